"""What the next request has to wait for, on a clock that the tests turn."""

from __future__ import annotations

import heapq
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.config import BudgetConfig, PriceConfig
from rlaif.engines.limits import (
    BudgetSpentError,
    Concurrency,
    Limits,
    NeverAllowedError,
    Spend,
    Ticket,
    Usage,
    Window,
)


def admitted(limits: Limits, now: float = 0.0, worst: Usage = Usage(10, 1)) -> Ticket:  # noqa: B008 - immutable
    answer = limits.admit(now, worst)
    assert isinstance(answer, Ticket), answer
    return answer


class TestWindow:
    def test_amounts_leave_after_a_minute_and_a_second(self) -> None:
        window = Window(10)
        window.add(0.0, 6)
        window.add(20.0, 3)
        assert window.wait(30.0, 1) == 0
        assert window.wait(30.0, 2) == 31  # until the first leaves at 61
        assert window.wait(30.0, 8) == 51  # until both have left
        assert window.wait(61.0, 7) == 0
        assert window.wait(30.0, 11) == math.inf

    def test_a_correction_counts_at_once_and_not_after_the_window(self) -> None:
        window = Window(10)
        entry = window.add(0.0, 9)
        window.correct(1.0, entry, 2)
        assert window.wait(1.0, 8) == 0
        window.add(1.0, 8)
        assert window.wait(61.5, 2) == 0
        window.correct(61.5, entry, 100)
        assert window.wait(61.5, 2) == 0

    @given(
        most=st.integers(1, 60),
        arrivals=st.lists(st.tuples(st.floats(0, 20), st.integers(1, 20)), min_size=1, max_size=60),
    )
    @settings(deadline=None)
    def test_no_minute_holds_more_than_the_limit(self, most: int, arrivals: list[tuple[float, int]]) -> None:
        window, now = Window(most), 0.0
        sent: list[tuple[float, int]] = []
        for gap, amount in arrivals:
            now += gap
            if amount > most:
                assert window.wait(now, amount) == math.inf
                continue
            while (wait := window.wait(now, amount)) > 0:
                now += wait
            window.add(now, amount)
            sent.append((now, amount))
        for start, _ in sent:
            assert sum(amount for at, amount in sent if start <= at <= start + 60) <= most


class TestConcurrency:
    def test_trouble_halves_it_once_per_round(self) -> None:
        concurrency = Concurrency(64, 64)
        for _ in range(64):  # all of one round are told off
            concurrency.ended(started=0.0, now=1.0, overloaded=True)
        assert concurrency.limit == 32
        concurrency.ended(started=1.0, now=2.0, overloaded=True)
        assert concurrency.limit == 16

    def test_a_round_of_good_replies_adds_one(self) -> None:
        concurrency = Concurrency(64, 64)
        concurrency.ended(0.0, 1.0, overloaded=True)
        for _ in range(32):
            concurrency.ended(1.0, 2.0, overloaded=False)
        assert concurrency.limit == pytest.approx(33, abs=0.05)

    def test_it_doubles_until_the_first_trouble(self) -> None:
        concurrency = Concurrency(64, 4)
        for expected in (8, 16, 32):
            for _ in range(int(concurrency.limit)):
                concurrency.ended(0.0, 1.0, overloaded=False)
            assert concurrency.limit == expected
        concurrency.ended(1.0, 2.0, overloaded=True)
        concurrency.ended(2.0, 3.0, overloaded=False)
        assert concurrency.limit == pytest.approx(16 + 1 / 16)

    def test_after_an_outage_it_grows_from_one(self) -> None:
        concurrency = Concurrency(64, 64)
        concurrency.ended(0.0, 1.0, overloaded=True)
        concurrency.start_over()
        for expected in (2, 4, 8):
            for _ in range(int(concurrency.limit)):
                concurrency.ended(2.0, 3.0, overloaded=False)
            assert concurrency.limit == expected

    def test_it_stays_between_one_and_the_most(self) -> None:
        concurrency = Concurrency(4, 9)
        concurrency.ended(0.0, 1.0, overloaded=False)
        assert concurrency.limit == 4
        for moment in range(1, 20):
            concurrency.ended(moment, moment, overloaded=True)
        assert concurrency.limit == 1

    def test_slow_replies_count_as_trouble(self) -> None:
        limits = Limits(8, slow_s=30)
        limits.done(29.0, admitted(limits), Usage())
        assert limits.concurrency.limit == 8
        limits.done(61.0, admitted(limits, 30.0), Usage())
        assert limits.concurrency.limit == 4


class TestLimits:
    def test_in_flight(self) -> None:
        limits = Limits(2)
        first, _ = admitted(limits), admitted(limits)
        assert limits.admit(0.0, Usage(10, 1)) == math.inf
        limits.done(1.0, first, Usage(10, 1))
        admitted(limits, 1.0)

    def test_pause(self) -> None:
        limits = Limits(2)
        limits.pause(5.0)
        limits.pause(3.0)  # an earlier end shortens nothing
        assert limits.admit(1.0, Usage()) == 4.0
        admitted(limits, 5.0)

    def test_a_request_above_the_limit_of_a_minute_is_refused(self) -> None:
        limits = Limits(2, tokens_per_minute=10)
        with pytest.raises(NeverAllowedError, match=r"may take 11 tokens, and labeler\.tokens_per_minute=10"):
            limits.admit(0.0, Usage(10, 1))

    def test_what_was_not_used_is_given_back(self) -> None:
        limits = Limits(9, tokens_per_minute=100, budget=BudgetConfig(tokens=100))
        ticket = admitted(limits, 0.0, Usage(90, 10))
        assert limits.admit(0.0, Usage(10, 1)) == math.inf  # the budget may have room when the first has ended
        limits.done(1.0, ticket, Usage(20, 1))
        admitted(limits, 1.0, Usage(70, 9))

    def test_the_budget_ends(self) -> None:
        price = PriceConfig(input_per_million=1e6, output_per_million=2e6)
        for budget, name in (
            (BudgetConfig(requests=1), "requests=1"),
            (BudgetConfig(tokens=20), "tokens=20"),
            (BudgetConfig(usd=20.0), "usd=20.0"),
        ):
            limits = Limits(9, budget=budget, price=price)
            limits.done(1.0, admitted(limits), Usage(10, 1))
            assert limits.spent == Spend(1, 10, 1, 12.0)
            with pytest.raises(BudgetSpentError, match=f"labeler.budget.{name}"):
                limits.admit(1.0, Usage(10, 1))
            with pytest.raises(BudgetSpentError):
                limits.admit(1.0, Usage())  # it stays ended

    def test_an_unknown_cost_is_the_worst(self) -> None:
        limits = Limits(9)
        limits.done(1.0, admitted(limits, 0.0, Usage(90, 10)), None)
        assert limits.spent[:3] == (1, 90, 10)

    def test_requests_in_flight_count_with_the_worst(self) -> None:
        limits = Limits(9)
        admitted(limits, 0.0, Usage(90, 10))
        assert limits.spent[:3] == (1, 90, 10)

    def test_an_earlier_run_counts(self) -> None:
        limits = Limits(9, budget=BudgetConfig(requests=5))
        limits.spent = Spend(4, 100, 10, 0.5)
        admitted(limits)
        assert limits.spent == Spend(5, 110, 11, 0.5)
        with pytest.raises(BudgetSpentError):
            limits.admit(0.0, Usage())


@given(
    seed=st.integers(0, 2**32),
    per_minute=st.integers(1, 30),
    tokens=st.integers(20, 300),
    budget=st.integers(1, 2000),
    usd=st.floats(0.001, 0.05),
)
@settings(deadline=None)
def test_nothing_is_ever_exceeded(seed: int, per_minute: int, tokens: int, budget: int, usd: float) -> None:
    """Requests of any size, length and outcome: limits per minute, budget and requests in flight all hold."""
    price = PriceConfig(input_per_million=10.0, output_per_million=30.0)
    limits = Limits(5, per_minute, tokens, BudgetConfig(tokens=budget, usd=usd), price)
    draw = random.Random(seed)
    running: list[tuple[float, int, Ticket, Usage | None]] = []
    sent: list[tuple[float, Usage]] = []
    now = 0.0
    for number in range(120):
        worst = Usage(draw.randint(1, 30), draw.randint(1, 5))
        try:
            answer = limits.admit(now, worst)
            while not isinstance(answer, Ticket):
                next_end = running[0][0] if running else math.inf
                now = min(now + answer, next_end)
                assert now < math.inf, "waits for ever"
                while running and running[0][0] <= now:
                    _, _, ticket, used = heapq.heappop(running)
                    limits.done(now, ticket, used, overloaded=draw.random() < 0.2)
                answer = limits.admit(now, worst)
        except (BudgetSpentError, NeverAllowedError):
            continue
        used = draw.choice([None, Usage(), worst, Usage(draw.randint(0, worst.prompt), worst.completion)])
        heapq.heappush(running, (now + draw.expovariate(0.2), number, answer, used))
        sent.append((now, worst if used is None else used))
        assert len(running) <= 5
        assert limits.in_flight == len(running)
    spent = Usage(sum(used.prompt for _, used in sent), sum(used.completion for _, used in sent))
    assert spent.prompt + spent.completion <= budget
    assert (spent.prompt * 10 + spent.completion * 30) / 1e6 <= usd
    for start, _ in sent:
        minute = [used for at, used in sent if start <= at <= start + 60]
        assert len(minute) <= per_minute
        assert sum(used.prompt + used.completion for used in minute) <= tokens


def test_spent_read_while_a_request_ends_is_never_too_little() -> None:
    """The caller's thread reads while the loop's thread writes: here the request ends after each single read."""

    class Racing(Limits):
        ends: Ticket | None = None

        def __getattribute__(self, name: str) -> object:
            value = object.__getattribute__(self, name)
            if name in ("_used", "_reserved") and (ticket := self.ends) is not None:
                self.ends = None
                self.done(1.0, ticket, Usage(7, 1))
            return value

    limits = Racing(4)
    limits.ends = admitted(limits)
    assert limits.spent.prompt_tokens >= 7
    assert limits.spent.prompt_tokens == 7


@given(seed=st.integers(0, 10_000), requests=st.none() | st.integers(1, 60), tokens=st.none() | st.integers(50, 2_000))
@settings(deadline=None, max_examples=50)
def test_what_is_noted_is_never_less_than_what_was_sent_and_within_the_budget(
    seed: int, requests: int | None, tokens: int | None
) -> None:
    """A run that is killed at any moment has sent no more than it has noted."""
    rng = random.Random(seed)
    limits = Limits(8, budget=BudgetConfig(requests=requests, tokens=tokens))
    notes: list[Spend] = []
    limits.set_aside = notes.append
    sent, cost = 0, 0
    open_tickets: list[Ticket] = []
    for _ in range(80):
        worst = Usage(rng.randint(1, 30), rng.randint(1, 10))
        try:
            answer = limits.admit(0.0, worst)
        except BudgetSpentError:
            break
        if isinstance(answer, Ticket):
            sent, cost = sent + 1, cost + sum(worst)
            open_tickets.append(answer)
        elif open_tickets:
            limits.done(0.0, open_tickets.pop(rng.randrange(len(open_tickets))), None)
        if sent:
            assert notes[-1].requests >= sent
            assert notes[-1].prompt_tokens + notes[-1].completion_tokens >= cost
            assert requests is None or notes[-1].requests <= requests
            assert tokens is None or notes[-1].prompt_tokens + notes[-1].completion_tokens <= tokens
    if sent > 20:
        assert len(notes) < sent


def test_what_is_settled_is_set_aside_anew() -> None:
    limits = Limits(4, budget=BudgetConfig(requests=100))
    notes: list[Spend] = []
    limits.set_aside = notes.append
    limits.done(0.0, admitted(limits), Usage(10, 1))
    assert limits.settle() == Spend(1, 10, 1)
    admitted(limits)
    assert [note.requests for note in notes] == [16, 17]
