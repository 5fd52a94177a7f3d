"""A labeler whose every answer is known: an HTTP server that judges by values planted in the texts.

A completion says what it is worth under each principle, ``{kind=+1.25 short=-0.50}``, and may hold a word that makes
the oracle withhold its verdict. A reader for each labeling mode finds in a request what is asked; a further mode is
a further reader.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fake_server import FakeServer, Reply, error, logprobs, text

QUESTIONS = {"kind": "Which reply is kinder?", "short": "Which reply is shorter?"}
STATEMENTS = {"kind": "In kindness this reply is", "short": "In length this reply is"}
WORDS = {"kind": ("kind", "rude"), "short": ("short", "long")}
WEIGHTS = {"kind": 1.0, "short": 0.5}
CONSTITUTION = "name: planted\nversion: '1'\ndescription: values planted in the texts\nprinciples:\n" + "".join(
    f"  - id: {name}\n    weight: {weight}\n    question: {QUESTIONS[name]}\n    statement: {STATEMENTS[name]}\n"
    f'    verdicts:\n      "yes": [{WORDS[name][0]}]\n      "no": [{WORDS[name][1]}]\n'
    f"    encourage: Be {WORDS[name][0]}.\n    discourage: Be {WORDS[name][1]}.\n"
    for name, weight in WEIGHTS.items()
)
UNCOVERED, UNLISTED, UNCLEAR, BROKEN, MUTE = "#uncovered", "#unlisted", "#unclear", "#broken", "#mute"
"""Words in a text: too little mass on the options; an option of several that is not listed; no verdict in a reply;
a server error for good; nothing said where the labeler should reason first, with every other seed."""
LEANS = (-2.0, -0.25, 0.5, 1.5)
"""Logits by which a rationale moves the verdict after it; the seed says which."""


SCALE = "from 1 (as bad as a reply can be) to 9"
"""What tells a question for a number from one for a verdict word."""


def worth(principle: str, completion: str) -> float:
    """The planted value."""
    found = re.search(rf"{principle}=([+-][\d.]+)", completion)
    assert found, completion
    return float(found[1])


@dataclass(frozen=True)
class Asked:
    """What a request asks: the logit of each option, what the options are called, and the texts it is about."""

    logits: tuple[float, ...]
    options: tuple[str, ...]
    texts: tuple[str, ...]


def shares(logits: Sequence[float], bias: float) -> list[float]:
    """Softmax, with ``bias`` logits for the first."""
    weights = [math.exp(logit + bias * (place == 0)) for place, logit in enumerate(logits)]
    return [weight / sum(weights) for weight in weights]


def ballots(p: Sequence[float], n: int) -> list[int]:
    """How many of ``n`` replies name each option; a single reply cannot choose among several that are the likeliest."""
    if n == 1:
        best = [place for place, share in enumerate(p) if share == max(p)]
        return [int(best == [place]) for place in range(len(p))]
    ends = [math.floor(n * sum(p[: place + 1]) + 0.5) for place in range(len(p))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def lean(seed: int) -> float:
    """By how much the rationale with this seed moves the verdict."""
    return LEANS[seed // 2 % len(LEANS)]


def is_mute(shown: str, seed: int) -> bool:
    """Whether the rationale with this seed is empty."""
    return MUTE in shown and seed % 2 == 1


def grades(value: float) -> tuple[float, ...]:
    """Logits of the numbers from 1 to 9 for something worth ``value``: a discretised normal around 5 + value."""
    return tuple(-((number - 5 - value) ** 2) / 4 for number in range(1, 10))


def read_pairwise(content: str) -> Asked | None:
    """Two replies between markers, and a letter to answer with."""
    if "[Reply C]" in content:
        return None
    found = re.search(
        r"\[Reply A\]\n(.*)\n\[End of reply a\]\n\n\[Reply B\]\n(.*)\n\[End of reply b\]", content, re.DOTALL
    )
    if found is None:
        return None
    [principle] = [name for name, question in QUESTIONS.items() if f"Principle: {question}" in content]
    moved = re.search(r"lean=([+-]\d+\.\d+)", content)
    logit = worth(principle, found[1]) - worth(principle, found[2]) + (float(moved[1]) if moved else 0.0)
    return Asked((logit, 0.0), ("A", "B"), found.groups())


def read_listwise(content: str) -> Asked | None:
    """Three replies or more between markers, and a letter to answer with."""
    found = re.findall(r"\[Reply ([A-Z])\]\n(.*?)\n\[End of reply [a-z]\]", content, re.DOTALL)
    if len(found) < 3:
        return None
    [principle] = [name for name, question in QUESTIONS.items() if f"Principle: {question}" in content]
    letters, texts = zip(*found, strict=True)
    return Asked(tuple(worth(principle, one) for one in texts), letters, texts)


def read_pointwise(content: str) -> Asked | None:
    """One reply between markers, and a sentence to finish with a verdict word."""
    found = re.search(r"\[Reply\]\n(.*)\n\[End of reply\]", content, re.DOTALL)
    if found is None or SCALE in content:
        return None
    [principle] = [
        name for name, statement in STATEMENTS.items() if statement in content.rpartition("[End of reply]")[2]
    ]
    return Asked((worth(principle, found[1]), 0.0), WORDS[principle], found.groups())


def read_score(content: str) -> Asked | None:
    """One reply between markers, and a number to answer with."""
    found = re.search(r"\[Reply\]\n(.*)\n\[End of reply\]", content, re.DOTALL)
    if found is None or SCALE not in content:
        return None
    [principle] = [name for name, question in QUESTIONS.items() if f"several replies): {question}" in content]
    return Asked(grades(worth(principle, found[1])), tuple(map(str, range(1, 10))), found.groups())


READERS: dict[str, Callable[[str], Asked | None]] = {
    "pairwise": read_pairwise,
    "pointwise": read_pointwise,
    "listwise": read_listwise,
    "score": read_score,
}


class Oracle:
    """Answers chat completions.

    Args:
        bias: logits added to the first option: a position bias, or a liking for yes.
        gives: ``logprobs``, or ``text``: replies alone, as many as are asked for, shared between the options
            (:func:`ballots`); a tie in a single reply names all. ``draws``: such replies, each drawn by chance.
        mass: probability on the options.
        sign: -1 for a labeler that wants the opposite.
        top: how many tokens it lists, so that an unlikely option may be missing; None: all that have been asked about.
        broken: the status of what is out of order.
    """

    def __init__(
        self,
        bias: float = 0.0,
        gives: str = "logprobs",
        mass: float = 0.9,
        sign: int = 1,
        top: int | None = None,
        broken: int = 500,
    ) -> None:
        self.bias, self.gives, self.mass, self.sign, self.top, self.broken = bias, gives, mass, sign, top, broken

    def __call__(self, body: dict[str, Any]) -> Reply:
        content = "\n".join(message["content"] for message in body["messages"])
        if "[End of reply" not in content:
            # A question of the engine's own: are there log-probabilities?
            return logprobs([("A", 0.9), ("B", 0.1)]) if self.gives == "logprobs" else text("A")
        [asked] = [found for reader in READERS.values() if (found := reader(content)) is not None]
        shown = " ".join(asked.texts)
        if BROKEN in shown:
            return error(self.broken, "out of order")
        if "Do not give a verdict yet" in content and len(body["messages"]) == 1:
            seed = body["seed"]
            return text("" if is_mute(shown, seed) else f"Number {seed} weighs them: lean={lean(seed):+.2f}.")
        p = shares([self.sign * logit for logit in asked.logits], self.bias)
        if self.gives != "logprobs":
            return self._replies(asked, shown, p, body)
        mass = 0.001 if UNCOVERED in shown else self.mass
        # Each option in two spellings, in changing parts, among tokens that are none.
        listed = []
        for place, (option, share) in enumerate(zip(asked.options, p, strict=True)):
            part = 0.5 if place % 2 else 0.75
            listed += [(option, part * mass * share), (f" {option}", (1 - part) * mass * share)]
        listed += [("The", 0.4 * (1 - mass)), ("Both", 0.4 * (1 - mass))]
        if UNLISTED in shown:
            listed = [("The", 0.5), ("Both", 0.3)]
        listed.sort(key=lambda entry: -entry[1])
        return logprobs(listed[: self.top])

    def _replies(self, asked: Asked, shown: str, p: list[float], body: dict[str, Any]) -> Reply:
        n = body.get("n", 1)
        if UNCLEAR in shown:
            return text(*["Both have their merits."] * n)
        if self.gives == "draws":
            return text(*random.Random(asked_of(body)).choices(asked.options, p, k=n))
        counts = ballots(p, n)
        if not any(counts):
            return text(" or ".join(option for option, share in zip(asked.options, p, strict=True) if share == max(p)))
        return text(*(option for option, count in zip(asked.options, counts, strict=True) for _ in range(count)))


def noisy(
    oracle: Callable[[dict[str, Any]], Reply], seed: int, share: float, faults: list[Reply]
) -> Callable[[dict[str, Any]], Reply]:
    """The oracle behind a bad line: a ``share`` of the calls, drawn anew for each call, gets one of the faults."""
    line = random.Random(seed)

    def answer(body: dict[str, Any]) -> Reply:
        return line.choice(faults) if line.random() < share else oracle(body)

    return answer


def asked_of(body: dict[str, Any]) -> str:
    """Which verdict a request is about, whatever its other parameters."""
    return hashlib.sha256(repr(body["messages"]).encode()).hexdigest()


def serve(oracle: Callable[[dict[str, Any]], Reply]) -> FakeServer:
    """A server that answers by the oracle and records what it is asked."""
    server = FakeServer()
    server.default = oracle
    return server
