"""The openai engine under faults, limits and budgets: what is true of every run, however the server behaves."""

from __future__ import annotations

import itertools
import logging
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_server import FakeServer, Reply, continuations, error, logprobs, text

from rlaif.config import BudgetConfig, Endpoint, LabelerConfig, LabelerType, PriceConfig
from rlaif.engines import address, client, limits
from rlaif.engines.base import Failure, OptionMass, OptionRequest
from rlaif.engines.limits import Spend
from rlaif.engines.openai import OpenAIEngine
from rlaif.records import UserError

AB = ((" A", "A"), (" B", "B"))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def build(server: FakeServer, **settings: Any) -> OpenAIEngine:
    settings = {"base_url": server.url, "model": "judge", "timeout_s": 5.0, "outage_s": 2.0} | settings
    return OpenAIEngine(LabelerConfig(type=LabelerType.openai, **settings), seed=5)


def asks(many: int) -> Iterator[OptionRequest]:
    for number in range(many):
        yield OptionRequest(({"role": "user", "content": f"Which? {number}"},), AB)


def share(body: dict[str, Any]) -> float:
    """The truth: P(A) is a function of the question; one of the engine's own has no number."""
    number = body["messages"][0]["content"].split()[-1]
    return 0.05 + 0.01 * (int(number) % 90 if number.isdigit() else 0)


def answer(body: dict[str, Any]) -> Reply:
    p = share(body)
    return logprobs([("A", p), ("B", 0.95 - p)])


def answer_ids(body: dict[str, Any]) -> Reply:
    return continuations(body, lambda prompt, token: -1.0 - (sum(prompt) + token) % 7)


def faulty(answered: Callable[[dict[str, Any]], Reply], rate: float = 0.3) -> Callable[[dict[str, Any]], Reply]:
    """A server that misbehaves in every way on a share of the calls."""
    draw = random.Random(7)
    delays = itertools.chain([30, 30, 30], itertools.repeat(0))  # a time-out costs the test a second
    ways: list[Callable[[dict[str, Any]], Reply]] = [
        lambda _: error(429, "slow down", **{"Retry-After": "0.02"}),
        lambda _: error(500, "oops"),
        lambda _: Reply(delay_s=next(delays)),
        lambda _: Reply(cut=True),
        lambda _: Reply({"choices": []}, cut=True),
        lambda _: Reply('{"choices": [{"mess'),
        lambda _: Reply({"choices": []}),
        lambda _: Reply(""),
        _without_logprobs(answered),
    ]
    kinds = itertools.cycle(ways)
    return lambda body: next(kinds)(body) if draw.random() < rate else answered(body)


def _without_logprobs(answered: Callable[[dict[str, Any]], Reply]) -> Callable[[dict[str, Any]], Reply]:
    def reply(body: dict[str, Any]) -> Reply:
        result = answered(body)
        for choice in result.body["choices"]:
            choice["logprobs"] = None
        return result

    return reply


@pytest.mark.parametrize("endpoint", Endpoint)
def test_a_third_of_the_calls_may_fail_without_a_trace(server: FakeServer, endpoint: Endpoint) -> None:
    calm = answer if endpoint is Endpoint.chat else answer_ids
    settings = {"endpoint": endpoint, "tokenizer": "tiny", "batch_size": 2, "timeout_s": 1.0, "max_retries": 15}
    results: list[dict[int, Any]] = []
    many = 60 if endpoint is Endpoint.completions else 120
    for default in (calm, faulty(calm)):
        server.default = default
        server.bodies.clear()
        with build(server, **settings) as engine:
            results.append(dict(engine.score_options(asks(many))))
    undisturbed, disturbed = results
    assert len(server.bodies) > many * 0.6
    assert sorted(disturbed) == list(range(many))
    for index, result in undisturbed.items():
        assert isinstance(result, OptionMass)
        other = disturbed[index]
        assert isinstance(other, OptionMass), other
        assert (other.masses, other.method) == (result.masses, "logprob")


class TestBudget:
    """Never above it, whatever happens; and the run ends as any other."""

    @pytest.mark.parametrize("endpoint", Endpoint)
    def test_requests(self, server: FakeServer, endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
        server.default = faulty(answer if endpoint is Endpoint.chat else answer_ids)
        settings = {"endpoint": endpoint, "tokenizer": "tiny", "batch_size": 2, "timeout_s": 1.0, "max_retries": 15}
        budget = BudgetConfig(requests=30)
        with build(server, budget=budget, **settings) as engine, caplog.at_level(logging.WARNING):
            results = dict(engine.score_options(asks(200)))
            assert engine.spent.requests == 30
        # On a busy machine one may time out before it has reached the server.
        assert 25 <= len(server.bodies) <= 30
        kinds = Counter(result.reason if isinstance(result, Failure) else "answered" for result in results.values())
        assert sum(kinds.values()) == 200
        assert set(kinds) == {"answered", "budget"}
        [line] = [record.getMessage() for record in caplog.records if "used up" in record.getMessage()]
        assert line.startswith("the budget is used up (labeler.budget.requests=30): spent 30 requests, ")
        assert f"{kinds['budget']} verdicts are missing" in line
        assert "\n" not in line

    def test_tokens_and_dollars(self, server: FakeServer) -> None:
        draw = random.Random(3)
        charged: list[tuple[int, int]] = []

        def reply(body: dict[str, Any]) -> Reply:
            result = answer(body)
            charged.append((draw.randint(10, 200), 1))
            result.body["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), charged[-1], strict=True))
            result.delay_s = draw.random() * 0.02
            return result

        server.default = reply
        price = PriceConfig(input_per_million=2.0, output_per_million=8.0)
        for budget in (BudgetConfig(tokens=5000), BudgetConfig(usd=0.01)):
            charged.clear()
            with build(server, budget=budget, price=price, concurrency=16) as engine:
                results = list(engine.score_options(asks(200)))
                spent = engine.spent
            assert spent[:3] == (len(charged), sum(p for p, _ in charged), sum(c for _, c in charged))
            assert spent.usd == pytest.approx((spent.prompt_tokens * 2 + spent.completion_tokens * 8) / 1e6)
            if budget.tokens:
                assert spent.prompt_tokens + spent.completion_tokens <= budget.tokens
            if budget.usd:
                assert spent.usd <= budget.usd
            # The worst case of one request is under 400 tokens: no more than that stays unspent.
            assert spent.prompt_tokens > 4500
            assert 0 < sum(isinstance(result, OptionMass) for _, result in results) < 200

    @pytest.mark.parametrize(("status", "counts"), [(400, False), (413, False), (500, True), (503, True)])
    def test_what_an_error_costs(self, server: FakeServer, status: int, counts: bool) -> None:
        """Nobody knows what a server had done when it broke; a refusal costs nothing."""
        plain = text("A")
        plain.body["usage"] = {"prompt_tokens": 0, "completion_tokens": 0}
        server.default = lambda body: error(status, "no") if body["messages"][0]["content"] == "Which? 0" else plain
        with build(server, max_retries=0) as engine:
            list(engine.score_options(asks(1)))
            spent = engine.spent
        assert spent.requests == len(server.bodies) > 0
        assert (spent.prompt_tokens > 0) == counts
        assert (spent.completion_tokens > 0) == counts

    def test_a_larger_budget_goes_on(self, server: FakeServer) -> None:
        server.default = answer
        with build(server, budget=BudgetConfig(requests=5)) as engine:
            first = dict(engine.score_options(asks(20)))
            spent = engine.spent
        missing = [index for index, result in first.items() if isinstance(result, Failure)]
        assert len(missing) == 15
        with build(server, budget=BudgetConfig(requests=12)) as engine:
            engine.spent = spent
            second = list(engine.score_options(asks(15)))
            assert engine.spent.requests == 12
        assert sum(isinstance(result, OptionMass) for _, result in second) == 7
        assert len(server.bodies) == 12

    @pytest.mark.parametrize("endpoint", Endpoint)
    def test_nothing_is_left(self, server: FakeServer, endpoint: Endpoint) -> None:
        """A run that may not even ask whether the server takes token ids ends like any other."""
        budget = BudgetConfig(requests=5)
        config = {"endpoint": endpoint, "tokenizer": "tiny"}
        with build(server, budget=budget, **config) as engine:
            engine.spent = Spend(5, 0, 0, 0.0)
            results = list(engine.score_options(asks(1000)))
        assert {result.reason for _, result in results if isinstance(result, Failure)} == {"budget"}
        assert len(results) == 1000
        assert server.bodies == []


class TestPerMinute:
    """A minute of the tests is a second."""

    @pytest.fixture(autouse=True)
    def _short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "WINDOW_S", 1.0)

    def test_requests(self, server: FakeServer) -> None:
        server.default = faulty(answer, 0.2)
        with build(server, requests_per_minute=20, timeout_s=0.3, max_retries=15) as engine:
            results = [result for _, result in engine.score_options(asks(45))]
        assert all(isinstance(result, OptionMass) for result in results)
        times = server.times
        assert len(times) > 45
        for start in times:
            assert sum(start <= moment <= start + 0.9 for moment in times) <= 20
        assert times[-1] - times[0] < len(times) / 20 + 2.5

    def test_tokens(self, server: FakeServer) -> None:
        server.default = answer  # 13 tokens each, where a few hundred are reserved
        with build(server, tokens_per_minute=1300) as engine:
            results = [result for _, result in engine.score_options(asks(150))]
        assert all(isinstance(result, OptionMass) for result in results)
        for start in server.times:
            assert sum(start <= moment <= start + 0.9 for moment in server.times) <= 100
        assert server.times[-1] - server.times[0] > 0.9

    def test_a_request_that_no_minute_can_hold(self, server: FakeServer) -> None:
        with build(server, tokens_per_minute=100) as engine:
            [(_, result)] = engine.score_options(asks(1))
        assert isinstance(result, Failure)
        assert result.reason == "over_limit"
        assert "labeler.tokens_per_minute=100" in result.detail


def test_too_many_at_once_are_fewer_at_once(server: FakeServer) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        if server._running > 6:
            return error(429, "too many at once")
        result = answer(body)
        result.delay_s = 0.02
        return result

    server.default = reply
    with build(server, concurrency=48, max_retries=20) as engine:
        results = [result for _, result in engine.score_options(asks(200))]
        assert engine._limits.concurrency.limit < 16
    assert all(isinstance(result, OptionMass) for result in results)
    assert len(server.bodies) < 450


@pytest.mark.parametrize(
    ("headers", "waits"),
    [
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "400ms"}, True),
        ({"x-ratelimit-remaining-tokens": "20", "x-ratelimit-reset-tokens": "0.4s"}, True),
        ({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "1m0s"}, False),
        ({"x-ratelimit-remaining-tokens": "90000", "x-ratelimit-reset-tokens": "9s"}, False),
        ({"x-ratelimit-remaining-requests": "none", "x-ratelimit-reset-requests": "soon"}, False),
    ],
)
def test_rate_limit_headers(server: FakeServer, headers: dict[str, str], waits: bool) -> None:
    first = answer({"messages": [{"content": "1"}]})
    first.headers = headers
    server.plan, server.default = [first], answer
    with build(server, concurrency=1) as engine:
        list(engine.score_options(asks(2)))
    gap = server.times[1] - server.times[0]
    assert (0.39 < gap < 1.5) if waits else gap < 0.3


def test_ctrl_c_ends_within_two_seconds(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = text("A")
    slow.delay_s = 60
    server.default = slow
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = build(server, timeout_s=60)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            list(engine.score_options(asks(1000)))
        start = time.monotonic()
        engine.close()
        assert time.monotonic() - start < 2
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    assert not engine._client._thread.is_alive()


def test_what_was_answered_before_a_refusal_is_handed_over(server: FakeServer) -> None:
    """A refused key ends the run, but answers that came in with it have been paid for."""
    server.plan = [answer({"messages": [{"content": "1"}]}) for _ in range(5)]
    server.default = error(401, "revoked")
    got: list[int] = []
    with build(server, concurrency=1) as engine:
        results = engine.score_options(asks(20))
        with pytest.raises(UserError, match="HTTP 401"):
            got.extend(index for index, _ in results)
    assert got == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"requests_per_minute": 0}, "labeler.requests_per_minute=0: must be above 0 or null"),
        ({"tokens_per_minute": -1}, "labeler.tokens_per_minute=-1: must be above 0 or null"),
        ({"batch_size": 0}, "labeler.batch_size=0: must be above 0"),
        ({"budget": {"usd": 5.0}}, "labeler.budget.usd=5.0 needs labeler.price.input_per_million and"),
        ({"budget": {"requests": 0}}, "labeler.budget.requests=0: must be above 0 or null"),
        ({"price": {"input_per_million": -0.1}}, "labeler.price.input_per_million=-0.1: must be 0 or more, or null"),
        ({"endpoint": "responses"}, "responses"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with pytest.raises((ValueError, OmegaConfBaseException), match=re.escape(message)):
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LabelerConfig), settings))


def test_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTPS_PROXY", "all_proxy", "no_proxy", "NO_PROXY", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert address.find_proxy("https://models.example.org/v1") is None
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:3128")
    assert address.find_proxy("https://models.example.org/v1") == "http://127.0.0.1:3128"
    assert address.find_proxy("http://models.example.org/v1") is None
    monkeypatch.setenv("no_proxy", "example.org")
    assert address.find_proxy("https://models.example.org:8443/v1") is None
