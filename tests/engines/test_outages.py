"""The openai engine when the server as a whole is down, or refuses everything."""

from __future__ import annotations

import itertools
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fake_server import FakeServer, Reply, error, logprobs

from rlaif.config import BudgetConfig, LabelerConfig, LabelerType
from rlaif.engines import breaker, client, refusals
from rlaif.engines.base import Failure, OptionMass, OptionRequest
from rlaif.engines.openai import OpenAIEngine
from rlaif.records import UserError

AB = ((" A", "A"), (" B", "B"))
PLAIN = "Which is larger, A: 2 or B: 5? Answer with one letter."
DOWN: dict[str, Reply] = {
    "unavailable": error(503, "no healthy upstream"),
    "failing": error(500, "EngineDeadError"),
    "cut": Reply(cut=True),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    monkeypatch.setattr(breaker, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(breaker, "MAX_WAIT_S", 0.4)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def build(server: FakeServer, **settings: Any) -> OpenAIEngine:
    settings = {"base_url": server.url, "model": "judge", "timeout_s": 5.0, "concurrency": 16} | settings
    return OpenAIEngine(LabelerConfig(type=LabelerType.openai, **settings), seed=5)


def asks(many: int) -> Iterator[OptionRequest]:
    for number in range(many):
        yield OptionRequest(({"role": "user", "content": f"Which? {number}"},), AB)


def one_by_one(body: dict[str, Any], step_s: float, many: int) -> Reply:
    """An answer after a time of its own, so that those to ``many`` requests in flight come one after the other."""
    number = content(body).split()[-1]
    reply = answer(body)
    reply.delay_s = step_s * (int(number) % many) if number.isdigit() else 0.0
    return reply


def content(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"])


def answer(body: dict[str, Any]) -> Reply:
    reply = logprobs([("A", 0.6), ("B", 0.3)])
    reply.delay_s = 0.03
    return reply


def reasons(results: list[Any]) -> Counter[str]:
    return Counter(result.reason if isinstance(result, Failure) else "answered" for result in results)


@pytest.mark.parametrize("retries", [1, 6])
@pytest.mark.parametrize("way", DOWN)
def test_a_short_outage_leaves_nothing_unanswered(
    way: str, retries: int, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.default = answer
    down = threading.Timer(0.2, setattr, (server, "default", DOWN[way]))
    up = threading.Timer(1.0, setattr, (server, "default", answer))
    with build(server, max_retries=retries) as engine, caplog.at_level(logging.WARNING):
        for timer in (down, up):
            timer.start()
        results = [result for _, result in engine.score_options(asks(400))]
        assert engine.waited_s > 0.4
    assert reasons(results) == {"answered": 400}
    # In a second without an answer: those in flight, and a question now and then.
    assert len(server.bodies) <= 400 + 2 * 16 + 2 * 8
    said = [record.getMessage() for record in caplog.records if record.name == "rlaif.engines.breaker"]
    assert any("asking pauses until it does, for at most labeler.outage_s=300 seconds" in line for line in said)
    assert re.search(r"answers again after \d seconds$", said[-1])


def test_what_was_sent_before_an_outage_may_be_answered_in_it(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Such an answer does not say that the server is up, and what fails meanwhile must not use up its attempts."""
    down: list[float] = []

    def stops_taking(body: dict[str, Any]) -> Reply:
        if content(body) == "Which? 100":
            down.append(time.monotonic())
        if down and time.monotonic() < down[0] + 0.8:
            return DOWN["failing"]
        return one_by_one(body, 0.004, 64)

    server.default = stops_taking
    with build(server, max_retries=0, concurrency=64) as engine:
        results = [result for _, result in engine.score_options(asks(600))]
    assert reasons(results) == {"answered": 600}
    assert len([line for line in caplog.messages if "answers again" in line]) == 1
    assert len(server.bodies) <= 600 + 64 + 2 * 8


def test_answers_to_what_was_sent_before_keep_the_patience(server: FakeServer) -> None:
    """The question hangs for longer than ``outage_s``, while those that are in flight are answered one by one."""
    state = {"failing": 8, "hanging": 1}

    def overloaded(body: dict[str, Any]) -> Reply:
        if content(body) == PLAIN and len(server.bodies) > 50 and state["hanging"]:
            state["hanging"] -= 1
            return Reply(delay_s=60)
        number = content(body).split()[-1]
        if number.isdigit() and int(number) >= 60 and state["failing"]:
            state["failing"] -= 1
            return DOWN["failing"]
        return one_by_one(body, 0.1, 16)

    server.default = overloaded
    with build(server, outage_s=1.2, timeout_s=2.0) as engine:
        results = [result for _, result in engine.score_options(asks(120))]
    assert reasons(results) == {"answered": 120}
    assert state == {"failing": 0, "hanging": 0}


def test_a_server_that_is_started_anew_is_asked_on(server: FakeServer) -> None:
    server.default = answer
    timers = [threading.Timer(0.2, server.go_down), threading.Timer(1.0, server.come_back)]
    with build(server, max_retries=1) as engine:
        for timer in timers:
            timer.start()
        results = [result for _, result in engine.score_options(asks(400))]
    assert reasons(results) == {"answered": 400}


@pytest.mark.parametrize("way", [*DOWN, "refusing connections", "hanging"])
def test_a_dead_server_ends_the_run_with_one_line(way: str, server: FakeServer) -> None:
    server.default = answer
    got: list[int] = []
    started = time.monotonic()
    with build(server, outage_s=1.0, timeout_s=0.3) as engine:
        results = engine.score_options(asks(100_000))
        got.extend(index for index, _ in itertools.islice(results, 20))
        if way == "refusing connections":
            server.go_down()
        else:
            server.default = DOWN.get(way, Reply(delay_s=60))
        with pytest.raises(UserError) as raised:
            got.extend(index for index, result in results if isinstance(result, OptionMass))
    assert len(got) == len(set(got)) >= 20
    assert time.monotonic() - started < 10
    asked = len(server.bodies)
    assert asked <= len(got) + 3 * 16 + 12
    line = str(raised.value)
    assert line.startswith(f"labeler.base_url={server.url}, labeler.model=judge: no answer for ")
    assert re.search(r"no answer for \d seconds \(labeler\.outage_s=1\), asked \d+ times? in that time \(", line)
    assert line.endswith("what was answered before is kept, and the same command goes on from here")
    assert "\n" not in line


def test_a_request_that_always_fails_is_no_outage(server: FakeServer) -> None:
    """However many there are, and also where nothing else is left to ask."""
    server.default = lambda body: (
        answer(body) if content(body) == PLAIN or int(content(body).split()[-1]) < 30 else error(500, "oops")
    )
    with build(server, max_retries=1, outage_s=2.0) as engine:
        results = dict(engine.score_options(asks(60)))
    assert reasons(list(results.values())) == {"answered": 30, "http_500": 30}
    assert all(isinstance(results[number], Failure) for number in range(30, 60))


def test_a_request_that_takes_the_server_down_with_it_fails_in_the_end(server: FakeServer) -> None:
    dead_until = 0.0

    def reply(body: dict[str, Any]) -> Reply:
        nonlocal dead_until
        if content(body) == "Which? 7":
            dead_until = time.monotonic() + 0.1
        return Reply(cut=True) if time.monotonic() < dead_until else answer(body)

    server.default = reply
    with build(server, outage_s=5.0) as engine:
        results = dict(engine.score_options(asks(40)))
    assert reasons(list(results.values())) == {"answered": 39, "connection": 1}
    assert isinstance(results[7], Failure)
    asked = Counter(map(content, server.bodies))
    assert asked["Which? 7"] <= client.OUTAGES_A_REQUEST + 7


def test_questions_about_an_outage_are_within_the_budget(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    server.default = error(500, "oops")
    with build(server, budget=BudgetConfig(requests=30), outage_s=30.0) as engine:
        results = [result for _, result in engine.score_options(asks(200))]
        assert engine.spent.requests == 30
        assert engine.waited_s == 0
    assert len(server.bodies) == 30
    assert reasons(results) == {"budget": 200}
    assert not any("answers again" in line for line in caplog.messages)


def test_a_key_that_is_revoked_during_an_outage_ends_the_run(server: FakeServer) -> None:
    server.default = error(500, "oops")
    revoke = threading.Timer(0.5, setattr, (server, "default", error(401, "revoked")))
    revoke.start()
    with build(server) as engine, pytest.raises(UserError, match="HTTP 401: revoked"):
        list(engine.score_options(asks(200)))


REFUSING = {
    "parameter": (error(400, "Extra inputs are not permitted: seed"), "http_400", "labeler.extra_body sets"),
    "prefill": (error(422, "continue_final_message is unknown"), "http_422", "try labeler.prefill=false"),
    "length": (error(400, "maximum context length is 8"), "http_400", "serve the model with a longer context"),
    "teapot": (error(418, "short and stout"), "http_418", "labeler.base_url say who is asked"),
    "rate": (error(429, "slow down"), "rate_limited", "see labeler.requests_per_minute"),
    "page": (Reply("<html>welcome</html>"), "malformed", "check the address (it usually ends in /v1)"),
}


@pytest.mark.parametrize("way", REFUSING)
def test_a_server_that_refuses_everything_is_asked_so_often_and_no_more(way: str, server: FakeServer) -> None:
    reply, reason, hint = REFUSING[way]
    server.default = reply
    with build(server, max_retries=0) as engine, pytest.raises(UserError) as raised:
        list(engine.score_options(asks(100_000)))
    line = str(raised.value)
    assert f"{refusals.MOST} requests failed with {reason} and none was answered, nor is a plain question" in line
    assert hint in line
    assert "\n" not in line
    # Each may be asked with fewer log-probabilities and without any; some are in flight.
    assert len(server.bodies) < 3 * (refusals.MOST + 2 * 16)


def test_requests_at_fault_by_themselves_do_not_end_the_run(server: FakeServer) -> None:
    """All of the first prompts may be too long."""
    server.default = lambda body: (
        answer(body)
        if content(body) == PLAIN or int(content(body).split()[-1]) >= 120
        else error(400, "maximum context length is 8")
    )
    with build(server) as engine:
        results = [result for _, result in engine.score_options(asks(150))]
    assert reasons(results) == {"answered": 30, "http_400": 120}
    assert sum(content(body) == PLAIN for body in server.bodies) == 1


@pytest.mark.parametrize("before", [0, 40])
@pytest.mark.parametrize("status", [400, 500])
def test_a_server_that_answers_nothing_but_harmless_questions_is_given_up(
    status: int, before: int, server: FakeServer
) -> None:
    """It is neither down nor refuses everything, and still no request is answered, for as long as there are any."""
    refused = replace(error(status, "out of order"), delay_s=0.05)
    server.default = lambda body: (
        answer(body) if content(body) == PLAIN or int(content(body).split()[-1]) < before else refused
    )
    started, got = time.monotonic(), list[Any]()
    with build(server, max_retries=0, outage_s=1.0) as engine, pytest.raises(UserError) as raised:
        got.extend(result for _, result in engine.score_options(asks(100_000)) if isinstance(result, OptionMass))
    assert len(got) == before
    assert 1 <= time.monotonic() - started < 10
    assert re.search(
        rf"labeler\.model=judge: \d+ requests in a row have failed in \d seconds \(labeler\.outage_s=1\), the last one "
        rf"with http_{status}: out of order; what was answered before is kept, and the same command goes on from here$",
        str(raised.value),
    )


def away(server: FakeServer) -> Reply:
    return Reply({}, 307, {"Location": f"{server.url}/elsewhere?key=hunter2"})


@pytest.mark.parametrize("answered", [False, True])
def test_no_redirect_is_followed(answered: bool, server: FakeServer) -> None:
    other = FakeServer()
    try:
        server.default = away(other)
        server.plan = [answer({})] if answered else []
        with build(server, concurrency=1) as engine:
            stream = engine.score_options(asks(2))
            expected = f"HTTP 307 points to {other.url}/elsewhere; redirects are not followed: give the address of the"
            if answered:
                first, second = (result for _, result in stream)
                assert isinstance(first, OptionMass)
                assert isinstance(second, Failure)
                assert second.reason == "redirect"
                assert expected in second.detail
            else:
                with pytest.raises(UserError, match=re.escape(expected)) as raised:
                    list(stream)
                assert "hunter2" not in str(raised.value)
        server.models = away(other)
        with pytest.raises(UserError, match=re.escape(expected)):
            build(server)
        assert other.bodies == []
        assert other.headers == []
    finally:
        other.close()


@pytest.mark.parametrize(("url", "warns"), [("http://judge.example.org/v1", True), ("https://h.example.org/v1", False)])
def test_a_key_that_anybody_can_read_is_warned_about(
    url: str, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "my_private_token_abcdef")
    monkeypatch.setattr(OpenAIEngine, "check", lambda self: None)
    with caplog.at_level(logging.WARNING):
        OpenAIEngine(LabelerConfig(type=LabelerType.openai, model="judge", base_url=url), seed=0).close()
    assert sum("OPENAI_API_KEY is sent over plain http" in line for line in caplog.messages) == warns
    assert "my_private" not in caplog.text


def test_a_key_to_this_machine_is_nothing_to_warn_about(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "my_private_token_abcdef")
    with caplog.at_level(logging.WARNING):
        build(server).close()
    assert not caplog.messages
