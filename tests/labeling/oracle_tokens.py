"""The oracle behind ``/completions``: prompts come as token ids, many in a request, as vLLM's server takes them.

It speaks in the bytes of the ``tiny`` tokenizer, a token each, so every option with a space before it is a spelling of
several tokens, which the labeler has to ask for one after the other.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from fake_server import Reply, continuations, error
from oracle_server import BROKEN, READERS, STATEMENTS, UNCOVERED, Oracle, shares

from rlaif.config import ModelConfig
from rlaif.models import load_tokenizer

OVERRIDES = ("labeler.endpoint=completions", "labeler.tokenizer=tiny", "labeler.batch_size=8")
_IMPOSSIBLE = -30.0


class TokenOracle:
    """Answers completions as ``oracle`` answers chats: the same shares, of texts that are spelt token by token.

    A prompt with the word that breaks it is refused, and with it the request that it came in.
    """

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.tokenizer: Any = load_tokenizer(ModelConfig(name="tiny"))
        self._weights = functools.lru_cache(maxsize=64)(self._weights_after)

    def __call__(self, body: dict[str, Any]) -> Reply:
        if is_check(body):
            return continuations(body, lambda prompt, token: -5.0)
        if any(BROKEN in self.tokenizer.decode(prompt) for prompt in body["prompt"]):
            return error(self.oracle.broken, "out of order")
        return continuations(body, self._logp)

    def questions(self, body: dict[str, Any]) -> list[str]:
        """The questions that a request asks anew; what goes on with an answer is none, nor is the engine's own."""
        if is_check(body):
            return []
        texts = [self.tokenizer.decode(prompt) for prompt in body["prompt"]]
        return [text for text in texts if not _begun(text)]

    def _logp(self, prompt: list[int], token: int) -> float:
        begun, weights = self._weights(tuple(prompt))
        after = begun + self.tokenizer.decode([token])
        share = sum(weight for text, weight in weights if text.startswith(after))
        whole = sum(weight for text, weight in weights if text.startswith(begun)) if begun else 1.0
        return math.log(share / whole) if share > 0 else _IMPOSSIBLE

    def _weights_after(self, prompt: tuple[int, ...]) -> tuple[str, list[tuple[str, float]]]:
        """What of a reply has been given already, and how likely each reply is as a whole."""
        text = self.tokenizer.decode(list(prompt))
        [asked] = [found for reader in READERS.values() if (found := reader(text)) is not None]
        mass = 0.001 if UNCOVERED in " ".join(asked.texts) else self.oracle.mass
        weights = []
        p = shares([self.oracle.sign * logit for logit in asked.logits], self.oracle.bias)
        for place, (option, share) in enumerate(zip(asked.options, p, strict=True)):
            part = 0.5 if place % 2 else 0.75
            # A verdict word follows its statement; a letter or a number may stand without a space.
            other = f" {option.capitalize()}" if len(option) > 2 else option
            weights += [(f" {option}", part * mass * share), (other, (1 - part) * mass * share)]
        return _begun(text), weights


def is_check(body: dict[str, Any]) -> bool:
    """Whether a request is the engine's own question, of single tokens: does the server take token ids?"""
    return all(len(prompt) == 1 for prompt in body["prompt"])


def _begun(text: str) -> str:
    reply = text.rpartition("<|im_start|>assistant\n")[2]
    for statement in STATEMENTS.values():
        reply = reply.removeprefix(statement)
    return reply
