"""``python -m rlaif.train``: preferences -> preference_model/ or policy/, and its metrics."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlaif.artifacts import model_inputs, plain, run_stage
from rlaif.cli import launch
from rlaif.config import Feedback, Method, Split, TrainConfig
from rlaif.records import Preference, Prompt, UserError, existing_dir, find_prompts
from rlaif.splits import read_split

log = logging.getLogger("rlaif")

USAGE = """
Train on preferences: a preference model (pm), or a policy by sft, ppo or dpo.

  python -m rlaif.train method=ppo policy.name=MODEL preferences=DIR prompts=FILE output_dir=DIR [key=value ...] [-m]

  method=ppo                      sft, pm, ppo, dpo; method=ppo,dpo seed=1,2,3 -m sweeps (-m anywhere)
  policy.name=MODEL               hub name, folder, or `embedded`; the reference of PPO and DPO
  preferences=DIR                 train.parquet (and validation.parquet), or train.jsonl in TRL's preference format;
                                  or a folder with one such folder per feedback: ai/, human/, simulated_human/
  feedback=ai                     which of them
  prompts=FILE                    prompts for PPO's rollouts and for evaluation; default: those of the preferences
  preference_model=DIR            PM for PPO; default: one is trained on the preferences first
  eval.gold=vader                 judge the policy on held-out prompts; eval.enabled=false skips evaluation
  pm.learning_rate=1e-4  ppo.iterations=100  ppo.kl_coef=0.05  dpo.beta=0.1  ppo.tuning=full  ppo.lora.r=16 ...

output_dir gets pm/preference_model/, METHOD/policy/ with training.jsonl, and evaluation/metrics.json.
An interrupted run goes on when the same command is given again.
"""


def preference_folder(preferences: str | None, feedback: Feedback) -> Path:
    """The dataset for a feedback: a subfolder of that name, else the folder itself.

    Raises:
        UserError: if it holds no training split; says what was looked for.
    """
    root = existing_dir(preferences, "preferences")
    for folder in (root / feedback.value / "preferences", root / feedback.value, root):
        if any((folder / f"train.{ending}").is_file() for ending in ("parquet", "jsonl", "jsonl.gz")):
            if folder == root:
                _check_feedback(folder, feedback)
            return folder
    raise UserError(
        f"preferences={root}: no train.parquet, train.jsonl or train.jsonl.gz in it or in its subfolder "
        f"{feedback.value} (feedback={feedback.value})"
    )


def _check_feedback(folder: Path, feedback: Feedback) -> None:
    """Labels of one kind must not be trained on, and reported, as another."""
    from rlaif.preferences import read_preferences

    rows = read_preferences(folder, "train")
    found = rows[0].feedback if rows else feedback.value
    if found != feedback.value:
        raise UserError(
            f"preferences={folder} holds {found} labels, but feedback={feedback.value}: give feedback={found}"
        )


def main(config: TrainConfig, output: Path) -> None:
    """Entry of the command."""
    if config.method is None:
        raise UserError(f"method is not set: give method={'|'.join(method.value for method in Method)}")
    if not config.policy.name:
        raise UserError("policy.name is not set: name a hub model, a folder, or `embedded`")
    if config.eval.gold is not None:
        from rlaif.gold import check_gold

        check_gold(config.eval.gold)
    policy, pm = fit(config, output)
    if policy is not None and config.eval.enabled:
        measure(config, output, f"{config.method.value}_{config.feedback.value}", policy, pm)


def fit(config: TrainConfig, output: Path) -> tuple[Path | None, Path | None]:
    """Train one arm into ``output``: returns the policy (None for method=pm) and the PM (None without one)."""
    from rlaif.preferences import prompts_of, read_preferences

    method = config.method
    assert method is not None
    source = preference_folder(config.preferences, config.feedback)
    data = {split: read_preferences(source, split) for split in ("train", "validation")}
    if not data["train"]:
        raise UserError(f"{source}: the training split is empty")
    prompts_file = find_prompts(config.prompts) if config.prompts else None
    if method is not Method.pm and config.eval.enabled:
        if prompts_file is None:
            raise UserError(
                "prompts is not set: evaluation needs held-out prompts; give prompts=FILE, or eval.enabled=false"
            )
        _warn_of_leak(read_split(prompts_file, config.data, config.eval.split), data["train"])
    pm = existing_dir(config.preference_model, "preference_model") if config.preference_model else None
    if method is Method.pm or (method is Method.ppo and pm is None):
        pm = _train_pm(config, output, source, data)
    if method is Method.pm:
        return None, pm
    if method is not Method.ppo:
        return _train_supervised(config, output, source, data["train"]), pm
    assert pm is not None
    prompts = read_split(prompts_file, config.data, Split.train) if prompts_file else prompts_of(data["train"])
    source_files: Mapping[str, Path | str | None] = (
        {"prompts": prompts_file} if prompts_file else _preference_inputs(source)
    )
    return _train_ppo(config, output, prompts, pm, source_files), pm


def _warn_of_leak(held_out: Sequence[Prompt], preferences: Sequence[Preference]) -> None:
    """Preferences that people bring may hold the very prompts that evaluation holds out."""
    trained = {preference.prompt[-1]["content"] for preference in preferences}
    leaked = sum(prompt.messages[-1]["content"] in trained for prompt in held_out)
    if leaked:
        log.warning(
            "WARNING: %d of %d evaluation prompts are also in the training preferences; the evaluation will flatter",
            leaked,
            len(held_out),
        )


def measure(
    config: TrainConfig,
    output: Path,
    name: str,
    policy: Path,
    preference_model: Path | None = None,
    baseline_samples: Path | None = None,
) -> None:
    """Evaluate a trained policy into ``output/evaluation``."""
    from rlaif.evaluate import run_evaluation

    assert config.method is not None
    prompts_file = find_prompts(config.prompts)
    start = config.policy
    run_evaluation(
        output / "evaluation",
        policy=replace(start, name=str(policy), adapter=None),
        reference=start,
        prompts=read_split(prompts_file, config.data, config.eval.split)[: config.eval.max_prompts],
        prompts_file=prompts_file,
        config=config.eval,
        row={
            "name": name,
            "method": config.method.value,
            "feedback": config.feedback.value,
            "seed": config.seed,
        },
        seed=config.seed,
        baseline_samples=baseline_samples,
        preference_model=preference_model,
    )


def _train_pm(config: TrainConfig, output: Path, source: Path, data: dict[str, list[Preference]]) -> Path:
    def make(folder: Path) -> None:
        from rlaif.methods.pm import train_pm

        train_pm(config.pm, config.policy, data["train"], data["validation"], folder, config.seed, config.eval.gold)

    settings = plain(pm=config.pm, policy=config.policy, gold=config.eval.gold)
    inputs = {**_preference_inputs(source), **model_inputs("start", config.policy)}
    return run_stage("pm", output / "pm", settings, inputs, make, config.seed) / "preference_model"


def _train_ppo(
    config: TrainConfig,
    output: Path,
    prompts: Sequence[Prompt],
    pm: Path,
    origin: Mapping[str, Path | str | None],
) -> Path:
    def make(folder: Path) -> None:
        from rlaif.methods.ppo import train_ppo
        from rlaif.preference_model import PreferenceModel

        model = PreferenceModel(replace(config.policy, name=str(pm), adapter=None))

        def score(asked: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
            return model.score([(prompt.messages, text) for prompt, text in zip(asked, texts, strict=True)])

        train_ppo(config.ppo, config.policy, prompts, score, folder, config.seed)

    inputs = {"preference_model": pm, **origin, **model_inputs("start", config.policy)}
    settings = plain(ppo=config.ppo, policy=config.policy, data=config.data)
    return run_stage("ppo", output / "ppo", settings, inputs, make, config.seed) / "policy"


def _train_supervised(config: TrainConfig, output: Path, source: Path, preferences: list[Preference]) -> Path:
    method = config.method
    assert method in (Method.sft, Method.dpo)
    settings: Any = config.dpo if method is Method.dpo else config.sft

    def make(folder: Path) -> None:
        if method is Method.dpo:
            from rlaif.methods.dpo import train_dpo

            train_dpo(config.dpo, config.policy, preferences, folder, config.seed)
        else:
            from rlaif.methods.sft import train_sft

            train_sft(config.sft, config.policy, preferences, folder, config.seed)

    inputs = {**_preference_inputs(source), **model_inputs("start", config.policy)}
    return (
        run_stage(
            method.value,
            output / method.value,
            plain(settings=settings, policy=config.policy),
            inputs,
            make,
            config.seed,
        )
        / "policy"
    )


def _preference_inputs(folder: Path) -> dict[str, Path | str | None]:
    """The files of a preference dataset that training reads."""
    names = [f"{split}.{ending}" for split in ("train", "validation") for ending in ("parquet", "jsonl", "jsonl.gz")]
    return {f"preferences/{name}": folder / name for name in names if (folder / name).is_file()}


if __name__ == "__main__":
    launch("train", main, USAGE)
