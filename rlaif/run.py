"""``python -m rlaif.run``: every stage from prompts to report, skipping what is up to date."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlaif.artifacts import check_writable, duration
from rlaif.cli import launch
from rlaif.config import (
    ArmConfig,
    Feedback,
    LabelConfig,
    LabelerType,
    LabelingConfig,
    LabelMode,
    Reward,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from rlaif.constitution import check_mode, load_constitution
from rlaif.engines import build_labeler
from rlaif.evaluate import run_evaluation
from rlaif.evaluation.pm_gate import PMGateError
from rlaif.folders import FAILED
from rlaif.gold import check_gold
from rlaif.label import run_label
from rlaif.records import UserError, find_prompts, write_json
from rlaif.rewards import REWARD_MODES
from rlaif.sample import run_sample
from rlaif.splits import read_split
from rlaif.train import Trained, fit, measure
from rlaif.train import check as check_training

log = logging.getLogger("rlaif")

USAGE = """
Run the whole comparison: sample, label, train every arm, evaluate, report.

  python -m rlaif.run experiment=demo                 the demo on the embedded model (23 minutes on 2 cores without AMX)
  python -m rlaif.run experiment=demo seed=1,2,3 -m   three seeds, one folder each
  python -m rlaif.run experiment=smoke                the same stages on a tiny random model (under a minute)

  output_dir=DIR                  one subfolder per stage; what is up to date is skipped
  prompts=FILE                    constitution=NAME_OR_FILE      gold=vader
  policy.name=MODEL               labeler=hf|vllm|openai|scripted labeler.model=NAME
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
    labels = output / "labels"
    # In the order of the enum: shuffled labels are made of the AI's.
    for feedback in sorted(used_labels(config) - {Feedback.human}, key=list(Feedback).index):
        run_label(label_config(config, candidates, feedback, labels), labels / feedback.value)
    arms = {name: train_config(config, arm, output) for name, arm in config.arms.items()}
    trained, stopped = _fit_all(arms, output / "arms")
    pm = report_pm(arms, {name: arm.pm for name, arm in trained.items()})
    baseline: Path | None = None
    for name in (name for name, arm in arms.items() if arm.method is None):
        folder = run_evaluation(
            output / "arms" / name / "evaluation",
            policy=config.policy,
            reference=None,
            prompts=read_split(prompts_file, config.data, config.eval.split)[: config.eval.max_prompts],
            prompts_file=prompts_file,
            config=config.eval,
            row={"name": name, "method": "base", "feedback": None, "seed": config.seed},
            seed=config.seed,
            preference_model=pm,
        )
        baseline = folder / "samples.jsonl"
    for name, arm in trained.items():
        if arm.policy is not None:
            measure(arms[name], output / "arms" / name, name, arm, pm, baseline)
    if trained or baseline:
        _report(config, output, list(arms))
    for arm in trained.values():
        if arm.guide is not None:
            arm.guide.tell()
    if stopped:
        raise UserError("; ".join(f"arm {name}: {error}" for name, error in stopped.items()))
    log.info("done in %s", duration(time.time() - started))


def _fit_all(arms: Mapping[str, TrainConfig], output: Path) -> tuple[dict[str, Trained], dict[str, PMGateError]]:
    """What every arm trained; and those that their PM stopped, which must not keep the others from being made."""
    trained: dict[str, Trained] = {}
    stopped: dict[str, PMGateError] = {}
    for name, arm in arms.items():
        if arm.method is None:
            continue
        note = output / name / FAILED
        try:
            trained[name] = fit(arm, output / name)
            note.unlink(missing_ok=True)
        except PMGateError as error:
            log.warning("arm %s is left out: %s", name, error)
            stopped[name] = error
            write_json(note, {"error": str(error), "overrides": [f"arms.{name}"]})
    return trained, stopped


def _report(config: RunConfig, output: Path, arms: Sequence[str]) -> None:
    from rlaif.reporting import write_report

    base = next((name for name, arm in config.arms.items() if arm.method is None), "base")
    # Only what this run made: an arm that was dropped from the settings may still lie there.
    roots = [output / "candidates", output / "labels", *(output / "arms" / name for name in arms)]
    roots = [root for root in roots if root.is_dir()]
    for path in write_report(roots, output, config.title, base, config.examples, config.seed):
        log.info("report: %s", path)


def check(config: RunConfig) -> Path:
    """Everything that can be wrong and is cheap to see, before any work; returns the prompts file."""
    prompts_file = find_prompts(config.prompts)
    if not config.policy.name:
        raise UserError("policy.name is not set: name a hub model, a folder, or `embedded`")
    if not config.arms:
        raise UserError(
            "arms is empty: nothing to train; choose experiment=demo or add '+arms.ppo={method: ppo, feedback: ai}'"
        )
    for arm in config.arms.values():
        if arm.method is not None:
            check_training(train_config(config, arm, Path()))
    feedbacks = used_labels(config)
    if Feedback.ai in feedbacks:
        check_mode(load_constitution(config.constitution), config.labeling.mode, config.labeling.exemplars)
        if config.labeler.type is None:
            raise UserError("labeler is not set: give labeler=hf, labeler=vllm, labeler=openai or labeler=scripted")
        if config.labeler.type is LabelerType.openai:
            # Asks the server whether it is there, takes the key and serves the model.
            build_labeler(config.labeler, config.seed).close()
    if Feedback.simulated_human in feedbacks and config.gold is None:
        raise UserError("feedback=simulated_human draws its labels from a gold judge: give gold=vader (or another)")
    if Feedback.human in feedbacks:
        if config.human_preferences is None:
            raise UserError("feedback=human needs human_preferences=DIR, a preference dataset labelled by people")
        from rlaif.methods.stages import preference_folder

        preference_folder(config.human_preferences, Feedback.human, config.columns, config.splits)
    for gold in {config.gold, config.eval.gold} - {None}:
        check_gold(str(gold))
    # Too few prompts to hold any out show here, not after the training.
    read_split(prompts_file, config.data, config.eval.split)
    return prompts_file


def used_labels(config: RunConfig) -> set[Feedback]:
    """The kinds of labels that some arm trains on."""
    from rlaif.methods.stages import needs_preferences

    arms = [arm for arm in config.arms.values() if arm.method is not None]
    used = {arm.feedback for arm in arms if needs_preferences(train_config(config, arm, Path()))}
    return used | {Feedback.ai} if Feedback.shuffled in used else used


def label_config(config: RunConfig, candidates: Path, feedback: Feedback, labels: Path) -> LabelConfig:
    """The labeling stage's configuration; ``labels`` holds a folder for each feedback."""
    return LabelConfig(
        candidates=str(candidates),
        constitution=config.constitution,
        feedback=feedback,
        labeler=config.labeler,
        labeling=config.labeling,
        annotator=config.annotator,
        gold=config.gold,
        style_order=config.style_order,
        shuffle=str(labels / Feedback.ai.value) if feedback is Feedback.shuffled else None,
        data=config.data,
        seed=config.seed,
    )


def train_config(config: RunConfig, arm: ArmConfig, output: Path) -> TrainConfig:
    """One arm's training configuration."""
    from rlaif.methods.stages import needs_preferences

    human = arm.feedback is Feedback.human
    result = TrainConfig(
        method=arm.method,
        feedback=arm.feedback,
        columns=config.columns if human else {},
        splits=config.splits if human else {},
        demonstrations=config.demonstrations,
        drop_leaked=config.drop_leaked,
        sft_first=arm.sft_first,
        reward=arm.reward,
        constitution=config.constitution,
        labeler=config.labeler,
        labeling=reward_labeling(config.labeling) if arm.reward is Reward.labeler else config.labeling,
        prompts=config.prompts,
        policy=config.policy,
        data=config.data,
        sft=config.sft,
        critique_revision=config.critique_revision,
        pm=config.pm,
        ppo=config.ppo,
        dpo=config.dpo,
        rloo=config.rloo,
        grpo=config.grpo,
        best_of_n=config.best_of_n,
        eval=config.eval,
        seed=config.seed,
    )
    if needs_preferences(result):
        result.preferences = config.human_preferences if human else str(output / "labels")
    return result


def reward_labeling(labeling: LabelingConfig) -> LabelingConfig:
    """How a labeler that is the reward is asked: in a run whose labels come from comparisons, for a score."""
    if labeling.mode in REWARD_MODES:
        return labeling
    return LabelingConfig(
        mode=LabelMode.score,
        principles=labeling.principles,
        temperature=labeling.temperature,
        calibrate=labeling.calibrate,
    )


def report_pm(arms: Mapping[str, TrainConfig], models: Mapping[str, Path | None]) -> Path | None:
    """The one PM that scores every row: an AI one, or else any."""
    found = [name for name, model in models.items() if model is not None]
    found.sort(key=lambda name: arms[name].feedback is not Feedback.ai)
    return models[found[0]] if found else None


if __name__ == "__main__":
    launch("run", main, USAGE)
