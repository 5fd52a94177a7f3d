"""How fast and how much a server is asked: adaptive concurrency, limits per minute, a hard budget. Pure.

Time is an argument everywhere (seconds of any clock that never goes back), so nothing here waits or does I/O.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from rlaif.config import BudgetConfig, PriceConfig

WINDOW_S = 61.0
"""Length of the sliding window: a minute, and a second for requests that reach the server late."""

AHEAD = 16
"""Requests that are noted as spent before they are sent, at a time."""


class Usage(NamedTuple):
    """Tokens of one request."""

    prompt: int = 0
    completion: int = 0


class Spend(NamedTuple):
    """What requests have cost so far. ``usd`` is 0 where no prices are set."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0


class BudgetSpentError(Exception):
    """The budget does not allow another request."""


class NeverAllowedError(Exception):
    """A request that alone is larger than a limit per minute."""


@dataclass(slots=True)
class Entry:
    """An amount in a :class:`Window`."""

    expires: float
    amount: int


class Window:
    """At most ``most`` units within any ``WINDOW_S`` seconds; ``None`` is no limit."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self._entries: deque[Entry] = deque()
        self._used = 0

    def wait(self, now: float, amount: int) -> float:
        """Seconds until ``amount`` fits; infinite if it never does."""
        if self.most is None:
            return 0.0
        if amount > self.most:
            return math.inf
        while self._entries and self._entries[0].expires <= now:
            self._used -= self._entries.popleft().amount
        over, until = self._used + amount - self.most, now
        for entry in self._entries:
            if over <= 0:
                break
            over -= entry.amount
            until = entry.expires
        return until - now

    def add(self, now: float, amount: int) -> Entry:
        """Count ``amount`` from now on."""
        entry = Entry(now + WINDOW_S, amount)
        if self.most is not None:
            self._entries.append(entry)
            self._used += amount
        return entry

    def correct(self, now: float, entry: Entry, amount: int) -> None:
        """Count ``amount`` instead of what an entry was added with."""
        if self.most is not None and entry.expires > now:
            self._used += amount - entry.amount
            entry.amount = amount


class Concurrency:
    """How many requests may be in flight: one more per round of good replies, half as many after trouble (AIMD).

    Chiu and Jain 1989. Until the first trouble it doubles with every round, as TCP does (Jacobson 1988).

    Args:
        most: never more than this.
        start: how many at first.
    """

    def __init__(self, most: int, start: int) -> None:
        self.most = most
        self.limit = float(min(start, most))
        self._cut: float | None = None

    def start_over(self) -> None:
        """One at first: a server that was down may not have got over what took it down."""
        self.limit, self._cut = 1.0, None

    def ended(self, started: float, now: float, overloaded: bool) -> None:
        """A request that was sent at ``started`` has ended."""
        if not overloaded:
            self.limit = min(self.most, self.limit + (1 if self._cut is None else 1 / self.limit))
        # Requests that were sent before the last cut tell nothing about what it did.
        elif self._cut is None or started >= self._cut:
            self.limit = max(1.0, self.limit / 2)
            self._cut = now


@dataclass(slots=True)
class Ticket:
    """Leave to send one request, with what it can cost at worst."""

    started: float
    worst: Usage
    entry: Entry


class Limits:
    """What the next request has to wait for. Every request asks :meth:`admit` and ends with :meth:`done`.

    The budget counts a request with its worst case while it is in flight, so that it cannot be exceeded, and with
    what the server says it used when it has ended. ``spent`` is what an earlier run has spent of the same budget, or
    had set aside when it was killed.
    """

    def __init__(
        self,
        concurrency: int,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        budget: BudgetConfig | None = None,
        price: PriceConfig | None = None,
        slow_s: float = math.inf,
        start: int | None = None,
    ) -> None:
        self.concurrency = Concurrency(concurrency, concurrency if start is None else start)
        self.in_flight = 0
        self.used_up: str | None = None
        """The setting that ended the run, with its value."""
        self._requests = Window(requests_per_minute)
        self._tokens = Window(tokens_per_minute)
        self._budget = budget or BudgetConfig()
        self._price = price or PriceConfig()
        self._slow_s = slow_s
        self._paused_until = -math.inf
        self._before = Spend()
        self._sent = 0
        self._used = Usage()
        self._reserved = Usage()
        self.set_aside: Callable[[Spend], None] | None = None
        """Told what may be spent before it is, so that a later run knows, however this one ends."""
        self._set_aside = Spend()

    @property
    def spent(self) -> Spend:
        """Everything so far; requests in flight count with their worst case."""
        return self._spend(Usage())

    @spent.setter
    def spent(self, before: Spend) -> None:
        self._before = before

    def _spend(self, more: Usage) -> Spend:
        # In this order, the reverse of :meth:`done`'s: from another thread this may be too much, never too little.
        reserved = self._reserved
        used = self._used
        prompt = used.prompt + reserved.prompt + more.prompt
        completion = used.completion + reserved.completion + more.completion
        # From whole tokens every time: sums of small floats would drift past the budget.
        millions = prompt * (self._price.input_per_million or 0.0), completion * (self._price.output_per_million or 0.0)
        before = self._before
        return Spend(
            before.requests + self._sent,
            before.prompt_tokens + prompt,
            before.completion_tokens + completion,
            before.usd + sum(millions) / 1e6,
        )

    def admit(self, now: float, worst: Usage) -> Ticket | float:
        """A ticket, or the seconds until it is worth asking again; infinite: when another request has ended.

        Raises:
            BudgetSpentError: if the budget has no room for the request, and none in flight can leave any.
            NeverAllowedError: if the request alone is larger than the limit of tokens per minute.
        """
        if (over := self._over_budget(worst)) is not None:
            if over == "requests" or not self.in_flight:
                self.used_up = f"labeler.budget.{over}={getattr(self._budget, over)}"
                raise BudgetSpentError(self.used_up)
            return math.inf
        if self.in_flight >= int(self.concurrency.limit):
            return math.inf
        tokens = worst.prompt + worst.completion
        wait = max(self._paused_until - now, self._requests.wait(now, 1), self._tokens.wait(now, tokens))
        if wait == math.inf:
            raise NeverAllowedError(f"it may take {tokens} tokens, and labeler.tokens_per_minute={self._tokens.most}")
        if wait > 0:
            return wait
        self._note(worst)
        self._requests.add(now, 1)
        self._sent += 1
        self._reserved = Usage(self._reserved.prompt + worst.prompt, self._reserved.completion + worst.completion)
        self.in_flight += 1
        return Ticket(now, worst, self._tokens.add(now, tokens))

    def done(self, now: float, ticket: Ticket, used: Usage | None, overloaded: bool = False) -> None:
        """The request has ended. ``used=None``: nobody knows what it cost, so it counts with the worst case."""
        used = ticket.worst if used is None else used
        self.in_flight -= 1
        # In this order: whoever reads ``spent`` in between, from another thread, sees too much and never too little.
        self._used = Usage(self._used.prompt + used.prompt, self._used.completion + used.completion)
        self._reserved = Usage(
            self._reserved.prompt - ticket.worst.prompt, self._reserved.completion - ticket.worst.completion
        )
        self._tokens.correct(now, ticket.entry, used.prompt + used.completion)
        self.concurrency.ended(ticket.started, now, overloaded or now - ticket.started > self._slow_s)

    def settle(self) -> Spend:
        """What has been spent, once nothing is in flight; what was set aside beyond that is free again."""
        self._set_aside = Spend()
        return self.spent

    def _note(self, worst: Usage) -> None:
        """Set aside what the next request can cost, and as much for some more."""
        if self.set_aside is None:
            return
        needed = self._with(worst, 1)
        if any(new > old for new, old in zip(needed, self._set_aside, strict=True)):
            ahead = self._with(worst, AHEAD)
            total = needed if self._exceeded(ahead) else ahead
            self.set_aside(total)
            self._set_aside = total

    def _with(self, worst: Usage, count: int) -> Spend:
        """Everything so far and so many requests more."""
        total = self._spend(Usage(worst.prompt * count, worst.completion * count))
        return total._replace(requests=total.requests + count)

    def pause(self, until: float) -> None:
        """Send nothing before ``until``: the server has said so."""
        self._paused_until = max(self._paused_until, until)

    def _over_budget(self, worst: Usage) -> str | None:
        """Which budget one more request could exceed."""
        if self.used_up:
            return self.used_up.removeprefix("labeler.budget.").partition("=")[0]
        return self._exceeded(self._with(worst, 1))

    def _exceeded(self, total: Spend) -> str | None:
        """Which budget that would be too much for."""
        budget = self._budget
        if budget.requests is not None and total.requests > budget.requests:
            return "requests"
        if budget.tokens is not None and total.prompt_tokens + total.completion_tokens > budget.tokens:
            return "tokens"
        if budget.usd is not None and total.usd > budget.usd:
            return "usd"
        return None
