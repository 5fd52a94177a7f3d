"""Gold scores have the values that can be worked out by hand."""

import pytest

from rlaif.gold import GOLD, gold_score
from rlaif.records import UserError


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("letters", "Aeiou", 1.0),
        ("letters", "Banana!", 3 / 6),
        ("letters", "rhythm", 0.0),
        ("letters", "123 !?", 0.0),
        ("letters", "", 0.0),
        ("length", "one  two\nthree", 3.0),
        ("length", "", 0.0),
        ("brevity", "one two three", -3.0),
        ("vader", "", 0.0),
        ("vader", "The table is brown.", 0.0),
        # One word of valence 1.9: 1.9 / sqrt(1.9**2 + 15), the normalisation of the VADER paper.
        ("vader", "good", 0.4404),
    ],
)
def test_values(name: str, text: str, expected: float) -> None:
    assert gold_score(name, text) == pytest.approx(expected, abs=1e-4)


def test_vader_orders_tones() -> None:
    scores = [gold_score("vader", text) for text in ("I hate this", "It is a chair", "I love this")]
    assert scores == sorted(scores)
    assert scores[0] < -0.4
    assert scores[2] > 0.4


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(UserError, match="'beauty' does not exist; there are: vader, letters, length, brevity"):
        gold_score("beauty", "text")


@pytest.mark.parametrize("name", GOLD)
def test_odd_text_is_scored(name: str) -> None:
    for text in ("\x00", "\ud800", "🙂" * 3, "ñandú", " "):
        assert isinstance(gold_score(name, text), float)
