"""The connection to one server: a thread with an event loop, retries, and the limits that every request passes.

aiohttp without the openai library: that builds and checks an object for every field, at 5 to 10 times the cost of
the request itself. No error, log line or representation holds the API key.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import queue
import random
import re
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar
from urllib.parse import urljoin, urlsplit

import aiohttp
from yarl import URL

from rlaif.engines.address import find_proxy
from rlaif.engines.base import CONTENT_FILTER
from rlaif.engines.breaker import Breaker
from rlaif.engines.limits import BudgetSpentError, Limits, NeverAllowedError, Ticket, Usage
from rlaif.engines.wire import (
    AttemptError,
    error_message,
    forbids_logprobs,
    is_filtered,
    parse_response,
    rate_limit_wait,
    retry_after,
    usage,
)
from rlaif.records import UserError
from rlaif.text import visible

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

BACKOFF_S = 0.5
"""First back-off; it doubles with every retry up to ``MAX_BACKOFF_S``."""
MAX_BACKOFF_S = 30.0
MAX_RETRY_AFTER_S = 300.0
"""A request fails, instead of hanging the run, if the server asks for a longer wait than this."""
MAX_RATE_LIMIT_PAUSE_S = 60.0
"""Longest pause because of ``x-ratelimit`` headers; where they mean a day's limit, an answer 429 will say so."""
MAX_RESPONSE_MIB = 16
"""A response that is larger once it is unpacked is not read to its end."""
OUTAGES_A_REQUEST = 3
"""So often a request may be in flight when a server goes down, at no expense of its retries. Maybe it is the cause."""
SHORTEST_SECRET = 8
"""A key of fewer characters ("EMPTY" for a server of one's own) is none, and may be part of an honest reply."""
_SHUTDOWN_S = 1.5

_RETRIED = {408, 409, 425, 429}
_OVERLOADED = {429, 503, 529}
_HINTS = {
    401: "check the key in the environment variable {key_env}",
    402: "the account has no credit",
    403: "the key in {key_env} may not use this model",
    404: "check the model's name and the address (it usually ends in /v1)",
}
"""Statuses that no request of the run can get past."""


class Client:
    """Talks to the server at ``base_url``. ``where`` begins the line that a refused key or model ends the run with."""

    def __init__(
        self,
        base_url: str,
        key: str,
        limits: Limits,
        *,
        headers: dict[str, str],
        proxied: bool,
        concurrency: int,
        timeout_s: float,
        max_retries: int,
        where: str,
        key_env: str,
    ) -> None:
        self.limits = limits
        self._base_url, self._key, self._where, self._key_env = base_url, key, where, key_env
        self._concurrency, self._timeout_s, self._max_retries = concurrency, timeout_s, max_retries
        self._headers = headers
        # Each character may be escaped, where a server quotes JSON or cuts it.
        self._spelt = re.compile(
            "".join(rf"(?:\\{{0,4}}{re.escape(one)}|\\{{1,4}}u(?i:{ord(one):04x}))" for one in key) or "(?!)"
        )
        self._proxy = find_proxy(base_url) if proxied else None
        self._urls: dict[str, URL] = {}
        self._answered = False  # has the server accepted a request yet?
        self._breaker: Breaker | None = None
        self._waiting: deque[tuple[asyncio.Future[Ticket], Usage, bool]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        # A generator of its own: drawing back-offs must not move the random state of anything else.
        self._jitter = random.Random()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-engine", daemon=True)
        self._thread.start()
        self._session = self.call(self._open())
        if key and proxied and urlsplit(base_url).scheme == "http":
            log.warning("%s: the key in %s is sent over plain http, for all on the way to read", where, key_env)

    def expect_outages(self, probe: Callable[[], Awaitable[object]], patience_s: float) -> None:
        """Pause while the server is down, instead of letting one request after the other fail.

        Args:
            probe: asks the server something harmless by :meth:`try_once`.
            patience_s: seconds without any answer after which every request raises UserError.
        """
        self._breaker = Breaker(self._where, patience_s, probe, self._resume)

    @property
    def waited_s(self) -> float:
        """Seconds in which the server was down."""
        return self._breaker.waited_s if self._breaker is not None else 0.0

    async def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers={
                **self._headers,
                "Content-Type": "application/json",
                "Authorization": f"Bearer {self._key or 'none'}",
            },
            connector=aiohttp.TCPConnector(limit=0),  # the limits are ours
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            proxy=self._proxy,
        )

    def call(self, job: Any) -> Any:
        """Run a coroutine on the loop's thread and wait for its result."""
        return asyncio.run_coroutine_threadsafe(job, self._loop).result()

    def close(self) -> None:
        """Cancel what is in flight, close the connections and end the thread."""
        if self._loop.is_closed():
            return
        try:
            asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result(_SHUTDOWN_S)
        except TimeoutError:
            log.debug("%s: connections did not close in time", self._base_url)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_SHUTDOWN_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _shut_down(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    def stream(
        self,
        requests: Iterable[T],
        job: Callable[[Sequence[T]], Awaitable[Sequence[R]]],
        size: int = 1,
        after_burst: Callable[[], None] = lambda: None,
    ) -> Generator[tuple[int, R]]:
        """Results of ``job`` on batches of ``size`` requests, as they end; at most ``concurrency`` jobs at once.

        As many batches again are pulled ahead, so that the server does not wait while the caller works.
        ``after_burst`` is called whenever results that came together have been handed over.
        """
        run: _Stream[T, R] = _Stream(self._loop, job, self._concurrency)
        source = iter(requests)
        step = max(1, self._concurrency // 4)
        start = in_hand = 0
        more = True
        try:
            while True:
                while more and in_hand + step <= 2 * self._concurrency:
                    units: list[tuple[int, list[T]]] = []
                    while len(units) < step and (batch := list(islice(source, size))):
                        units.append((start, batch))
                        start += len(batch)
                    more = len(units) == step
                    in_hand += len(units)
                    self._loop.call_soon_threadsafe(run.give, units)
                if not in_hand:
                    return
                problem = None
                for entry in run.results.get():
                    in_hand -= 1
                    if isinstance(entry, Exception):
                        problem = entry  # what others have got comes first: it may have been paid for
                        continue
                    yield from enumerate(entry[1], entry[0])
                after_burst()
                if problem is not None:
                    raise problem
        finally:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(run.cancel)

    async def post(self, path: str, body: dict[str, Any], worst: Usage, parse: Callable[[dict[str, Any]], T]) -> T:
        """A response, parsed; tried again with back-off while that can help. ``worst`` is the most it can cost.

        Raises:
            AttemptError: if the last attempt failed, or the limits forbid another.
            UserError: if the server refuses the key or the model, or is down for too long.
        """
        data = json.dumps(body).encode()
        attempt = outages = 0
        while True:
            began = self._loop.time()
            try:
                return parse(await self._attempt(path, data, worst))
            except AttemptError as problem:
                last = attempt >= self._max_retries or (problem.retry_after or 0) > MAX_RETRY_AFTER_S
                last = last or not problem.retry
                if problem.outage and outages < OUTAGES_A_REQUEST and await self._was_down(began, last):
                    outages += 1
                    continue  # the next attempt waits until the server is back
                if last:
                    raise
                wait = min(MAX_BACKOFF_S, BACKOFF_S * 2.0**attempt) * self._jitter.uniform(0.5, 1)
                if problem.retry_after is not None:
                    wait = problem.retry_after + self._jitter.uniform(0, 0.1)
                    # The limit holds for the key, so every other request would only run into it too.
                    self.limits.pause(self._loop.time() + problem.retry_after)
                log.debug("attempt %d: %s %s; again in %.1f s", attempt + 1, problem.reason, problem.detail, wait)
            await asyncio.sleep(wait)
            attempt += 1

    async def try_once(self, path: str, body: dict[str, Any], worst: Usage, parse: Callable[[dict[str, Any]], T]) -> T:
        """As :meth:`post`, but with a single attempt, which is made also while others wait for a server that is down.

        Raises:
            AttemptError: if it fails.
            UserError: if the server refuses the key or the model.
        """
        return parse(await self._attempt(path, json.dumps(body).encode(), worst, is_probe=True))

    def _resume(self, was_down: bool) -> None:
        if was_down:
            self.limits.concurrency.start_over()
            # A request that takes the server down must not take the same others with it each time.
            self._jitter.shuffle(self._waiting)
        self._admit()

    async def _was_down(self, began: float, find_out: bool) -> bool:
        """Whether it is for the server, not the request, that an attempt has failed which began at that time."""
        if self._breaker is None:
            return False
        known = self._breaker.open or began < self._breaker.back_at
        return known or (find_out and not await self._breaker.is_up())

    async def _attempt(self, path: str, data: bytes, worst: Usage, is_probe: bool = False) -> dict[str, Any]:
        """One request within the limits, which learn how it ended."""
        ticket = await self._turn(worst, is_probe)
        used: Usage | None = None
        overloaded = False
        try:
            status, headers, content = await self.request("POST", path, data)
            if self._breaker is not None and status < 500:
                self._breaker.answered()
            if status >= 400:
                # A request that is refused costs nothing; one that broke the server may have cost everything.
                used, overloaded = (Usage() if status < 500 else None), status in _OVERLOADED
                raise self._status_problem(status, headers, content)
            if wait := rate_limit_wait(headers, worst.prompt + worst.completion):
                self.limits.pause(self._loop.time() + min(wait, MAX_RATE_LIMIT_PAUSE_S))
            payload = self._parsed(content)
            used = usage(payload)
            return payload
        except AttemptError as problem:
            if self._breaker is not None and problem.outage:
                self._breaker.failed(problem)
            overloaded = overloaded or problem.reason == "timeout"
            used = used if problem.sent else Usage()
            if problem.reason == "redirect" and not self._answered:
                raise UserError(f"{self._where}: {problem.detail}") from None
            raise
        finally:
            self.limits.done(self._loop.time(), ticket, used, overloaded)
            self._admit()

    async def _turn(self, worst: Usage, is_probe: bool) -> Ticket:
        """Wait, in the order of asking, until the server is up and the limits allow the request."""
        place: asyncio.Future[Ticket] = self._loop.create_future()
        # A probe goes first: the others may wait for what it finds out.
        (self._waiting.appendleft if is_probe else self._waiting.append)((place, worst, is_probe))
        self._admit()
        try:
            return place.result() if place.done() else await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.limits.done(self._loop.time(), place.result(), Usage())
                self._admit()
            raise

    def _admit(self) -> None:
        """Let in whoever may go; whoever may not is asked again when a request ends or the wait is over."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            place, worst, is_probe = self._waiting[0]
            if not place.done():
                try:
                    answer = self._may_go(worst, is_probe)
                except BudgetSpentError as error:
                    place.set_exception(AttemptError("budget", str(error), retry=False, sent=False))
                except NeverAllowedError as error:
                    place.set_exception(AttemptError("over_limit", str(error), retry=False, sent=False))
                except Exception as error:  # what it may cost could not be noted, or the server is down for good
                    place.set_exception(error)
                else:
                    if isinstance(answer, float):
                        if answer < math.inf:
                            self._timer = self._loop.call_later(answer, self._admit)
                        return
                    place.set_result(answer)
            self._waiting.popleft()

    def _may_go(self, worst: Usage, is_probe: bool) -> Ticket | float:
        """As :meth:`Limits.admit`, but only to a server that is up, or to find out whether it is."""
        if self._breaker is not None and not is_probe:
            if self._breaker.stopped is not None:
                raise self._breaker.stopped.with_traceback(None)
            if self._breaker.open:
                return math.inf
        return self.limits.admit(self._loop.time(), worst)

    async def request(
        self, method: str, path: str, data: bytes | None = None, timeout_s: float | None = None
    ) -> tuple[int, Any, bytes]:
        """Status, headers and content of one HTTP request, with no limit and no retry.

        Raises:
            AttemptError: if there is no complete answer.
        """
        if path not in self._urls:
            self._urls[path] = URL(self._base_url + path)
        timeout = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with self._session.request(
                method,
                self._urls[path],
                data=data,
                timeout=aiohttp.ClientTimeout(total=timeout),
                # Prompts go to nobody but the server that was named.
                allow_redirects=False,
            ) as response:
                if 300 <= response.status < 400:
                    raise AttemptError("redirect", self._redirect(response), retry=False, sent=False)
                return response.status, response.headers, await _bounded(response)
        except aiohttp.ClientConnectorError as error:
            raise AttemptError("connection", self.shorten(str(error)), sent=False) from None
        except TimeoutError:
            raise AttemptError("timeout", f"no answer within {timeout:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise AttemptError("connection", self.shorten(str(error) or type(error).__name__)) from None

    def _parsed(self, content: bytes) -> dict[str, Any]:
        # A server may say the key back; replies are stored.
        secret = len(self._key) >= SHORTEST_SECRET
        if secret:
            content = content.replace(self._key.encode(), b"***")
        try:
            payload = parse_response(content)
            if secret and b"\\" in content:
                payload = self._redacted(payload)
        except AttemptError as problem:
            raise AttemptError(problem.reason, self.shorten(problem.detail)) from None
        except RecursionError:
            raise AttemptError("malformed", "the response is nested too deeply") from None
        self._answered = True
        return payload

    def _redacted(self, value: Any) -> Any:
        """Parsed JSON without the key, however JSON had spelt it."""
        if isinstance(value, str):
            return self._spelt.sub("***", value)
        if isinstance(value, list):
            return [self._redacted(entry) for entry in value]
        if isinstance(value, dict):
            return {self._redacted(name): self._redacted(entry) for name, entry in value.items()}
        return value

    def _status_problem(self, status: int, headers: Any, content: bytes) -> Exception:
        detail, codes = self.server_message(content)
        if status < 500 and is_filtered(codes):
            return AttemptError(CONTENT_FILTER, detail, retry=False, status=status)
        known = 402 if status == 429 and "insufficient_quota" in codes else status
        # Where others went through, a 403 or 404 is about this request (a moderated text), not about key or model.
        about_request = self._answered or (known == 403 and forbids_logprobs(detail))
        if known in (401, 402) or (known in _HINTS and not about_request):
            return UserError(f"{self._where}: HTTP {status}: {detail}; {self.hint(known)}")
        reason = "rate_limited" if status == 429 else f"http_{status}"
        retry = status in _RETRIED or status >= 500
        return AttemptError(reason, detail, retry=retry, status=status, retry_after=retry_after(headers))

    def _redirect(self, response: aiohttp.ClientResponse) -> str:
        """What to say of an answer that points elsewhere."""
        try:
            parts = urlsplit(urljoin(self._base_url + "/", response.headers.get("Location", "")))
            # Without what may be a secret.
            target = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        except ValueError:
            target = "no address"
        return (
            f"HTTP {response.status} points to {self.shorten(target)}; redirects are not followed: "
            "give the address of the server itself"
        )

    def hint(self, status: int) -> str:
        """What to do about a status that no request can get past."""
        return _HINTS[status].format(key_env=self._key_env)

    def server_message(self, content: bytes) -> tuple[str, set[str]]:
        """Message and codes of an error, in any of the shapes that servers give it."""
        text, codes = error_message(content)
        return self.shorten(text) or "no message", codes

    def shorten(self, text: str) -> str:
        """One line of at most 200 characters without control characters and the key (a cut key is not found)."""
        if self._key:
            text = self._spelt.sub("***", text)
        text = visible(" ".join(re.sub(r"\bsk-[\w*-]+", "***", text).split())[:201])
        return text if len(text) <= 200 else text[:197] + "..."


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    """The content of a response, as long as it is not too large; a small packed one can be huge.

    Raises:
        AttemptError: if it is.
    """
    parts: list[bytes] = []
    left = MAX_RESPONSE_MIB << 20
    while part := await response.content.readany():
        left -= len(part)
        if left < 0:
            raise AttemptError("too_large", f"the response has more than {MAX_RESPONSE_MIB} MiB", retry=False)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Stream(Generic[T, R]):
    """Batches on their way from the caller's thread to the loop's, and results on their way back.

    Results are handed back once per turn of the loop, not one by one: each hand-over wakes a thread.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, job: Callable[[Sequence[T]], Awaitable[Sequence[R]]], most: int
    ) -> None:
        self._loop, self._job, self._most = loop, job, most
        self._waiting: deque[tuple[int, Sequence[T]]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._ended: list[tuple[int, Sequence[R]] | Exception] = []
        self.results: queue.SimpleQueue[list[tuple[int, Sequence[R]] | Exception]] = queue.SimpleQueue()

    def give(self, units: Sequence[tuple[int, Sequence[T]]]) -> None:
        """Run these (on the loop's thread)."""
        self._waiting.extend(units)
        self._start()

    def cancel(self) -> None:
        """Forget everything (on the loop's thread)."""
        self._waiting.clear()
        for task in self._running:
            task.cancel()

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._most:
            task = self._loop.create_task(self._run(*self._waiting.popleft()))
            self._running.add(task)
            task.add_done_callback(self._finished)

    async def _run(self, first: int, unit: Sequence[T]) -> None:
        try:
            entry: Any = (first, await self._job(unit))
        except Exception as error:
            entry = error
        if not self._ended:
            self._loop.call_soon(self._hand_back)
        self._ended.append(entry)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    def _hand_back(self) -> None:
        ended, self._ended = self._ended, []
        self.results.put(ended)
