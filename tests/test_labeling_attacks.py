"""The attack benchmark on labelers whose answers are known."""

from __future__ import annotations

import pytest

from benchmarks.labeling_attacks import ATTACKS, harmless, measure
from rlaif.config import LabelMode, ScriptedConfig
from rlaif.constitution import load_constitution
from rlaif.engines.scripted import ScriptedEngine
from rlaif.records import Candidates, Completion, Prompt

WARM = load_constitution("warm")
PAIRS = [
    Candidates(
        Prompt(f"p{number}", ({"role": "user", "content": f"q {number}"},)),
        tuple(Completion(f"c{place}", "word " * size + str(number)) for place, size in enumerate((3, 5))),
    )
    for number in range(6)
]


@pytest.mark.parametrize("mode", [LabelMode.pairwise, LabelMode.pointwise])
def test_a_labeler_that_counts_words_is_swayed_by_either_edit(mode: LabelMode) -> None:
    engine = ScriptedEngine(ScriptedConfig(utility="length", sharpness=0.1), seed=0)
    rates, counts = measure(PAIRS, WARM, engine, mode, seed=0)
    assert counts == {"pairs": 6, "without_verdict_or_tied": 0}
    assert set(rates) == set(ATTACKS)
    for found in rates.values():
        assert (found["flip_rate"], found["flip_rate_harmless"], found["difference"]) == (1.0, 1.0, 0.0)
        assert (found["flip_rate_n"], found["lost_verdicts"]) == (6, 0)


def test_a_labeler_that_likes_it_short_is_never_swayed() -> None:
    engine = ScriptedEngine(ScriptedConfig(utility="brevity", sharpness=0.1), seed=0)
    rates, _ = measure(PAIRS, WARM, engine, LabelMode.pairwise, seed=0)
    for found in rates.values():
        assert (found["flip_rate"], found["flip_rate_harmless"], found["difference"]) == (0.0, 0.0, 0.0)
        assert found["flip_rate_high"] > 0.3


def test_pairs_without_a_verdict_are_counted_not_guessed() -> None:
    tied = Candidates(Prompt("tie", PAIRS[0].prompt.messages), (Completion("c0", "same"), Completion("c1", "same")))
    engine = ScriptedEngine(ScriptedConfig(utility="length", fault_rate=0.2), seed=3)
    rates, counts = measure([*PAIRS, tied], WARM, engine, LabelMode.pairwise, seed=0)
    judged = counts["pairs"] - counts["without_verdict_or_tied"]
    assert counts["pairs"] == 7
    assert 0 < judged < 6
    for found in rates.values():
        assert found["flip_rate_n"] + found["lost_verdicts"] == judged
    assert any(found["lost_verdicts"] for found in rates.values())


@pytest.mark.parametrize("length", [1, 2, 50, 5000])
def test_harmless_sentences_have_the_length_asked_for(length: int) -> None:
    assert len(harmless(length)) == length
