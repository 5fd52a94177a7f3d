"""The audit's figures against hand-computed ones, and what it says of good, blind and contrary labelers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from rlaif.config import PriceConfig
from rlaif.labeling.aggregate import PairLabel
from rlaif.labeling.audit import (
    Comparison,
    audit,
    cohens_kappa,
    human_ceiling,
    read_comparisons,
    reliability,
    trainable,
    verdict,
)
from rlaif.records import Label, Prompt, UserError

PROMPT = ({"role": "user", "content": "q"},)


def comparison(name: str, truth: int, a: str = "long text", b: str = "short", **more: object) -> Comparison:
    return Comparison(name, Prompt(f"prompt-{name}", PROMPT), a, b, truth, **more)  # type: ignore[arg-type]


def pair(name: str, logit: float, **principles: float) -> PairLabel:
    return PairLabel(name, "a", "b", logit, principles or {"p": logit})


def pairwise(name: str, p: float | None) -> Label:
    return Label(name, "pairwise", "p", "l", "logprob", p, first="a", second="b", prompt_tokens=10)


def test_kappa_by_hand() -> None:
    # 4 of 5 agree; the labeler says a 3 times of 5, people 2 times: expected 6/25 + 6/25 = 0.48.
    sides = [(1.0, 1), (2.0, 1), (0.5, -1), (-1.0, -1), (-3.0, -1)]
    assert cohens_kappa([(one, float(other)) for one, other in sides]) == pytest.approx((0.8 - 0.48) / 0.52, abs=1e-6)
    assert cohens_kappa([(1.0, 1.0), (1.0, 1.0)]) is None
    assert cohens_kappa([]) is None


def test_the_ceiling_is_that_of_annotators_who_both_took_a_side() -> None:
    rows = [
        comparison("1", 1, votes=(1, 1, -1)),  # one pair of annotators of three agrees
        comparison("2", 1, votes=(1, 0)),  # a tie is no side
        comparison("3", -1, votes=(-1, -1)),
        comparison("4", 1),
    ]
    estimate = human_ceiling(rows)
    assert estimate is not None
    assert estimate.value == pytest.approx(2 / 4)
    assert estimate.n == 2
    assert human_ceiling(rows[3:]) is None


def test_the_audit_by_hand() -> None:
    comparisons = [
        comparison("1", 1),  # longer preferred, labeler right
        comparison("2", 1),  # longer preferred, labeler wrong
        comparison("3", -1),  # shorter preferred, labeler right
        comparison("4", -1, "aaaaaaaaaaaaaaaaaaaaa", "aaaaaaaaaaaaaaaaaaaab"),  # equal lengths, labeler ties
        comparison("5", 0),  # people tie
        comparison("6", 1),  # no label
    ]
    pairs = [pair("1", 2.0), pair("2", -1.0), pair("3", -2.0), pair("4", 0.0), pair("5", 1.0)]
    labels = [pairwise(row.name, 0.7) for row in comparisons[:5]] + [pairwise("6", None)]
    result = audit(comparisons, labels, pairs)
    assert result["agreement"] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert result["agreement_n"] == 4
    assert result["longer_wins"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert result["gain_over_longer"] == pytest.approx(0.0)
    assert (result["missing"], result["human_ties"], result["labeler_ties"]) == (1, 1, 1)
    assert result["agreement_longer_preferred"] == 0.5
    assert result["agreement_shorter_preferred"] == 1.0
    assert result["agreement_similar_length"] == 0.5
    assert result["tokens_per_usable_label"] == 12.0
    assert "usd" not in result
    # 6 prompts of 10 tokens at 2 dollars for a million, for 5 usable labels.
    paid = audit(comparisons, labels, pairs, PriceConfig(input_per_million=2.0, output_per_million=9.0))
    assert (paid["usd"], paid["usd_per_usable_label"]) == pytest.approx((1.2e-4, 2.4e-5))
    assert "human_ceiling" not in result


def test_a_label_the_other_way_round_counts_the_same() -> None:
    rows = [comparison("1", 1), comparison("2", -1)]
    turned = [PairLabel("1", "b", "a", -2.0, {}), PairLabel("2", "b", "a", 2.0, {})]
    assert audit(rows, [], turned)["agreement"] == 1.0


def test_principles_and_subsets_are_measured_apart() -> None:
    rows = [comparison("1", 1, subset="easy"), comparison("2", 1, subset="hard")]
    pairs = [pair("1", 1.0, good=2.0, bad=-1.0), pair("2", -1.0, good=2.0, bad=-3.0)]
    result = audit(rows, [], pairs)
    assert (result["agreement_principle_good"], result["agreement_principle_bad"]) == (1.0, 0.0)
    assert (result["agreement_subset_easy"], result["agreement_subset_hard"]) == (1.0, 0.0)


def test_reliability_bins() -> None:
    points = reliability([(0.05, 0.0), (0.09, 1.0), (0.95, 1.0), (1.0, 1.0)])
    assert points == [{"p": 0.07, "observed": 0.5, "n": 2}, {"p": 0.975, "observed": 1.0, "n": 2}]


@pytest.mark.parametrize(
    ("right", "words"),
    [
        (0.9, "TRAINABLE: above chance, on 90.0% [85.1%, 93.4%] of 200 prompts' pairs, and better than preferring the"),
        (0.5, "CANNOT TELL. DO NOT TRAIN ON THESE LABELS: agreement with people cannot be told"),
        (0.2, "NOT TRAINABLE. DO NOT TRAIN ON THESE LABELS: the labeler agrees with people less often than a coin"),
    ],
)
def test_the_verdict_cannot_be_missed(right: float, words: str) -> None:
    # People prefer the longer and the shorter completion equally often, so the longer-wins rule is at one half.
    rows = [comparison(str(n), 1 if n % 2 else -1) for n in range(200)]
    pairs = [pair(row.name, (1.0 if n < 200 * right else -1.0) * row.truth) for n, row in enumerate(rows)]
    assert verdict(audit(rows, [], pairs)).startswith(words)


def test_above_chance_and_not_above_length_is_said_to_be_trainable() -> None:
    """People prefer the longer completion each time, and so does the labeler."""
    rows = [comparison(str(n), 1) for n in range(12)]
    said = verdict(audit(rows, [], [pair(row.name, 1.0) for row in rows]))
    assert said.startswith("TRAINABLE: above chance, on 100.0%")
    assert said.endswith("but not shown to be better than preferring the longer completion (100.0%).")


def test_a_few_pairs_that_all_agree_show_nothing() -> None:
    """Not a single one differs, and yet the interval is not empty."""
    rows = [comparison(str(n), -1 if n % 2 else 1) for n in range(3)]
    right = [pair(row.name, float(row.truth)) for row in rows]
    result = audit(rows, [], right)
    # Wilson at 3 of 3: 1 / (1 + z^2 / 3).
    assert (result["agreement"], result["agreement_n"], result["agreement_high"]) == (1.0, 3, 1.0)
    assert result["agreement_low"] == pytest.approx(1 / (1 + 1.959964**2 / 3), abs=1e-6)
    assert "DO NOT TRAIN" in verdict(result)
    assert not trainable(result)


def test_no_number_of_pairs_of_one_prompt_shows_anything() -> None:
    rows = [Comparison(str(n), Prompt("same", PROMPT), f"long {n}", f"{n}", 1) for n in range(50)]
    result = audit(rows, [], [pair(row.name, 1.0) for row in rows])
    assert (result["agreement_n"], result["agreement_low"], result["agreement_high"]) == (1, 0.0, 1.0)
    assert not trainable(result)


def test_enough_pairs_are_trainable_and_missing_ones_are_said() -> None:
    rows = [comparison(str(n), -1 if n % 2 else 1) for n in range(40)]
    result = audit(rows, [], [pair(row.name, float(row.truth)) for row in rows[:30]])
    assert trainable(result)
    assert verdict(result).endswith("10 of 40 pairs had no label.")
    nothing = audit(rows, [], [])
    assert not trainable(nothing)
    assert verdict(nothing).startswith("CANNOT TELL. DO NOT TRAIN ON THESE LABELS: no label")


def test_equal_gains_over_the_longer_have_an_interval() -> None:
    rows = [comparison(str(n), -1) for n in range(2)]  # people prefer the shorter, the labeler too
    result = audit(rows, [], [pair(row.name, -1.0) for row in rows])
    assert result["gain_over_longer"] == 1.0
    assert result["gain_over_longer_low"] < 0.5


def test_the_temperature_that_calibrates_is_recovered() -> None:
    # A labeler that is right three times out of four and says 95 %: log(3) is what its logit should have been.
    rows = [comparison(str(n), 1 if n % 2 else -1) for n in range(400)]
    pairs = [pair(row.name, row.truth * (3.0 if n % 8 < 6 else -3.0)) for n, row in enumerate(rows)]
    assert audit(rows, [], pairs)["temperature"] == pytest.approx(3.0 / 1.0986, abs=0.01)


def test_no_better_than_length_is_said() -> None:
    rows = [comparison(str(n), 1 if n % 10 else -1) for n in range(200)]
    assert "not shown to be better than preferring the longer" in verdict(
        audit(rows, [], [pair(row.name, 1.0) for row in rows])
    )
    assert verdict(audit(rows, [], [])).startswith("CANNOT TELL. DO NOT TRAIN ON THESE LABELS: no label")


def write(file: Path, *lines: dict[str, object]) -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    return file


CHOSEN = {"prompt": "q", "chosen": "good", "rejected": "bad"}
SIDES = {"prompt": "q", "response_a": "x", "response_b": "y", "label": "tie"}


def test_both_forms_are_read(tmp_path: Path) -> None:
    votes = [{"annotator": "1", "label": "a"}, {"annotator": "2", "label": "tie"}]
    file = write(
        tmp_path / "pairs.jsonl.gz",
        *({**CHOSEN, "chosen": f"good {n}", "id": f"c{n}"} for n in range(40)),
        {**SIDES, "label": "b", "annotators": votes, "subset": "hard"},
        {**SIDES, "response_b": "x"},
    )
    found = read_comparisons(file)
    assert len(found) == 41  # the pair of equal completions is left out
    for row in found[:40]:
        assert (row.a if row.truth == 1 else row.b).startswith("good")
    # Which one is a tells nothing.
    assert 8 < sum(row.truth == 1 for row in found[:40]) < 32
    assert (found[40].truth, found[40].votes, found[40].subset) == (-1, (1, 0), "hard")
    assert [row.name for row in read_comparisons(file, 4)] == ["c0", "c10", "c20", "c30"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "q"}, 'has no "response_a"'),
        ({"prompt": "q", "chosen": "x"}, 'has no "rejected"'),
        ({**SIDES, "label": "c"}, '"label" must be "a", "b" or "tie"'),
        ({**SIDES, "response_a": " "}, "must be non-empty texts"),
        ({**SIDES, "annotators": [{"label": 3}]}, r'"annotators\[\].label" must be'),
        ({**SIDES, "annotators": "x"}, '"annotators" must be a list'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: dict[str, object], message: str) -> None:
    file = write(tmp_path / "pairs.jsonl", CHOSEN, line)
    with pytest.raises(UserError, match=rf"pairs.jsonl, line 2: .*{message}"):
        read_comparisons(file)


def test_ids_must_be_unique(tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", {**CHOSEN, "id": "x"}, {**CHOSEN, "id": "x", "chosen": "other"})
    with pytest.raises(UserError, match=r"line 2: .*'x' was used"):
        read_comparisons(file)


def test_transcripts_are_read_as_for_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begin = "\n\nHuman: hi\n\nAssistant:"
    whole = {"chosen": f"{begin} hello", "rejected": f"{begin} go away"}
    file = write(
        tmp_path / "pairs.jsonl",
        whole,
        {"chosen": f"{begin} hello", "rejected": "\n\nHuman: ho\n\nAssistant: go away"},
        {"chosen": begin, "rejected": f"{begin} go away"},
        whole,
    )
    [found] = read_comparisons(file)
    assert found.prompt.messages == ({"role": "user", "content": "hi"},)
    assert {found.a, found.b} == {"hello", "go away"}
    assert "3 of 4 pairs are left out" in caplog.text
    assert "1 that repeat an earlier one" in caplog.text


def test_what_people_preferred_is_p_chosen(tmp_path: Path) -> None:
    shares = (1.0, 0.8, 0.5, 0.2, None)
    rows = [{**CHOSEN, "prompt": "same", "chosen": f"good {n}", "p_chosen": p} for n, p in enumerate(shares)]
    # Several pairs of a prompt share its id, as in this project's own datasets.
    found = read_comparisons(write(tmp_path / "pairs.jsonl", *({**row, "prompt_id": "one"} for row in rows)))
    assert [row.truth * (1 if row.a.startswith("good") else -1) for row in found] == [1, 1, 0, -1, 1]
    assert len({row.prompt.prompt_id for row in found}) == 1
