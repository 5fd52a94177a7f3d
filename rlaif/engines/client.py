"""The connection to one server: a thread with an event loop, retries, and the limits that every request passes.

aiohttp without the openai library: that builds and checks an object for every field, at 5 to 10 times the cost of
the request itself. No error, log line or representation holds the API key.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import math
import os
import queue
import random
import re
import threading
import urllib.request
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from rlaif.engines.limits import BudgetSpentError, Limits, NeverAllowedError, Ticket, Usage
from rlaif.engines.wire import AttemptError, forbids_logprobs, rate_limit_wait, retry_after, usage
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
        self._proxy = _proxy(base_url) if proxied else None
        self._urls: dict[str, URL] = {}
        self._answered = False  # has the server accepted a request yet?
        self._waiting: deque[tuple[asyncio.Future[Ticket], Usage]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        # A generator of its own: drawing back-offs must not move the random state of anything else.
        self._jitter = random.Random()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-engine", daemon=True)
        self._thread.start()
        self._session = self.call(self._open())

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
    ) -> Iterator[tuple[int, R]]:
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
            UserError: if the server refuses the key or the model.
        """
        data = json.dumps(body).encode()
        attempt = 0
        while True:
            try:
                return parse(await self._attempt(path, data, worst))
            except AttemptError as problem:
                wait = min(MAX_BACKOFF_S, BACKOFF_S * 2.0**attempt) * self._jitter.uniform(0.5, 1)
                if problem.retry_after is not None:
                    wait = problem.retry_after + self._jitter.uniform(0, 0.1)
                if not problem.retry or attempt >= self._max_retries or (problem.retry_after or 0) > MAX_RETRY_AFTER_S:
                    raise
                if problem.retry_after is not None:
                    # The limit holds for the key, so every other request would only run into it too.
                    self.limits.pause(self._loop.time() + problem.retry_after)
                log.debug("attempt %d: %s %s; again in %.1f s", attempt + 1, problem.reason, problem.detail, wait)
            await asyncio.sleep(wait)
            attempt += 1

    async def _attempt(self, path: str, data: bytes, worst: Usage) -> dict[str, Any]:
        """One request within the limits, which learn how it ended."""
        ticket = await self._turn(worst)
        used: Usage | None = None
        overloaded = False
        try:
            status, headers, content = await self.request("POST", path, data)
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
            overloaded = overloaded or problem.reason == "timeout"
            used = used if problem.sent else Usage()
            raise
        finally:
            self.limits.done(self._loop.time(), ticket, used, overloaded)
            self._admit()

    async def _turn(self, worst: Usage) -> Ticket:
        """Wait, in the order of asking, until the limits allow the request."""
        place: asyncio.Future[Ticket] = self._loop.create_future()
        self._waiting.append((place, worst))
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
            place, worst = self._waiting[0]
            if not place.done():
                try:
                    answer = self.limits.admit(self._loop.time(), worst)
                except BudgetSpentError as error:
                    place.set_exception(AttemptError("budget", str(error), retry=False))
                except NeverAllowedError as error:
                    place.set_exception(AttemptError("over_limit", str(error), retry=False))
                except UserError as error:  # what it may cost could not be noted
                    place.set_exception(error)
                else:
                    if isinstance(answer, float):
                        if answer < math.inf:
                            self._timer = self._loop.call_later(answer, self._admit)
                        return
                    place.set_result(answer)
            self._waiting.popleft()

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
                method, self._urls[path], data=data, timeout=aiohttp.ClientTimeout(total=timeout)
            ) as response:
                return response.status, response.headers, await response.read()
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
            payload = json.loads(content)
        except ValueError:
            raise AttemptError("malformed", "the response is not JSON") from None
        if secret and b"\\" in content:
            payload = self._redacted(payload)
        if not isinstance(payload, dict) or not isinstance(payload.get("choices"), list):
            raise AttemptError("malformed", self.shorten(f"the response has no choices: {payload}"))
        if not payload["choices"]:
            raise AttemptError("empty", "the response has an empty list of choices")
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
        detail, code = self.server_message(content)
        known = 402 if status == 429 and code == "insufficient_quota" else status
        # Where others went through, a 403 or 404 is about this request (a moderated text), not about key or model.
        about_request = self._answered or (known == 403 and forbids_logprobs(detail))
        if known in (401, 402) or (known in _HINTS and not about_request):
            return UserError(f"{self._where}: HTTP {status}: {detail}; {self.hint(known)}")
        reason = "rate_limited" if status == 429 else f"http_{status}"
        retry = status in _RETRIED or status >= 500
        return AttemptError(reason, detail, retry=retry, status=status, retry_after=retry_after(headers))

    def hint(self, status: int) -> str:
        """What to do about a status that no request can get past."""
        return _HINTS[status].format(key_env=self._key_env)

    def server_message(self, content: bytes) -> tuple[str, str]:
        """Message and code of an error, in any of the shapes that servers give it."""
        text = content.decode("utf-8", "replace")
        body: Any
        try:
            body = json.loads(text)
        except ValueError:
            body = text
        code = ""
        if isinstance(body, dict) and isinstance(body.get("error"), dict):
            body = body["error"]
        if isinstance(body, dict):
            code = str(body.get("code"))
            body = body.get("message") or body.get("detail") or body.get("error") or body
        return self.shorten(str(body or "no message")), code

    def shorten(self, text: str) -> str:
        """One line of at most 200 characters without control characters and the key (a cut key is not found)."""
        if self._key:
            text = self._spelt.sub("***", text)
        text = visible(" ".join(re.sub(r"\bsk-[\w*-]+", "***", text).split()))
        return text if len(text) <= 200 else text[:197] + "..."


def find_key(variable: str, loopback: bool) -> str:
    """The API key; empty where a server on this machine needs none.

    Raises:
        UserError: if there is none, or none that a request could carry.
    """
    key = os.environ.get(variable, "").strip()
    if not key and not loopback:
        raise UserError(
            f"no API key: set the environment variable {variable} (labeler.api_key_env names another; "
            "only a server on this machine needs none)"
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the API key in the environment variable {variable} has characters that no key has")
    return key


def check_url(url: str, key: str, reason: str) -> tuple[str, bool]:
    """An address without a slash at its end, and whether it is on this machine.

    Args:
        url: the address.
        key: the setting that holds it.
        reason: why no secret may stand in it.

    Raises:
        UserError: if it is no address, or holds what may be a secret.
    """
    # What stands before an @ or after a ? may be a secret, also in an address that can't be read.
    where = key if re.search("[@?#]", url) else f"{key}={url}"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UserError(f"{where}: not a valid address; give one like http://127.0.0.1:8000/v1") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        # The address is written into every artefact, so it must not carry a secret; nor does this message.
        raise UserError(f"{key}: an address with a user, a query or a fragment is refused, because {reason}")
    if parts.scheme not in ("http", "https") or not host or re.search(r"\s", url):
        raise UserError(f"{where}: not a valid address; give one like http://127.0.0.1:8000/v1")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    return url.rstrip("/"), loopback


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


def _proxy(base_url: str) -> str | None:
    """The proxy that the environment names for an address (aiohttp's own look-up reads ~/.netrc for every request)."""
    parts = urlsplit(base_url)
    if urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")
