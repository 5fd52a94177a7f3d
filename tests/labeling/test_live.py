"""What a labeling run shows: figures that are right, and words that nobody can miss."""

from types import SimpleNamespace

import pytest

from rlaif.engines.base import Failure, Likelihood, OptionMass, OptionRequest, Sampled
from rlaif.labeling.audit import Comparison
from rlaif.labeling.live import LiveView, agreement_with_gold, agreement_with_people, summary

OPTIONS = (("A",), ("B",))


def asked(first="a b c", second="a"):
    return OptionRequest((), OPTIONS, meta={"mode": "pairwise", "first": first, "second": second})


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr("rlaif.labeling.live.time.monotonic", lambda: now.s)
    return now


def test_the_figures_so_far(clock):
    engine = SimpleNamespace(spent=SimpleNamespace(usd=1.234), waited_s=0.0)
    with LiveView(100, ("labeling", "verdict"), engine, minimum=0.5, truth=agreement_with_gold("length")) as view:
        view.known(20)
        # Of the first (longer) completion: right, wrong, a tie; then two that are of no use, and no failure is judged.
        for masses in ((0.6, 0.2), (0.1, 0.8), (0.4, 0.4), (0.2, 0.2), (0.9, None)):
            view.add(asked(), OptionMass(masses, "logprob", prompt_tokens=900, completion_tokens=100))
        view.add(asked(), Failure("timeout"))
        view.add(asked("a", "a"), OptionMass((0.6, 0.2), "logprob"))
        clock.s += 2
        figures = view.figures()
        assert (view._bar.n, view._bar.initial) == (27, 20)
    # 5000 tokens in 2 seconds; 3 of 7 unusable; right 1.5 of 3 times, gold ties left out.
    assert figures == "2.5k tok/s, $1.23, 42.9% unusable, 50% like length"


def test_the_end_is_foretold_once_there_is_a_rate(clock, monkeypatch):
    monkeypatch.setattr("rlaif.labeling.live.time.time", lambda: 1_000_000.0)
    with LiveView(100, ("labeling", "verdict"), SimpleNamespace(spent=None, waited_s=0.0)) as view:
        view.add(asked(), OptionMass((0.6, 0.2), "logprob"))
        clock.s += 6
        assert "ends" in view.figures()
        clock.s += 93
        view.add(asked(), OptionMass((0.6, 0.2), "logprob"))
        # 98 left at 49.5 s each.
        import time

        assert view.figures().endswith(time.strftime(", ends %H:%M", time.localtime(1_000_000 + 98 * 49.5)))


def test_an_outage_is_not_taken_for_a_slow_server(clock, monkeypatch):
    monkeypatch.setattr("rlaif.labeling.live.time.time", lambda: 1_000_000.0)
    engine = SimpleNamespace(spent=None, waited_s=50.0)  # one was over before
    with LiveView(100, ("labeling", "verdict"), engine) as view:
        view.add(asked(), OptionMass((0.6, 0.2), "logprob"))
        clock.s += 10
        view.add(asked(), OptionMass((0.6, 0.2), "logprob"))
        clock.s += 600
        engine.waited_s += 600
        view.add(asked(), OptionMass((0.6, 0.2), "logprob"))
        import time

        assert view.figures().endswith(time.strftime(", ends %H:%M", time.localtime(1_000_000 + 97 * 10 / 3)))


def test_the_end_of_a_round_is_estimated_by_what_prompts_have_taken_so_far(clock, monkeypatch):
    monkeypatch.setattr("rlaif.labeling.live.time.time", lambda: 1_000_000.0)
    with LiveView(None, ("labeling", "verdict"), SimpleNamespace(spent=None, waited_s=0.0), prompts=100) as view:
        for requests in (4, 0, 0, 0):  # one of four asks
            view.prompt(requests)
        for _ in range(4):
            clock.s += 10
            view.add(asked(), OptionMass((0.6, 0.2), "logprob"))
        import time

        # A hundred verdicts, of which 96 are left, four in 30 s.
        assert view._bar.total == 100
        assert view.figures().endswith(time.strftime("round ends %H:%M", time.localtime(1_000_000 + 96 * 7.5)))


def test_what_is_written_counts_too(clock):
    with LiveView(9, ("rationales", "rationale"), SimpleNamespace(spent=None, waited_s=0.0)) as view:
        view.add(None, Sampled("because", "stop", 100, prompt_tokens=900))
        view.add(None, Likelihood(-1.0, 100, prompt_tokens=900))
        clock.s += 2
        assert view.figures().startswith("1.0k tok/s")


def test_people_are_agreed_with_in_both_orders_and_where_lists_have_two():
    pairs = [
        Comparison("1", None, "x", "y", -1),
        Comparison("2", None, "x", "z", 1),
        Comparison("3", None, "x", "z", -1),
    ]
    people = agreement_with_people(pairs)
    assert [people.prefers(*shown) for shown in (("x", "y"), ("y", "x"), ("x", "z"), ("x", "other"))] == [-1, 1, 0, 0]
    with LiveView(9, ("labeling", "verdict"), SimpleNamespace(spent=None, waited_s=0.0), truth=people) as view:
        view.add(asked("x", "y"), OptionMass((0.2, 0.6), "logprob"))
        listed = OptionRequest((), OPTIONS, meta={"mode": "listwise", "completions": ["y", "x"]})
        view.add(listed, OptionMass((0.2, 0.6), "logprob"))
        assert view.figures().endswith("50% like people")


QUALITY = {
    "n_preferences": 90,
    "n_pairs": 100,
    "dropped": {"tie": 10},
    "n_verdicts": 204,
    "uncovered": 3,
    "unlisted": 0,
    "failed_reasons": {"timeout": 1},
    "methods": {"logprob": 150, "text": 50},
    "option_mass_mean": 0.913,
    "prompt_tokens": 51_000,
    "verdicts_per_s": 12.34,
    "same_position_rate": 0.81,
    "position_bias": 1.5,
    "gold": "vader",
    "agreement": 0.52,
    "agreement_low": 0.48,
    "agreement_high": 0.56,
    "longer_wins": 0.61,
}


def test_the_summary_names_what_was_lost_and_warns():
    text = summary(QUALITY)
    for part in (
        "90 preferences from 100 pairs",
        "dropped: 10 tie",
        "verdicts: 204, missing: 3 uncovered, 1 timeout; mean option mass 0.91",
        "found by logprob: 150, text: 50",
        "12.3 verdicts/s, 51.0k prompt tokens",
        "the same in both orders for 81% of pairs, bias +1.50 logits",
        "agreement with vader: 52.0% [48.0%, 56.0%]; the longer one wins: 61.0%",
        "WARNING: no better than chance; do not train on these labels",
    ):
        assert part in text
    assert "WARNING" not in summary({**QUALITY, "agreement_low": 0.51})
    assert "spent" not in text
    spent = {"requests": 210, "prompt_tokens": 51_000, "completion_tokens": 204, "usd": 0.0123}
    paid = summary({**QUALITY, "spent": spent})
    assert "spent by every run into this folder: 210 requests, 51,204 tokens, $0.0123" in paid
    audited = summary({**QUALITY, "audit_verdict": "DO NOT TRAIN ON THESE LABELS: x."})
    assert audited.splitlines()[-1].endswith("DO NOT TRAIN ON THESE LABELS: x.")
    open_ended = summary({**QUALITY, "agreement_low": 0.51, "unlisted": 51})
    assert "WARNING: 25% of the verdicts are left open by the tokens that the server lists" in open_ended
    partial = summary({**QUALITY, "n_partial": 12, "missing_weight_mean": 0.031})
    assert "12 pairs are labelled by some of their principles (missing weight, over all pairs: 3.1%)" in partial
    cut = summary({**QUALITY, "agreement_low": 0.51, "truncated": 7})
    assert "WARNING: 7 verdicts saw a long text without its middle" in cut


def test_the_summary_of_simulated_people_has_no_verdicts():
    assert summary({"n_preferences": 3, "n_pairs": 3, "dropped": {}}) == "3 preferences from 3 pairs"
