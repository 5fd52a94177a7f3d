"""``rlaif.label`` against servers that answer anything: no traceback, no label out of nonsense, all counted."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import logprobs, text
from odd_replies import DEEP, MALFORMED

GOOD, SWAPPED = (json.dumps(logprobs([(one, 0.6), (other, 0.3)]).body) for one, other in ("AB", "BA"))
MODELS = '{"data": [{"id": "judge"}]}'


def http(body: str | bytes = "", status: int = 200, **headers: str) -> bytes:
    """A whole response."""
    content = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    named = {"Content_Type": "application/json", "Content_Length": str(len(content)), "Connection": "close"} | headers
    lines = [f"HTTP/1.1 {status} Odd", *(f"{name.replace('_', '-')}: {value}" for name, value in named.items())]
    return "\r\n".join([*lines, "", ""]).encode() + content


def said(reply: str) -> bytes:
    """A verdict with words beside it that the server has chosen."""
    body = json.loads(GOOD)
    body["choices"][0]["message"]["content"] = reply
    return http(json.dumps(body))


def refused(status: int, detail: Any, **headers: str) -> bytes:
    return http(json.dumps({"error": detail}), status, **headers)


BOMB = gzip.compress(b" " * (64 << 20))
SILENT = b""
"""The server takes the request and says nothing."""

ODD: dict[str, tuple[bytes, str]] = {
    **{name: (http(body), "malformed") for name, body in MALFORMED.items()},
    # Not HTTP, or not as it says.
    "no HTTP": (b"HELLO\r\n\r\n", "connection"),
    "no status": (b"HTTP/1.1 \r\n\r\n", "connection"),
    "a header of 100 kB": (http(GOOD, X_Long="x" * 100_000), "connection"),
    "10,000 headers": (http(GOOD, **{f"X_{number}": "x" for number in range(10_000)}), "connection"),
    "less than announced": (http(GOOD, Content_Length="99999"), "connection"),
    "a terabyte announced": (http(GOOD, Content_Length=str(10**12)), "connection"),
    "a length that is none": (http(GOOD, Content_Length="many"), "connection"),
    "chunks that are none": (http(GOOD, Transfer_Encoding="chunked"), "connection"),
    "said to be packed": (http(GOOD, Content_Encoding="gzip"), "connection"),
    "packed in an unknown way": (http(GOOD, Content_Encoding="zzz"), "answered"),
    "nothing at all": (SILENT, "timeout"),
    # Too much.
    "17 MiB": (http(" " * (17 << 20)), "too_large"),
    "64 MiB, packed": (http(BOMB, Content_Encoding="gzip"), "too_large"),
    "64 MiB of an error, packed": (http(BOMB, 400, Content_Encoding="gzip"), "too_large"),
    # Statuses.
    "no content": (http("", 204), "malformed"),
    "empty": (http(""), "malformed"),
    "no choices": (http('{"choices": []}'), "empty"),
    **{f"a redirect {status}": (http("", status, Location="http://127.0.0.1:9/"), "redirect") for status in (301, 307)},
    "a redirect to nowhere": (http("", 302), "redirect"),
    "a redirect to no address": (http("", 308, Location="http://[::1"), "redirect"),
    "a redirect with a bell": (http("", 303, Location="\x1b[2J\x07"), "redirect"),
    "an error that is deep": (http(DEEP, 400), "http_400"),
    "an error in a number": (refused(400, 7), "http_400"),
    "an error of nothing": (http("null", 422), "http_422"),
    "an error with odd fields": (refused(422, {"message": {"a": [True]}, "code": [1], "type": {}}), "http_422"),
    "an error of a megabyte": (refused(413, {"message": "x" * (1 << 20)}), "http_413"),
    "an error that moves the cursor": (refused(418, {"message": "\x1b[2J\r\u202e"}), "http_418"),
    "a status of 999": (http("{}", 999), "http_999"),
    "a gateway's page": (http("<html>bad gateway</html>", 502), "http_502"),
    "wait for ever": (refused(429, {}, Retry_After="1" + "0" * 400), "rate_limited"),
    "wait until 9999": (refused(503, {}, Retry_After="Fri, 31 Dec 9999 23:59:59 -2359"), "http_503"),
    "wait until no date": (refused(503, {}, Retry_After="Fri, 99 Foo 0000 99:99:99 GMT"), "http_503"),
    "limits that are none": (http(GOOD, **{"x-ratelimit-reset-tokens": "9" * 400 + "h"}), "answered"),
    "a filter": (refused(400, {"code": "content_filter", "message": "no"}), "content_filter"),
    "a withheld reply": (http(json.dumps(text("", finish_reason="content_filter").body)), "content_filter"),
    # A verdict all the same.
    "a lone surrogate": (said("\ud800"), "answered"),
    "control characters": (said("\x00\x1b[2J\u202e\ufffe"), "answered"),
    "300 kB of words": (said("word " * 60_000), "answered"),
    "markup": (said("<script>alert(1)</script>"), "answered"),
}


WELL = http(GOOD)
"""In the place of a verdict for the first of two texts."""


class Server:
    """Answers each prompt with what belongs to its number.

    Args:
        odd: the responses, as bytes.
        models: the response to a question for its models.
        other: the response to everything else.
    """

    def __init__(self, odd: list[bytes], models: bytes = http(MODELS), other: bytes = WELL) -> None:
        self._odd, self._models, self._other = odd, models, other
        self.asked = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"

    async def _start(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(
                (int(line[15:]) for line in head.splitlines() if line.lower().startswith("content-length")), 0
            )
            body = await reader.readexactly(length)
            answer = self._answer(head, body)
            writer.write(answer)
            await writer.drain()
            if answer is SILENT:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _answer(self, head: str, body: bytes) -> bytes:
        if head.startswith("GET"):
            return self._models
        self.asked += 1
        content = json.loads(body)["messages"][0]["content"]
        found = [number for number in range(len(self._odd)) if f"Prompt {number}." in content]
        if not found and self._other is WELL:
            return http(GOOD if content.find("One.") < content.find("Two.") else SWAPPED)
        return self._odd[found[0]] if found else self._other

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    running: list[Server] = []

    def start(*arguments: Any) -> Server:
        running.append(Server(*arguments))
        return running[-1]

    yield start
    for server in running:
        server.close()


def arguments(folder: Path, server: Server, prompts: int) -> list[str]:
    file = folder / "candidates.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number in range(-1, prompts):  # the first one is answered well
            row = {"prompt": f"Prompt {number}.", "split": "train", "completions": ["One.", "Two."]}
            lines.write(json.dumps(row) + "\n")
    return [
        f"candidates={file}",
        "constitution=warm",
        "labeler=openai",
        "labeler.model=judge",
        f"labeler.base_url={server.url}",
        f"output_dir={folder / 'out'}",
        *("labeler.max_retries=0", "labeler.timeout_s=1", "labeler.outage_s=0.5", "labeler.concurrency=1"),
    ]


def test_every_odd_reply_is_counted_for_what_it_is(
    serve: Callable[..., Server], run_command: Any, tmp_path: Path
) -> None:
    """More than 60 kinds of them, in one run that all of them leave alone."""
    assert len(ODD) >= 60
    server = serve([reply for reply, _ in ODD.values()])
    command = arguments(tmp_path, server, len(ODD))
    result = run_command("label", *command)
    assert "Traceback" not in result.stderr
    assert "\x1b[2J" not in result.stderr
    labels = [json.loads(line) for line in (tmp_path / "out" / "labels.jsonl").read_text().splitlines()]
    found = dict(
        zip(ODD, zip(*[iter(label.get("reason", "answered") for label in labels[2:])] * 2, strict=True), strict=True)
    )
    # Each was asked in both orders.
    assert found == {name: (reason, reason) for name, (_, reason) in ODD.items()}
    # Of the first prompt the truth, of the others what the server says.
    assert [label["p_first"] for label in labels[:2]] == pytest.approx([2 / 3, 1 / 3])
    assert all(label["p_first"] == pytest.approx(2 / 3) for label in labels[2:] if "reason" not in label)
    quality = json.loads((tmp_path / "out" / "quality.json").read_text())
    counts = Counter(reason for _, reason in ODD.values())
    assert quality["methods"] == {"logprob": 2 + 2 * counts.pop("answered")}
    assert quality["content_filter"] == 2 * counts.pop("content_filter")
    assert quality["failed_reasons"] == {reason: 2 * count for reason, count in counts.items()}
    assert "content_filter" in result.stderr


def test_what_a_filter_withholds_is_not_asked_again(
    serve: Callable[..., Server], run_command: Any, tmp_path: Path
) -> None:
    filtered = [reply for reply, reason in ODD.values() if reason == "content_filter"]
    server = serve(filtered)
    command = arguments(tmp_path, server, len(filtered))
    run_command("label", *command)
    asked = server.asked
    assert asked == 2 * (1 + len(filtered))
    labels = (tmp_path / "out" / "labels.jsonl").read_bytes()
    assert labels.count(b'"content_filter"') == 2 * len(filtered)
    assert "up to date" in run_command("label", *command).stderr
    # Also where everything is made anew from the store.
    run_command("label", *command, "labeling.min_margin=0.01")
    assert server.asked == asked
    assert (tmp_path / "out" / "labels.jsonl").read_bytes() == labels


WHOLE: dict[str, tuple[bytes, bytes, str]] = {
    "models: deep": (http(DEEP), b"", "usually ends in /v1"),
    "models: a page": (http("<html>"), b"", "usually ends in /v1"),
    "models: no HTTP": (b"HELLO\r\n\r\n", b"", "cannot be reached"),
    "models: packed": (http(BOMB, Content_Encoding="gzip"), b"", "the response has more than 16 MiB"),
    "models: elsewhere": (http("", 307, Location="https://other/v1/models"), b"", "points to https://other/v1/models"),
    "models: silent": (SILENT, b"", "no answer within 1 s"),
    "elsewhere": (http(MODELS), http("", 308, Location="/elsewhere"), "redirects are not followed"),
    "refusing": (http(MODELS), refused(400, {"message": "seed is not permitted"}), "seed is not permitted"),
    "out of order": (http(MODELS), http("{}", 500), "no answer for"),
    "cutting": (http(MODELS), b"H", "no answer for"),
    "key": (http(MODELS), http("{}", 401), "check the key in the environment variable"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_server_that_is_no_use_ends_with_one_line(
    name: str, serve: Callable[..., Server], run_command: Any, tmp_path: Path
) -> None:
    models, reply, words = WHOLE[name]
    server = serve([], models, reply)
    result = run_command("label", *arguments(tmp_path, server, 1), expect=2)
    assert "Traceback" not in result.stderr
    assert words in result.stderr.strip().splitlines()[-1]
