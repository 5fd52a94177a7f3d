"""Settings of the training methods."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

from rlaif.config.checks import BELOW_HALF, FRACTION, POSITIVE, Bounds, Settings, require
from rlaif.config.choices import (
    Critic,
    DPOLoss,
    EnsembleScore,
    Gate,
    GRPOLoss,
    Keep,
    KLControl,
    KLEstimator,
    Sampler,
    Tuning,
    ValueInit,
)
from rlaif.config.models import LoraSettings


class Rates(NamedTuple):
    """The learning rates that a method has where none is given."""

    lora: float
    full: float


class ByTuning(Settings):
    """Settings whose learning rate follows from the tuning where none is given."""

    RATES: ClassVar[Rates]
    tuning: Tuning
    learning_rate: float | None

    @property
    def rate(self) -> float:
        """The peak learning rate in force."""
        if self.learning_rate is not None:
            return self.learning_rate
        return self.RATES.full if self.tuning is Tuning.full else self.RATES.lora

    def resolved(self) -> Self:
        """The same settings with that rate as ``learning_rate``."""
        return replace(self, learning_rate=self.rate)  # type: ignore[type-var]


@dataclass
class TrainerSettings(ByTuning):
    """What the methods on TRL's trainers (all but ppo) share."""

    _bounds = (
        POSITIVE.of(
            "learning_rate", "epochs", "batch_size", "gradient_accumulation_steps", "max_length", "max_grad_norm"
        )
        | FRACTION.of("warmup_ratio")
        | Bounds(least=-1).of("max_steps")
    )
    _idle = frozenset({"gradient_checkpointing", "report_to"})

    tuning: Tuning = Tuning.lora
    """``lora``, ``qlora`` (needs a CUDA GPU and bitsandbytes) or ``full``."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Adapter settings."""
    learning_rate: float | None = None
    """Peak learning rate. Null: the method's own for the tuning, in docs/train.md with their sources."""
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
    report_to: list[str] | None = None
    """Trackers known to transformers: tensorboard, wandb, mlflow ...; null: tensorboard where it is installed."""


@dataclass
class SFTConfig(TrainerSettings):
    """Supervised fine-tuning on demonstrations, or on the chosen completions of preferences."""

    _group = "sft"

    RATES = Rates(lora=2e-4, full=2e-5)


@dataclass
class CritiqueRevisionConfig(TrainerSettings):
    """The supervised stage of Constitutional AI (Bai et al. 2022, section 3): fine-tuning on revised completions."""

    _group = "critique_revision"
    _bounds = POSITIVE.of("revisions", "samples_per_prompt", "max_new_tokens", "critique_tokens", "temperature")

    RATES = SFTConfig.RATES
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


@dataclass
class PMConfig(TrainerSettings):
    """Preference model: soft-label Bradley-Terry."""

    _group = "pm"
    _bounds = POSITIVE.of("ensemble") | FRACTION.of("min_accuracy")
    # How scores combine later, and what they must be worth: what takes them counts it, or looks.
    _idle = frozenset({"ensemble_score", "ensemble_penalty", "gate", "min_accuracy"})

    RATES = Rates(lora=1e-4, full=1e-5)
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
    keep: Keep = Keep.last
    """Which weights are saved: the ``last``, or the ``best`` by likelihood on a third of the validation prompts, looked
    at five times. The PM is measured on the others."""
    gate: Gate = Gate.stop
    """What happens where a PM that is not shown to be above chance, or is below ``min_accuracy``, would guide a policy:
    ``stop``, or ``warn`` and go on."""
    min_accuracy: float | None = None
    """Held-out accuracy that a PM must reach besides being above chance. Null: any."""


@dataclass
class DPOConfig(TrainerSettings):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    _group = "dpo"
    _bounds = POSITIVE.of("beta") | BELOW_HALF.of("label_smoothing")

    RATES = Rates(lora=5e-5, full=5e-7)
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
        require(
            self.label_smoothing > 0 or self.loss_type is not DPOLoss.exo_pair,
            "dpo.loss_type=exo_pair needs dpo.label_smoothing above 0; its paper takes 1e-3",
        )


@dataclass
class OnlineConfig(TrainerSettings):
    """What rloo and grpo share: groups of completions of a prompt are compared with each other."""

    _bounds = POSITIVE.of("max_new_tokens", "temperature")

    RATES = Rates(lora=1e-5, full=1e-6)
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
    missing_eos_penalty: float = 1.0
    """Subtracted from the score of completions that were cut instead of ended."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self._group
        require(self.generations >= 2, f"{name}.generations={self.generations}: comparing takes at least 2")
        require(
            self.batch_size % self.generations == 0,
            f"{name}.batch_size={self.batch_size} must be a multiple of {name}.generations={self.generations}",
        )
        require(
            self.max_new_tokens < self.max_length,
            f"{name}.max_new_tokens={self.max_new_tokens} leaves no room for a prompt in "
            f"{name}.max_length={self.max_length}",
        )


@dataclass
class RLOOConfig(OnlineConfig):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024), by TRL."""

    _group = "rloo"


@dataclass
class GRPOConfig(OnlineConfig):
    """Group relative policy optimisation (Shao et al. 2024), by TRL."""

    _group = "grpo"

    loss_type: GRPOLoss = GRPOLoss.grpo
    """``grpo``: the mean over each completion's tokens, then over completions, as in the paper. ``dapo`` (TRL's own
    default) and ``bnpo``: the mean over all tokens of the step, or of the micro-batch. ``dr_grpo``: the sum over tokens
    divided by ``max_new_tokens``."""


@dataclass
class BestOfNConfig(Settings):
    """Best of n samples: no training, the reference point for every method that uses the same reward."""

    _group = "best_of_n"
    _bounds = Bounds(least=2).of("n")

    n: int = 16
    """Completions per prompt, of which the best by the reward is kept."""


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The LoRA ranks that vLLM can be started for (MaxLoRARanks in its config/lora.py); an adapter's may be smaller."""


@dataclass
class SamplerVLLMConfig(Settings):
    """The vLLM that samples PPO's rollouts: in a process of its own beside the training, or a server."""

    _group = "ppo.vllm"
    _bounds = POSITIVE.of("tensor_parallel_size")

    url: str | None = None
    """Address of a ``vllm serve --enable-lora`` that sees the same files; null starts a process, as the rest says."""
    tensor_parallel_size: int = 1
    """GPUs that the model is spread over."""
    gpu_memory_utilization: float = 0.3
    """Share of each GPU's memory that vLLM may take; training needs the rest."""
    enforce_eager: bool = False
    """Start sooner, run slower: neither compilation nor CUDA graphs."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Any other arguments of vLLM's EngineArgs, by name."""
    python: str | None = None
    """Interpreter that has vLLM, where that is not this one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.gpu_memory_utilization
        require(
            0 < value < 1, f"ppo.vllm.gpu_memory_utilization={value}: must be between 0 and 1; training needs a part"
        )


@dataclass
class PPOConfig(ByTuning):
    """PPO with a preference model (Ouyang et al. 2022; details after Huang et al. 2023/2024)."""

    _group = "ppo"
    _idle = frozenset(
        {
            *("micro_batch_size", "rollout_batch_size", "gradient_checkpointing", "vllm"),
            *("save_every", "log_samples", "report_to"),
        }
    )
    _bounds = POSITIVE.of(
        "iterations",
        "rollouts",
        "epochs",
        "minibatch_size",
        "micro_batch_size",
        "rollout_batch_size",
        "max_new_tokens",
        "temperature",
        "learning_rate",
        "adam_epsilon",
        "clip_range",
        "value_clip_range",
        "max_grad_norm",
        "kl_target",
        "kl_horizon",
        "score_clip",
        "max_prompt_length",
        "save_every",
        "value_learning_rate",
        "eval_prompts",
        "stop_kl",
    ) | FRACTION.of("gamma", "gae_lambda")

    RATES = Rates(lora=1e-5, full=1e-6)

    tuning: Tuning = Tuning.lora
    """``lora``, or ``qlora`` over 4-bit weights (needs a CUDA GPU and bitsandbytes): the adapter-off base is the
    reference. ``full``: a frozen copy is the reference."""
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
    """Episodes per pass with gradients, which add up to a minibatch; four times as many per pass without."""
    rollout_batch_size: int = 64
    """Sequences decoded at once."""
    max_new_tokens: int = 128
    """Completions are cut after this many tokens."""
    sampler: Sampler = Sampler.hf
    """What samples rollouts, and completions on validation prompts: ``hf`` or ``vllm``."""
    vllm: SamplerVLLMConfig = field(default_factory=SamplerVLLMConfig)
    """With ``sampler=vllm``: how vLLM runs."""
    temperature: float = 1.0
    """Sampling temperature of rollouts; log-probabilities are scored at the same temperature."""
    learning_rate: float | None = None
    """AdamW learning rate of the policy. Null: 1e-5, or 1e-6 with ``tuning=full``."""
    value_learning_rate: float = 1e-3
    """AdamW learning rate of the value head, and of ``value_adapter``."""
    adam_epsilon: float = 1e-8
    """AdamW epsilon, of policy and value function. Gradients of its size and below make smaller steps."""
    linear_decay: bool = True
    """Anneal the learning rates linearly to zero."""
    warmup_iterations: int = 0
    """Iterations in which only the value head trains."""
    gamma: float = 1.0
    """Discount."""
    gae_lambda: float = 1.0
    """GAE lambda (Schulman et al. 2015). Below 1 the critic has to carry the score from the end to the first tokens."""
    clip_range: float = 0.2
    """Clip range of the probability ratio."""
    value_clip_range: float = 0.2
    """Clip range of the value update."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    value_init: ValueInit = ValueInit.zero
    """``zero``: no opinion at first. ``pm``: the PM's head, in units of the reward."""
    value_adapter: bool = False
    """The value function has a LoRA adapter of its own, trained at ``value_learning_rate``; else only a linear head."""
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
    missing_eos_penalty: float = 1.0
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
    report_to: list[str] | None = None
    """Trackers known to accelerate: tensorboard, wandb, mlflow ...; null: tensorboard where it is installed."""
    gradient_checkpointing: bool = False
    """Keep only the layers' inputs for the backward pass and compute the rest again: less memory, more compute."""

    def idle(self) -> frozenset[str]:
        """Measurements only decide something where they choose the policy that is kept."""
        return super().idle() | ({"eval_every", "eval_prompts"} if self.keep is Keep.last else set())

    def extensible(self) -> frozenset[str]:
        """Without a decay that ends with the run, its rounds do not depend on how many there will be."""
        return frozenset() if self.linear_decay else frozenset({"iterations"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.keep is Keep.last or self.eval_every > 0,
            "ppo.keep=best needs measurements on validation prompts: give ppo.eval_every=N",
        )
        require(
            self.value_init is ValueInit.zero or not self.relative_reward,
            "ppo.value_init=pm starts at scores, ppo.relative_reward=true trains on differences: set value_init=zero",
        )
        if self.sampler is Sampler.vllm:
            require(
                self.tuning is not Tuning.qlora,
                "ppo.sampler=vllm with ppo.tuning=qlora: vLLM would sample from other weights than the 4-bit ones that "
                "train; give ppo.tuning=lora or ppo.sampler=hf",
            )
            require(
                self.vllm.url is None or self.tuning is Tuning.lora,
                f"ppo.vllm.url with ppo.tuning={self.tuning.value}: a server takes adapters alone; give "
                "ppo.tuning=lora, or leave the url out",
            )
            require(
                self.tuning is Tuning.full or self.lora.r <= max(VLLM_RANKS),
                f"ppo.lora.r={self.lora.r}: with ppo.sampler=vllm at most {max(VLLM_RANKS)}, vLLM's largest",
            )
        require(
            not (self.value_adapter and self.tuning is Tuning.full),
            "ppo.value_adapter=true needs a base that does not train: give ppo.tuning=lora; with ppo.tuning=full the "
            "value function can train all weights (ppo.value_backprop=true)",
        )
        require(
            not (self.value_adapter and self.value_backprop),
            "ppo.value_adapter=true with ppo.value_backprop=true: the value loss trains either its own adapter or the "
            "policy's; leave one out",
        )
        require(
            self.rollouts % self.minibatch_size == 0,
            f"ppo.rollouts={self.rollouts} must be a multiple of ppo.minibatch_size={self.minibatch_size}",
        )
        require(
            self.minibatch_size % min(self.micro_batch_size, self.minibatch_size) == 0,
            f"ppo.minibatch_size={self.minibatch_size} must be a multiple of "
            f"ppo.micro_batch_size={self.micro_batch_size}",
        )
