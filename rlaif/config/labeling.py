"""Settings of the labeler, of labeling, and of the programmatic annotator."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from rlaif.config.checks import (
    ANY,
    BELOW_HALF,
    FRACTION,
    POSITIVE,
    SHARE,
    Bounds,
    Settings,
    require,
    template_variables,
)
from rlaif.config.choices import Dtype, Endpoint, LabelerType, LabelMode, Pairs, Principles, Selection


@dataclass
class ScriptedConfig(Settings):
    """The scripted labeler: a known utility plus programmable bias, noise and faults."""

    _group = "labeler.scripted"
    _idle = frozenset({"delay_s"})
    _bounds = (
        ANY.of("sharpness", "position_bias")
        | FRACTION.of("option_mass", "fault_rate")
        | Bounds(least=0, most=3600).of("delay_s")
    )

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


@dataclass
class VLLMConfig(Settings):
    """vLLM's engine, which runs in a process of its own."""

    _group = "labeler.vllm"
    _idle = frozenset(
        {"tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization", "enforce_eager", "python"}
    )
    _bounds = POSITIVE.of("tensor_parallel_size", "data_parallel_size", "max_model_len") | SHARE.of(
        "gpu_memory_utilization"
    )

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


@dataclass
class BudgetConfig(Settings):
    """What the requests to a server may cost, earlier runs into the same folder included. Null: no limit."""

    _group = "labeler.budget"
    _bounds = Bounds(above=0, largest=10**15).of("requests", "tokens") | POSITIVE.of("usd")

    requests: int | None = None
    """HTTP requests, retries included."""
    tokens: int | None = None
    """Tokens of prompts and completions."""
    usd: float | None = None
    """US dollars at the prices in labeler.price."""


@dataclass
class PriceConfig(Settings):
    """What the server's owner charges, in US dollars."""

    _group = "labeler.price"

    input_per_million: float | None = None
    """For a million tokens of prompts."""
    output_per_million: float | None = None
    """For a million tokens of completions."""


_REQUESTS_OWN = {
    *("model", "messages", "prompt", "n", "stream", "logprobs", "top_logprobs", "logprob_token_ids"),
    *("return_tokens_as_token_ids", "continue_final_message", "add_generation_prompt", "chat_template_kwargs"),
}
"""What of a request makes the question, or is read in the answer."""


@dataclass
class LabelerConfig(Settings):
    """The model that judges completions against principles."""

    _group = "labeler"
    _idle = frozenset(
        {
            *("concurrency", "timeout_s", "max_retries", "batch_tokens", "batch_size", "api_key_env", "device"),
            *("requests_per_minute", "tokens_per_minute", "budget", "price", "outage_s"),
        }
    )
    _inputs = frozenset({"model", "revision", "dtype", "tokenizer", "audit"})
    _bounds = POSITIVE.of(
        *("batch_tokens", "batch_size", "concurrency", "timeout_s", "outage_s", "votes"),
        *("requests_per_minute", "tokens_per_minute"),
    ) | FRACTION.of("min_agreement")

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
    """Name of the environment variable with the API key, in capitals (openai). The key itself never enters a config."""
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
    outage_s: float = 300.0
    """Seconds after which a run ends in which the server answers nothing, or no request succeeds (openai)."""
    top_logprobs: int = 20
    """Log-probabilities asked for per position (openai); servers cap this."""
    audit: str | None = None
    """Pairs that people have labelled (see ``rlaif.audit``): the labeler is measured on them before it labels."""
    min_agreement: float | None = None
    """Refuse to label if the agreement in ``labeler.audit`` is below this."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """What else every request holds, for example {reasoning_effort: low}; it is recorded with the labels (openai)."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables that the chat template is given, for example {enable_thinking: false} for Qwen3."""
    prefill: bool = False
    """The server can continue an assistant message (vLLM, SGLang: yes; OpenAI: no)."""
    votes: int = 1
    """Replies sampled per verdict where the server gives no log-probabilities."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """Settings of the vLLM engine."""
    scripted: ScriptedConfig = field(default_factory=ScriptedConfig)
    """Settings of the scripted labeler."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env) is not None,
            # Without the value: it may be the key, set here by mistake.
            "labeler.api_key_env: must be the name of an environment variable, in capitals (OPENAI_API_KEY), no key",
        )
        require(
            self.budget.usd is None or None not in (self.price.input_per_million, self.price.output_per_million),
            f"labeler.budget.usd={self.budget.usd} needs labeler.price.input_per_million and "
            "labeler.price.output_per_million",
        )
        require(
            self.min_agreement is None or self.audit is not None,
            f"labeler.min_agreement={self.min_agreement} needs labelled pairs to measure it on: labeler.audit=FILE",
        )
        template_variables(self, "labeler", "chat_template_kwargs")
        if taken := sorted(_REQUESTS_OWN & self.extra_body.keys()):
            raise ValueError(
                f"labeler.extra_body: {', '.join(taken)} can't be set: the labeler sets it in each request"
            )
        for name in {"max_tokens", "max_completion_tokens"} & self.extra_body.keys():
            value = self.extra_body[name]
            require(
                type(value) is int and value > 0, f"labeler.extra_body: {name}={value!r}: must be an integer above 0"
            )
        require(
            1 <= self.top_logprobs <= 20,
            f"labeler.top_logprobs={self.top_logprobs}: servers accept between 1 and 20",
        )


@dataclass
class LabelingConfig(Settings):
    """How verdicts are asked and combined."""

    _group = "labeling"
    _bounds = (
        POSITIVE.of(
            "temperature",
            "rationale_tokens",
            "rotations",
            "pairs_per_prompt",
            "second_order_below",
            "stop_principles_above",
        )
        | BELOW_HALF.of("clamp", "min_margin")
        | FRACTION.of("min_option_mass", "min_principle_weight")
    )

    mode: LabelMode = LabelMode.pairwise
    """``pairwise``: which of two completions; ``listwise``: which of all; ``pointwise``: verdict words on one
    completion; ``score``: a number from 1 to 9 for one; ``contrastive``: how much likelier one is under a system
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
    min_principle_weight: float = 0.5
    """A pair is labelled by the principles that have their verdicts on it (in both orders); it is dropped if these have
    less than this share of the weight of all that it was asked under. 1: every principle must have them."""
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
        super().__post_init__()
        require(
            self.rotations is None or self.mode is LabelMode.listwise,
            f"labeling.rotations={self.rotations}: only with labeling.mode=listwise",
        )
        require(
            self.both_orders or self.rotations in (None, 1),
            f"labeling.rotations={self.rotations} asks for several orders, labeling.both_orders=false for one",
        )
        require(
            self.principles is not Principles.together or self.mode is not LabelMode.pointwise,
            "labeling.principles=together: not with labeling.mode=pointwise, whose words belong to one principle; "
            "labeling.mode=score judges single completions by all principles together",
        )
        require(
            not self.exemplars or self.mode is LabelMode.pairwise,
            "labeling.exemplars=true: exemplars are pairs, so only with labeling.mode=pairwise",
        )
        require(
            not self.length_normalize or self.mode is LabelMode.contrastive,
            "labeling.length_normalize=true: only with labeling.mode=contrastive",
        )
        pairwise_only = {
            "pairs": self.pairs is not Pairs.all,
            "second_order_below": self.second_order_below is not None,
            "stop_principles_above": self.stop_principles_above is not None,
        }
        for name, is_set in pairwise_only.items():
            require(
                not is_set or self.mode is LabelMode.pairwise,
                f"labeling.{name}={getattr(self, name)}: only with labeling.mode=pairwise",
            )
        require(
            self.pairs_per_prompt is None or self.pairs is Pairs.adaptive,
            f"labeling.pairs_per_prompt={self.pairs_per_prompt}: only with labeling.pairs=adaptive",
        )
        require(
            self.second_order_below is None or self.both_orders,
            f"labeling.second_order_below={self.second_order_below}: only with labeling.both_orders=true",
        )
        require(
            self.stop_principles_above is None or self.principles is Principles.each,
            f"labeling.stop_principles_above={self.stop_principles_above}: only with labeling.principles=each",
        )
        require(
            self.calibrate is None or self.mode is not LabelMode.listwise,
            "labeling.calibrate: people labelled pairs, so not with labeling.mode=listwise",
        )
        require(
            self.calibrate is None or self.temperature == 1,
            f"labeling.temperature={self.temperature}: labeling.calibrate measures the temperature; leave one of them",
        )
        require(
            self.rationales == 0 or (self.mode is LabelMode.pairwise and not self.exemplars),
            f"labeling.rationales={self.rationales}: only with labeling.mode=pairwise, and without exemplars",
        )


def check_likelihood(labeler: LabelerConfig, labeling: LabelingConfig) -> None:
    require(
        labeling.mode is not LabelMode.contrastive or labeler.type is not LabelerType.openai,
        "labeling.mode=contrastive needs labeler=hf or labeler=vllm: an API gives no likelihood of given text",
    )


@dataclass
class AnnotatorConfig(Settings):
    """The programmatic annotator behind ``simulated_human`` labels: Bradley-Terry draws from the gold judge."""

    _group = "annotator"
    _bounds = POSITIVE.of("scale", "annotators") | FRACTION.of("flip")

    scale: float = 4.0
    """P(prefer a) = sigmoid(scale * (gold(a) - gold(b)))."""
    flip: float = 0.05
    """Label noise: share of drawn labels that are flipped."""
    annotators: int = 1
    """Annotators who label each pair. One gives a hard label; k of n for a gives P(a) = (k + 1/2) / (n + 1)."""
