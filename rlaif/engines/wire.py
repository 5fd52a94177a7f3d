"""What an OpenAI-compatible server is sent and what it answers, as plain data. Pure.

Nothing in an answer is believed before it is looked at, and this is the one place where it is: whatever has another
type, or a value that cannot be, makes the answer ``malformed``.
"""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from rlaif.chat import defuse
from rlaif.engines.base import CONTENT_FILTER, OptionRequest
from rlaif.engines.limits import Usage
from rlaif.records import Message

TOKEN_ID = "token_id:"
"""What vLLM puts before a token's number where it is asked for numbers."""
WITHHELD = "the server withheld the reply"
MAX_LOGPROB = 1e-3
"""A log-probability above this is none; up to it, a server has rounded."""
MAX_TOTAL = 1.05
"""The probabilities of a token's alternatives add up to 1 at most; servers round each of them."""
MAX_COUNT = 10**9
"""No request has more tokens."""
MAX_MESSAGE = 1 << 16
"""Bytes of an answer that are looked through for a message."""
_RATE_LIMITS = ("requests", "tokens")
_FILTERS = {CONTENT_FILTER, "content_policy_violation", "responsibleaipolicyviolation"}
"""Codes of an error by which servers (OpenAI, Azure) say that a text is withheld from the model."""


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
        if self.reason == CONTENT_FILTER:
            return False
        return self.status in (400, 422) or (self.status == 403 and forbids_logprobs(self.detail))

    @property
    def outage(self) -> bool:
        """The server as a whole may be down."""
        return self.reason in ("connection", "timeout") or (self.status or 0) >= 500


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


def parse_json(content: bytes) -> Any:
    """What a body says.

    Raises:
        ValueError: whatever is wrong with it.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_models(content: bytes) -> tuple[list[str], bool]:
    """The names of the models that a server lists, and whether there are more.

    Raises:
        ValueError: if the answer is something else.
    """
    listing = parse_json(content)
    entries = listing.get("data") if isinstance(listing, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("no list of models")
    return [entry["id"] for entry in entries if isinstance(entry.get("id"), str)], bool(listing.get("has_more"))


def error_message(content: bytes) -> tuple[str, set[str]]:
    """What the body of an error says, in any of the shapes that servers give it, and its codes in small letters."""
    try:
        body = parse_json(content)
    except ValueError:
        body = None
    inner = body.get("error") if isinstance(body, dict) else None
    for found in (inner, body):
        if isinstance(found, dict):
            words = (found.get(name) for name in ("message", "detail", "error"))
            if said := next((word for word in words if isinstance(word, str) and word), None):
                return said, _codes(body)
    return body if isinstance(body, str) else content[:MAX_MESSAGE].decode("utf-8", "replace"), _codes(body)


def _codes(body: Any, depth: int = 4) -> set[str]:
    """Codes and types anywhere in an error: Azure puts the telling one into an inner error."""
    if not isinstance(body, dict) or not depth:
        return set()
    found = {body[name].lower() for name in ("code", "type") if isinstance(body.get(name), str)}
    return found.union(*(_codes(value, depth - 1) for value in body.values()))


def is_filtered(codes: set[str]) -> bool:
    """Whether these are of an error that a text will always meet: a content filter withholds it from the model."""
    return bool(codes & _FILTERS)


def parse_response(content: bytes) -> dict[str, Any]:
    """The body of an answer with choices, which are objects, and with counts of tokens that are such or missing.

    Raises:
        AttemptError: if it is something else.
    """
    try:
        payload = parse_json(content)
    except ValueError:
        _malformed("the response is not JSON")
    if not isinstance(payload, dict) or not isinstance(payload.get("choices"), list):
        _malformed(f"the response has no choices: {content[:MAX_MESSAGE].decode('utf-8', 'replace')}")
    if not payload["choices"]:
        raise AttemptError("empty", "the response has an empty list of choices")
    for choice in payload["choices"]:
        _object(choice, "choice")
    _counts(payload)
    return payload


def parse_first_token(payload: dict[str, Any]) -> FirstToken:
    """The first token of a chat completion.

    Raises:
        AttemptError: if the response has another shape, or the server withheld the reply.
    """
    choices, prompt_tokens, completion_tokens = parse_replies(payload)
    reply, finish_reason = choices[0]
    logprobs = _object(payload["choices"][0].get("logprobs") or {}, "logprobs")
    content = _list(logprobs.get("content") or [], "logprobs")
    if not content:
        if finish_reason == CONTENT_FILTER:
            raise AttemptError(CONTENT_FILTER, WITHHELD, retry=False)
        return FirstToken(None, "", reply, prompt_tokens, completion_tokens)
    first = _object(content[0], "token")
    tokens = _list(first.get("top_logprobs") or [], "top_logprobs")
    try:
        listed = [(entry["token"], entry["logprob"]) for entry in tokens]
    except (TypeError, KeyError):
        _malformed("the response has a token without its text or its log-probability")
    if not all(type(token) is str for token, _ in listed):
        _malformed("the response has a token that is no text")
    # Every verdict has twenty of them, so what is plainly one is not looked at more closely.
    listed = [
        pair if type(pair[1]) is float and pair[1] <= 0 else (pair[0], checked_logprob(pair[1])) for pair in listed
    ]
    _check_total(logp for _, logp in listed)
    return FirstToken(listed or None, _text(first.get("token"), "token"), reply, prompt_tokens, completion_tokens)


def parse_replies(payload: dict[str, Any]) -> Replies:
    """The replies of a chat completion.

    Raises:
        AttemptError: if the response has another shape.
    """
    choices = []
    for choice in payload["choices"]:
        content = _object(choice.get("message"), "message").get("content")
        # A reply that ends at once has no content: an empty text is what the model said.
        choices.append(("" if content is None else _text(content, "content"), _finish_reason(choice)))
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
    choices = payload["choices"]
    if len(choices) != prompts:
        _malformed(f"the response has {len(choices)} choices for {prompts} prompts")
    places = [choice.get("index") for choice in choices]
    if any(place is not None for place in places):
        if not all(type(place) is int for place in places) or sorted(places) != list(range(prompts)):
            _malformed("the response's choices have other indices than their prompts")
        choices = sorted(choices, key=lambda choice: int(choice["index"]))
    found = []
    for choice in choices:
        logprobs = _object(choice.get("logprobs") or {}, "logprobs")
        [top, *_] = _list(logprobs.get("top_logprobs") or [], "top_logprobs") or [None]
        [sampled, *_] = _list(logprobs.get("tokens") or [], "tokens") or [""]
        listed = {_token(name): checked_logprob(logp) for name, logp in _object(top or {}, "top_logprobs").items()}
        _check_total(listed.values())
        text = choice.get("text")
        found.append(
            Continuation(
                listed or None,
                _token(_text(sampled, "token")),
                "" if text is None else _text(text, "text"),
                _finish_reason(choice),
            )
        )
    return found


def usage(payload: Mapping[str, Any]) -> Usage | None:
    """What a response says it has cost; ``None`` if it does not say.

    Raises:
        AttemptError: if it says what cannot be.
    """
    prompt, completion = _counts(payload)
    return None if prompt is None else Usage(prompt, completion or 0)


def _counts(payload: Mapping[str, Any]) -> tuple[int | None, int | None]:
    counted = _object(payload.get("usage") or {}, "usage")
    prompt, completion = counted.get("prompt_tokens"), counted.get("completion_tokens")
    for count in (prompt, completion):
        if count is not None and (type(count) is not int or not 0 <= count <= MAX_COUNT):
            _malformed("the response has a count of tokens that is none")
    return prompt, completion


def checked_logprob(value: Any) -> float:
    """A log-probability; minus infinity is one.

    Raises:
        AttemptError: if it is something else.
    """
    # NaN is not below anything. A number of 400 digits is below 0 or not, but no float.
    if type(value) not in (int, float) or not value <= MAX_LOGPROB or (type(value) is int and value < -MAX_COUNT):
        _malformed("the response has a log-probability that is none")
    return min(float(value), 0.0)


def _check_total(logps: Iterable[float]) -> None:
    if sum(map(math.exp, logps)) > MAX_TOTAL:
        _malformed(f"the response has log-probabilities of more than {MAX_TOTAL} in all")


def _malformed(detail: str) -> NoReturn:
    raise AttemptError("malformed", detail)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _malformed(f"the response has a {what} that is no object")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        _malformed(f"the response has {what} that are no list")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        _malformed(f"the response has a {what} that is no text")
    return value


def _token(name: str) -> str:
    """A token by its text, or by its number."""
    if name.startswith(TOKEN_ID) and not re.fullmatch(r"[0-9]{1,9}", name[len(TOKEN_ID) :]):
        _malformed("the response has a token's number that is none")
    return name


def _finish_reason(choice: Mapping[str, Any]) -> str:
    return _text(choice.get("finish_reason") or "stop", "finish_reason")


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
    except (TypeError, ValueError, AttributeError, OverflowError):
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
