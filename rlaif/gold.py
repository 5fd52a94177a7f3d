"""Gold scores: programmatic truth about a text, for controlled experiments. Never a stand-in for people."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from rlaif.records import UserError
from rlaif.text import count_words


@cache
def _vader_analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(text: str) -> float:
    """Compound VADER sentiment in [-1, 1] (Hutto and Gilbert 2014); 0 for a text without sentiment words."""
    return float(_vader_analyser().polarity_scores(text)["compound"])


def letters(text: str) -> float:
    """Share of vowels (a, e, i, o, u) among the letters, in [0, 1]; 0 for a text without letters."""
    found = [letter for letter in text.lower() if letter.isalpha()]
    return sum(letter in "aeiou" for letter in found) / len(found) if found else 0.0


def length(text: str) -> float:
    """Number of words; of letters where a script has no spaces."""
    return float(count_words(text))


def brevity(text: str) -> float:
    """Minus the number of words."""
    return -length(text)


GOLD: dict[str, Callable[[str], float]] = {
    "vader": vader,
    "letters": letters,
    "length": length,
    "brevity": brevity,
}


def gold_score(name: str, text: str) -> float:
    """Score a text by a gold judge's name.

    Raises:
        UserError: if there is no such gold judge; lists the names.
    """
    check_gold(name)
    return GOLD[name](text)


def check_gold(name: str) -> None:
    """Fail early on an unknown gold judge.

    Raises:
        UserError: if there is no such gold judge; lists the names.
    """
    if name not in GOLD:
        raise UserError(f"gold judge {name!r} does not exist; there are: {', '.join(GOLD)}")
