"""``python -m rlaif.evaluate``: a policy on held-out prompts -> samples.jsonl and metrics.json."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.artifacts import model_inputs, run_stage
from rlaif.cli import launch
from rlaif.config import EvalConfig, EvaluateConfig, ModelConfig
from rlaif.processes import is_main
from rlaif.records import Prompt, UserError, existing_dir, existing_file, find_prompts
from rlaif.splits import read_split

if TYPE_CHECKING:
    from rlaif.rewards import RewardSource

log = logging.getLogger("rlaif")

USAGE = """
Measure a policy on held-out prompts against the policy it started from.

  python -m rlaif.evaluate policy.name=DIR_OR_MODEL reference.name=MODEL prompts=FILE output_dir=DIR [key=value ...]

  policy.name=DIR                 a trained policy folder (whole model or PEFT adapter) or any model name
  reference.name=MODEL            where it started: baseline of gains, win rate and KL; null for the baseline itself
  prompts=FILE                    JSONL prompts; eval.split=test picks the same prompts that training held out
  preference_model=DIR            also report this PM's score
  eval.gold=vader                 programmatic gold judge: vader, letters, length, brevity
  eval.samples_per_prompt=1       eval.max_new_tokens=128      eval.max_prompts=100
  baseline_samples=FILE           samples.jsonl of the reference, to save sampling it again
  name=ppo feedback=ai            how the report calls the row
"""


def run_evaluation(
    output: Path,
    *,
    policy: ModelConfig,
    reference: ModelConfig | None,
    prompts: Sequence[Prompt],
    prompts_file: Path,
    config: EvalConfig,
    row: dict[str, str | float | int | None],
    seed: int,
    baseline_samples: Path | None = None,
    preference_model: Path | None = None,
    best_of: tuple[int, RewardSource] | None = None,
) -> Path:
    """Evaluate into ``output``; ``row`` (name, method, feedback, seed, the PM that guided it) stands in reports.

    With ``best_of`` each completion is the best of n by that reward.
    """
    if config.gold is not None:
        from rlaif.gold import check_gold

        check_gold(config.gold)

    def make(folder: Path) -> None:
        from rlaif.evaluation.policy import (
            best_of_n,
            best_of_n_kl,
            policy_metrics,
            read_samples,
            sample_policy,
            score_samples,
            write_evaluation,
        )
        from rlaif.generation import STREAM_BEST_OF_N
        from rlaif.preference_model import pm_config, pm_identity

        pm = pm_config(policy, preference_model) if preference_model else None
        extra: dict[str, float | int] = {}
        if best_of is None:
            samples = sample_policy(policy, reference, prompts, config, seed)
        else:
            n, source = best_of
            many = replace(config, samples_per_prompt=n * config.samples_per_prompt)
            # The baseline's random numbers would make it one of the n.
            samples = sample_policy(policy, None, prompts, many, seed, STREAM_BEST_OF_N)
            with source.open(folder) as reward:
                # Several processes sample; one scores what all have made.
                asked = [sample.example for sample in samples if is_main()]
                scores = reward.score(asked)
            if is_main():
                samples = best_of_n(samples, scores, n)
            extra = {"best_of": n, "kl_bound": round(best_of_n_kl(n), 6)}
        baseline = samples
        if reference is not None and baseline_samples is None:
            log.info("sampling the reference policy for comparison")
            baseline = sample_policy(reference, None, prompts, config, seed)
        if not is_main():
            return
        score_samples(samples, config.gold, pm)
        if baseline_samples is not None and reference is not None:
            baseline = read_samples(baseline_samples)
        if reference is not None:
            score_samples(baseline, config.gold, pm)
        metrics = {
            **row,
            "gold": config.gold,
            **(pm_identity(preference_model) if preference_model else {"preference_model": None}),
            **extra,
            **policy_metrics(samples, baseline),
        }
        if best_of is not None:
            # The log-ratio of the policy that was sampled from says nothing of the best of n.
            for suffix in ("", "_n", "_low", "_high"):
                metrics.pop(f"kl{suffix}", None)
        if reference is None:
            # Against itself there is nothing to estimate.
            for name in ("gold_gain", "pm_gain", "win_rate", "kl"):
                for suffix in ("", "_n", "_low", "_high"):
                    metrics.pop(name + suffix, None)
        write_evaluation(folder, samples, metrics)

    inputs: dict[str, Path | str | None] = {
        **model_inputs("policy", policy),
        **model_inputs("reference", reference),
        "prompts": prompts_file,
        "preference_model": preference_model,
        "baseline_samples": baseline_samples,
    }
    prompt_ids = [prompt.prompt_id for prompt in prompts]
    settings: dict[str, Any] = {"eval": config, "row": row, "prompt_ids": prompt_ids}
    carry_over: tuple[str, ...] = ()
    if best_of is not None:
        n, source = best_of
        settings |= {"best_of": n, **source.settings}
        inputs |= {f"reward_{role}": value for role, value in source.inputs.items()}
        carry_over = source.carry_over
    return run_stage("evaluate", output, settings, inputs, make, seed, carry_over=carry_over, together=True)


def main(config: EvaluateConfig, output: Path) -> None:
    """Entry of the command."""
    file = find_prompts(config.prompts)
    if not config.policy.name:
        raise UserError("policy.name is not set: name a policy folder or a model")
    run_evaluation(
        output,
        policy=config.policy,
        reference=config.reference if config.reference.name else None,
        prompts=read_split(file, config.data, config.eval.split)[: config.eval.max_prompts],
        prompts_file=file,
        config=config.eval,
        row={
            "name": config.name,
            "method": None,
            "feedback": config.feedback.value if config.feedback else None,
            "feedback_declared": config.feedback is not None,
            "seed": config.seed,
        },
        seed=config.seed,
        baseline_samples=existing_file(config.baseline_samples, "baseline_samples")
        if config.baseline_samples
        else None,
        preference_model=existing_dir(config.preference_model, "preference_model") if config.preference_model else None,
    )


if __name__ == "__main__":
    launch("evaluate", main, USAGE)
