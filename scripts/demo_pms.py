"""Train the preference models of the demo under many seeds, and say what each is worth on held-out preferences.

python scripts/demo_pms.py runs/demo_pms 1-20 [KEY=VALUE ...]

Prompts, candidates, AI labels and all settings are those of experiment=demo, with the overrides; a seed decides the
order of the data, the adapter's start, and how simulated annotators vote. What is up to date is not made again, so two
processes may share the seeds, and a third prints the table of them all. The exit status is 1 if any PM does not pass
its gate.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlaif.cli import configure_logging
from rlaif.config import ArmConfig, Feedback, Method, Reward, RunConfig, SampleConfig, register
from rlaif.evaluation.pm_gate import examine_pm
from rlaif.label import run_label
from rlaif.methods.stages import REWARDED
from rlaif.records import read_json, shipped
from rlaif.reporting.collect import Record
from rlaif.reporting.text import estimate_text
from rlaif.run import label_config, train_config
from rlaif.sample import run_sample
from rlaif.train import fit

COLUMNS = {
    "accuracy": "accuracy",
    "gain_over_longer": "over longer wins",
    "nll": "NLL",
    "gold_accuracy": "gold accuracy",
}


def settings(overrides: Sequence[str]) -> RunConfig:
    """The demo's, or those of another experiment that the overrides name."""
    register("run")
    demo = [] if any(override.startswith("experiment=") for override in overrides) else ["experiment=demo"]
    with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
        config = OmegaConf.to_object(compose("run", [*demo, *overrides]))
    assert isinstance(config, RunConfig)
    return config


def seeds(text: str) -> list[int]:
    """``1-3,7`` as 1, 2, 3, 7."""
    ranges = (part.partition("-") for part in text.split(","))
    return [seed for first, _, last in ranges for seed in range(int(first), int(last or first) + 1)]


def train(config: RunConfig, seed: int, feedback: Feedback, folder: Path, candidates: Path) -> Path:
    """The folder of the PM of one kind of labels under a seed."""
    seeded, own = replace(config, seed=seed), folder / f"seed={seed}"
    # The annotators vote anew; a labeler would say the same again.
    asked, labels = (seeded, own / "labels") if feedback is Feedback.simulated_human else (config, folder / "labels")
    run_label(label_config(asked, candidates, feedback, labels), labels / feedback.value)
    made = replace(train_config(seeded, ArmConfig(Method.pm, feedback), folder), preferences=str(labels))
    fit(made, own / feedback.value)
    return own / feedback.value / "pm" / "preference_model"


def table(found: dict[tuple[str, int], tuple[dict[str, Any], bool]]) -> Iterator[str]:
    """A line for each PM, and one for each kind of labels."""
    yield "| labels | seed | " + " | ".join(COLUMNS.values()) + " | above chance |"
    yield "|" + " --- |" * (len(COLUMNS) + 3)
    for (feedback, seed), (metrics, passed) in found.items():
        record = Record(Path(), "", Path(), metrics)
        cells = [estimate_text(record.estimate(key)) for key in COLUMNS]
        yield f"| {feedback} | {seed} | " + " | ".join(cells) + f" | {'yes' if passed else 'no'} |"
    yield ""
    for feedback in dict.fromkeys(feedback for feedback, _ in found):
        rows = [row for (name, _), row in found.items() if name == feedback]
        accuracies = [metrics.get("accuracy", float("nan")) for metrics, _ in rows]
        yield (
            f"{feedback}: {sum(passed for _, passed in rows)} of {len(rows)} above chance, accuracy "
            f"{fmean(accuracies):.3f} in the mean, {min(accuracies):.3f} to {max(accuracies):.3f}"
        )


def main(folder: Path, wanted: Sequence[int], overrides: Sequence[str]) -> bool:
    """Whether all PMs pass."""
    configure_logging()
    config = settings(overrides)
    sample = SampleConfig(
        prompts=config.prompts, policy=config.policy, sampling=config.sampling, data=config.data, seed=config.seed
    )
    candidates = run_sample(sample, folder / "candidates")
    arms = config.arms.values()
    kinds = {arm.feedback for arm in arms if arm.method in REWARDED and arm.reward is Reward.pm}
    found = {}
    for seed in wanted:
        for feedback in sorted(kinds):
            model = train(config, seed, feedback, folder, candidates)
            metrics = read_json(model.parent / "pm_metrics.json")
            found[feedback.value, seed] = metrics, bool(examine_pm(model, config.pm).passed)
    print("\n".join(table(dict(sorted(found.items())))))
    return all(passed for _, passed in found.values())


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(0 if main(Path(sys.argv[1]), seeds(sys.argv[2]), sys.argv[3:]) else 1)
