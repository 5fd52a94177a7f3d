"""The named choices that settings offer."""

from __future__ import annotations

from enum import StrEnum


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
    """Where preference labels come from.

    ``simulated_human`` is a programmatic annotator, never people. ``style_order`` and ``shuffled`` are controls: what
    the styles that candidates were sampled in give away, and AI labels whose direction a coin decides.
    """

    ai = "ai"
    human = "human"
    simulated_human = "simulated_human"
    style_order = "style_order"
    shuffled = "shuffled"


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


class GRPOLoss(StrEnum):
    """By what GRPO's loss divides the sum over tokens; the names are TRL's."""

    grpo = "grpo"
    bnpo = "bnpo"
    dapo = "dapo"
    dr_grpo = "dr_grpo"


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
    """What training leaves: the last weights, or those that were best on validation prompts."""

    last = "last"
    best = "best"


class Gate(StrEnum):
    """What a preference model that is not shown to be above chance does to a policy: stops its training, or warns."""

    stop = "stop"
    warn = "warn"


class Sampler(StrEnum):
    """What samples PPO's rollouts: the policy's own model in this process, or vLLM with the policy's weights."""

    hf = "hf"
    vllm = "vllm"


class Dtype(StrEnum):
    """Precision of the arithmetic. ``auto`` is bfloat16 where the hardware multiplies that faster, else float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Split(StrEnum):
    """A part of the prompts; made once, by prompt, near-duplicates together."""

    train = "train"
    validation = "validation"
    test = "test"
