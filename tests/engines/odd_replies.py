"""Replies that cannot be: of a wrong shape or type, or with values that nothing has."""

from __future__ import annotations

import json
import math

from fake_server import logprobs, text

DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "1" + "0" * 400


def with_logprob(value: str) -> str:
    reply = json.dumps(logprobs([("A", 0.6), ("B", 0.3)]).body)
    return reply.replace(str(math.log(0.6)), value)


def with_usage(value: str) -> str:
    body = logprobs([("A", 0.6), ("B", 0.3)]).body
    return json.dumps(body | {"usage": {"prompt_tokens": "HERE", "completion_tokens": 1}}).replace('"HERE"', value)


MALFORMED: dict[str, str] = {
    "deep": DEEP,
    "deep in a reply": json.dumps(text("A").body).replace('"A"', DEEP),
    "deep beside the reply": json.dumps(text("A").body | {"extra": 1}).replace('"extra": 1', f'"extra": {DEEP}'),
    "a number of 5000 digits": '{"choices": ' + "1" * 5000 + "}",
    "not UTF-8": "\ud800",
    **{f"log-probability {value}": with_logprob(value) for value in ("5", "0.01", "NaN", "Infinity", "true", '"-1"')},
    **{f"log-probability {value}": with_logprob(value) for value in ("null", "[]", HUGE, "-" + HUGE, "1e400")},
    "a token twice": json.dumps(logprobs([("A", 0.6), ("B", 0.3), ("A", 0.6)]).body),
    "probabilities of 3": json.dumps(logprobs([("A", 1.0), ("B", 1.0), (" A", 1.0)]).body),
    **{f"tokens {value}": with_usage(value) for value in (HUGE, "-1", "true", "1.5", '"12"', "[1]", "NaN", "1e400")},
    "choices of texts": '{"choices": ["A"]}',
    "choices of nothing": '{"choices": [null]}',
    "an object of choices": '{"choices": {"0": {"message": {"content": "A"}}}}',
    "a number as content": '{"choices": [{"message": {"content": 7}}]}',
    "true as content": '{"choices": [{"message": {"content": true}}]}',
    "parts as content": '{"choices": [{"message": {"content": [{"type": "text", "text": "A"}]}}]}',
    "a number as finish_reason": '{"choices": [{"message": {"content": "A"}, "finish_reason": 7}]}',
    "true as logprobs": '{"choices": [{"message": {"content": "A"}, "logprobs": true}]}',
    "true as a token": '{"choices": [{"message": {"content": "A"}, "logprobs": {"content": [true]}}]}',
    "a list of usage": json.dumps(text("A").body | {"usage": [1]}),
}
