"""Pair labels become preferences as configured, and preference files of all kinds are read."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.cli import _normalise
from rlaif.config import (
    AnnotatorConfig,
    DataConfig,
    Feedback,
    Method,
    ModelConfig,
    Reward,
    Selection,
    Split,
    TrainConfig,
)
from rlaif.gold import gold_score
from rlaif.labeling.aggregate import PairLabel, logit, sigmoid
from rlaif.methods.stages import Arm
from rlaif.preferences import (
    LengthBalance,
    PreferenceWriter,
    balanced,
    parse_preference,
    prompts_of,
    read_preferences,
    select_preferences,
    simulated_human_pairs,
)
from rlaif.records import Candidates, Completion, Preference, Prompt, UserError
from rlaif.splits import assign_splits

USER = ({"role": "user", "content": "q"},)


def line(prompt_id="p", split=None, **completions):
    completions = completions or {"a": "text a", "b": "text b", "c": "text c"}
    return Candidates(Prompt(prompt_id, USER), tuple(Completion(k, v) for k, v in completions.items()), split)


def pair(one, other, value, prompt_id="p"):
    return PairLabel(prompt_id, one, other, value, {"k": value})


def select(pairs, lines=None, selection=Selection.all_pairs, min_margin=0.0):
    """The preferences by split, and what was dropped."""
    chosen, dropped = {}, Counter()
    for found in lines or [line()]:
        of_line = [pair for pair in pairs if pair.prompt_id == found.prompt.prompt_id]
        rows, reasons = select_preferences(found, of_line, selection, min_margin, "me", "ai")
        dropped += reasons
        if rows:
            chosen.setdefault(found.split or "train", []).extend(rows)
    return chosen, dropped


ULTRAFEEDBACK = {
    "prompt": "Why?",
    "chosen": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}],
    "rejected": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No idea."}],
}


def test_splits_of_other_names(tmp_path):
    for name, count in (("train_prefs", 3), ("test_prefs", 2)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(ULTRAFEEDBACK) + "\n") * count)

    def arm(**splits):
        config = TrainConfig(preferences=str(tmp_path), feedback=Feedback.human, splits=splits)
        return Arm(config, tmp_path, ModelConfig(name="tiny"))

    assert _normalise(["splits={train: train_prefs}"]) == (["++splits={train: train_prefs}"], False)
    found = arm(train="train_prefs", validation="test_prefs")
    assert [len(found.preferences(split)) for split in ("train", "validation")] == [3, 2]
    files = {role: Path(file).name for role, file in found.preference_inputs.items() if isinstance(file, Path)}
    assert files == {"preferences/train.jsonl": "train_prefs.jsonl", "preferences/validation.jsonl": "test_prefs.jsonl"}
    with pytest.raises(UserError, match=r"no train.parquet, .*splits=\{train: NAME\} says what else"):
        arm().preferences("train")
    with pytest.raises(UserError, match=r"splits=\{validation: dev\}: .* has no such file"):
        arm(train="train_prefs", validation="dev").preferences("train")
    with pytest.raises(ValueError, match="names train and validation, not dev"):
        TrainConfig(splits={"dev": "x"})


def test_a_dataset_without_a_validation_split_holds_prompts_out_for_one(tmp_path, caplog):
    """By prompt, where a file of prompts puts them, and never silently."""
    prompts = [Prompt(f"p{n}", ({"role": "user", "content": f"{n} w{7 * n} v{3 * n}"},)) for n in range(60)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    rows = [
        {"prompt_id": prompt.prompt_id, "prompt": list(prompt.messages), "chosen": f"good {n}", "rejected": "bad"}
        for prompt in prompts
        for n in range(2)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "one" / "train.jsonl").write_text(lines)
    (tmp_path / "two" / "train.jsonl").write_text(lines)
    (tmp_path / "two" / "validation.jsonl").write_text(json.dumps(ULTRAFEEDBACK) + "\n")

    def arm(folder, method=Method.pm, **data):
        source = str(tmp_path / folder)
        config = TrainConfig(method=method, preferences=source, feedback=Feedback.human, data=DataConfig(**data))
        return Arm(config, tmp_path, ModelConfig(name="tiny"))

    splits = assign_splits(prompts, DataConfig(validation_fraction=0.3))
    expected = {name for name, split in splits.items() if split is Split.validation}
    assert 8 < len(expected) < 30
    caplog.set_level("INFO", "rlaif")
    found = arm("one", validation_fraction=0.3)
    train, held_out = found.preferences("train"), found.preferences("validation")
    assert {row.prompt_id for row in held_out} == expected
    assert {row.prompt_id for row in train} == {prompt.prompt_id for prompt in prompts} - expected
    assert len(train) + len(held_out) == 120
    assert f"{len(held_out)} of its 120 preferences are held out" in caplog.text
    # Another share makes other training data, and a stage is made anew for it.
    assert found.preference_inputs != arm("one", validation_fraction=0.2).preference_inputs

    assert arm("one", Method.ppo, validation_fraction=0.3).preferences("train") == train
    # DPO measures nothing on them.
    for whole in (arm("one", validation_fraction=0.0), arm("one", Method.dpo, validation_fraction=0.3)):
        assert (len(whole.preferences("train")), whole.preferences("validation")) == (120, [])
    given = arm("two", validation_fraction=0.3)
    assert (len(given.preferences("train")), len(given.preferences("validation"))) == (120, 1)
    assert "preferences/held_out" not in given.preference_inputs


def arm_on(folder, feedback, *words):
    """Training on rows whose column ``feedback`` has these words; None stands for no such column."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{**ULTRAFEEDBACK, **({} if word is None else {"feedback": word})} for word in words]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "validation.jsonl").write_text(json.dumps(ULTRAFEEDBACK) + "\n")
    config = TrainConfig(method=Method.pm, preferences=str(folder), feedback=feedback)
    return Arm(config, folder, ModelConfig(name="tiny"))


@pytest.mark.parametrize("word", [None, "", 4, "The reply is rude, but otherwise fine."])
def test_where_a_file_does_not_say_who_labelled_it_the_user_does(tmp_path, word):
    """UltraFeedback's labels are GPT-4's, and nothing in it says so."""
    for feedback in (Feedback.ai, Feedback.human):
        arm = arm_on(tmp_path, feedback, word, word)
        for split in ("train", "validation"):
            assert {(row.feedback, row.declared) for row in arm.preferences(split)} == {(feedback.value, True)}
        assert (arm.feedback, arm.declared) == (feedback.value, True)
        # Goes into provenance.json, and into the fingerprint.
        assert arm.preference_inputs["preferences/feedback"] == f"{feedback.value}, declared by the user"
    with pytest.raises(UserError, match=r"do not say who labelled them .*: give feedback=ai or feedback=human"):
        arm_on(tmp_path, None, word).preferences("train")


def test_where_a_file_says_who_labelled_it_it_is_believed(tmp_path):
    for feedback in (None, Feedback.human):
        arm = arm_on(tmp_path / "one", feedback, "human", " Human")
        assert {(row.feedback, row.declared) for row in arm.preferences("train")} == {("human", False)}
        assert (arm.feedback, arm.declared) == ("human", False)
        assert "preferences/feedback" not in arm.preference_inputs
    with pytest.raises(UserError, match="2 of its 2 rows say that they are human labels, but feedback=ai: give feedb"):
        arm_on(tmp_path / "one", Feedback.ai, "human", "human").preferences("train")
    # Some rows say it, and not only the first counts.
    with pytest.raises(UserError, match="1 of its 3 rows say that they are human labels"):
        arm_on(tmp_path / "one", Feedback.ai, None, "ai", "human").preferences("train")
    mixed = arm_on(tmp_path / "one", Feedback.ai, "ai", None)
    assert [row.declared for row in mixed.preferences("train")] == [False, True]
    assert mixed.declared


def test_nobody_speaks_for_rows_that_do_not_say_who_labelled_them(tmp_path):
    with pytest.raises(UserError, match="1 of its 3 rows do not say who labelled them"):
        arm_on(tmp_path, None, "human", "human", None).preferences("train")


@pytest.mark.parametrize(
    ("settings", "word", "origin"),
    [
        ({"method": Method.ppo, "preference_model": "pm"}, "human", ("human", False)),
        ({"method": Method.ppo, "preference_model": "pm", "feedback": Feedback.ai}, "human", ("human", False)),
        ({"method": Method.best_of_n, "preference_model": "pm"}, None, (None, False)),
        ({"method": Method.rloo, "preference_model": "pm", "feedback": Feedback.human}, None, ("human", True)),
        ({"method": Method.grpo, "reward": Reward.labeler}, None, ("ai", False)),
        ({"method": Method.critique_revision}, None, ("ai", False)),
        ({"method": Method.sft, "demonstrations": "d.jsonl"}, None, (None, False)),
        ({"method": Method.sft, "demonstrations": "d.jsonl", "feedback": Feedback.human}, None, ("human", True)),
    ],
)
def test_whose_feedback_trains_a_policy_without_preferences(tmp_path, settings, word, origin):
    """A PM that is given knows; of demonstrations nobody says it. Neither is AI feedback for want of a word."""
    (tmp_path / "pm").mkdir()
    if word is not None:
        (tmp_path / "pm" / "calibration.json").write_text(json.dumps({"feedback": word, "feedback_declared": False}))
    settings = {key: str(tmp_path / value) if value == "pm" else value for key, value in settings.items()}
    assert Arm(TrainConfig(**settings), tmp_path, ModelConfig(name="tiny")).origin == origin


def test_a_folder_that_is_named_after_its_feedback_is_the_default(tmp_path):
    arm_on(tmp_path / "ai", None, None)
    arm_on(tmp_path / "human", None, "human")
    for feedback, rows in ((None, "ai"), (Feedback.human, "human")):
        arm = Arm(TrainConfig(method=Method.pm, preferences=str(tmp_path), feedback=feedback), tmp_path, ModelConfig())
        assert arm.preferences("train")[0].feedback == arm.feedback == rows
    arm_on(tmp_path / "ai", None, "human")
    with pytest.raises(UserError, match="say that they are human labels, but feedback=ai"):
        Arm(TrainConfig(method=Method.pm, preferences=str(tmp_path)), tmp_path, ModelConfig()).preferences("train")


def test_too_few_prompts_hold_nothing_out(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(ULTRAFEEDBACK) + "\n")
    for share in (0.1, 0.99):
        data = DataConfig(validation_fraction=share, test_fraction=0.0)
        config = TrainConfig(method=Method.pm, preferences=str(tmp_path), feedback=Feedback.human, data=data)
        arm = Arm(config, tmp_path, ModelConfig(name="tiny"))
        assert (len(arm.preferences("train")), arm.preferences("validation")) == (1, [])


def test_lists_that_begin_with_the_prompt_beside_them():
    for prompt in ("Why?", ULTRAFEEDBACK["chosen"][:1]):
        found = parse_preference({**ULTRAFEEDBACK, "prompt": prompt})
        assert found.prompt == ({"role": "user", "content": "Why?"},)
        assert (found.chosen, found.rejected) == ("Because.", "No idea.")
    with pytest.raises(ValueError, match="must be one assistant message after the prompt"):
        parse_preference({**ULTRAFEEDBACK, "prompt": "Who?"})


def test_preferences_are_oriented():
    chosen, dropped = select([pair("a", "b", 2.0), pair("a", "c", -1.0)])
    first, second = chosen["train"]
    assert (first.chosen_id, first.rejected_id, first.chosen, first.rejected) == ("a", "b", "text a", "text b")
    assert (second.chosen_id, second.rejected_id, second.chosen, second.rejected) == ("c", "a", "text c", "text a")
    # sigmoid(2) = 0.880797, sigmoid(1) = 0.731059.
    assert first.p_chosen == pytest.approx(0.880797, abs=1e-6)
    assert second.p_chosen == pytest.approx(0.731059, abs=1e-6)
    # The breakdown by principle is turned with the pair.
    assert (first.principles, second.principles) == ({"k": 2.0}, {"k": 1.0})
    assert (first.labeler, first.feedback, first.prompt) == ("me", "ai", USER)
    assert dropped == {}


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=3))
def test_chosen_is_never_the_less_likely(values):
    names = [("a", "b"), ("a", "c"), ("b", "c")]
    pairs = [pair(*name, value) for name, value in zip(names, values, strict=False)]
    chosen, dropped = select(pairs)
    rows = chosen.get("train", [])
    assert all(row.p_chosen >= 0.5 for row in rows)
    assert len(rows) + sum(dropped.values()) == len(pairs)


def test_ties_are_dropped_and_counted():
    chosen, dropped = select([pair("a", "b", 0.0), pair("a", "c", 1e-3)])
    assert [row.rejected_id for row in chosen["train"]] == ["c"]
    assert dropped == {"tie": 1}


def test_the_margin():
    # sigmoid(1) - 0.5 = 0.231059.
    for margin, count in ((0.23, 1), (0.232, 0)):
        chosen, dropped = select([pair("a", "b", -1.0)], min_margin=margin)
        assert len(chosen.get("train", [])) == count
        assert dropped == ({} if count else {"margin": 1})


def test_best_worst():
    # Mean logits: a (1 + 3) / 2 = 2, b (-1 + 2.5) / 2 = 0.75, c (-3 - 2.5) / 2 = -2.75: best a, worst c.
    pairs = [pair("a", "b", 1.0), pair("a", "c", 3.0), pair("b", "c", 2.5)]
    chosen, dropped = select(pairs, selection=Selection.best_worst)
    [row] = chosen["train"]
    assert (row.chosen_id, row.rejected_id) == ("a", "c")
    assert dropped == {"not_selected": 2}


def test_best_worst_where_not_all_pairs_have_a_label():
    # a beats b by 1 and c by 1, c beats d by 3: d is the worst, but a and d were not compared.
    pairs = [pair("a", "b", 1.0), pair("a", "c", 1.0), pair("c", "d", 3.0)]
    chosen, _ = select(pairs, [line(a="1", b="2", c="3", d="4")], Selection.best_worst)
    assert [(row.chosen_id, row.rejected_id) for row in chosen["train"]] == [("c", "d")]


def test_ranks_are_those_of_all_pairs():
    chosen, _ = select([pair("a", "b", -1.0), pair("a", "c", 3.0), replace(pair("b", "c", 2.5), inferred=True)])
    found = {(row.chosen_id, row.rejected_id): (row.chosen_rank, row.rejected_rank) for row in chosen["train"]}
    assert found == {("b", "a"): (1, 2), ("a", "c"): (2, 3), ("b", "c"): (1, 3)}
    assert [row.inferred for row in chosen["train"]] == [False, False, True]


def sized(number, chosen, rejected):
    return Preference(f"p{number}", USER, chosen, rejected, "a", "b", 0.75, "me", "ai", {"k": 1.0})


@given(st.lists(st.tuples(st.sampled_from(["train", "test"]), st.integers(-1, 1)), max_size=60), st.integers(0, 9))
def test_length_balance_is_exact_in_each_split(kinds, seed):
    rows = [(split, sized(n, "x" * (3 + sign), "yyy")) for n, (split, sign) in enumerate(kinds)]
    balance = LengthBalance(seed)
    for row in rows:
        balance.add(*row)
    kept = [(split, len(row.chosen) - 3) for split, row in rows if not balance.drops(split, row)]
    for split in ("train", "test"):
        fewer = min(kinds.count((split, 1)), kinds.count((split, -1)))
        assert kept.count((split, 1)) == kept.count((split, -1)) == fewer
        assert kept.count((split, 0)) == kinds.count((split, 0))


def test_balancing_keeps_the_rest_as_it_was(tmp_path):
    rows = [("train", sized(number, "long" * (number % 3 + 1), "short")) for number in range(30)]
    dropped = Counter()
    kept = list(balanced(iter(rows), 0, dropped, tmp_path))
    # Of each three, one is shorter than "short" and two are longer.
    assert dropped == {"length_balance": 10}
    assert kept == [row for row in rows if row in kept]
    assert list(balanced(iter(rows[::-1]), 0, Counter(), tmp_path)) == kept[::-1]
    assert list(balanced(iter(rows), 1, Counter(), tmp_path)) != kept
    assert not list(tmp_path.iterdir())


def test_best_worst_is_one_pair_a_prompt():
    lines = [line("p"), line("q")]
    pairs = [pair("a", "b", 1.0, name) for name in "pq"] + [pair("b", "c", 1.0, name) for name in "pq"]
    chosen, dropped = select(pairs, lines, Selection.best_worst)
    assert Counter(row.prompt_id for row in chosen["train"]) == {"p": 1, "q": 1}
    assert dropped == {"not_selected": 2}


def test_best_worst_is_the_best_and_the_worst_that_say_something():
    """The worst is often one that says nothing; the prompt is not lost with it."""
    pairs = [pair("a", "b", 1.0), pair("a", "c", 5.0), pair("b", "c", 4.0)]
    chosen, dropped = select(pairs, [line(a="1", b="2", c=" ")], Selection.best_worst)
    assert [(row.chosen_id, row.rejected_id) for row in chosen["train"]] == [("a", "b")]
    assert dropped == {"empty_completion": 2}


def test_empty_completions_are_dropped():
    chosen, dropped = select([pair("a", "b", 1.0), pair("b", "a", 1.0)], [line(a="x", b=" ")])
    assert (chosen, dropped) == ({}, {"empty_completion": 2})


def test_splits_and_cut_completions_are_carried():
    cut = Candidates(Prompt("p", USER), (Completion("a", "x", finish_reason="length"), Completion("b", "y")), "test")
    lines = [cut, line("q")]
    chosen, _ = select([pair("a", "b", 1.0), pair("a", "b", 1.0, "q")], lines)
    assert {split: [row.prompt_id for row in rows] for split, rows in chosen.items()} == {"test": ["p"], "train": ["q"]}
    assert (chosen["test"][0].chosen_ended, chosen["test"][0].rejected_ended) == (False, True)


# The simulated annotator


def simulated(lines, gold, annotator, seed):
    return [pair for line in lines for pair in simulated_human_pairs(line, gold, annotator, seed)]


@pytest.mark.parametrize(("scale", "flip"), [(0.5, 0.0), (0.5, 0.2), (1.0, 0.05)])
def test_simulated_labels_follow_bradley_terry(scale, flip):
    # One word against three: P(three wins) = sigmoid(2 * scale), then a share `flip` is turned.
    n = 3000
    lines = [line(f"p{i}", a="one", b="one two three") for i in range(n)]
    pairs = simulated(lines, "length", AnnotatorConfig(scale=scale, flip=flip), seed=1)
    assert len(pairs) == n
    p = sigmoid(2 * scale)
    expected = p * (1 - flip) + (1 - p) * flip
    rate = sum(pair.logit < 0 for pair in pairs) / n
    assert rate == pytest.approx(expected, abs=4 * (expected * (1 - expected) / n) ** 0.5)
    # Hard labels: as certain as a logit may be.
    assert all(abs(pair.logit) == pytest.approx(logit(1.0)) for pair in pairs)


def test_simulated_ties_are_a_fair_coin():
    lines = [line(f"p{i}", a="one", b="two") for i in range(2000)]
    pairs = simulated(lines, "length", AnnotatorConfig(flip=0.1), seed=0)
    assert sum(pair.logit > 0 for pair in pairs) / 2000 == pytest.approx(0.5, abs=4 * 0.5 / 2000**0.5)


def test_simulated_labels_are_a_function_of_seed_and_pair():
    lines = [line(f"p{i}") for i in range(50)]
    annotator = AnnotatorConfig(scale=0.1)
    pairs = simulated(lines, "length", annotator, seed=1)
    assert len(pairs) == 150
    assert simulated(lines[::-1], "length", annotator, seed=1)[-3:] == pairs[:3]
    assert simulated(lines[7:8], "length", annotator, seed=1) == pairs[21:24]
    assert simulated(lines, "length", annotator, seed=2) != pairs


@pytest.mark.parametrize("n", [2, 5])
def test_the_votes_of_several_annotators_are_smoothed_shares(n):
    lines = [line(f"p{i}", a="one", b="one two three") for i in range(2000)]
    pairs = simulated(lines, "length", AnnotatorConfig(scale=0.5, flip=0.1, annotators=n), seed=1)
    # k of n votes for a: P(a) = (k + 1/2) / (n + 1).
    votes = [sigmoid(pair.logit) * (n + 1) - 0.5 for pair in pairs]
    assert {round(k) for k in votes} == set(range(n + 1))
    assert votes == pytest.approx([round(k) for k in votes])
    # The votes are independent: their number is binomial in P(a wins a vote) = 0.1 + 0.8 sigmoid(-1).
    p = 0.1 + 0.8 * sigmoid(-1.0)
    assert sum(votes) / len(votes) == pytest.approx(n * p, abs=4 * (n * p * (1 - p) / 2000) ** 0.5)
    assert sum(k * k for k in votes) / 2000 == pytest.approx(n * p * (1 - p) + (n * p) ** 2, rel=0.1)


def test_one_more_annotator_changes_no_vote_of_the_others():
    lines = [line(f"p{i}") for i in range(50)]
    alone, both = (
        [pair.logit for pair in simulated(lines, "length", AnnotatorConfig(scale=0.1, annotators=n), seed=1)]
        for n in (1, 2)
    )
    # With two, a pair is undecided or decided as the first one did.
    assert {(one > 0) == (two > 0) for one, two in zip(alone, both, strict=True) if abs(two) > 1e-9} == {True}


def test_a_sure_annotator_agrees_with_the_gold_judge():
    lines = [line(a="aaa", b="bbb", c="abb")]
    for found in simulated(lines, "letters", AnnotatorConfig(scale=1e4, flip=0.0), seed=0):
        texts = {candidate.candidate_id: candidate.completion for candidate in lines[0].candidates}
        assert (found.logit > 0) == (
            gold_score("letters", texts[found.one]) > gold_score("letters", texts[found.other])
        )


# Files


def write(folder, by_split):
    with PreferenceWriter(folder, {"labeler": "me"}) as writer:
        for split, rows in by_split.items():
            writer.add(split, rows)


def preference(prompt_id="p", **changes):
    base = Preference(prompt_id, USER, "good ü\n🙂", "bad", "a", "b", 0.75, "me", "ai", {"k": 1.5}, False, True)
    return replace(base, **changes)


def test_preferences_roundtrip(tmp_path):
    system = ({"role": "system", "content": "s"}, *USER)
    by_split = {"train": [preference("p"), preference("q", prompt=system)], "test": [preference("r")], "validation": []}
    write(tmp_path / "x", by_split)
    for split, rows in by_split.items():
        # The breakdown by principle is for readers of the file; training has no use for it.
        assert read_preferences(tmp_path / "x", split) == [replace(row, principles={}) for row in rows]
    assert not (tmp_path / "x" / "validation.parquet").exists()
    card = (tmp_path / "x" / "README.md").read_text()
    assert "| train | 2 |" in card
    assert '- labeler: "me"' in card


def test_datasets_loads_the_folder(tmp_path):
    import datasets

    folder = tmp_path / "preferences"
    write(folder, {"train": [preference("p")] * 3, "test": [preference("r")]})
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "test": 1}
    row = loaded["test"][0]
    assert row["prompt"] == list(USER)
    assert row["chosen"] == [{"role": "assistant", "content": "good ü\n🙂"}]
    assert row["rejected"] == [{"role": "assistant", "content": "bad"}]
    assert row["p_chosen"] == 0.75
    assert json.loads(row["principles"]) == {"k": 1.5}


def say(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": list(USER), "chosen": [say("good")], "rejected": [say("bad")]},
        {"chosen": [*USER, say("good")], "rejected": [*USER, say("bad")]},
        {"prompt": "q", "chosen": "good", "rejected": "bad", "p_chosen": None, "prompt_id": None},
    ],
    ids=["text", "messages", "implicit prompt", "nulls"],
)
def test_formats_of_ones_own(row):
    found = parse_preference(row)
    assert (found.prompt, found.chosen, found.rejected, found.p_chosen) == (USER, "good", "bad", 1.0)
    assert (found.feedback, found.labeler, found.chosen_ended) == ("", "unknown", True)
    # The same prompt has the same id in every format.
    assert found.prompt_id == parse_preference({"prompt": "q", "chosen": "x", "rejected": "y"}).prompt_id


def test_implicit_prompts_of_several_turns():
    turns = [*USER, say("hm?"), {"role": "user", "content": "r"}]
    found = parse_preference({"chosen": [*turns, say("same")], "rejected": [*turns, say("same")]})
    assert (list(found.prompt), found.chosen, found.rejected) == (turns, "same", "same")


def test_a_prompt_id_of_zero_is_an_id():
    assert parse_preference({"prompt": "q", "chosen": "a", "rejected": "b", "prompt_id": 0}).prompt_id == "0"


BROKEN = [
    ({}, 'has no "chosen" (found: nothing)'),
    ({"prompt": "q", "chosen": "a"}, 'has no "rejected" (found: chosen, prompt)'),
    ({"chosen": "a", "rejected": "b"}, 'has no "prompt", and "chosen" and "rejected" are not message lists'),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
    ({"prompt": "q", "chosen": " ", "rejected": "b"}, '"chosen" must be a non-empty text or one assistant message'),
    ({"prompt": "q", "chosen": "a", "rejected": 3}, '"rejected" must be a non-empty text or one assistant message'),
    ({"prompt": "q", "chosen": list(USER), "rejected": "b"}, '"chosen" must be one assistant message after'),
    ({"prompt": "q", "chosen": [say("a"), say("b")], "rejected": "b"}, '"chosen" must be one assistant message after'),
    ({"chosen": [say("a")], "rejected": [say("b")]}, "prompt is an empty list"),
    ({"chosen": [], "rejected": []}, "prompt is an empty list"),
    ({"chosen": [*USER, say("a"), *USER, say("x")], "rejected": [*USER, say("b")]}, '"chosen" must be one assistant'),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "p_chosen": 1.2}, '"p_chosen" must be between 0 and 1, found 1.2'),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "p_chosen": "high"}, '"p_chosen" must be between 0 and 1'),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "p_chosen": True}, '"p_chosen" must be between 0 and 1'),
]


@pytest.mark.parametrize(("row", "part"), BROKEN)
def test_broken_rows_name_file_and_line(tmp_path, row, part):
    good = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"})
    (tmp_path / "train.jsonl").write_text(f"{good}\n{json.dumps(row)}\n")
    with pytest.raises(UserError) as caught:
        read_preferences(tmp_path, "train")
    assert f"{tmp_path / 'train.jsonl'}, line 2: " in str(caught.value)
    assert part in str(caught.value)


def test_broken_parquet(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": None}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(UserError, match=r'train.parquet, row 2: has no "rejected"'):
        read_preferences(tmp_path, "train")
    (tmp_path / "train.parquet").write_text("nonsense")
    with pytest.raises(UserError, match=r"train.parquet: not a readable parquet file"):
        read_preferences(tmp_path, "train")


def test_gzip_and_missing_splits(tmp_path):
    text = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"})
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert len(read_preferences(tmp_path, "train")) == 1
    assert read_preferences(tmp_path, "test") == []


def test_prompts_of():
    rows = [preference("p"), preference("q"), preference("p", chosen="other")]
    assert [prompt.prompt_id for prompt in prompts_of(rows)] == ["p", "q"]


def hh(*turns):
    return "".join(
        f"\n\n{name}: {text}" for name, text in zip(["Human", "Assistant"] * len(turns), turns, strict=False)
    )


def test_transcripts_of_the_hh_data():
    row = parse_preference(
        {"chosen": hh("Hi", "Yes?", "A: b\n\nc", "Sure."), "rejected": hh("Hi", "Yes?", "A: b\n\nc", "No.")}
    )
    assert [message["role"] for message in row.prompt] == ["user", "assistant", "user"]
    assert row.prompt[-1]["content"] == "A: b\n\nc"
    assert (row.chosen, row.rejected, row.p_chosen, row.feedback) == ("Sure.", "No.", 1.0, "")


def test_a_transcript_as_prompt():
    row = parse_preference(
        {"prompt": hh("Hi", "Yes?", "Bye") + "\n\nAssistant:", "chosen": " Sure.", "rejected": "No."}
    )
    assert [message["content"] for message in row.prompt] == ["Hi", "Yes?", "Bye"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (hh("Hi", "Yes?", "Bye", "Sure."), hh("Hi", "Well?", "Bye", "No."), "differ by more than the last reply"),
        (hh("Hi", ""), hh("Hi", "No."), "empty turn"),
        (hh("Hi", "Yes"), hh("Hi", "Yes"), "two equal replies"),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "\n\nHuman: a\n\nHuman: b\n\nAssistant: d", "do not alternate"),
        (hh("Hi", "a", "b"), hh("Hi", "a", "c"), "do not end with the assistant"),
    ],
)
def test_transcripts_without_a_pair_are_left_out_and_counted(tmp_path, caplog, chosen, rejected, reason):
    rows = [{"chosen": hh("Hi", "Yes"), "rejected": hh("Hi", "No")}, {"chosen": chosen, "rejected": rejected}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("WARNING", "rlaif"):
        found = read_preferences(tmp_path, "train")
    assert [row.chosen for row in found] == ["Yes"]
    assert "1 of 2 transcripts are left out" in caplog.text
    assert reason in caplog.text


def test_columns_of_another_dataset(tmp_path):
    row = {"question": "q", "good": "yes", "bad": "no", "share": 0.8, "subset": "maths"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "p_chosen": "share"}
    (found,) = read_preferences(tmp_path, "train", columns)
    assert (found.prompt, found.chosen, found.rejected, found.p_chosen) == (USER, "yes", "no", 0.8)
    assert found.source == "maths"
    with pytest.raises(UserError, match=r"line 1: has no column answer that columns names \(found: bad, good"):
        read_preferences(tmp_path, "train", {**columns, "chosen": "answer"})


def test_datasets_of_the_hub_become_a_folder(tmp_path, monkeypatch):
    import datasets
    from datasets import Dataset, DatasetDict

    from rlaif.preferences import hub_preferences

    rows = DatasetDict(train=Dataset.from_list([{"chosen": hh("Hi", "Yes"), "rejected": hh("Hi", "No")}]))
    asked = []
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or rows)
    folder = hub_preferences("somebody/pairs")
    assert asked == ["somebody/pairs"]
    assert [row.chosen for row in read_preferences(folder, "train")] == ["Yes"]
    # A path that is there is never asked for, and neither is what cannot be a name.
    assert hub_preferences(str(tmp_path)) is None
    assert hub_preferences("pairs") is None
    assert len(asked) == 1

    def refuse(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"preferences=somebody/pairs: no such folder, and the hub .*no route to host"):
        hub_preferences("somebody/pairs")
