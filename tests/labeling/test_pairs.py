"""Which pairs, orders and principles are asked, and that an interrupted run asks the same."""

import itertools
import json
import random

import pytest

from rlaif.config import LabelingConfig, LabelMode, Pairs, ScriptedConfig
from rlaif.constitution import Constitution, Principle
from rlaif.engines.base import Engine, Failure, Sampled
from rlaif.engines.scripted import ScriptedEngine
from rlaif.labeling.aggregate import Calibration
from rlaif.labeling.label import Labeling, label_candidates
from rlaif.labeling.modes import Setup
from rlaif.labeling.pairs import saved
from rlaif.labeling.ranking import ranks, scores_of
from rlaif.labeling.store import VerdictStore
from rlaif.records import Candidates, Completion, Prompt

HEAVY, LIGHT = Principle("heavy", 3.0, "Which is kinder?"), Principle("light", 1.0, "Which is shorter?")
ONE = Constitution("one", "1", "d", (HEAVY,))
TWO = Constitution("two", "1", "d", (LIGHT, HEAVY))
AGAINST_BEST = LabelingConfig(pairs=Pairs.against_best)
ADAPTIVE = LabelingConfig(pairs=Pairs.adaptive)


def line(*words, name="p"):
    """Candidates c0, c1 ... of so many words each."""
    texts = [" ".join(["word"] * count) for count in words]
    prompt = Prompt(name, ({"role": "user", "content": f"question {name}"},))
    return Candidates(prompt, tuple(Completion(f"c{k}", text) for k, text in enumerate(texts)))


def many(count=12, size=6, seed=0):
    rng = random.Random(seed)
    return [line(*rng.sample(range(1, 30), size), name=f"p{number}") for number in range(count)]


class Labeler(Engine):
    """Prefers longer texts, by so many logits a word; remembers what it was asked."""

    def __init__(self, fails=lambda meta: False, dies_after=None, **settings):
        self.inner = ScriptedEngine(ScriptedConfig(**{"utility": "length", "sharpness": 2.0, **settings}), seed=0)
        self.identity, self.asked, self.fails, self.dies_after = self.inner.identity, [], fails, dies_after

    def sample(self, requests):
        for index, request in enumerate(requests):
            yield index, Sampled(f"thought {request.seed}", "stop", 2)

    def score_options(self, requests):
        for index, request in enumerate(requests):
            if len(self.asked) == self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            if self.fails(request.meta):
                yield index, Failure("timeout")
            else:
                [(_, answer)] = self.inner.score_options([request])
                yield index, answer


@pytest.fixture
def store(tmp_path):
    with VerdictStore(tmp_path / "s.sqlite") as opened:
        yield opened


def asked_pairs(labels):
    return list(dict.fromkeys(tuple(sorted((label.first, label.second))) for label in labels))


def test_against_best_keeps_the_best_so_far(store):
    labels = label_candidates([line(3, 1, 5, 4)], ONE, Labeler(), AGAINST_BEST, store)
    # 3 beats 1; 5 beats 3; 5 beats 4.
    assert asked_pairs(labels) == [("c0", "c1"), ("c0", "c2"), ("c2", "c3")]
    assert len(labels) == 6


def test_both_orders_decide_about_the_best(store):
    # A bias of 3 logits makes the first one win single orders whatever is shown; words differ by 2 logits.
    labels = label_candidates([line(3, 4, 5)], ONE, Labeler(position_bias=3.0), AGAINST_BEST, store)
    assert asked_pairs(labels) == [("c0", "c1"), ("c1", "c2")]


def test_a_pair_without_a_verdict_changes_nothing(store):
    fails = lambda meta: len(meta["first"].split()) + len(meta["second"].split()) == 7  # noqa: E731
    labels = label_candidates([line(3, 4, 5)], ONE, Labeler(fails), AGAINST_BEST, store)
    assert asked_pairs(labels) == [("c0", "c1"), ("c0", "c2")]


def test_adaptive_finds_the_order_with_fewer_pairs(store):
    lines = many()
    labeler = Labeler()
    setup = Setup(ONE, "l", ADAPTIVE)
    labels = label_candidates(lines, ONE, labeler, ADAPTIVE, store)
    assert len(labels) < 0.8 * len(lines) * 15 * 2
    for candidates in lines:
        own = [label for label in labels if label.prompt_id == candidates.prompt.prompt_id]
        words = {c.candidate_id: len(c.completion.split()) for c in candidates.candidates}
        assert ranks(scores_of(setup.pairs(own)[0])) == ranks(words)


@pytest.mark.parametrize("budget", [1, 3, 7])
def test_the_budget_is_kept(store, budget):
    config = LabelingConfig(pairs=Pairs.adaptive, pairs_per_prompt=budget)
    # No labeler that is this unsure ever makes an order certain.
    labels = label_candidates(many(4), ONE, Labeler(sharpness=0.001), config, store)
    for name in {label.prompt_id for label in labels}:
        assert len(asked_pairs([label for label in labels if label.prompt_id == name])) == budget


def test_an_unsure_labeler_is_asked_everything(store):
    labels = label_candidates([line(1, 2, 3, 4)], ONE, Labeler(sharpness=0.001), ADAPTIVE, store)
    assert sorted(asked_pairs(labels)) == list(itertools.combinations(["c0", "c1", "c2", "c3"], 2))


def test_a_failed_pair_is_not_asked_again_in_one_run(store):
    labeler = Labeler(fails=lambda meta: True)
    labels = label_candidates([line(1, 2, 3)], ONE, labeler, ADAPTIVE, store)
    assert len(labels) == len(labeler.asked) == 6
    assert {label.reason for label in labels} == {"timeout"}


def test_the_second_order_only_where_the_first_is_unclear(store):
    config = LabelingConfig(second_order_below=3.0)
    # 2 logits a word: 1 and 2 differ by 2, 1 and 9 by 16.
    labels = label_candidates([line(1, 2, 9)], ONE, Labeler(), config, store)
    orders = {name: sum({a.first, a.second} == set(name) for a in labels) for name in asked_pairs(labels)}
    assert orders == {("c0", "c1"): 2, ("c0", "c2"): 1, ("c1", "c2"): 1}
    pairs, dropped = Setup(ONE, "l", config).pairs(labels)
    assert {(pair.one, pair.other): round(pair.logit, 3) for pair in pairs} == {
        ("c0", "c1"): -2.0,
        # Probabilities are clipped at 1e-6 from the ends.
        ("c0", "c2"): -13.816,
        ("c1", "c2"): -13.816,
    }
    assert dropped == {"no_verdict": 0}
    assert saved(Setup(ONE, "l", config), 3, labels) == {"pairs": 0, "principles": 0, "second_order": 2}


def test_the_calibrated_bias_decides_what_is_unclear_and_is_removed(store):
    config = LabelingConfig(second_order_below=3.0)
    calibration = Calibration(temperature=2.0, bias=5.0, single_temperature=4.0)
    setup = Setup(ONE, "l", config, calibration=calibration)
    labeling = Labeling(lambda: [line(1, 2, 5)], setup, Labeler(position_bias=5.0), store)
    labeling.ask(6)
    [(_, labels)] = labeling.labels()
    # Less the bias, single orders differ from 0 by 2, 8 and 6: only the first is unclear.
    assert saved(Setup(ONE, "l", config), 3, labels)["second_order"] == 2
    # -2 / 2 for the pair with both orders, -8 / 4 and -6 / 4 for those with one.
    found = {(pair.one, pair.other): pair.logit for pair in setup.pairs(labels)[0]}
    assert found[("c0", "c1")] == pytest.approx(-1.0, abs=1e-3)
    assert found[("c1", "c2")] == pytest.approx(-1.5, abs=0.01)
    # A logit of 13 is close to the clip.
    assert found[("c0", "c2")] == pytest.approx(-2.0, abs=0.2)


def test_which_order_comes_first_is_left_to_chance(store):
    config = LabelingConfig(second_order_below=0.001)
    lines = many(60, 2)
    labels = label_candidates(lines, ONE, Labeler(), config, store)
    assert len(labels) == 60
    assert 15 < sum(label.first == "c0" for label in labels) < 45
    again = label_candidates(lines, ONE, Labeler(), config, store)
    assert again == labels


def test_a_first_order_without_a_verdict_has_no_second(store):
    config = LabelingConfig(second_order_below=99.0)
    labels = label_candidates([line(1, 2)], ONE, Labeler(fails=lambda meta: True), config, store)
    assert len(labels) == 1
    assert Setup(ONE, "l", config).pairs(labels) == ([], {"no_verdict": 1})


def test_principles_stop_once_the_rest_cannot_turn_the_pair(store):
    # heavy weighs 3, light 1. With verdicts of at most 5 logits, light can undo 5: |3 * l| > 5 stops.
    config = LabelingConfig(stop_principles_above=5.0)
    # 1 against 2 words: 3 * 2 = 6 > 5, stop. With 0.5 logits a word 3 * 0.5 = 1.5 < 5, go on.
    for sharpness, count in ((2.0, 2), (0.5, 4)):
        labels = label_candidates([line(1, 2)], TWO, Labeler(sharpness=sharpness), config, store)
        assert len(labels) == count
        assert [label.principle for label in labels[:2]] == ["heavy", "heavy"]
    setup = Setup(TWO, "l", config)
    labels = label_candidates([line(1, 2)], TWO, Labeler(), config, store)
    [pair], dropped = setup.pairs(labels)
    # The principle that was not asked is undecided: 3 * -2 / 4.
    assert pair.logit == pytest.approx(-1.5, abs=1e-4)
    assert pair.principles == {"heavy": pytest.approx(-2.0, abs=1e-4)}
    assert dropped == {"no_verdict": 0}
    assert saved(Setup(TWO, "l", config), 2, labels) == {"pairs": 0, "principles": 2, "second_order": 0}


def test_principles_that_were_stopped_never_turn_a_pair(store):
    """Within the bound, which a scripted labeler's logits here keep, signs are those of all principles."""
    every = LabelingConfig()
    stopped = LabelingConfig(stop_principles_above=13.9)
    five = Constitution("five", "1", "d", tuple(Principle(f"k{n}", 2.0**n, f"Which {n}?") for n in range(5)))
    lines = many(10, 4)
    labeler = Labeler(sharpness=0.7, noise=3.0)
    all_labels = label_candidates(lines, five, labeler, every, store)
    few = label_candidates(lines, five, labeler, stopped, store)
    assert len(few) < len(all_labels)
    signs = [
        {(pair.prompt_id, pair.one, pair.other): pair.logit > 0 for pair in Setup(five, "l", config).pairs(labels)[0]}
        for config, labels in ((every, all_labels), (stopped, few))
    ]
    assert signs[0] == signs[1]


def test_a_pair_is_asked_on_until_too_much_is_missing(store):
    """heavy has 3 of 4 of the weight, light 1: what is left without light is enough, without heavy it is not."""
    config = LabelingConfig(stop_principles_above=99.0)
    setup = Setup(TWO, "l", config)
    labels = label_candidates([line(1, 2)], TWO, Labeler(lambda meta: meta["principle"] == "heavy"), config, store)
    assert [label.principle for label in labels] == ["heavy", "heavy"]
    assert setup.pairs(labels) == ([], {"no_verdict": 1})
    assert not any(saved(setup, 2, labels).values())

    light = LabelingConfig(stop_principles_above=99.0, min_principle_weight=0.25)
    labels = label_candidates([line(1, 2)], TWO, Labeler(lambda meta: meta["principle"] == "heavy"), light, store)
    assert [label.principle for label in labels] == ["heavy", "heavy", "light", "light"]
    [pair], _ = Setup(TWO, "l", light).pairs(labels)
    assert (pair.logit, pair.missing_weight) == (pytest.approx(-2.0, abs=1e-4), 0.75)

    labels = label_candidates([line(1, 3)], TWO, Labeler(lambda meta: meta["principle"] == "light"), config, store)
    assert len(labels) == 4
    [pair], _ = setup.pairs(labels)
    assert (pair.logit, pair.missing_weight) == (pytest.approx(-4.0, abs=1e-3), 0.25)


def test_what_a_missing_verdict_left_unasked_was_not_saved(store):
    config = LabelingConfig(second_order_below=3.0)
    labels = label_candidates([line(1, 2)], TWO, Labeler(lambda meta: meta["principle"] == "heavy"), config, store)
    assert any(label.p is None for label in labels)
    assert len(labels) < 4
    assert not any(saved(Setup(TWO, "l", config), 2, labels).values())


CONFIGS = {
    "against_best": AGAINST_BEST,
    "adaptive": ADAPTIVE,
    "second_order": LabelingConfig(second_order_below=8.0),
    "principles": LabelingConfig(stop_principles_above=6.0),
    "everything": LabelingConfig(pairs=Pairs.adaptive, second_order_below=8.0, stop_principles_above=6.0),
    "rationales": LabelingConfig(pairs=Pairs.against_best, rationales=2, clamp=0.0),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_interrupted_run_ends_the_same_and_asks_nothing_twice(tmp_path, config):
    lines = many(6, 4)
    whole = Labeler(noise=1.0)
    with VerdictStore(tmp_path / "whole.sqlite") as store:
        expected = label_candidates(lines, TWO, whole, config, store)
    asked = 0
    with VerdictStore(tmp_path / "parts.sqlite") as store:
        for stop in (1, 5, 11):
            part = Labeler(noise=1.0, dies_after=stop)
            with pytest.raises(KeyboardInterrupt):
                label_candidates(lines, TWO, part, config, store)
            asked += len(part.asked)
        last = Labeler(noise=1.0)
        labels = label_candidates(lines, TWO, last, config, store)
        # What is finished is skipped.
        idle = Labeler(noise=1.0)
        assert label_candidates(lines, TWO, idle, config, store) == labels
        assert not idle.asked
    assert [json.dumps(label.to_json()) for label in labels] == [json.dumps(label.to_json()) for label in expected]
    # Each interruption loses at most the answer that was on its way.
    assert len(whole.asked) <= asked + len(last.asked) <= len(whole.asked) + 3


def test_failures_are_asked_again_by_a_later_run(store):
    lines = many(4, 4)
    expected = label_candidates(lines, ONE, Labeler(), ADAPTIVE, VerdictStore(store.path.with_name("other.sqlite")))
    broken = label_candidates(lines, ONE, Labeler(lambda meta: len(meta["first"]) % 3 == 0), ADAPTIVE, store)
    assert any(label.p is None for label in broken)
    assert label_candidates(lines, ONE, Labeler(), ADAPTIVE, store) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": LabelMode.pointwise, "pairs": Pairs.adaptive}, r"labeling.pairs=adaptive: only with .*pairwise"),
        ({"mode": LabelMode.pointwise, "second_order_below": 1.0}, r"second_order_below=1.0: only with .*pairwise"),
        ({"pairs_per_prompt": 3}, r"pairs_per_prompt=3: only with labeling.pairs=adaptive"),
        ({"pairs": Pairs.adaptive, "pairs_per_prompt": 0}, r"pairs_per_prompt=0: must be above 0 or null"),
        ({"second_order_below": 1.0, "both_orders": False}, r"only with labeling.both_orders=true"),
        ({"stop_principles_above": -1.0}, r"stop_principles_above=-1.0: must be above 0"),
        ({"calibrate": "x", "temperature": 2.0}, r"labeling.temperature=2.0: labeling.calibrate measures"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        LabelingConfig(**settings)
