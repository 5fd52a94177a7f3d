"""Any OpenAI-compatible server (vLLM, SGLang, llama.cpp, Ollama, OpenAI ...) over its chat completions.

Options are scored from the first token's log-probabilities. Where a server gives none, the engine says so
once and falls back to sampled replies ("votes"), or one reply ("text"). No error, log line or identity holds
the API key.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import json
import logging
import math
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import aiohttp
import httpx2
import openai

from rlaif.chat import defuse
from rlaif.config import LabelerConfig
from rlaif.engines.base import Engine, Failure, OptionMass, OptionRequest, Sampled, SampleRequest
from rlaif.engines.options import option_masses, parse_reply
from rlaif.records import Message, UserError, content_hash

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"
CHECK_TIMEOUT_S = 10.0
BACKOFF_S = 0.5
"""First back-off; it doubles with every retry up to ``MAX_BACKOFF_S``."""
MAX_BACKOFF_S = 30.0
MAX_RETRY_AFTER_S = 300.0
"""A request fails, instead of hanging the run, if the server asks for a longer wait than this."""
FALLBACK_TOP_LOGPROBS = 5
"""What servers with a cap below 20 usually allow."""
MISSES_BEFORE_FALLBACK = 3
SHORTEST_SECRET = 8
"""A key of fewer characters ("EMPTY" for a server of one's own) is none, and may be part of an honest reply."""
REPLY_TOKENS = 16
"""Length of a reply that is parsed for a verdict."""

_RETRIED = {408, 409, 425, 429}
_HINTS = {
    401: "check the key in the environment variable {key_env}",
    402: "the account has no credit",
    403: "the key in {key_env} may not use this model",
    404: "check labeler.model, and labeler.base_url (it usually ends in /v1)",
}
"""Statuses that no request of the run can get past."""


class _AttemptError(Exception):
    """One attempt without a usable answer. Its texts are already free of the key."""

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        retry: bool = True,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.retry = retry
        self.status = status
        self.retry_after = retry_after

    @property
    def rejected(self) -> bool:
        """The server understood the request and refuses what it asks for."""
        return self.status in (400, 422)


class FirstToken(NamedTuple):
    """A reply's first token. ``listed`` is ``None`` if the server gives no log-probabilities."""

    listed: list[tuple[str, float]] | None
    sampled: str
    reply: str
    prompt_tokens: int | None
    completion_tokens: int | None


class Replies(NamedTuple):
    """The replies of one response: text and finish reason of each."""

    choices: list[tuple[str, str]]
    prompt_tokens: int | None
    completion_tokens: int | None


class OpenAIEngine(Engine):
    """An OpenAI-compatible server. The constructor checks key, address and model before any work is done.

    ``labeler.base_url`` unset means the environment variable ``OPENAI_BASE_URL``, else OpenAI itself.

    Raises:
        UserError: if the key is missing or refused, the server cannot be reached or does not serve the model.
    """

    def __init__(self, config: LabelerConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._base_url, loopback = _check_url(config.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL)
        self._key = _find_key(config.api_key_env, loopback)
        self.identity: dict[str, Any] = {
            "engine": "openai",
            "base_url": self._base_url,
            "model": config.model,
            "votes": config.votes,
            "top_logprobs": config.top_logprobs,
            "prefill": config.prefill,
        }
        if config.votes > 1:
            self.identity["seed"] = seed  # only sampled votes depend on it

        self._answered = False  # has the server accepted a request yet?
        self._logprobs: bool | None = None  # does the server give them? None: not known yet
        self._top_logprobs = config.top_logprobs
        self._misses = 0
        self._many_choices = True
        self._paused_until = 0.0
        # A generator of its own: drawing back-offs must not move the random state of anything else.
        self._jitter = random.Random()
        # httpx logs a line per request at INFO, which Hydra's logging would print thousands of times.
        logging.getLogger("httpx2").setLevel(logging.WARNING)

        self._client = openai.AsyncOpenAI(
            base_url=self._base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=config.timeout_s,
            http_client=openai.DefaultAioHttpClient(
                # A proxy from the environment cannot reach this machine's own addresses.
                trust_env=not loopback,
                limits=httpx2.Limits(max_connections=config.concurrency + 1),
                timeout=config.timeout_s,
            ),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-engine", daemon=True)
        self._thread.start()
        try:
            self.check()
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Ask the server for its models.

        Raises:
            UserError: if it cannot be reached, refuses the key or lists models without ``labeler.model``.
        """
        asyncio.run_coroutine_threadsafe(self._check(), self._loop).result()

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[tuple[int, Sampled | Failure]]:
        """Sample a completion for each request; ``tokens`` is 0 where the server does not count them.

        Raises:
            UserError: if the server refuses the key or the model.
        """
        return self._stream(requests, self._sample)

    def score_options(self, requests: Iterable[OptionRequest]) -> Iterator[tuple[int, OptionMass | Failure]]:
        """Mass of each option, from log-probabilities (see :func:`option_masses`) or from replies.

        Raises:
            UserError: if the server refuses the key or the model.
        """
        return self._stream(requests, self._score)

    def close(self) -> None:
        """Cancel what is in flight, close the connections and end the thread."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut_down(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    def _stream(self, requests: Iterable[T], job: Callable[[T], Coroutine[Any, Any, R]]) -> Iterator[tuple[int, R]]:
        """Run jobs on the loop's thread, ``concurrency`` at once; requests are pulled as places free up."""
        finished: queue.SimpleQueue[Future[R]] = queue.SimpleQueue()
        running: dict[Future[R], int] = {}
        source = enumerate(requests)
        more = True
        try:
            while True:
                while more and len(running) < self._config.concurrency:
                    index, request = next(source, (-1, None))
                    if request is None:
                        more = False
                        break
                    future = asyncio.run_coroutine_threadsafe(job(request), self._loop)
                    running[future] = index
                    future.add_done_callback(finished.put)
                if not running:
                    return
                future = finished.get()
                yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()

    async def _sample(self, request: SampleRequest) -> Sampled | Failure:
        started = time.perf_counter()
        try:
            got = await self._chat(
                _parse_replies,
                messages=_clean(request.messages),
                max_tokens=request.max_new_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
            )
        except _AttemptError as problem:
            return Failure(problem.reason, problem.detail, time.perf_counter() - started)
        text, finish_reason = got.choices[0]
        if finish_reason == "content_filter":
            return Failure("content_filter", "the server withheld the reply", time.perf_counter() - started)
        finish_reason = "length" if finish_reason == "length" else "stop"
        return Sampled(text, finish_reason, got.completion_tokens or 0, got.prompt_tokens)

    async def _score(self, request: OptionRequest) -> OptionMass | Failure:
        started = time.perf_counter()
        try:
            scored = None if self._logprobs is False else await self._score_by_logprobs(request)
            if scored is None:
                scored = await self._score_by_replies(request)
        except _AttemptError as problem:
            return Failure(problem.reason, problem.detail, time.perf_counter() - started)
        masses, method, reply, prompt_tokens, completion_tokens = scored
        latency = time.perf_counter() - started
        return OptionMass(masses, method, reply, prompt_tokens, completion_tokens, latency)

    async def _score_by_logprobs(self, request: OptionRequest) -> _Scored | None:
        """``None`` if the server gives no log-probabilities for this request."""
        # Temperature 1: servers report log-probabilities before the temperature (vLLM) or after it.
        body = {**_body(request, self._config.prefill), "max_tokens": 1, "temperature": 1.0, "logprobs": True}
        refusal: _AttemptError | None = None
        for top in dict.fromkeys((self._top_logprobs, min(self._top_logprobs, FALLBACK_TOP_LOGPROBS))):
            try:
                # Some servers leave them out of a reply now and then.
                for _ in range(MISSES_BEFORE_FALLBACK):
                    token = await self._chat(_parse_first_token, **body, top_logprobs=top)
                    if token.listed is not None:
                        break
                    self._miss()
                    if self._logprobs is False:
                        return None
                else:
                    return None
            except _AttemptError as problem:
                if not problem.rejected or (self._logprobs and top == self._top_logprobs):
                    raise  # a request's own fault: this server has given log-probabilities before
                refusal = problem
                continue
            if top < self._top_logprobs:
                log.warning("%s gives only %d log-probabilities per position", self._base_url, top)
                self._top_logprobs = top
            self._logprobs = True
            masses = option_masses(token.listed, token.sampled, request.options)
            return _Scored(masses, "logprob", token.reply, token.prompt_tokens, token.completion_tokens)
        # Was it the log-probabilities or the request that the server refused? The plain request will tell.
        scored = await self._score_by_replies(request)
        self._give_up_logprobs(refusal.detail if refusal else "")
        return scored

    def _miss(self) -> None:
        self._misses += 1
        if self._logprobs is None and self._misses >= MISSES_BEFORE_FALLBACK:
            self._give_up_logprobs("responses have none")

    def _give_up_logprobs(self, why: str) -> None:
        if self._logprobs is None:
            self._logprobs = False
            log.warning(
                "%s gives no log-probabilities (%s): verdicts come from %d sampled repl%s each",
                self._base_url,
                why,
                self._config.votes,
                "y" if self._config.votes == 1 else "ies",
            )

    async def _score_by_replies(self, request: OptionRequest) -> _Scored:
        """Share of replies per option; a reply without a clear verdict counts for none of them."""
        votes = self._config.votes
        body = _body(request, self._config.prefill)
        body |= {"max_tokens": REPLY_TOKENS, "temperature": 1.0 if votes > 1 else 0.0}
        replies: list[str] = []
        usage: list[Replies] = []
        while len(replies) < votes:
            # Some servers refuse n, others ignore it: ask again, with another seed, for what is missing.
            n = votes - len(replies) if self._many_choices else 1
            extra: dict[str, Any] = {"n": n} if n > 1 else {}
            if votes > 1:
                digest = content_hash(self._seed, request.messages, request.stem, len(replies))
                extra["seed"] = int(digest[:7], 16)
            try:
                got = await self._chat(_parse_replies, **body, **extra)
            except _AttemptError as problem:
                if n == 1 or not problem.rejected:
                    raise
                self._many_choices = False
                continue
            replies += [text for text, _ in got.choices[:n]]
            usage.append(got)
        chosen = [parse_reply(reply, request.options, request.stem) for reply in replies]
        return _Scored(
            tuple(chosen.count(option) / votes for option in range(len(request.options))),
            "votes" if votes > 1 else "text",
            " | ".join(replies),
            _total([got.prompt_tokens for got in usage]),
            _total([got.completion_tokens for got in usage]),
        )

    async def _chat(self, parse: Callable[[dict[str, Any]], T], **body: Any) -> T:
        """One chat completion, parsed; tried again with back-off while that can help."""
        attempt = 0
        while True:
            await self._wait_for_turn()
            try:
                return parse(await self._attempt(body))
            except _AttemptError as problem:
                wait = self._backoff(attempt)
                if problem.retry_after is not None:
                    wait = problem.retry_after + self._jitter.uniform(0, 0.1)
                if (
                    not problem.retry
                    or attempt >= self._config.max_retries
                    or (problem.retry_after or 0) > MAX_RETRY_AFTER_S
                ):
                    raise
                if problem.retry_after is not None:
                    # The limit holds for the key, so every other request would only run into it too.
                    self._paused_until = max(self._paused_until, self._loop.time() + problem.retry_after)
                log.debug("attempt %d: %s %s; again in %.1f s", attempt + 1, problem.reason, problem.detail, wait)
            await asyncio.sleep(wait)
            attempt += 1

    def _backoff(self, attempt: int) -> float:
        return min(MAX_BACKOFF_S, BACKOFF_S * 2.0**attempt) * self._jitter.uniform(0.5, 1)

    async def _wait_for_turn(self) -> None:
        while (wait := self._paused_until - self._loop.time()) > 0:
            await asyncio.sleep(wait + self._jitter.uniform(0, 0.1))

    async def _attempt(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._config.timeout_s):
                # Raw: building the client library's objects costs more than the request.
                raw = await self._client.chat.completions.with_raw_response.create(
                    model=self._config.model or "", **body
                )
                content = raw.content
        except openai.APIStatusError as error:
            raise self._status_problem(error) from None
        except (openai.APIConnectionError, aiohttp.ClientError, OSError) as error:
            raise _AttemptError(*self._connection_reason(error)) from None
        if len(self._key) >= SHORTEST_SECRET:
            # A server may say the key back; replies are stored.
            content = content.replace(self._key.encode(), b"***")
        try:
            payload = json.loads(content)
        except ValueError:
            raise _AttemptError("malformed", "the response is not JSON") from None
        if not isinstance(payload, dict) or not isinstance(payload.get("choices"), list):
            raise _AttemptError("malformed", self._shorten(f"the response has no choices: {payload}"))
        if not payload["choices"]:
            raise _AttemptError("empty", "the response has an empty list of choices")
        self._answered = True
        return payload

    def _status_problem(self, error: openai.APIStatusError) -> Exception:
        status, detail = error.status_code, self._server_message(error)
        if status == 429 and error.code == "insufficient_quota":
            status = 402
        # Where others went through, a 403 or 404 is about this request (a moderated text), not about key or model.
        if status in (401, 402) or (status in _HINTS and not self._answered):
            hint = _HINTS[status].format(key_env=self._config.api_key_env)
            return UserError(
                f"labeler.base_url={self._base_url}, labeler.model={self._config.model}: "
                f"HTTP {error.status_code}: {detail}; {hint}"
            )
        reason = "rate_limited" if status == 429 else f"http_{status}"
        retry = status in _RETRIED or status >= 500
        return _AttemptError(
            reason, detail, retry=retry, status=status, retry_after=_retry_after(error.response.headers)
        )

    def _connection_reason(self, error: BaseException) -> tuple[str, str]:
        """``timeout`` or ``connection``, with what the network said."""
        chain = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        timed_out = any(isinstance(link, (TimeoutError, openai.APITimeoutError)) for link in chain)
        # The aiohttp transport reports any lost connection as a time-out; its own error tells them apart.
        if any(isinstance(link, aiohttp.ClientConnectionError) for link in chain):
            timed_out = any(isinstance(link, TimeoutError) for link in chain)
        if timed_out:
            return "timeout", f"no answer within {self._config.timeout_s:g} s"
        return "connection", self._shorten(str(chain[-1]) or type(chain[-1]).__name__)

    def _server_message(self, error: openai.APIStatusError) -> str:
        body: Any = error.body
        if isinstance(body, dict):
            body = body.get("message") or body.get("detail") or body.get("error") or body
        return self._shorten(str(body or error.response.text or "no message"))

    def _shorten(self, text: str) -> str:
        """One line of at most 200 characters without the key (scrubbed first: a cut key is not found)."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(re.sub(r"\bsk-[\w*-]+", "***", text).split())
        return text if len(text) <= 200 else text[:197] + "..."

    async def _check(self) -> None:
        where = f"labeler.base_url={self._base_url}"
        timeout = min(CHECK_TIMEOUT_S, self._config.timeout_s)
        try:
            async with asyncio.timeout(timeout):
                raw = await self._client.models.with_raw_response.list()
                content = raw.content
        except openai.APIStatusError as error:
            status, detail = error.status_code, self._server_message(error)
            if status == 401:
                hint = _HINTS[401].format(key_env=self._config.api_key_env)
                raise UserError(f"{where}: HTTP 401: {detail}; {hint}") from None
            if status >= 500:
                raise UserError(f"{where}: cannot be reached (HTTP {status}: {detail})") from None
            return  # no listing, or not for this key: the first request will tell
        except (openai.APIConnectionError, aiohttp.ClientError, OSError) as error:
            reason, detail = self._connection_reason(error)
            detail = f"no answer within {timeout:g} s" if reason == "timeout" else detail
            raise UserError(f"{where}: cannot be reached ({detail})") from None
        try:
            listing = json.loads(content)
            names = [str(entry["id"]) for entry in listing["data"]]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{where}: GET /models does not answer as an OpenAI-compatible server does; "
                "check the address (it usually ends in /v1)"
            ) from None
        model = self._config.model
        # Ollama serves "llama3" as "llama3:latest"; Gemini lists "models/" before each name.
        known = {model, f"{model}:latest", f"models/{model}"} & set(names)
        if names and not known and not listing.get("has_more"):
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            raise UserError(f"labeler.model={model}: not served by {self._base_url}; available: {shown}")


class _Scored(NamedTuple):
    masses: tuple[float | None, ...]
    method: str
    reply: str
    prompt_tokens: int | None
    completion_tokens: int | None


def _body(request: OptionRequest, prefill: bool) -> dict[str, Any]:
    """The messages that put a request's stem before the model."""
    messages = _clean(request.messages)
    if not request.stem:
        return {"messages": messages}
    if prefill:
        messages.append({"role": "assistant", "content": request.stem})
        return {
            "messages": messages,
            "extra_body": {"continue_final_message": True, "add_generation_prompt": False},
        }
    last = messages[-1]
    asked = f"{last['content']}\n\nFinish this sentence with one word: {request.stem}"
    return {"messages": [*messages[:-1], {**last, "content": asked}]}


def _clean(messages: Sequence[Message]) -> list[Message]:
    """Messages that can be sent: a lone surrogate becomes U+FFFD, and no text is a control token to the server."""
    return [
        {name: defuse(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace") for name, text in m.items()}
        for m in messages
    ]


def _parse_first_token(payload: dict[str, Any]) -> FirstToken:
    choices, prompt_tokens, completion_tokens = _parse_replies(payload)
    logprobs = payload["choices"][0].get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not content:
        return FirstToken(None, "", choices[0][0], prompt_tokens, completion_tokens)
    try:
        listed = [(str(entry["token"]), float(entry["logprob"])) for entry in content[0]["top_logprobs"] or ()]
        sampled = str(content[0]["token"])
    except (TypeError, KeyError, ValueError, IndexError):
        raise _AttemptError("malformed", "the response's logprobs have an unknown shape") from None
    if any(math.isnan(logprob) for _, logprob in listed):
        raise _AttemptError("malformed", "the response has a log-probability that is not a number")
    return FirstToken(listed or None, sampled, choices[0][0], prompt_tokens, completion_tokens)


def _parse_replies(payload: dict[str, Any]) -> Replies:
    try:
        choices = [
            # A reply that ends at once has no content: an empty text is what the model said.
            (str(choice["message"].get("content") or ""), str(choice.get("finish_reason") or "stop"))
            for choice in payload["choices"]
        ]
    except (TypeError, KeyError, AttributeError):
        raise _AttemptError("malformed", "the response's choices have no message") from None
    usage = payload.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Replies(choices, _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _retry_after(headers: Any) -> float | None:
    """Seconds the server asks to wait: ``Retry-After-Ms``, or ``Retry-After`` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name)) * unit
        except (TypeError, ValueError):
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after"))
        return max(0.0, date.timestamp() - time.time())
    except (TypeError, ValueError, AttributeError):
        return None


def _check_url(url: str) -> tuple[str, bool]:
    """The address, and whether it is on this machine."""
    where = f"labeler.base_url={url}"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{where}: not a valid address ({error})") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        # The address is written into every artefact, so it must not carry a secret; nor does this message.
        raise UserError(
            f"labeler.base_url: an address on {host} with a user, a query or a fragment is refused, because "
            "it is recorded with the labels; give the key in the environment variable that "
            "labeler.api_key_env names"
        )
    if parts.scheme not in ("http", "https") or not host or re.search(r"\s", url):
        raise UserError(f"{where}: not a valid address; give one like http://127.0.0.1:8000/v1")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    return url.rstrip("/"), loopback


def _find_key(variable: str, loopback: bool) -> str:
    """The API key; empty where a server on this machine needs none."""
    key = os.environ.get(variable, "").strip()
    if not key and not loopback:
        raise UserError(
            f"no API key: set the environment variable {variable} (labeler.api_key_env names another; "
            "only a server on this machine needs none)"
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the API key in the environment variable {variable} has characters that no key has")
    return key
