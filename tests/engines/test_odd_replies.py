"""Whatever a server answers, a request is answered or fails: no exception, and no label out of nonsense."""

from __future__ import annotations

import asyncio
import copy
import gzip
import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import StreamReader, web
from fake_server import FakeServer, Reply, continuations, logprobs, text
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_replies import DEEP, MALFORMED, with_logprob

from rlaif.config import Endpoint, LabelerConfig, LabelerType
from rlaif.engines import client
from rlaif.engines.base import Failure, OptionMass, OptionRequest, Sampled, SampleRequest
from rlaif.engines.client import Client
from rlaif.engines.openai import OpenAIEngine
from rlaif.engines.wire import AttemptError, parse_continuations, parse_response
from rlaif.records import UserError

AB = ((" A", "A"), (" B", "B"))
ASK = OptionRequest(({"role": "user", "content": "Which?"},), AB)
SAMPLE = SampleRequest(({"role": "user", "content": "Hi"},), 8)
KNOWN = {"malformed", "empty", "no_logprobs", "content_filter", "rate_limited", "redirect", "connection", "timeout"}
VALID = [logprobs([("A", 0.6), (" A", 0.1), ("B", 0.2)]).body, text("A").body, text("A", "B", None).body]
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 5, 0.5, -0.5, 1e300, -1e300, 10**400, -(10**400), math.nan, math.inf, -math.inf),
    *("", "A", "\ud800", "\x00", "x" * 300, "1e999", [], {}, [None], [[]], {"": None}, [True], ["A"], {"A": "B"}),
    {"token": "A", "logprob": 3.0},
    {"content": [{"token": True, "top_logprobs": [[]]}]},
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


class Transport:
    """In the place of HTTP: a reply is a status and a body."""

    def __init__(self) -> None:
        self.status, self.body = 200, b""

    async def request(self, method: str, path: str, data: bytes | None = None, timeout_s: float | None = None) -> Any:
        if path == "/models":
            return 200, {}, b'{"data": [{"id": "judge"}]}'
        return self.status, {}, self.body


def build(url: str = "http://127.0.0.1:9/v1", **more: Any) -> OpenAIEngine:
    given = {"base_url": url, "model": "judge", "max_retries": 0, "outage_s": 0.01, "timeout_s": 5.0} | more
    return OpenAIEngine(LabelerConfig(type=LabelerType.openai, **given), seed=5)


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> Transport:
    fake = Transport()
    monkeypatch.setattr(Client, "request", lambda self, *more, **named: fake.request(*more, **named))
    return fake


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a reply."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, entry in entries:
        yield from nodes(entry, (*path, name))


def changed(reply: Any, draw: random.Random, times: int) -> Any:
    """The reply with so many of its places replaced, dropped or doubled."""
    reply = copy.deepcopy(reply)
    for _ in range(times):
        *above, last = draw.choice(list(nodes({"all": reply}))[1:])
        holder: Any = {"all": reply}
        for name in above:
            holder = holder[name]
        kind = draw.randrange(4)
        if kind == 0 and len(above):
            del holder[last]
        elif kind == 1 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        elif above:
            holder[last] = copy.deepcopy(draw.choice(ODD))
        else:
            reply = copy.deepcopy(draw.choice(ODD))
    return reply


def check(engine: OpenAIEngine) -> str:
    """Ask for a verdict and for a completion; what became of the verdict."""
    results: list[Any] = []
    for ask in (lambda: engine.score_options([ASK]), lambda: engine.sample([SAMPLE])):
        try:
            [(_, result)] = ask()
        except UserError:
            results.append("stopped")
            continue
        json.dumps(vars(result))
        results.append(result)
        if isinstance(result, OptionMass):
            assert all(mass is None or (math.isfinite(mass) and mass >= 0) for mass in result.masses)
            for count in (result.prompt_tokens, result.completion_tokens):
                assert count is None or (type(count) is int and 0 <= count < 10**12)
        elif isinstance(result, Sampled):
            assert type(result.text) is str
            assert type(result.tokens) is int
        else:
            assert isinstance(result, Failure)
            assert result.reason in KNOWN or result.reason.startswith("http_")
            assert len(result.detail) <= 200
            assert "\n" not in result.detail
    assert engine.spent.requests > 0
    [verdict, _] = results
    return verdict if isinstance(verdict, str) else getattr(verdict, "reason", "answered")


def test_a_reply_that_is_changed_anywhere(transport: Transport) -> None:
    """At least 300 replies of the right shape but for one to three places."""
    seen: set[str] = set()

    @given(seed=st.integers(0, 2**32), times=st.integers(1, 3), valid=st.sampled_from(VALID))
    @settings(deadline=None, max_examples=350, database=None)
    def odd(seed: int, times: int, valid: Any) -> None:
        transport.status, transport.body = 200, json.dumps(changed(valid, random.Random(seed), times)).encode()
        with build() as engine:
            seen.add(check(engine))

    odd()
    assert {"malformed", "answered", "empty"} <= seen


@given(
    body=st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["error", "message", "code", "choices", "detail", "type"]), inner)
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
    status=st.sampled_from([200, 204, 400, 401, 403, 404, 409, 413, 418, 422, 429, 500, 503, 599]),
)
@settings(deadline=None, max_examples=150)
def test_any_body_with_any_status(body: bytes, status: int) -> None:
    fake = Transport()
    fake.status, fake.body = status, body
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "request", lambda self, *more, **named: fake.request(*more, **named))
        with build() as engine:
            check(engine)


@pytest.fixture(scope="module")
def token_ids() -> Iterator[tuple[FakeServer, OpenAIEngine]]:
    """An engine that asks with token ids, past its own first question."""
    server = FakeServer()
    server.default = lambda body: continuations(body, lambda prompt, token: -3.0, known=False)
    engine = build(server.url, endpoint=Endpoint.completions, tokenizer="tiny")
    assert isinstance(next(engine.score_options([ASK]))[1], OptionMass)
    yield server, engine
    engine.close()
    server.close()


def test_an_odd_reply_to_token_ids(token_ids: tuple[FakeServer, OpenAIEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = token_ids
    fake = Transport()
    monkeypatch.setattr(Client, "request", lambda self, *more, **named: fake.request(*more, **named))
    valid = continuations({"prompt": [[1]]}, lambda prompt, token: -3.0, known=False).body
    seen: set[str] = set()

    @given(seed=st.integers(0, 2**32), times=st.integers(1, 3))
    @settings(deadline=None, max_examples=150, database=None)
    def odd(seed: int, times: int) -> None:
        fake.body = json.dumps(changed(valid, random.Random(seed), times)).encode()
        seen.add(check(engine))

    odd()
    assert {"malformed", "answered"} <= seen


@pytest.mark.parametrize("name", MALFORMED)
def test_what_cannot_be_is_malformed(name: str, transport: Transport) -> None:
    transport.body = MALFORMED[name].encode("utf-8", "surrogatepass")
    with build() as engine:
        assert check(engine) == "malformed"


def test_what_can_be_is_not(transport: Transport) -> None:
    for value, p, other in (
        ("0.0009", 1.0, 0.01),
        ("-Infinity", 0.0, 1.0),
        ("-9999", 0.0, 0.3),
        ("-1", math.exp(-1), 0.3),
    ):
        transport.body = with_logprob(value).replace(str(math.log(0.3)), str(math.log(other))).encode()
        with build() as engine:
            [(_, result)] = engine.score_options([ASK])
        assert isinstance(result, OptionMass)
        assert result.masses == pytest.approx((p, other))


@pytest.mark.parametrize(
    ("places", "order"),
    [((0, 1), "ab"), ((1, 0), "ba"), ((None, None), "ab"), ((0, 0), None), ((0, 2), None), ((True, 0), None)],
)
def test_choices_belong_to_the_prompts_of_their_index(places: tuple[Any, Any], order: str | None) -> None:
    choices = [{"index": place, "text": word} for place, word in zip(places, "ab", strict=True)]
    body = json.dumps({"choices": choices}).encode()
    if order is None:
        with pytest.raises(AttemptError, match="other indices than their prompts"):
            parse_continuations(parse_response(body), 2)
    else:
        assert "".join(found.text for found in parse_continuations(parse_response(body), 2)) == order


def refused(status: int, **fields: Any) -> Reply:
    return Reply({"error": {"message": "no", **fields}}, status)


FILTERED = {
    "Azure": refused(400, code="content_filter", innererror={"code": "ResponsibleAIPolicyViolation"}),
    "Azure, inner code alone": refused(400, code=None, innererror={"code": "ResponsibleAIPolicyViolation"}),
    "OpenAI": refused(400, code="content_policy_violation", type="invalid_request_error"),
    "by type": refused(403, type="content_filter", code=None),
    "finish reason": text("", finish_reason="content_filter"),
    "finish reason without content": text(None, finish_reason="content_filter"),
}


@pytest.mark.parametrize("endpoint", Endpoint)
@pytest.mark.parametrize("way", FILTERED)
def test_a_content_filter_is_heard_once(way: str, endpoint: Endpoint, server: FakeServer) -> None:
    """It is asked neither again nor with fewer log-probabilities, and others in the same request are answered."""
    filtered = FILTERED[way]

    def chat(body: dict[str, Any]) -> Reply:
        return filtered if "bad" in str(body["messages"]) else logprobs([("A", 0.6), ("B", 0.2)])

    def completions(body: dict[str, Any]) -> Reply:
        bad = [len(prompt) > 60 for prompt in body["prompt"]]
        if filtered.status >= 400:
            return filtered if any(bad) else continuations(body, lambda prompt, token: -3.0)
        reply = continuations(body, lambda prompt, token: -3.0)
        for choice in reply.body["choices"]:
            if bad[choice["index"]]:
                choice.update(logprobs=None, finish_reason="content_filter")
        return reply

    server.default = chat if endpoint is Endpoint.chat else completions
    asks = [OptionRequest(({"role": "user", "content": word},), (("A",), ("B",))) for word in ("x", "bad" * 20, "y")]
    with build(server.url, endpoint=endpoint, tokenizer="tiny", max_retries=3) as engine:
        results = dict(engine.score_options(asks))
    assert isinstance(results[0], OptionMass)
    assert isinstance(results[2], OptionMass)
    assert isinstance(results[1], Failure)
    assert results[1].reason == "content_filter"
    assert results[1].permanent
    if endpoint is Endpoint.chat:
        assert len(server.bodies) == 3


class Bomb:
    """A server whose answers are large: by themselves, or once they are unpacked."""

    def __init__(self) -> None:
        self.written = 0
        self.encoding: str | None = None
        self.path = "/v1/chat/completions"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path != self.path:
            return web.json_response({"data": [{"id": "judge"}]})
        response = web.StreamResponse(headers={"Content-Encoding": self.encoding} if self.encoding else {})
        await response.prepare(request)
        # 64 MiB in either case.
        part = gzip.compress(b" " * (64 << 20)) if self.encoding else b" " * (1 << 20)
        try:
            for _ in range(1 if self.encoding else 64):
                await response.write(part)
                self.written += len(part)
        except ConnectionError:
            pass
        return response


@pytest.fixture
def bomb() -> Iterator[tuple[Bomb, str]]:
    kept, fake = FakeServer(), Bomb()

    async def start() -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", fake.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, int(runner.addresses[0][1])

    def call(job: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(job, kept._loop).result(10)

    runner, port = call(start())
    yield fake, f"http://127.0.0.1:{port}/v1"
    call(runner.cleanup())
    kept.close()


@pytest.mark.parametrize("encoding", [None, "gzip"])
def test_a_response_is_bounded(encoding: str | None, bomb: tuple[Bomb, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused at 16 MiB, however small it came over the wire, and before it is in memory."""
    fake, url = bomb
    fake.encoding = encoding
    held: list[int] = []
    readany = StreamReader.readany

    async def counted(self: StreamReader) -> bytes:
        part = await readany(self)
        held.append(len(part))
        return part

    monkeypatch.setattr(StreamReader, "readany", counted)
    with build(url, max_retries=5) as engine:
        [(_, result)] = engine.score_options([ASK])
    assert isinstance(result, Failure)
    assert (result.reason, result.detail) == ("too_large", "the response has more than 16 MiB")
    # The listing of models is the first part.
    assert sum(held) < 18 << 20
    assert max(held) < 2 << 20
    fake.path = "/v1/models"
    with pytest.raises(UserError, match="the response has more than 16 MiB"):
        build(url)


MODELS: dict[str, Callable[[], Reply]] = {
    "deep": lambda: Reply(DEEP),
    "a list": lambda: Reply([{"id": "judge"}]),
    "no objects": lambda: Reply({"data": ["judge"]}),
    "a number of 5000 digits": lambda: Reply('{"data": ' + "1" * 5000 + "}"),
    "deep in an error": lambda: Reply(DEEP, 500),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_odd_listing_of_models(name: str, server: FakeServer) -> None:
    server.models = MODELS[name]()
    with pytest.raises(UserError, match=r"cannot be reached|usually ends in /v1") as raised:
        build(server.url)
    assert "\n" not in str(raised.value)
