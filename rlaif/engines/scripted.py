"""A deterministic labeler with a known utility and programmable bias, noise and faults.

It answers from ``OptionRequest.meta``, not from the messages:

- ``{"mode": "pairwise", "first": text, "second": text, ...}`` with options in the order (first, second);
- ``{"mode": "pointwise", "completion": text, ...}`` with options in the order (yes, no).
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rlaif.config import ScriptedConfig
from rlaif.engines.base import Engine, Failure, OptionMass, OptionRequest, Sampled, SampleRequest
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
        """``option_mass`` shared between the two options by the logit.

        Raises:
            ValueError: if a request has no usable ``meta`` or not two options.
        """
        for index, request in enumerate(requests):
            key = self._key(request.messages, request.options, request.stem, request.meta)
            yield index, self._fault(key) or self._verdict(key, request)

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
        if len(request.options) != 2:
            raise ValueError(f"the scripted engine takes 2 options, got {len(request.options)}")
        masses = [self._config.option_mass * _sigmoid(sign * self._logit(key, request)) for sign in (1, -1)]
        reply = request.options[masses[1] > masses[0]][0]
        return OptionMass(tuple(masses), "logprob", reply=reply, latency_s=self._config.delay_s)

    def _logit(self, key: str, request: OptionRequest) -> float:
        config, meta = self._config, request.meta
        mode = meta.get("mode") if isinstance(meta, dict) else None
        noise = config.noise * random.Random(f"noise {key}").gauss(0, 1)
        if mode == "pairwise":
            difference = gold_score(config.utility, meta["first"]) - gold_score(config.utility, meta["second"])
            return config.sharpness * difference + config.position_bias + noise
        if mode == "pointwise":
            return config.sharpness * gold_score(config.utility, meta["completion"]) + noise
        raise ValueError(f'the scripted engine needs meta with "mode" pairwise or pointwise, got {meta!r}')


def _sigmoid(logit: float) -> float:
    """1 / (1 + exp(-logit)) without overflow."""
    small = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else small) / (1.0 + small)


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
