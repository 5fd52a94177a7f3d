"""Options that are numbers: one may be the beginning of another, and replies name the end of the scale."""

import math

import pytest

from rlaif.engines.options import Spelling, parse_reply, sequence_masses, spellings
from rlaif.labeling.prompts import SCALE, letter_spellings, number_spellings

NUMBERS = tuple(number_spellings(number) for number in SCALE)


class Bytes:
    """A tokenizer with a token for each character."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(character) for character in text]}


class Words:
    """A tokenizer with a token for each text."""

    def __call__(self, text, **_):
        return {"input_ids": [int(text)]}


def test_a_spelling_knows_whose_it_goes_on_from():
    found = {(spelling.option, spelling.tokens): spelling.inside for spelling in spellings(Bytes(), [("1",), ("10",)])}
    assert found == {(0, (49,)): None, (1, (49, 48)): 0}
    assert {spelling.inside for spelling in spellings(Words(), [("1",), ("10",)])} == {None}


def test_masses_of_nested_spellings_by_hand():
    # 1, 10 and 100: what goes on is the longer one's alone.
    spelled = [Spelling(0, (1,), None), Spelling(1, (1, 0), 0), Spelling(2, (1, 0, 0), 1)]
    logps = {(1,): math.log(0.6), (1, 0): math.log(0.5), (1, 0, 0): math.log(0.2)}
    assert sequence_masses(spelled, logps, 3) == pytest.approx((0.1, 0.3, 0.2))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("7", 7),
        (" 9", 9),
        ("**8**", 8),
        ("8/9", 8),
        ("9/9", 9),
        ("9 / 9", 9),
        ("7 out of 9.", 7),
        ("Score: 7", 7),
        ("Rating: **9/9**", 9),
        ("The reply is warm.\nScore: 3", 3),
        ("The score is 4.", 4),
        ("Answer: 2. It is cold.", 2),
        ("6, because it is polite", 6),
        ("7.5", None),
        ("7,5", None),
        ("7-8", None),
        ("7 or 8", None),
        # On another scale than that which was asked for.
        ("10", None),
        ("8/10", None),
        ("7 out of 10.", None),
        ("11", None),
        ("0", None),
        ("100", None),
        ("2 points stand out in this reply", None),
        ("Of the 3 claims none is true", None),
        ("Score: high", None),
        ("", None),
    ],
)
def test_replies_that_are_numbers(reply, expected):
    place = parse_reply(reply, NUMBERS)
    assert (None if place is None else SCALE[place]) == expected


def test_letters_of_a_list_are_read_as_those_of_a_pair():
    letters = tuple(letter_spellings(letter) for letter in "ABCD")
    assert [parse_reply(reply, letters) for reply in ("(C)", "Answer: d", "B and C", "C is fine but\nAnswer: A")] == [
        2,
        3,
        None,
        0,
    ]
