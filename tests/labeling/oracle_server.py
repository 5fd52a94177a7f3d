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
    for name, weight in WEIGHTS.items()
)
UNCOVERED, UNLISTED, UNCLEAR, BROKEN = "#uncovered", "#unlisted", "#unclear", "#broken"
"""Words in a text: too little mass on the options; an option of several that is not listed; no verdict in a reply;
a server error for good."""


SCALE = "from 1 (as bad as a reply can be) to 10"
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


def grades(value: float) -> tuple[float, ...]:
    """Logits of the numbers from 1 to 10 for something worth ``value``: a discretised normal around 5.5 + value."""
    return tuple(-((number - 5.5 - value) ** 2) / 4 for number in range(1, 11))


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
    return Asked((worth(principle, found[1]) - worth(principle, found[2]), 0.0), ("A", "B"), found.groups())


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
    [principle] = [name for name, question in QUESTIONS.items() if f"Principle: {question}" in content]
    return Asked(grades(worth(principle, found[1])), tuple(map(str, range(1, 11))), found.groups())


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
        gives: ``logprobs``, or ``text``: replies alone, as many as are asked for, shared between the options by the
            logit; a tie in a single reply names both.
        mass: probability on the options.
    """

    def __init__(self, bias: float = 0.0, gives: str = "logprobs", mass: float = 0.9) -> None:
        self.bias, self.gives, self.mass = bias, gives, mass

    def __call__(self, body: dict[str, Any]) -> Reply:
        content = "\n".join(message["content"] for message in body["messages"])
        if "[End of reply" not in content:
            # A question of the engine's own: are there log-probabilities?
            return text("A") if self.gives == "text" else logprobs([("A", 0.9), ("B", 0.1)])
        [asked] = [found for reader in READERS.values() if (found := reader(content)) is not None]
        shown = " ".join(asked.texts)
        if BROKEN in shown:
            return error(500, "out of order")
        p = shares(asked.logits, self.bias)
        if self.gives == "text":
            return self._replies(asked, shown, p[0], body.get("n", 1))
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
        return logprobs(listed)

    def _replies(self, asked: Asked, shown: str, p: float, n: int) -> Reply:
        yes, no = asked.options
        if UNCLEAR in shown:
            return text(*["Both have their merits."] * n)
        if n == 1:
            return text(f"{yes} or {no}" if p == 0.5 else yes if p > 0.5 else no)
        return text(*(yes if place < round(p * n) else no for place in range(n)))


def noisy(oracle: Oracle, seed: int, share: float, faults: list[Reply]) -> Callable[[dict[str, Any]], Reply]:
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
