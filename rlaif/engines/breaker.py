"""Is the server as a whole down? Then nothing more is sent, and one question at a time tries whether it is back.

A circuit breaker (Nygard 2007, Release It!), for any client that runs on an event loop. It must be used on that loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable

from rlaif.engines.wire import AttemptError
from rlaif.records import UserError

log = logging.getLogger(__name__)

IN_A_ROW = 5
"""After so many failed attempts with no answer between them the server is suspected to be down."""
FIRST_WAIT_S = 0.5
"""Wait after the first question that stays without an answer; it doubles up to ``MAX_WAIT_S``."""
MAX_WAIT_S = 10.0


class Breaker:
    """Open while the server does not answer. An answer to the probe, a refusal too, closes it.

    Args:
        where: names the server in the lines that are logged, and in the one that ends the run.
        patience_s: seconds without any answer after which the run ends (``labeler.outage_s``).
        probe: asks the server something harmless, once; raises AttemptError if that fails.
        resume: called when requests may be sent again, or never will be, with whether the server was down.
    """

    def __init__(
        self, where: str, patience_s: float, probe: Callable[[], Awaitable[object]], resume: Callable[[bool], None]
    ) -> None:
        self._where, self._patience_s, self._probe, self._resume = where, patience_s, probe, resume
        self.open = False
        self.stopped: Exception | None = None
        """Why nothing will be sent any more."""
        self.waited_s = 0.0
        """Seconds of all outages that have ended."""
        self.back_at = -math.inf
        """When the last outage ended, by the loop's clock."""
        self._down = False
        self._failures = 0
        self._since = self._heard = 0.0
        self._watch: asyncio.Task[bool] | None = None
        self._jitter = random.Random()

    def answered(self) -> None:
        """The server has answered a request.

        If it is suspected to be down, that was sent before. It does not end the outage, but the patience lasts longer.
        """
        if self.open:
            self._heard = asyncio.get_running_loop().time()
        else:
            self._failures = 0

    def failed(self, problem: AttemptError) -> None:
        """An attempt has ended without an answer, for a reason that may be the server's (``problem.outage``)."""
        if not self._failures:
            self._since = asyncio.get_running_loop().time()
        self._failures += 1
        # Where nobody takes the connection, no request can be at fault.
        if self._failures >= IN_A_ROW or not problem.sent:
            self._suspect()

    async def is_up(self) -> bool:
        """Whether the server answers a question now."""
        self._suspect()
        return self._watch is not None and await asyncio.shield(self._watch)

    def _suspect(self) -> None:
        """Send nothing more until the server answers."""
        if self.stopped is None and (self._watch is None or self._watch.done()):
            loop = asyncio.get_running_loop()
            self.open, self._down = True, False
            if not self._failures:
                self._since = loop.time()
            self._watch = loop.create_task(self._until_up())

    async def _until_up(self) -> bool:
        """Ask until the server answers, or for too long; returns whether it answered the first question."""
        clock = asyncio.get_running_loop().time
        wait, tries, answered = FIRST_WAIT_S, 0, True
        while True:
            tries += 1
            try:
                await self._probe()
                break
            except AttemptError as problem:
                if not problem.outage:
                    answered = problem.sent  # else the limits forbid another question
                    break
                down = clock() - max(self._since, self._heard)
                if down >= self._patience_s:
                    self._stop(self._gave_up(down, tries, problem))
                    return False
                if not self._down:
                    self._down = True
                    log.warning(
                        "%s does not answer (%s: %s); asking pauses until it does, for at most "
                        "labeler.outage_s=%g seconds",
                        self._where,
                        problem.reason,
                        problem.detail,
                        self._patience_s,
                    )
                await asyncio.sleep(min(wait * self._jitter.uniform(0.8, 1), self._patience_s - down))
                wait = min(2 * wait, MAX_WAIT_S)
            except Exception as error:  # the key is refused, for example
                self._stop(error)
                return False
        self.open, self._failures = False, 0
        self._resume(self._down)
        if self._down and answered:
            self.back_at = clock()
            down = self.back_at - self._since
            self.waited_s += down
            log.warning("%s answers again after %.0f seconds", self._where, down)
        return not self._down

    def _gave_up(self, down: float, tries: int, problem: AttemptError) -> UserError:
        return UserError(
            f"{self._where}: no answer for {down:.0f} seconds (labeler.outage_s={self._patience_s:g}), asked {tries} "
            f"time{'s' * (tries > 1)} in that time ({problem.reason}: {problem.detail}); what was answered before is "
            "kept, and the same command goes on from here"
        )

    def _stop(self, why: Exception) -> None:
        self.stopped = why
        self._resume(self._down)
