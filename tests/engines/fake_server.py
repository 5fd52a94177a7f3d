"""A programmable OpenAI-compatible server on 127.0.0.1."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Reply:
    """One answer: a status and a body, or a misbehaviour."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut: bool = False
    """Close the connection: before the answer, or in the middle of a body if there is one."""


def text(*contents: str | None, finish_reason: str = "stop", logprobs: Any = None) -> Reply:
    """A chat completion with one choice per content."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": content},
            "finish_reason": finish_reason,
            "logprobs": logprobs,
        }
        for index, content in enumerate(contents)
    ]
    usage = {"prompt_tokens": 11, "completion_tokens": 2 * len(contents)}
    return Reply({"object": "chat.completion", "choices": choices, "usage": usage})


def logprobs(tokens: list[tuple[str, float]], sampled: str | None = None) -> Reply:
    """A chat completion whose first token has these probabilities."""
    top = [{"token": token, "logprob": math.log(p) if p > 0 else -9999.0} for token, p in tokens]
    sampled = tokens[0][0] if sampled is None else sampled
    return text(sampled, logprobs={"content": [{"token": sampled, "logprob": -0.1, "top_logprobs": top}]})


def continuations(body: dict[str, Any], logp: Callable[[list[int], int], float], known: bool = True) -> Reply:
    """What vLLM's ``/completions`` answers. ``logp``: of a token after a prompt, both as ids.

    ``known=False`` is a server without ``logprob_token_ids``: it lists the first 20 tokens instead.
    """
    tokens = body.get("logprob_token_ids", range(20)) if known else range(20)
    choices = []
    for index, prompt in enumerate(body["prompt"]):
        top = {f"token_id:{token}": logp(prompt, token) for token in tokens}
        first = next(iter(top))
        listed = {"tokens": [first], "token_logprobs": [top[first]], "top_logprobs": [top], "text_offset": [0]}
        choices.append({"index": index, "text": "x", "logprobs": listed, "finish_reason": "length"})
    choices.reverse()  # their index tells them apart
    counts = {"prompt_tokens": sum(map(len, body["prompt"])), "completion_tokens": len(body["prompt"])}
    return Reply({"object": "text_completion", "choices": choices, "usage": counts})


def error(status: int, message: str = "no", **headers: str) -> Reply:
    """An error as OpenAI words it."""
    return Reply({"error": {"message": message, "type": "test", "code": None}}, status, headers)


class FakeServer:
    """Answers from ``plan`` (first come, first served), then from ``default``; records what it is asked."""

    def __init__(self, adapters: bool = False) -> None:
        self.adapters = adapters
        """Whether adapters can be loaded, as vLLM allows on request; ``default`` answers that too."""
        self.models: Reply = Reply({"object": "list", "data": [{"id": "judge"}]})
        self.plan: list[Reply] = []
        self.default: Reply | Callable[[dict[str, Any]], Reply] = text("A")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.peak = 0
        self.cancelled = 0
        self._running = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._call(self._start())}/v1"

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _start(self) -> int:
        app = web.Application()
        app.router.add_get("/v1/models", self._on_models)
        app.router.add_post("/v1/chat/completions", self._on_post)
        app.router.add_post("/v1/completions", self._on_post)
        if self.adapters:
            app.router.add_post("/v1/load_lora_adapter", self._on_post)
            app.router.add_post("/v1/unload_lora_adapter", self._on_post)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await self._site.start()
        return int(self._runner.addresses[0][1])

    def go_down(self) -> None:
        """Refuse connections and cut those that are open."""
        self._call(self._stop())

    async def _stop(self) -> None:
        assert self._runner.server is not None
        self._port = int(self._runner.addresses[0][1])
        await self._site.stop()
        for connection in self._runner.server.connections:
            connection.force_close()
            if connection.transport is not None:
                connection.transport.abort()

    def come_back(self) -> None:
        """Take connections again, at the same address."""
        self._call(self._restart())

    async def _restart(self) -> None:
        self._site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await self._site.start()

    def close(self) -> None:
        self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _on_models(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        return await self._answer(request, self.models)

    async def _on_post(self, request: web.Request) -> web.StreamResponse:
        self._running += 1
        self.peak = max(self.peak, self._running)
        try:
            body = await request.json()
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            self.times.append(time.monotonic())
            default = self.default
            reply = self.plan.pop(0) if self.plan else default(body) if callable(default) else default
            return await self._answer(request, reply)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self._running -= 1

    async def _answer(self, request: web.Request, reply: Reply) -> web.StreamResponse:
        if reply.delay_s:
            await asyncio.sleep(reply.delay_s)
        raw = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
        if reply.cut:
            assert request.transport is not None
            response = web.StreamResponse(headers={"Content-Length": "9999"})
            if reply.body is not None:
                await response.prepare(request)
                await response.write(raw.encode())
            request.transport.close()
            return response
        return web.Response(text=raw, status=reply.status, headers=reply.headers, content_type="application/json")
