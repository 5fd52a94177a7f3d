"""A deterministic labeler with a known utility and programmable bias, noise and faults.

It answers from ``OptionRequest.meta``, not from the messages:

- ``{"mode": "pairwise", "first": text, "second": text, ...}`` with options in the order (first, second);
- ``{"mode": "pointwise", "completion": text, ...}`` with options in the order (yes, no);
- ``{"mode": "score", "completion": text, ...}`` with the options 1 to 9;
- ``{"mode": "listwise", "completions": [text, ...], ...}`` with an option for each;
- ``{"mode": "contrastive", "encouraged": true or false, ...}`` for a likelihood.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rlaif.config import ScriptedConfig
from rlaif.engines.base import (
    CompletionRequest,
    Engine,
    Failure,
    Likelihood,
    OptionMass,
    OptionRequest,
    Sampled,
    SampleRequest,
)
from rlaif.gold import gold_score
from rlaif.records import content_hash

_SUBJECTS = ("The answer", "This idea", "Your plan", "The result", "That question", "The story")
_VERBS = ("is", "looks", "seems", "sounds", "feels")
_TONES = {
    "warm": ("wonderful", "great", "lovely", "happy", "good", "friendly"),
    "plain": ("short", "usual", "long", "early", "common", "plain"),
    "cold": ("terrible", "sad", "bad", "awful", "gloomy", "rude"),
}


class ScriptedEngine(Engine):
    """Labels by a gold utility: the logit is ``sharpness * utility difference + position bias + noise``.

    Of a list, each is the best with a probability proportional to exp(sharpness * utility), with the position bias for
    the first. Numbers follow a binomial distribution with the mean 1 + 8 * sigmoid(sharpness * utility). The
    log-likelihood ratio of a completion is sharpness * utility.

    Every answer is a function of the settings, the seed and the request; faults also of how often this engine
    was asked the same request.

    Raises:
        UserError: if the utility does not exist.
    """

    def __init__(self, config: ScriptedConfig, seed: int) -> None:
        gold_score(config.utility, "")  # an unknown name must fail here, not after the first request
        self._config = config
        self._seed = seed
        self._attempts: Counter[str] = Counter()
        self.identity: dict[str, Any] = {"engine": "scripted", **asdict(config), "seed": seed}

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[tuple[int, Sampled | Failure]]:
        """Pseudo-text: a few short sentences of varying tone."""
        for index, request in enumerate(requests):
            key = self._key(*asdict(request).values())
            yield index, self._fault(key) or _babble(key, request)

    def score_options(self, requests: Iterable[OptionRequest]) -> Iterator[tuple[int, OptionMass | Failure]]:
        """``option_mass`` shared between the options.

        Raises:
            ValueError: if a request has no usable ``meta`` or another number of options than its mode has.
        """
        for index, request in enumerate(requests):
            key = self._key(request.messages, request.options, request.stem, request.meta)
            yield index, self._fault(key) or self._verdict(key, request)

    def score_completions(self, requests: Iterable[CompletionRequest]) -> Iterator[tuple[int, Likelihood | Failure]]:
        """About two nats a word, more or less by half the likelihood ratio, with noise."""
        for index, request in enumerate(requests):
            key = self._key(request.messages, request.completion, request.meta)
            yield index, self._fault(key) or self._likelihood(key, request)

    def _key(self, *content: Any) -> str:
        return content_hash(self._seed, *content)

    def _fault(self, key: str) -> Failure | None:
        """Take the time a request takes, and fail if the script says so."""
        if self._config.delay_s > 0:
            time.sleep(self._config.delay_s)
        if self._config.fault_rate <= 0:
            return None
        attempt = self._attempts[key]
        self._attempts[key] += 1
        if random.Random(f"fault {key} {attempt}").random() >= self._config.fault_rate:
            return None
        return Failure("scripted_fault", f"attempt {attempt + 1}", self._config.delay_s)

    def _verdict(self, key: str, request: OptionRequest) -> OptionMass:
        shares = self._shares(key, request.meta)
        if len(request.options) != len(shares):
            raise ValueError(f"the scripted engine takes {len(shares)} options here, got {len(request.options)}")
        masses = tuple(self._config.option_mass * share for share in shares)
        reply = request.options[masses.index(max(masses))][0]
        return OptionMass(masses, "logprob", reply=reply, latency_s=self._config.delay_s)

    def _shares(self, key: str, meta: Any) -> list[float]:
        """Share of each option in the option mass."""
        mode = meta.get("mode") if isinstance(meta, dict) else None
        noise = self._noise(key)
        if mode == "pairwise":
            difference = self._logit(meta["first"]) - self._logit(meta["second"])
            logit = difference + self._config.position_bias + noise
            return [_sigmoid(logit), _sigmoid(-logit)]
        if mode == "pointwise":
            logit = self._logit(meta["completion"]) + noise
            return [_sigmoid(logit), _sigmoid(-logit)]
        if mode == "score":
            p = _sigmoid(self._logit(meta["completion"]) + noise)
            return [math.comb(8, k) * p**k * (1 - p) ** (8 - k) for k in range(9)]
        if mode == "listwise":
            first, *others = (self._logit(text) for text in meta["completions"])
            return _softmax([first + self._config.position_bias + noise, *others])
        raise ValueError(
            f'the scripted engine needs meta with "mode" pairwise, pointwise, score or listwise, got {meta!r}'
        )

    def _likelihood(self, key: str, request: CompletionRequest) -> Likelihood:
        tokens = len(request.completion.split())
        half = (self._logit(request.completion) + self._noise(key)) / 2
        logp = -2.0 * tokens + (half if request.meta["encouraged"] else -half)
        return Likelihood(logp, tokens, latency_s=self._config.delay_s)

    def _logit(self, text: str) -> float:
        return self._config.sharpness * gold_score(self._config.utility, text)

    def _noise(self, key: str) -> float:
        return self._config.noise * random.Random(f"noise {key}").gauss(0, 1)


def _sigmoid(logit: float) -> float:
    """1 / (1 + exp(-logit)) without overflow."""
    small = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else small) / (1.0 + small)


def _softmax(logits: Sequence[float]) -> list[float]:
    """exp(logit) / sum of all, without overflow."""
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def _babble(key: str, request: SampleRequest) -> Sampled:
    rng = random.Random(f"sample {key}")
    tone = rng.choice(list(_TONES.values()))
    words: list[str] = []
    for _ in range(rng.randint(1, 4)):
        sentence = f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(tone)}."
        words += sentence.split()
    cut = words[: request.max_new_tokens]
    finish_reason = "stop" if len(cut) == len(words) else "length"
    return Sampled(" ".join(cut), finish_reason, tokens=len(cut))
