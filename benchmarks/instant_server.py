"""An OpenAI-compatible server that answers at once: ``python -m benchmarks.instant_server [A B]``.

It prints its address. It speaks as much HTTP as its clients do (keep-alive, Content-Length) and picks one of a few
answers that are ready, by a checksum of what it was asked, so that the client under test is the slow side. A and B
are the ids of the tokens that get the probability over ``/completions``, as by a model that answers with a letter.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import zlib
from typing import Any

MODEL = "instant"
VARIANTS = 61


def _http(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def _probabilities(variant: int) -> tuple[float, float]:
    """P(A) and P(B): 0.95 of the mass, shared differently by each variant."""
    a = 0.05 + 0.85 * variant / (VARIANTS - 1)
    return a, 0.95 - a


def _chat(variant: int) -> bytes:
    """A chat completion with twenty log-probabilities, as servers word it."""
    a, b = _probabilities(variant)
    listed = [("A", a), ("B", b), *((f"token{number}", 0.0005) for number in range(18))]
    top = [{"token": token, "logprob": math.log(p), "bytes": list(token.encode())} for token, p in listed]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "A"},
        "logprobs": {"content": [{**top[0], "top_logprobs": top}]},
        "finish_reason": "length",
    }
    usage = {"prompt_tokens": 250, "completion_tokens": 1, "total_tokens": 251}
    head = {"id": "x", "object": "chat.completion", "created": 1, "model": MODEL}
    return _http(json.dumps({**head, "choices": [choice], "usage": usage}).encode())


CHAT = [_chat(variant) for variant in range(VARIANTS)]
MODELS = _http(json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode())
LETTERS: list[int] = []
MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}"


def _completions(body: bytes) -> bytes:
    """Log-probabilities of the tokens in ``logprob_token_ids``, for every prompt, as vLLM words them."""
    asked: dict[str, Any] = json.loads(body)
    prompts, tokens = asked["prompt"], asked.get("logprob_token_ids") or [0]
    choices = []
    for index, prompt in enumerate(prompts):
        shared = dict(zip(LETTERS, _probabilities(hash(tuple(prompt)) % VARIANTS), strict=False))
        logprobs = {f"token_id:{token}": math.log(shared.get(token, 1e-6)) for token in tokens}
        first = next(iter(logprobs))
        logprobs = {"tokens": [first], "token_logprobs": [logprobs[first]], "top_logprobs": [logprobs]}
        choices.append({"index": index, "text": "A", "logprobs": logprobs, "finish_reason": "length"})
    usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": len(prompts)}
    return _http(json.dumps({"object": "text_completion", "choices": choices, "usage": usage}).encode())


class Connection(asyncio.Protocol):
    """One client's connection."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end]
            place = head.lower().find(b"content-length:")
            length = int(head[place + 15 :].split(b"\r\n", 1)[0]) if place >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + length], self.buffer[end + 4 + length :]
            self.transport.write(_answer(head.split(b" ", 2)[1], body))


def _answer(path: bytes, body: bytes) -> bytes:
    if path == b"/v1/chat/completions":
        return CHAT[zlib.crc32(body) % VARIANTS]
    if path == b"/v1/completions":
        return _completions(body)
    return MODELS if path == b"/v1/models" else MISSING


async def serve() -> None:
    """Answer until the process is ended."""
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    LETTERS += map(int, sys.argv[1:3])
    asyncio.run(serve())
