"""Does the server refuse every request? Then the run ends after some, not after a million."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Iterator
from typing import Any

from rlaif.engines.base import CONTENT_FILTER, Failure
from rlaif.engines.wire import AttemptError
from rlaif.records import UserError

MOST = 50
"""If so many requests fail for one reason and none has been answered, a plain question shows whether any can be."""

_BY_WORDS = (
    (r"continue_final_message|add_generation_prompt|prefill", "try labeler.prefill=false"),
    (r"chat_template", "see labeler.chat_template_kwargs"),
    (r"context length|context window|too long|too many tokens", "serve the model with a longer context"),
    (r"logprobs", "see labeler.top_logprobs"),
    (r"", "labeler.extra_body sets what it asks for; labeler.model and labeler.base_url say who is asked"),
)
_BY_REASON = {
    "malformed": "check the address (it usually ends in /v1)",
    "too_large": "check the address (it usually ends in /v1)",
    "empty": "check labeler.model and what serves it",
    "rate_limited": "see labeler.requests_per_minute, labeler.tokens_per_minute and labeler.concurrency",
    "over_limit": "raise the limit",
    CONTENT_FILTER: "see the server's own settings of its content filter",
}


class Refusals:
    """Counts failed requests until one is answered.

    Args:
        where: begins the line that ends the run.
        ask_plainly: asks the server something harmless, once; raises AttemptError if that fails.
    """

    def __init__(self, where: str, ask_plainly: Callable[[], Awaitable[object]]) -> None:
        self._where, self._ask_plainly = where, ask_plainly
        self._reasons: Counter[str] = Counter()
        self._asking = asyncio.Lock()
        self.over = False
        """Whether the server has answered something, so that a request which fails is itself at fault."""

    async def add(self, problem: AttemptError) -> None:
        """One request more has failed.

        Raises:
            UserError: with the server's words, if it refuses a plain question for the same reason as many requests.
        """
        if self.over or problem.reason == "budget":
            return
        self._reasons[problem.reason] += 1
        if self._reasons[problem.reason] < MOST:
            return
        async with self._asking:
            if self.over:
                return
            try:
                await self._ask_plainly()
            except AttemptError as refused:
                if refused.reason == problem.reason:
                    raise UserError(
                        f"{self._where}: {MOST} requests failed with {refused.reason} and none was answered, nor is a "
                        f"plain question: {refused.detail}; {_hint(refused)}"
                    ) from None
                self._reasons.clear()  # something else is wrong by now
            else:
                self.over = True


def _hint(problem: AttemptError) -> str:
    """The setting that would help."""
    if problem.reason in _BY_REASON:
        return _BY_REASON[problem.reason]
    return next(hint for words, hint in _BY_WORDS if re.search(words, problem.detail, re.IGNORECASE))


def while_some_succeed(
    results: Generator[tuple[int, Any]], where: str, patience_s: float, waited_s: Callable[[], float]
) -> Iterator[tuple[int, Any]]:
    """Results, until requests have failed for too long with none answered between them.

    A server that answers harmless questions is neither down nor does it refuse everything; yet if nothing that is
    asked of it comes back, asking on is of no use.

    Args:
        results: of the requests, as they come in.
        where: begins the line that ends the run.
        patience_s: ``labeler.outage_s``.
        waited_s: how long the server has been down, which does not count.

    Raises:
        UserError: with the last reason.
    """
    failed, since = 0, 0.0
    with contextlib.closing(results):
        for index, result in results:
            if not isinstance(result, Failure) or result.permanent or result.reason == "budget":
                failed = 0
            else:
                now = time.monotonic() - waited_s()
                since = since if failed else now
                failed += 1
                if failed >= MOST and now - since >= patience_s:
                    raise UserError(
                        f"{where}: {failed} requests in a row have failed in {now - since:.0f} seconds "
                        f"(labeler.outage_s={patience_s:g}), the last one with {result.reason}: {result.detail}; what "
                        "was answered before is kept, and the same command goes on from here"
                    )
            yield index, result
