"""Options scored over ``/completions`` with prompts as token ids, many in a request (vLLM's server takes them so).

Prompts are rendered and tokenised here by the code of the in-process engines, so text from outside can't become a
control token, and a stem is continued exactly. vLLM gives the log-probabilities of exactly the tokens asked for
(``logprob_token_ids``); of another server the most likely tokens are read, as over chat.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from rlaif.chat import ChatEncoder
from rlaif.config import LabelerConfig, ModelConfig
from rlaif.engines.base import CONTENT_FILTER, Failure, OptionMass, OptionRequest, Sampled, SampleRequest
from rlaif.engines.client import Client
from rlaif.engines.limits import Usage
from rlaif.engines.options import (
    Spelling,
    accepted_tokens,
    beginnings,
    option_bounds,
    option_masses,
    sequence_masses,
    spellings,
)
from rlaif.engines.wire import TOKEN_ID, WITHHELD, AttemptError, Continuation, parse_continuations, usage
from rlaif.models import load_tokenizer
from rlaif.records import UserError, content_hash

log = logging.getLogger(__name__)

MOST_TOKENS = 128
"""vLLM's limit for the tokens of one request (MAX_LOGPROB_TOKEN_IDS)."""
FALLBACK_TOP_LOGPROBS = 5
"""What OpenAI's completions allow."""

Ids = Sequence[int]
Logps = dict[tuple[int, ...], float]
_Masses = tuple[tuple[float | None, ...], float | None]
"""Masses of the options, and what of them was seen (see :class:`OptionMass`)."""


class TokenScorer:
    """Scores and samples by token ids.

    Raises:
        UserError: if there is no tokenizer.
    """

    def __init__(self, config: LabelerConfig, client: Client) -> None:
        name = config.tokenizer or config.model
        model = ModelConfig(
            name=name,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            chat_template_kwargs=config.chat_template_kwargs,
        )
        try:
            self.tokenizer = load_tokenizer(model, "labeler")
        except UserError as error:
            raise UserError(
                f"labeler.endpoint=completions tokenises prompts itself: set labeler.tokenizer=NAME_OR_FOLDER ({error})"
            ) from None
        self.identity = {
            "endpoint": "completions",
            "tokenizer": name,
            "revision": config.revision,
            "template": content_hash(self.tokenizer.chat_template),
            # Not its name alone: a folder can get another content, and a hub name another commit.
            "vocabulary": _vocabulary(self.tokenizer),
        }
        self._config, self._client = config, client
        self._encode = ChatEncoder(self.tokenizer)
        self._spelled: dict[tuple[tuple[str, ...], ...], list[Spelling]] = {}
        self._top = config.top_logprobs
        self._exact: bool | None = None  # None: not asked yet

    def check(self) -> None:
        """Ask the server once whether it takes token ids, and gives the log-probabilities of chosen ones.

        Raises:
            UserError: if it does not take lists of token ids, or gives no log-probabilities for them.
        """
        if self._exact is None:
            self._client.call(self._check())
            # Not before: a server that cannot do this is not down.
            self._client.expect_outages(self._probe, self._config.outage_s)

    async def _check(self) -> None:
        where = f"labeler.base_url={self._config.base_url}, labeler.endpoint=completions"
        instead = "use labeler.endpoint=chat"
        prompts = self._harmless()
        # Spread so far that no list of the likeliest tokens has them all.
        want = sorted({len(self.tokenizer) * part // 7 for part in range(7)})
        for top in dict.fromkeys((self._top, min(self._top, FALLBACK_TOP_LOGPROBS))):
            try:
                answers = await self._post(prompts, logprobs=top, logprob_token_ids=want)
            except AttemptError as problem:
                if problem.rejected and top > FALLBACK_TOP_LOGPROBS:
                    continue
                if problem.reason == "budget":
                    return  # every other request will say so too
                if problem.reason == "no_logprobs":
                    raise UserError(f"{where}: the server gives no log-probabilities there; {instead}") from None
                raise UserError(
                    f"{where}: the server does not take a list of prompts as token ids "
                    f"({problem.reason}: {problem.detail}); {instead}"
                ) from None
            except UserError as error:
                raise UserError(f"{error} (labeler.endpoint=completions; a server without it: {instead})") from None
            self._top = top
            self._exact = all(_asked(answer, want) is not None for answer in answers)
            if not self._exact:
                log.warning("%s gives only the %d most likely tokens, not those asked for", where, top)
            return

    def _harmless(self) -> list[list[int]]:
        """Two prompts of a token each."""
        return [[token] for token in self._encode([{"role": "user", "content": "A"}])[-2:]]

    async def _probe(self) -> None:
        """Ask once for anything."""
        body = {"model": self._config.model, "prompt": self._harmless(), "max_tokens": 1}
        await self._client.try_once("/completions", *self._sent(body), lambda payload: payload)

    async def score(self, batch: Sequence[OptionRequest]) -> list[OptionMass | Failure]:
        """Mass of each option, for each request."""
        started = time.perf_counter()
        prompts = [self._encode(request.messages, request.stem) for request in batch]
        found = await (self._exactly(batch, prompts) if self._exact else self._listed(batch, prompts))
        seconds = time.perf_counter() - started
        return [
            Failure(one.reason, one.detail, seconds)
            if isinstance(one, AttemptError)
            else OptionMass(one[0], "logprob", prompt_tokens=len(ids), latency_s=seconds, observed=one[1])
            for one, ids in zip(found, prompts, strict=True)
        ]

    async def sample(self, batch: Sequence[SampleRequest]) -> list[Sampled | Failure]:
        """One completion."""
        [request] = batch
        started = time.perf_counter()
        ids = self._encode(request.messages)
        body = {
            "model": self._config.model,
            "prompt": [ids],
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
        }
        try:
            answer, used = await self._client.post(
                "/completions",
                *self._sent(body),
                lambda payload: (parse_continuations(payload, 1)[0], usage(payload)),
            )
        except AttemptError as problem:
            return [Failure(problem.reason, problem.detail, time.perf_counter() - started)]
        if answer.finish_reason == CONTENT_FILTER:
            return [Failure(CONTENT_FILTER, WITHHELD, time.perf_counter() - started)]
        finish = "length" if answer.finish_reason == "length" else "stop"
        return [Sampled(answer.text.strip(), finish, used.completion if used else 0, len(ids))]

    async def _exactly(self, batch: Sequence[OptionRequest], prompts: Sequence[Ids]) -> list[_Masses | AttemptError]:
        """Sums over every spelling; those of several tokens cost a prompt more for each later token."""
        spelled = [self._spellings(request) for request in batch]
        firsts = {spelling.tokens[0] for one in spelled for spelling in one}
        logps: list[Logps | AttemptError] = []
        for answer in await self._logps(prompts, firsts):
            if isinstance(answer, AttemptError):
                logps.append(answer)
            else:
                logps.append({(token,): logp for token, logp in answer.items()})
        asks = {
            (index, begun): wanted
            for index, (one, known) in enumerate(zip(spelled, logps, strict=True))
            if not isinstance(known, AttemptError)
            for begun, wanted in beginnings(one, known).items()
        }
        after: dict[tuple[int, tuple[int, ...]], dict[int, float] | AttemptError] = {}
        size, keys = self._config.batch_size, list(asks)
        parts = [keys[start : start + size] for start in range(0, len(keys), size)]
        jobs = [
            self._logps(
                [[*prompts[index], *beginning] for index, beginning in part],
                set().union(*(asks[key] for key in part)),
            )
            for part in parts
        ]
        for part, answers in zip(parts, await asyncio.gather(*jobs), strict=True):
            after.update(zip(part, answers, strict=True))
        results: list[_Masses | AttemptError] = []
        for index, (one, known) in enumerate(zip(spelled, logps, strict=True)):
            problem = known if isinstance(known, AttemptError) else self._extend(index, one, known, after)
            results.append(problem or (sequence_masses(one, known, len(batch[index].options)), None))  # type: ignore[arg-type]
        return results

    @staticmethod
    def _extend(
        index: int,
        spelled: Sequence[Spelling],
        known: Logps,
        after: dict[tuple[int, tuple[int, ...]], dict[int, float] | AttemptError],
    ) -> AttemptError | None:
        """Add the log-probabilities of whole spellings to those of their first tokens."""
        for spelling in spelled:
            tokens = spelling.tokens
            for place in range(1, len(tokens)):
                answer = after.get((index, tokens[:place]))
                if answer is None:
                    break
                if isinstance(answer, AttemptError):
                    return answer
                known[tokens[: place + 1]] = known[tokens[:place]] + answer[tokens[place]]
        return None

    async def _logps(self, prompts: Sequence[Ids], want: set[int]) -> list[dict[int, float] | AttemptError]:
        """Log-probabilities of the wanted tokens after each prompt."""
        wanted = sorted(want)
        found: list[dict[int, float] | AttemptError] = [{} for _ in prompts]
        for start in range(0, len(wanted), MOST_TOKENS):
            part = wanted[start : start + MOST_TOKENS]
            for index, answer in enumerate(await self._ask(prompts, logprobs=1, logprob_token_ids=part)):
                so_far = found[index]
                asked = answer if isinstance(answer, AttemptError) else _asked(answer, part)
                if isinstance(so_far, dict):
                    if isinstance(asked, dict):
                        so_far.update(asked)
                    else:
                        found[index] = asked or AttemptError("malformed", "tokens that were asked for are missing")
        return found

    async def _listed(self, batch: Sequence[OptionRequest], prompts: Sequence[Ids]) -> list[_Masses | AttemptError]:
        """Masses from the most likely tokens (see :func:`option_masses`)."""
        results: list[_Masses | AttemptError] = []
        for request, answer in zip(batch, await self._ask(prompts, logprobs=self._top), strict=True):
            if isinstance(answer, AttemptError):
                results.append(answer)
                continue
            listed = [(self._text(token), logp) for token, logp in (answer.listed or {}).items()]
            bounds = option_bounds(listed, self._text(answer.sampled), accepted_tokens(request.options))
            results.append((option_masses(bounds), bounds.seen))
        return results

    def _text(self, token: str) -> str:
        return self.tokenizer.decode([int(token[len(TOKEN_ID) :])]) if token.startswith(TOKEN_ID) else token

    def _spellings(self, request: OptionRequest) -> list[Spelling]:
        if request.options not in self._spelled:
            self._spelled[request.options] = spellings(self.tokenizer, request.options)
        return self._spelled[request.options]

    async def _ask(self, prompts: Sequence[Ids], **body: Any) -> list[Continuation | AttemptError]:
        """Answers to prompts; of a request that is refused the halves are asked, to find the prompt at fault."""
        try:
            answers = await self._post(prompts, **body)
        except AttemptError as problem:
            about_one = problem.rejected or problem.status == 413 or problem.reason == CONTENT_FILTER
            if len(prompts) == 1 or not about_one:
                return [problem] * len(prompts)
        else:
            withheld = AttemptError(CONTENT_FILTER, WITHHELD, retry=False)
            return [withheld if answer.listed is None else answer for answer in answers]
        half = len(prompts) // 2
        parts = await asyncio.gather(self._ask(prompts[:half], **body), self._ask(prompts[half:], **body))
        return [answer for part in parts for answer in part]

    async def _post(self, prompts: Sequence[Ids], **body: Any) -> list[Continuation]:
        def parse(payload: dict[str, Any]) -> list[Continuation]:
            answers = parse_continuations(payload, len(prompts))
            if any(answer.listed is None and answer.finish_reason != CONTENT_FILTER for answer in answers):
                raise AttemptError("no_logprobs", "the response lacks log-probabilities")
            return answers

        body = {
            "model": self._config.model,
            "prompt": prompts,
            "max_tokens": 1,
            # Servers report log-probabilities before the temperature (vLLM) or after it.
            "temperature": 1.0,
            # Two tokens can have the same text.
            "return_tokens_as_token_ids": True,
            **body,
        }
        return await self._client.post("/completions", *self._sent(body), parse)

    def _sent(self, body: dict[str, Any]) -> tuple[dict[str, Any], Usage]:
        """The body with what the user adds to every request, and the most that it can cost."""
        body = body | self._config.extra_body
        return body, Usage(sum(map(len, body["prompt"])), body["max_tokens"] * len(body["prompt"]))


def _vocabulary(tokenizer: Any) -> str:
    """Hash of everything that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return content_hash(backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()))


def _asked(answer: Continuation, want: Sequence[int]) -> dict[int, float] | None:
    """Log-probabilities of the wanted tokens; ``None`` if one is missing."""
    listed = answer.listed or {}
    found = {token: listed.get(f"{TOKEN_ID}{token}", math.nan) for token in want}
    return None if any(map(math.isnan, found.values())) else found
