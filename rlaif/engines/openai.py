"""Any OpenAI-compatible server (vLLM, SGLang, llama.cpp, Ollama, OpenAI ...) over its chat completions.

Options are scored from the first token's log-probabilities. Where a server gives none, to the engine's own questions
either, the engine says so once and falls back to sampled replies ("votes"), or one reply ("text"). A server that gives
them is never asked for replies: a request that stays without fails, and a rerun asks it again. No error, log line or
identity holds the API key.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rlaif.config import Endpoint, LabelerConfig
from rlaif.engines.address import account_headers, check_url, find_key
from rlaif.engines.base import CONTENT_FILTER, Engine, Failure, OptionMass, OptionRequest, Sampled, SampleRequest
from rlaif.engines.client import Client
from rlaif.engines.limits import Limits, Spend, Usage
from rlaif.engines.options import (
    LOG_NEGLIGIBLE,
    UNDECIDED,
    Bounds,
    accepted_tokens,
    option_bounds,
    option_masses,
    parse_reply,
    rests,
)
from rlaif.engines.refusals import Refusals, while_some_succeed
from rlaif.engines.wire import (
    WITHHELD,
    AttemptError,
    Dialect,
    FirstToken,
    Replies,
    chat_body,
    clean,
    parse_first_token,
    parse_models,
    parse_replies,
    total,
)
from rlaif.records import UserError, content_hash

if TYPE_CHECKING:
    from rlaif.engines.token_scorer import TokenScorer

T = TypeVar("T")
R = TypeVar("R")
A = TypeVar("A", FirstToken, Replies)

log = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"
CHECK_TIMEOUT_S = 10.0
FALLBACK_TOP_LOGPROBS = 5
"""What servers with a cap below 20 usually allow."""
TRIES_FOR_LOGPROBS = 3
"""Some servers leave log-probabilities out of a reply now and then."""
PROBES = (
    "Which is larger, A: 2 or B: 5? Answer with one letter.",
    "Which is a colour, A: red or B: seven? Answer with one letter.",
    "Which is colder, A: fire or B: ice? Answer with one letter.",
)
"""Harmless questions. Does the server answer at all, and does it give log-probabilities?"""
REPLY_TOKENS = 16
"""Length of a reply that is parsed for a verdict."""
TEMPLATE_TOKENS = 256
"""What a server's chat template may add to a prompt, for the worst case that is reserved; more once it has."""


class OpenAIEngine(Engine):
    """An OpenAI-compatible server. The constructor checks key, address and model before any work is done.

    ``labeler.base_url`` unset means the environment variable ``OPENAI_BASE_URL``, else OpenAI itself.

    Raises:
        UserError: if the key is missing or refused, the server cannot be reached or does not serve the model.
    """

    in_bursts = True

    def __init__(self, config: LabelerConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._base_url, loopback = check_url(
            config.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL,
            "labeler.base_url",
            "it is recorded with the labels; give the key in the environment variable that labeler.api_key_env names",
        )
        self._key = find_key(config.api_key_env, loopback)
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
        # Only if set: what is stored without them stays known.
        added = {"extra_body": config.extra_body, "chat_template_kwargs": config.chat_template_kwargs}
        self.identity |= {name: dict(value) for name, value in added.items() if value}

        self._dialect = Dialect(config.extra_body)
        self._logprobs: bool | None = None  # does the server give them? None: not known yet
        self._top_logprobs = config.top_logprobs
        self._settling = asyncio.Lock()
        self._many_choices = True
        self._template_tokens = TEMPLATE_TOKENS
        self._limits = Limits(
            config.concurrency,
            config.requests_per_minute,
            config.tokens_per_minute,
            config.budget,
            config.price,
            # A server that batches answers later, and does more, the more it is asked; near the time-out is too much.
            slow_s=config.timeout_s / 2,
            # Many prompts in each request: a slow server shall answer some before it is given all.
            start=config.concurrency if config.endpoint is Endpoint.chat else config.concurrency // 16 + 1,
        )
        self._asked = where = f"labeler.base_url={self._base_url}, labeler.model={config.model}"
        self._refusals = Refusals(where, self._ask_plainly)
        self._client = Client(
            self._base_url,
            self._key,
            self._limits,
            headers=account_headers(),
            # A proxy from the environment cannot reach this machine's own addresses.
            proxied=not loopback,
            concurrency=config.concurrency,
            timeout_s=config.timeout_s,
            max_retries=config.max_retries,
            where=where,
            key_env=config.api_key_env,
        )
        self._tokens: TokenScorer | None = None
        try:
            self.check()
            if config.endpoint is Endpoint.completions:
                from rlaif.engines.token_scorer import TokenScorer

                self._tokens = TokenScorer(config, self._client)
                self.identity |= self._tokens.identity
            else:
                self._client.expect_outages(self._ask_plainly, config.outage_s)
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Ask the server for its models.

        Raises:
            UserError: if it cannot be reached, refuses the key or lists models without ``labeler.model``.
        """
        where = f"labeler.base_url={self._base_url}"
        timeout = min(CHECK_TIMEOUT_S, self._config.timeout_s)
        try:
            status, _, content = self._client.call(self._client.request("GET", "/models", timeout_s=timeout))
        except AttemptError as problem:
            raise UserError(f"{where}: cannot be reached ({problem.detail})") from None
        if status >= 400:
            detail, _ = self._client.server_message(content)
            if status == 401:
                raise UserError(f"{where}: HTTP 401: {detail}; {self._client.hint(401)}")
            if status >= 500:
                raise UserError(f"{where}: cannot be reached (HTTP {status}: {detail})")
            return  # no listing, or not for this key: the first request will tell
        try:
            names, more = parse_models(content)
        except ValueError:
            raise UserError(
                f"{where}: GET /models does not answer as an OpenAI-compatible server does; "
                "check the address (it usually ends in /v1)"
            ) from None
        model = self._config.model
        # Ollama serves "llama3" as "llama3:latest"; Gemini lists "models/" before each name.
        known = {model, f"{model}:latest", f"models/{model}"} & set(names)
        if names and not known and not more:
            shown = ", ".join(map(self._client.shorten, names[:10])) + (
                f" and {len(names) - 10} more" if len(names) > 10 else ""
            )
            raise UserError(f"labeler.model={model}: not served by {self._base_url}; available: {shown}")

    @property
    def spent(self) -> Spend:
        """What all requests have cost; those in flight count with the most that they can cost."""
        return self._limits.spent

    @spent.setter
    def spent(self, before: Spend) -> None:
        """Set what earlier runs have spent of the same budget, before the first request."""
        self._limits.spent = before

    @property
    def waited_s(self) -> float:
        """Seconds in which the server was down."""
        return self._client.waited_s

    def set_aside(self, note: Callable[[Any], None]) -> bool:
        """Have what may be spent noted before it is."""
        self._limits.set_aside = note
        return True

    def settle(self) -> Spend:
        """What has been spent, once everything that was asked is answered."""
        return self._limits.settle()

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[tuple[int, Sampled | Failure]]:
        """Sample a completion for each request; ``tokens`` is 0 where the server does not count them.

        Raises:
            UserError: if the server refuses the key or the model, or does not take token ids where they are chosen.
        """
        if self._tokens is not None:
            self._tokens.check()
            return self._stream(requests, self._tokens.sample, "completions")
        return self._stream(requests, self._sample, "completions")

    def score_options(self, requests: Iterable[OptionRequest]) -> Iterator[tuple[int, OptionMass | Failure]]:
        """Mass of each option, from log-probabilities (see :func:`option_masses`) or from replies.

        Raises:
            UserError: if the server refuses the key or the model.
        """
        if self._tokens is not None:
            self._tokens.check()
            return self._stream(requests, self._tokens.score, "verdicts", self._config.batch_size)
        return self._stream(requests, self._score, "verdicts")

    def close(self) -> None:
        """Cancel what is in flight, close the connections and end the thread."""
        self._client.close()

    def told(self, results: Iterator[tuple[int, T]], what: str) -> Iterator[tuple[int, T]]:
        """As for any engine, and a line if the budget has cut the results short."""
        missing = 0
        self._told_reasons.add("budget")
        for index, result in super().told(results, what):
            missing += isinstance(result, Failure) and result.reason == "budget"
            yield index, result
        if missing:
            spent = self.spent
            cost = f", {spent.usd:.4f} US dollars" if self._config.price.input_per_million is not None else ""
            log.warning(
                "the budget is used up (%s): spent %d requests, %d prompt tokens, %d completion tokens%s; "
                "%d %s are missing, and a rerun with a larger budget goes on with them",
                self._limits.used_up,
                *spent[:3],
                cost,
                missing,
                what,
            )

    def _stream(
        self, requests: Iterable[T], job: Callable[[Sequence[T]], Awaitable[Sequence[R]]], what: str, size: int = 1
    ) -> Iterator[tuple[int, R]]:
        results = self._client.stream(requests, job, size, self.after_burst)
        patient = while_some_succeed(results, self._asked, self._config.outage_s, lambda: self.waited_s)
        return self.told(patient, what)

    async def _sample(self, batch: Sequence[SampleRequest]) -> list[Sampled | Failure]:
        [request] = batch
        started = time.perf_counter()
        try:
            got = await self._chat(
                parse_replies,
                messages=clean(request.messages),
                max_tokens=request.max_new_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
            )
        except AttemptError as problem:
            await self._refusals.add(problem)
            return [Failure(problem.reason, problem.detail, time.perf_counter() - started)]
        self._refusals.over = True
        text, finish_reason = got.choices[0]
        if finish_reason == CONTENT_FILTER:
            return [Failure(CONTENT_FILTER, WITHHELD, time.perf_counter() - started)]
        finish_reason = "length" if finish_reason == "length" else "stop"
        return [Sampled(text, finish_reason, got.completion_tokens or 0, got.prompt_tokens)]

    async def _score(self, batch: Sequence[OptionRequest]) -> list[OptionMass | Failure]:
        [request] = batch
        started = time.perf_counter()
        try:
            scored = None if self._logprobs is False else await self._score_by_logprobs(request)
            if scored is None:
                scored = await self._score_by_replies(request)
        except AttemptError as problem:
            await self._refusals.add(problem)
            return [Failure(problem.reason, problem.detail, time.perf_counter() - started)]
        self._refusals.over = True
        return [OptionMass(latency_s=time.perf_counter() - started, **scored._asdict())]

    async def _ask_plainly(self) -> None:
        """Ask a harmless question, without log-probabilities and once."""
        messages = [{"role": "user", "content": PROBES[0]}]
        await self._chat(parse_replies, self._client.try_once, messages=messages, max_tokens=1)

    async def _score_by_logprobs(self, request: OptionRequest) -> _Scored | None:
        """``None`` if the server gives no log-probabilities for this request."""
        # Temperature 1: servers report log-probabilities before the temperature (vLLM) or after it.
        body = {**chat_body(request, self._config.prefill), "max_tokens": 1, "temperature": 1.0, "logprobs": True}
        refusal: AttemptError | None = None
        for top in dict.fromkeys((self._top_logprobs, min(self._top_logprobs, FALLBACK_TOP_LOGPROBS))):
            try:
                for _ in range(TRIES_FOR_LOGPROBS):
                    token = await self._chat(parse_first_token, **body, top_logprobs=top)
                    if token.listed is not None:
                        break
                    if self._logprobs is False:
                        return None
                else:
                    if await self._gives_logprobs("responses have none"):
                        raise AttemptError(
                            "no_logprobs", "the server gives log-probabilities, but not for this request"
                        )
                    return None
            except AttemptError as problem:
                if not problem.rejected or (self._logprobs and top == self._top_logprobs):
                    raise  # a request's own fault: this server has given log-probabilities before
                refusal = problem
                continue
            if top < self._top_logprobs:
                log.warning("%s gives only %d log-probabilities per position", self._base_url, top)
                self._top_logprobs = top
            self._logprobs = True
            bounds = await self._bounds(request, token, accepted_tokens(request.options))
            return _Scored(
                option_masses(bounds), "logprob", token.reply, token.prompt_tokens, token.completion_tokens, bounds.seen
            )
        # Was it the log-probabilities or the request that the server refused? The plain request will tell.
        assert refusal is not None
        scored = await self._score_by_replies(request)
        if await self._gives_logprobs(refusal.detail):
            raise refusal
        return scored

    async def _bounds(
        self, request: OptionRequest, token: FirstToken, accepted: Sequence[frozenset[str]], share: float = 1.0
    ) -> Bounds:
        """What a position says of the options, asking on where a likely token only begins a spelling ("Harm").

        What follows such a token is asked with it as the beginning of the reply, and so on to the end of the spellings.

        Args:
            request: what the position is the answer to.
            token: the answer.
            accepted: the options' spellings from here on.
            share: the probability of what the reply begins with.
        """
        assert token.listed is not None
        bounds = option_bounds(token.listed, token.sampled, accepted)
        if not self._config.prefill or sum(bounds.open.values()) <= UNDECIDED * max(bounds.least):
            return bounds
        after: dict[str, Bounds] = {}
        for text, p in bounds.open.items():
            # A template may cut a space off the end of the reply.
            if share * p < math.exp(LOG_NEGLIGIBLE) or not text.strip():
                continue
            begun = replace(request, stem=request.stem + text)
            body = {**chat_body(begun, True), "max_tokens": 1, "temperature": 1.0, "logprobs": True}
            following = await self._chat(parse_first_token, **body, top_logprobs=self._top_logprobs)
            if following.listed is None:
                raise AttemptError("no_logprobs", "the server gives log-probabilities, but not for this request")
            after[text] = await self._bounds(begun, following, rests(accepted, text), share * p)
        return option_bounds(token.listed, token.sampled, accepted, after)

    async def _gives_logprobs(self, why: str) -> bool:
        """Whether the server gives log-probabilities, where a request went without: found out once.

        Not from that request: its text may be what the server answers differently.

        Raises:
            AttemptError: if the server can't be asked.
        """
        async with self._settling:
            if self._logprobs is None:
                self._logprobs = await self._probe()
                if not self._logprobs:
                    log.warning(
                        "%s gives no log-probabilities (%s): verdicts come from %d sampled repl%s each",
                        self._base_url,
                        why,
                        self._config.votes,
                        "y" if self._config.votes == 1 else "ies",
                    )
            return self._logprobs

    @property
    def where(self) -> str:
        """The address."""
        return self._base_url

    def gives_logprobs(self) -> bool:
        """What the server has shown; else what it says to the questions of :data:`PROBES`.

        If they cannot be asked now, verdicts from replies are what there is.
        """
        if self._tokens is not None or self._logprobs is not None:
            return self._logprobs is not False
        try:
            return bool(self._client.call(self._gives_logprobs("asked because of earlier verdicts from replies")))
        except AttemptError as problem:
            log.warning("%s: cannot be asked for log-probabilities (%s)", self._base_url, problem.detail)
            return False

    async def _probe(self) -> bool:
        top = min(self._top_logprobs, FALLBACK_TOP_LOGPROBS)
        for question in PROBES:
            body = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": top}
            try:
                token = await self._chat(parse_first_token, messages=[{"role": "user", "content": question}], **body)
            except AttemptError as problem:
                if not problem.rejected:
                    raise
                continue
            if token.listed is not None or self._logprobs:
                return True
        return bool(self._logprobs)  # another request may have got them meanwhile

    async def _score_by_replies(self, request: OptionRequest) -> _Scored:
        """Share of replies per option; a reply without a clear verdict counts for none of them."""
        votes = self._config.votes
        body = chat_body(request, self._config.prefill)
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
                got = await self._chat(parse_replies, **body, **extra)
            except AttemptError as problem:
                if n == 1 or not problem.rejected:
                    raise
                self._many_choices = False
                continue
            if all(finish == CONTENT_FILTER for _, finish in got.choices[:n]):
                raise AttemptError(CONTENT_FILTER, WITHHELD)
            replies += [text for text, _ in got.choices[:n]]
            usage.append(got)
        chosen = [parse_reply(reply, request.options, request.stem) for reply in replies]
        return _Scored(
            tuple(chosen.count(option) / votes for option in range(len(request.options))),
            "votes" if votes > 1 else "text",
            " | ".join(replies),
            total([got.prompt_tokens for got in usage]),
            total([got.completion_tokens for got in usage]),
            replies=votes,
        )

    async def _chat(self, parse: Callable[[dict[str, Any]], A], send: Any = None, **body: Any) -> A:
        """One chat completion, parsed; ``send``: another way to send it than with all retries."""
        # A token has at least one byte of text, so the bytes of the messages are a bound that needs no tokenizer.
        size = sum(len(text.encode()) for message in body["messages"] for text in message.values())
        if self._config.chat_template_kwargs:
            body["chat_template_kwargs"] = self._config.chat_template_kwargs
        while True:
            sent = self._dialect.body({"model": self._config.model, **body})
            most = max(sent.get("max_tokens", 0), sent.get("max_completion_tokens", 0))
            worst = Usage(size + self._template_tokens, most * sent.get("n", 1))
            try:
                answer: A = await (send or self._client.post)("/chat/completions", sent, worst, parse)
            except AttemptError as problem:
                if (learned := self._dialect.learn(sent, problem)) is None:
                    raise
                if learned:
                    log.warning("%s %s (%s)", self._base_url, learned, problem.detail)
                continue
            self._template_tokens = max(self._template_tokens, (answer.prompt_tokens or 0) - size)
            return answer


class _Scored(NamedTuple):
    masses: tuple[float | None, ...]
    method: str
    reply: str
    prompt_tokens: int | None
    completion_tokens: int | None
    observed: float | None = None
    replies: int | None = None
