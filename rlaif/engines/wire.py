"""What an OpenAI-compatible server is sent and what it answers, as plain data. Pure."""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlaif.chat import defuse
from rlaif.engines.base import OptionRequest
from rlaif.engines.limits import Usage
from rlaif.records import Message

TOKEN_ID = "token_id:"
"""What vLLM puts before a token's number where it is asked for numbers."""
WITHHELD = "the server withheld the reply"
_RATE_LIMITS = ("requests", "tokens")


class AttemptError(Exception):
    """One attempt without a usable answer. Its texts are already free of the key."""

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        retry: bool = True,
        status: int | None = None,
        retry_after: float | None = None,
        sent: bool = True,
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.retry = retry
        self.status = status
        self.retry_after = retry_after
        self.sent = sent
        """Whether the server may have worked on it (and charge for it)."""

    @property
    def rejected(self) -> bool:
        """The server understood the request and refuses what it asks for."""
        return self.status in (400, 422) or (self.status == 403 and forbids_logprobs(self.detail))


def forbids_logprobs(detail: str) -> bool:
    """Whether a 403 is about log-probabilities, not about key or model: OpenAI's reasoning models answer so."""
    return "logprobs" in detail


_UNSUPPORTED = re.compile(r"\bunsupported\b|n[o']t support|\bunrecognized\b", re.IGNORECASE)


class Dialect:
    """Which parameters a server's chat takes: what it has once refused by name is renamed or left out from then on.

    Args:
        extra: what the user adds to every request; it is never changed.
    """

    def __init__(self, extra: Mapping[str, Any]) -> None:
        self._extra = dict(extra)
        self._names: dict[str, str | None] = {}
        """What a parameter is called instead; ``None``: left out."""
        if "max_completion_tokens" in extra:
            self._names["max_tokens"] = None

    def body(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """A request's parameters as they are sent."""
        called = {self._names.get(name, name): value for name, value in parameters.items()}
        called.pop(None, None)
        return called | self._extra  # type: ignore[return-value]

    def learn(self, sent: Mapping[str, Any], problem: AttemptError) -> str | None:
        """What a refusal teaches, to be said ("": nothing new, so try again); ``None`` if it is about other things."""
        if not problem.rejected or not _UNSUPPORTED.search(problem.detail):
            return None
        refused = [name for name in ("temperature", "top_p") if re.search(rf"\b{name}\b", problem.detail)]
        if "max_completion_tokens" in problem.detail:
            refused.append("max_tokens")
        refused = [name for name in refused if name in sent and name not in self._extra]
        if not refused:
            return None
        new = [name for name in refused if name not in self._names]
        self._names |= {name: "max_completion_tokens" if name == "max_tokens" else None for name in new}
        return "; ".join(
            "takes max_completion_tokens, not max_tokens"
            if name == "max_tokens"
            else f"takes no {name}: it is left out"
            for name in new
        )


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


def chat_body(request: OptionRequest, prefill: bool) -> dict[str, Any]:
    """The messages that put a request's stem before the model."""
    messages = clean(request.messages)
    if not request.stem:
        return {"messages": messages}
    if prefill:
        messages.append({"role": "assistant", "content": request.stem})
        return {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    last = messages[-1]
    asked = f"{last['content']}\n\nFinish this sentence with one word: {request.stem}"
    return {"messages": [*messages[:-1], {**last, "content": asked}]}


def clean(messages: Sequence[Message]) -> list[Message]:
    """Messages that can be sent: a lone surrogate becomes U+FFFD, and no text is a control token to the server."""
    return [{name: _clean_text(text) for name, text in message.items()} for message in messages]


def _clean_text(text: str) -> str:
    text = defuse(text)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def parse_first_token(payload: dict[str, Any]) -> FirstToken:
    """The first token of a chat completion.

    Raises:
        AttemptError: if the response has another shape, or the server withheld the reply.
    """
    choices, prompt_tokens, completion_tokens = parse_replies(payload)
    logprobs = payload["choices"][0].get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not content:
        if choices[0][1] == "content_filter":
            raise AttemptError("content_filter", WITHHELD, retry=False)
        return FirstToken(None, "", choices[0][0], prompt_tokens, completion_tokens)
    try:
        listed = [(str(entry["token"]), float(entry["logprob"])) for entry in content[0]["top_logprobs"] or ()]
        sampled = str(content[0]["token"])
    except (TypeError, KeyError, ValueError, IndexError):
        raise AttemptError("malformed", "the response's logprobs have an unknown shape") from None
    if any(math.isnan(logprob) for _, logprob in listed):
        raise AttemptError("malformed", "the response has a log-probability that is not a number")
    return FirstToken(listed or None, sampled, choices[0][0], prompt_tokens, completion_tokens)


def parse_replies(payload: dict[str, Any]) -> Replies:
    """The replies of a chat completion.

    Raises:
        AttemptError: if the response has another shape.
    """
    try:
        choices = [
            # A reply that ends at once has no content: an empty text is what the model said.
            (str(choice["message"].get("content") or ""), str(choice.get("finish_reason") or "stop"))
            for choice in payload["choices"]
        ]
    except (TypeError, KeyError, AttributeError):
        raise AttemptError("malformed", "the response's choices have no message") from None
    return Replies(choices, *_counts(payload))


class Continuation(NamedTuple):
    """What a completion says of one prompt: log-probabilities by token text (or ``token_id:N``), text, finish."""

    listed: dict[str, float] | None
    sampled: str
    text: str
    finish_reason: str


def parse_continuations(payload: dict[str, Any], prompts: int) -> list[Continuation]:
    """The answers to the prompts of a request to ``/completions``, in their order.

    Raises:
        AttemptError: if the response has another shape or another number of choices.
    """
    try:
        choices = sorted(payload["choices"], key=lambda choice: int(choice.get("index") or 0))
        found = []
        for choice in choices:
            logprobs = choice.get("logprobs") or {}
            listed = (logprobs.get("top_logprobs") or [None])[0]
            sampled = str((logprobs.get("tokens") or [""])[0])
            if listed is not None:
                listed = {str(token): float(logprob) for token, logprob in listed.items()}
            text, finish = str(choice.get("text") or ""), str(choice.get("finish_reason") or "stop")
            found.append(Continuation(listed or None, sampled, text, finish))
    except (TypeError, KeyError, ValueError, AttributeError, IndexError):
        raise AttemptError("malformed", "the response's choices have an unknown shape") from None
    if len(found) != prompts:
        raise AttemptError("malformed", f"the response has {len(found)} choices for {prompts} prompts")
    if any(math.isnan(logprob) for one in found for logprob in (one.listed or {}).values()):
        raise AttemptError("malformed", "the response has a log-probability that is not a number")
    return found


def usage(payload: Any) -> Usage | None:
    """What a response says it has cost; ``None`` if it does not say."""
    prompt, completion = _counts(payload) if isinstance(payload, dict) else (None, None)
    if prompt is None or prompt < 0:
        return None
    return Usage(prompt, max(completion or 0, 0))


def _counts(payload: Mapping[str, Any]) -> tuple[int | None, int | None]:
    counted = payload.get("usage")
    counted = counted if isinstance(counted, dict) else {}
    return _count(counted.get("prompt_tokens")), _count(counted.get("completion_tokens"))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def total(counts: Sequence[int | None]) -> int | None:
    """Sum of what is known; ``None`` if nothing is."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds the server asks to wait: ``Retry-After-Ms``, or ``Retry-After`` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        seconds = _number(headers.get(name))
        if seconds is not None:
            return seconds * unit
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after"))  # type: ignore[arg-type]
        return max(0.0, date.timestamp() - time.time())
    except (TypeError, ValueError, AttributeError):
        return None


def rate_limit_wait(headers: Mapping[str, str], tokens: int) -> float:
    """Seconds until the server takes another request of so many tokens, by its ``x-ratelimit-*`` headers."""
    wait = 0.0
    for name, needed in zip(_RATE_LIMITS, (1, tokens), strict=True):
        remaining = _number(headers.get(f"x-ratelimit-remaining-{name}"))
        if remaining is not None and remaining < needed:
            wait = max(wait, duration(headers.get(f"x-ratelimit-reset-{name}")) or 0.0)
    return wait


def duration(text: str | None) -> float | None:
    """Seconds of a header like ``6m0s``, ``120ms`` or ``1.5``.

    >>> [duration(text) for text in ("1h2m3.5s", "120ms", "1.5", "soon")]
    [3723.5, 0.12, 1.5, None]
    """
    plain = _number(text)
    if plain is not None or text is None:
        return plain
    if not re.fullmatch(r"(?:\d+(?:\.\d+)?(?:ms|h|m|s))+", text.strip()):
        return None
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s)", text))


def _number(text: str | None) -> float | None:
    try:
        number = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
