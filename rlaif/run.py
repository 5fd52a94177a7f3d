"""``python -m rlaif.run``: every stage from prompts to report, skipping what is up to date."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from rlaif.artifacts import check_writable, duration
from rlaif.cli import launch
from rlaif.config import (
    ArmConfig,
    Feedback,
    LabelConfig,
    Method,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from rlaif.constitution import load_constitution
from rlaif.evaluate import held_out_prompts, run_evaluation
from rlaif.label import run_label
from rlaif.records import UserError, find_prompts
from rlaif.sample import run_sample
from rlaif.train import train

log = logging.getLogger("rlaif")

USAGE = """
Run the whole comparison: sample, label, train every arm, evaluate, report.

  python -m rlaif.run experiment=demo                 the demo on the embedded model (about 15 minutes on 2 cores)
  python -m rlaif.run experiment=demo seed=1,2,3 -m   three seeds, one folder each
  python -m rlaif.run experiment=smoke                the same stages on a tiny random model (under a minute)

  output_dir=DIR                  one subfolder per stage; what is up to date is skipped
  prompts=FILE                    constitution=NAME_OR_FILE      gold=vader
  policy.name=MODEL               labeler=hf|openai|scripted labeler.model=NAME
  '+arms.my_dpo={method: dpo, feedback: ai}'          one more arm; ~arms.dpo removes one
  ppo.iterations=20 ppo.kl_coef=0.05 pm.epochs=2 dpo.beta=0.1 eval.samples_per_prompt=2 ...

Your own: python -m rlaif.run output_dir=runs/mine prompts=my.jsonl constitution=helpful policy.name=MODEL \\
            labeler=openai labeler.base_url=URL labeler.model=NAME '+arms.ppo={method: ppo, feedback: ai}'
"""


def main(config: RunConfig, output: Path) -> None:
    """Entry of the command."""
    started = time.time()
    prompts_file = check(config)
    check_writable(output)
    candidates = run_sample(
        SampleConfig(
            prompts=config.prompts,
            policy=config.policy,
            sampling=config.sampling,
            data=config.data,
            seed=config.seed,
        ),
        output / "candidates",
    )
    used = {arm.feedback for arm in config.arms.values() if arm.method is not None}
    for feedback in sorted(used - {Feedback.human}):
        run_label(label_config(config, candidates, feedback), output / "labels" / feedback.value)
    prompts = held_out_prompts(prompts_file, config.data, config.eval)
    pm: Path | None = None
    baseline: Path | None = None
    # The PM that scores every row of the report is the first AI one, or else the first there is.
    trained = sorted(
        ((name, arm) for name, arm in config.arms.items() if arm.method is not None),
        key=lambda item: (item[1].method is not Method.ppo, item[1].feedback is not Feedback.ai),
    )
    for name, arm in trained:
        arm_output = output / "arms" / name
        settings = train_config(config, arm, output)
        if arm.method is Method.ppo:
            # Trained before the baseline is measured, so that the baseline can be scored by it.
            train(settings_without_evaluation(settings), arm_output, name)
            pm = pm or arm_output / "pm" / "preference_model"
    for name, arm in config.arms.items():
        if arm.method is None:
            baseline = (
                run_evaluation(
                    output / "arms" / name / "evaluation",
                    policy=config.policy,
                    reference=None,
                    prompts=prompts,
                    prompts_file=prompts_file,
                    config=config.eval,
                    row={"name": name, "method": "base", "feedback": None, "seed": config.seed},
                    seed=config.seed,
                    preference_model=pm,
                )
                / "samples.jsonl"
            )
    for name, arm in trained:
        train(train_config(config, arm, output), output / "arms" / name, name, baseline, pm)
    from rlaif.reporting import write_report

    base = next((name for name, arm in config.arms.items() if arm.method is None), "base")
    for path in write_report([output], output, config.title, base, config.examples, config.seed):
        log.info("report: %s", path)
    log.info("done in %s", duration(time.time() - started))


def check(config: RunConfig) -> Path:
    """Everything that can be wrong and is cheap to see, before any work; returns the prompts file."""
    prompts_file = find_prompts(config.prompts)
    if not config.policy.name:
        raise UserError("policy.name is not set: name a hub model, a folder, or `embedded`")
    if not config.arms:
        raise UserError(
            "arms is empty: nothing to train; choose experiment=demo or add '+arms.ppo={method: ppo, feedback: ai}'"
        )
    feedbacks = {arm.feedback for arm in config.arms.values() if arm.method is not None}
    if Feedback.ai in feedbacks:
        load_constitution(config.constitution)
        if config.labeler.type is None:
            raise UserError("labeler is not set: give labeler=hf, labeler=openai or labeler=scripted")
    if Feedback.simulated_human in feedbacks and config.gold is None:
        raise UserError("feedback=simulated_human draws its labels from a gold judge: give gold=vader (or another)")
    if Feedback.human in feedbacks and config.human_preferences is None:
        raise UserError("feedback=human needs human_preferences=DIR, a preference dataset labelled by people")
    if config.gold is not None:
        from rlaif.gold import check_gold

        check_gold(config.gold)
    return prompts_file


def label_config(config: RunConfig, candidates: Path, feedback: Feedback) -> LabelConfig:
    """The labeling stage's configuration."""
    return LabelConfig(
        candidates=str(candidates),
        constitution=config.constitution,
        feedback=feedback,
        labeler=config.labeler,
        labeling=config.labeling,
        annotator=config.annotator,
        gold=config.gold,
        data=config.data,
        seed=config.seed,
    )


def train_config(config: RunConfig, arm: ArmConfig, output: Path) -> TrainConfig:
    """One arm's training configuration."""
    human = arm.feedback is Feedback.human
    return TrainConfig(
        method=arm.method,
        feedback=arm.feedback,
        preferences=config.human_preferences if human else str(output / "labels"),
        prompts=config.prompts,
        policy=config.policy,
        data=config.data,
        sft=config.sft,
        pm=config.pm,
        ppo=config.ppo,
        dpo=config.dpo,
        eval=config.eval,
        seed=config.seed,
    )


def settings_without_evaluation(config: TrainConfig) -> TrainConfig:
    """The same training without measuring the policy afterwards."""
    from dataclasses import replace

    return replace(config, eval=replace(config.eval, enabled=False))


if __name__ == "__main__":
    launch("run", main, USAGE)
