"""The interface between the project and whatever serves text: prompts in, text and log-probabilities out.

An engine takes an iterable of requests and yields ``(index, result)`` as results come in, in any order, so that
callers can store each one at once and memory stays flat. A request that fails yields a :class:`Failure`.
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from rlaif.records import Message

T = TypeVar("T")

log = logging.getLogger(__name__)

CONTENT_FILTER = "content_filter"
"""The reason of a failure that will be the same however often the request is asked: a filter withholds it."""


@dataclass(frozen=True)
class SampleRequest:
    """Sample one completion. ``seed`` makes it repeatable where the engine allows."""

    messages: tuple[Message, ...]
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class OptionRequest:
    """Probability of each option as the next words.

    ``options`` holds, for each option, its accepted spellings (" A" and "A"; a set of verdict words): their mass
    is summed. ``stem`` is a text that the assistant's reply starts with, before the option.
    """

    messages: tuple[Message, ...]
    options: tuple[tuple[str, ...], ...]
    stem: str = ""
    meta: Any = None
    """What a scripted engine needs to know of the request's meaning; never part of what a model sees."""


@dataclass(frozen=True)
class CompletionRequest:
    """Likelihood of a given completion as the assistant's reply to the messages."""

    messages: tuple[Message, ...]
    completion: str
    meta: Any = None
    """As for :class:`OptionRequest`."""


@dataclass(frozen=True)
class Sampled:
    """A completion. ``finish_reason`` is ``stop`` (the model ended) or ``length`` (it was cut)."""

    text: str
    finish_reason: str
    tokens: int
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class OptionMass:
    """Probability mass of each option, summed over its spellings; ``None`` where the engine cannot tell.

    ``method`` says how it was found: ``logprob`` (log-probabilities), ``votes`` (share of sampled replies) or
    ``text`` (one parsed reply).
    """

    masses: tuple[float | None, ...]
    method: str
    reply: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_s: float | None = None
    observed: float | None = None
    """What the options have for certain, where some of ``masses`` are upper bounds; ``None``: their sum."""
    replies: int | None = None
    """How many replies the masses are shares of (``votes``, ``text``)."""

    @property
    def mass(self) -> float:
        """Mass on the options that was seen: what coverage counts."""
        return sum(mass for mass in self.masses if mass is not None) if self.observed is None else self.observed


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of a given completion: the sum over its ``tokens``, without an end token."""

    logp: float
    tokens: int
    prompt_tokens: int | None = None
    latency_s: float | None = None


@dataclass(frozen=True)
class Failure:
    """A request without a result, and why (``timeout``, ``http_500``, ``malformed`` ...)."""

    reason: str
    detail: str = ""
    latency_s: float | None = None

    @property
    def permanent(self) -> bool:
        """Whether asking again is of no use."""
        return self.reason == CONTENT_FILTER


class Engine(ABC):
    """Serves one model. Use as a context manager; ``close`` frees what it holds."""

    identity: dict[str, Any]
    """Everything about the engine that can change an answer: part of every cache key."""

    in_bursts = False
    """Whether answers come several at a time, so that it pays to store together what came together."""
    after_burst: Callable[[], None] = staticmethod(lambda: None)
    """What an engine that is ``in_bursts`` calls once it has handed over a burst, before anything else."""

    @property
    def name(self) -> str:
        """Short name for tables and labels."""
        return str(self.identity.get("model") or self.identity["engine"])

    @abstractmethod
    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[tuple[int, Sampled | Failure]]:
        """Sample a completion for each request."""

    @abstractmethod
    def score_options(self, requests: Iterable[OptionRequest]) -> Iterator[tuple[int, OptionMass | Failure]]:
        """Probability mass of each request's options."""

    def score_completions(self, requests: Iterable[CompletionRequest]) -> Iterator[tuple[int, Likelihood | Failure]]:
        """Likelihood of each request's completion. Not every engine can tell: an API that only samples cannot."""
        raise NotImplementedError(f"the {self.identity['engine']} engine gives no likelihood of given text")

    @property
    def where(self) -> str:
        """What messages about its requests call it."""
        return self.name

    def gives_logprobs(self) -> bool:
        """Whether verdicts come from log-probabilities, not from replies. To find out may take questions of its own."""
        return True

    @functools.cached_property
    def _told_reasons(self) -> set[str]:
        return set()

    def told(self, results: Iterator[tuple[int, T]], what: str) -> Iterator[tuple[int, T]]:
        """Results as they come, and a line in the log for each new reason of failure."""
        for index, result in results:
            if isinstance(result, Failure) and result.reason not in self._told_reasons:
                self._told_reasons.add(result.reason)
                log.warning("%s: %s fail with %s: %s", self.where, what, result.reason, result.detail)
            yield index, result

    @property
    def spent(self) -> Any:
        """What all requests have cost (:class:`rlaif.engines.limits.Spend`); ``None`` for an engine that costs nothing.

        An engine that has it can also be told, before its first request, what earlier runs have spent.
        """
        return None

    @property
    def waited_s(self) -> float:
        """Seconds in which nothing could be asked, because a server was down."""
        return 0.0

    def set_aside(self, note: Callable[[Any], None]) -> bool:
        """Have what may be spent noted before it is, by a thread of the engine; false if nothing is ever spent."""
        return False

    def settle(self) -> Any:
        """What has been spent, once everything that was asked is answered; see :meth:`set_aside`."""
        return self.spent

    def close(self) -> None:  # noqa: B027 - most engines hold nothing
        """Free memory, connections and processes."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
