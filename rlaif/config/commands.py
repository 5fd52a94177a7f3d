"""Settings of each command, and their registration with Hydra."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from rlaif.config.checks import POSITIVE, Bounds, Settings, require
from rlaif.config.choices import Feedback, LabelMode, Method, Reward
from rlaif.config.labeling import AnnotatorConfig, LabelerConfig, LabelingConfig, check_likelihood
from rlaif.config.models import DataConfig, EvalConfig, ModelConfig, SamplingConfig
from rlaif.config.training import (
    BestOfNConfig,
    CritiqueRevisionConfig,
    DPOConfig,
    GRPOConfig,
    PMConfig,
    PPOConfig,
    RLOOConfig,
    SFTConfig,
)


@dataclass
class CommandConfig(Settings):
    """What every command has."""

    _bounds = Bounds(least=0, most=2**32 - 1).of("seed")

    output_dir: str | None = None
    """Folder that the command writes. In a sweep each job gets a subfolder of it."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            getattr(self, "experiment", None) is None,
            "experiment: its settings stand below `experiment` and would be ignored: begin the file with the line "
            "`# @package _global_`",
        )


@dataclass
class SampleConfig(CommandConfig):
    """``python -m rlaif.sample``."""

    prompts: str | None = None
    """JSONL file with one prompt a line."""
    policy: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    experiment: Any = None
    """Chosen by ``experiment=NAME``: a file of ``conf/experiment`` that sets many keys at once."""


@dataclass
class LabelConfig(CommandConfig):
    """``python -m rlaif.label``."""

    _bounds = POSITIVE.of("combine_weights")

    candidates: str | None = None
    """JSONL file with one prompt and its candidates a line (``rlaif.sample`` writes it; you can bring it)."""
    constitution: str | None = None
    """Name of a shipped constitution (harmless, helpful, ...) or a YAML file."""
    feedback: Feedback = Feedback.ai
    """``ai`` asks the labeler; ``simulated_human`` draws labels from the gold judge; two controls ask nobody:
    ``style_order`` and ``shuffled``."""
    labeler: LabelerConfig = field(default_factory=LabelerConfig)
    labeling: LabelingConfig = field(default_factory=LabelingConfig)
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)
    gold: str | None = None
    """Programmatic gold judge: measures label quality, and is the truth behind ``simulated_human``."""
    combine: list[str] = field(default_factory=list)
    """Folders of earlier label runs on the same candidates: their labels are combined, and nobody is asked."""
    combine_weights: list[float] = field(default_factory=list)
    """Weight of each of them; empty: all the same."""
    style_order: list[str] = field(default_factory=list)
    """With ``feedback=style_order``: the styles of the candidates, the best first."""
    shuffle: str | None = None
    """With ``feedback=shuffled``: folder of an earlier label run, whose labels a coin turns round."""
    data: DataConfig = field(default_factory=DataConfig)
    experiment: Any = None
    """Chosen by ``experiment=NAME``: a file of ``conf/experiment`` that sets many keys at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_likelihood(self.labeler, self.labeling)
        require(len(self.combine) != 1, f"combine={self.combine}: give at least two folders")
        require(
            not self.combine_weights or len(self.combine_weights) == len(self.combine),
            f"combine_weights={self.combine_weights}: give one weight for each of the {len(self.combine)} folders in "
            "combine",
        )
        require(
            not self.combine or self.labeler.type is None,
            "combine= takes the labels of earlier runs and asks nobody: leave labeler out",
        )
        asking = {
            "labeler.audit": self.labeler.audit,
            "labeler.min_agreement": self.labeler.min_agreement,
            "labeling.calibrate": self.labeling.calibrate,
        }
        for name, value in asking.items():
            require(
                not self.combine or value is None,
                f"{name}={value}: combine= takes the labels of earlier runs and asks nobody; give it to those runs",
            )
        require(
            not self.combine or self.feedback is Feedback.ai,
            f"feedback={self.feedback.value}: combine= takes labels of labelers, so only feedback=ai goes with it",
        )
        check_style_order(self.style_order, needed=self.feedback is Feedback.style_order)
        require(
            (self.shuffle is None) == (self.feedback is not Feedback.shuffled),
            "feedback=shuffled and shuffle=DIR, the folder of the labels that a coin turns round, go together",
        )


@dataclass
class AuditConfig(CommandConfig):
    """``python -m rlaif.audit``."""

    _bounds = POSITIVE.of("max_pairs")

    comparisons: str | None = None
    """JSONL file of pairs that people have labelled."""
    max_pairs: int | None = None
    """Use only this many of them, spread evenly over the file."""
    constitution: str | None = None
    """Name of a shipped constitution or a YAML file."""
    labeler: LabelerConfig = field(default_factory=LabelerConfig)
    labeling: LabelingConfig = field(default_factory=LabelingConfig)
    compare: list[str] = field(default_factory=list)
    """Folders of earlier audits on the same pairs: agreement between labelers is written beside."""
    experiment: Any = None
    """Chosen by ``experiment=NAME``: a file of ``conf/experiment`` that sets many keys at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_likelihood(self.labeler, self.labeling)
        require(
            self.labeling.calibrate is None,
            "labeling.calibrate: rlaif.audit measures the labeler as it is; calibrate in rlaif.label",
        )


@dataclass
class TrainConfig(CommandConfig):
    """``python -m rlaif.train``."""

    method: Method | None = None
    """``sft``, ``critique_revision``, ``pm``, ``ppo``, ``dpo``, ``rloo``, ``grpo`` or ``best_of_n``."""
    feedback: Feedback | None = None
    """Whose labels. If ``preferences`` has a subfolder of this name, that one is used. Null: the subfolder ``ai``, or
    what the rows say; if they do not, it must be given."""
    preferences: str | None = None
    """Preference dataset: a folder with parquet or JSONL splits, or with one such folder per feedback; or a dataset
    on the hub (``owner/name``)."""
    columns: dict[str, str] = field(default_factory=dict)
    """What another dataset calls the columns: ``{prompt: question, chosen: good, rejected: bad}``."""
    splits: dict[str, str] = field(default_factory=dict)
    """What it calls the splits: ``{train: train_prefs, validation: test_prefs}``."""
    demonstrations: str | None = None
    """What sft trains on: a JSONL file of messages, prompt and completion, or text. Null: the chosen completions."""
    sft_first: bool = False
    """Fine-tune first (as method=sft would), then start everything else from the result, which is also the
    reference: the three stages of Ouyang et al. (2022)."""
    preference_model: str | None = None
    """PM for ppo, rloo, grpo and best_of_n. Null: a PM is trained on ``preferences`` first."""
    reward: Reward = Reward.pm
    """What scores completions: ``pm``, or ``labeler`` (its verdicts on single completions, without a PM)."""
    constitution: str | None = None
    """Principles for critique_revision and for reward=labeler: a shipped name or a YAML file."""
    labeler: LabelerConfig = field(default_factory=LabelerConfig)
    """The model behind reward=labeler and critique_revision.critic=labeler."""
    labeling: LabelingConfig = field(default_factory=lambda: LabelingConfig(mode=LabelMode.score))
    """How reward=labeler asks: ``labeling.mode`` is ``score`` (the expected score, normalised to -1 ... 1) or
    ``pointwise`` (the logit of a verdict word)."""
    prompts: str | None = None
    """Prompts for rollouts, revisions and evaluation (JSONL). Null: the prompts of ``preferences``."""
    drop_leaked: bool = False
    """Leave preferences and demonstrations out of training whose prompts resemble those that evaluation holds out."""
    policy: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    critique_revision: CritiqueRevisionConfig = field(default_factory=CritiqueRevisionConfig)
    pm: PMConfig = field(default_factory=PMConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    rloo: RLOOConfig = field(default_factory=RLOOConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    best_of_n: BestOfNConfig = field(default_factory=BestOfNConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    experiment: Any = None
    """Chosen by ``experiment=NAME``: a file of ``conf/experiment`` that sets many keys at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_splits(self.splits)


@dataclass
class EvaluateConfig(CommandConfig):
    """``python -m rlaif.evaluate``."""

    policy: ModelConfig = field(default_factory=ModelConfig)
    """The policy to measure; ``policy.adapter`` for a LoRA policy."""
    reference: ModelConfig = field(default_factory=ModelConfig)
    """The policy before training: the baseline for win rate and KL."""
    name: str = "policy"
    """What the report calls this policy."""
    feedback: Feedback | None = None
    """Which labels trained it (for the report)."""
    baseline_samples: str | None = None
    """samples.jsonl of an earlier evaluation of the reference on the same prompts; null samples it anew."""
    preference_model: str | None = None
    """PM whose score is reported."""
    prompts: str | None = None
    """JSONL file with prompts."""
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    experiment: Any = None
    """Chosen by ``experiment=NAME``: a file of ``conf/experiment`` that sets many keys at once."""


@dataclass
class ReportConfig(CommandConfig):
    """``python -m rlaif.report``."""

    runs: list[str] = field(default_factory=list)
    """Folders to compare; every metrics.json below them becomes a row. Default: ``output_dir``."""
    title: str = "Comparison of alignment runs"
    """Heading of the report."""
    baseline: str = "base"
    """Name of the row that the others are compared with."""
    examples: int = 10
    """Prompts shown side by side, drawn at random by ``seed``."""


@dataclass
class ArmConfig(Settings):
    """One line of training in a run: a method on one kind of labels."""

    _group = "arms.*"

    method: Method | None = None
    """Null measures the starting policy."""
    feedback: Feedback = Feedback.ai
    """Which labels it trains on."""
    sft_first: bool = False
    """Fine-tune on ``demonstrations``, or else on the chosen completions, before anything else."""
    reward: Reward = Reward.pm
    """What scores completions: ``pm`` or ``labeler``."""


@dataclass
class RunConfig(CommandConfig):
    """``python -m rlaif.run``: every stage, skipping what is up to date."""

    title: str = "Comparison of alignment runs"
    """Heading of the report."""
    prompts: str | None = None
    """JSONL file with one prompt a line."""
    constitution: str | None = None
    """Name of a shipped constitution (harmless, helpful, ...) or a YAML file."""
    gold: str | None = None
    """Programmatic gold judge: measures label quality, and is the truth behind ``simulated_human``."""
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    """Named lines of training to compare."""
    policy: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    labeler: LabelerConfig = field(default_factory=LabelerConfig)
    labeling: LabelingConfig = field(default_factory=LabelingConfig)
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)
    style_order: list[str] = field(default_factory=list)
    """For arms with ``feedback: style_order``: the styles of the candidates, the best first."""
    human_preferences: str | None = None
    """Preference dataset of human labels, for arms with feedback=human."""
    columns: dict[str, str] = field(default_factory=dict)
    """What ``human_preferences`` calls the columns."""
    splits: dict[str, str] = field(default_factory=dict)
    """What it calls the splits: ``{train: train_prefs, validation: test_prefs}``."""
    demonstrations: str | None = None
    """What sft trains on: a JSONL file of messages, prompt and completion, or text. Null: the chosen completions."""
    drop_leaked: bool = False
    """Leave preferences and demonstrations out of training whose prompts resemble those that evaluation holds out."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    critique_revision: CritiqueRevisionConfig = field(default_factory=CritiqueRevisionConfig)
    pm: PMConfig = field(default_factory=PMConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    rloo: RLOOConfig = field(default_factory=RLOOConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    best_of_n: BestOfNConfig = field(default_factory=BestOfNConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    examples: int = 10
    """Sample completions shown side by side in the report."""
    experiment: Any = None
    """Chosen by ``experiment=NAME``: a file of ``conf/experiment`` that sets many keys at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_likelihood(self.labeler, self.labeling)
        check_splits(self.splits)
        check_style_order(
            self.style_order, needed=any(arm.feedback is Feedback.style_order for arm in self.arms.values())
        )
        for name in self.arms:
            require(
                re.fullmatch(r"\w[^/\\\x00-\x1f]{0,99}", name) is not None,
                f"arms: {name!r} names a folder: begin with a letter, a digit or _, without / and \\, and at most 100 "
                "characters",
            )


def check_style_order(order: list[str], needed: bool) -> None:
    require(len(set(order)) == len(order), f"style_order={order}: names a style twice")
    require(
        not needed or len(order) >= 2,
        f"style_order={order}: feedback=style_order needs the styles of the candidates, at least two, the best first",
    )


def check_splits(splits: dict[str, str]) -> None:
    unknown = sorted(set(splits) - {"train", "validation"})
    require(not unknown, f"splits={splits}: names train and validation, not {', '.join(unknown)}")


COMMANDS: dict[str, type[CommandConfig]] = {
    "sample": SampleConfig,
    "label": LabelConfig,
    "audit": AuditConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "run": RunConfig,
}


def register(command: str) -> None:
    """Make a command's schemas known to Hydra under the names that the files in ``conf/`` refer to."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name=f"{command}_schema", node=COMMANDS[command])
    store.store(group="model", name="model_schema", node=ModelConfig)
    store.store(group="labeler", name="labeler_schema", node=LabelerConfig)
