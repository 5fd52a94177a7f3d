"""Metrics of a policy from samples made by hand."""

import contextlib
import math
from typing import ClassVar

import pytest

from rlaif.config import EvalConfig, ModelConfig
from rlaif.evaluate import run_evaluation
from rlaif.evaluation.policy import (
    Sample,
    best_of_n,
    best_of_n_kl,
    policy_metrics,
    read_samples,
    sample_policy,
    write_evaluation,
)
from rlaif.records import Prompt, UserError, read_json

USER = [{"role": "user", "content": "q"}]


def sample(prompt_id, number=0, gold=None, pm=None, tokens=10, reason="stop", kl=0.0):
    return Sample(prompt_id, USER, number, f"text {prompt_id} {number}", tokens, reason, kl, gold, pm)


def test_win_rate_and_gain():
    # Gains 0.3, -0.1, 0, 0.2: wins 1, 0, 1/2, 1 = 0.625; mean gain 0.1; mean score 0.35.
    samples = [sample("p", gold=0.5), sample("q", gold=0.1), sample("r", gold=0.2), sample("s", gold=0.6)]
    baseline = [sample("s", gold=0.4), sample("r", gold=0.2), sample("q", gold=0.2), sample("p", gold=0.2)]
    found = policy_metrics(samples, baseline)
    assert found["win_rate"] == pytest.approx(0.625)
    assert found["gold_gain"] == pytest.approx(0.1)
    assert found["gold_score"] == pytest.approx(0.35)
    assert (found["n_prompts"], found["n_samples"], found["win_rate_n"]) == (4, 4, 4)
    assert found["win_rate_low"] <= 0.625 <= found["win_rate_high"]
    assert not any(key.startswith("pm_") for key in found)


def test_a_policy_ties_with_itself():
    samples = [sample(name, gold=0.1 * place, pm=place) for place, name in enumerate("pqrs")]
    found = policy_metrics(samples, samples)
    assert found["win_rate"] == 0.5
    # Four ties are not proof of a tie.
    assert found["win_rate_low"] < 0.5 < found["win_rate_high"]
    assert (found["gold_gain"], found["pm_gain"], found["pm_score"]) == (0, 0, 1.5)


def test_pairing_makes_the_gain_sharper_than_the_score():
    samples = [sample(str(i), gold=i + 0.5) for i in range(20)]
    baseline = [sample(str(i), gold=float(i)) for i in range(20)]
    found = policy_metrics(samples, baseline)
    assert found["gold_gain_high"] - found["gold_gain_low"] == pytest.approx(0, abs=1e-6)
    assert found["gold_score_high"] - found["gold_score_low"] > 2


def test_samples_are_paired_by_number_and_counted_by_prompt():
    # Sample 0 gains 1, sample 1 loses 1 on both prompts: the mean of each is 0.
    samples = [sample(name, number, gold=1.0 - number) for name in "pq" for number in (0, 1)]
    baseline = [sample(name, number, gold=float(number)) for name in "pq" for number in (1, 0)]
    found = policy_metrics(samples, baseline)
    assert (found["n_prompts"], found["n_samples"], found["gold_gain_n"]) == (2, 4, 2)
    assert [found[f"gold_gain{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]


def test_length_end_and_kl():
    samples = [sample("p", tokens=4, kl=-0.5), sample("q", tokens=8, reason="length", kl=2.5)]
    found = policy_metrics(samples, samples)
    assert (found["length"], found["eos_rate"], found["kl"]) == (6, 0.5, 1.0)
    # Single values of the signed estimate may be negative, and are not clamped.
    assert found["kl_low"] < 0


def test_scores_that_the_baseline_lacks_have_no_gain():
    found = policy_metrics([sample("p", gold=1.0), sample("q", gold=0.0)], [sample("p"), sample("q")])
    assert found["gold_score"] == 0.5
    assert "gold_gain" not in found
    assert "win_rate" not in found


def test_a_baseline_must_have_every_sample():
    with pytest.raises(UserError, match="baseline_samples lacks 2 of the evaluated prompts, first q"):
        policy_metrics([sample("p"), sample("q"), sample("r")], [sample("p"), sample("x")])
    with pytest.raises(UserError, match="lacks 1 of"):
        policy_metrics([sample("p", 0), sample("p", 1)], [sample("p", 0)])


def test_samples_roundtrip_in_a_fixed_order(tmp_path):
    samples = [sample("q", 1, gold=0.5), sample("q", 0), sample("p", 0, pm=-1.0)]
    write_evaluation(tmp_path, samples, {"n": 3})
    assert read_samples(tmp_path / "samples.jsonl") == [samples[2], samples[1], samples[0]]
    assert read_json(tmp_path / "metrics.json") == {"n": 3}
    (tmp_path / "samples.jsonl").write_text('{"prompt": "q"}\n')
    with pytest.raises(UserError, match=r"line 1: is not a line of samples.jsonl"):
        read_samples(tmp_path / "samples.jsonl")


def test_best_of_n_keeps_the_best_of_each_group():
    samples = [sample(name, number) for name in "pq" for number in range(4)]
    scores = [0.1, 0.7, None, 0.3, 2.0, 2.0, None, None]
    best = best_of_n(samples, scores, 2)
    # p: 1 of (0, 1), 3 of (2, 3); q: the first of two equals, and the first where nothing has a score.
    assert [row.completion for row in best] == ["text p 1", "text p 3", "text q 0", "text q 2"]
    assert [row.sample for row in best] == [0, 1, 0, 1]
    assert best_of_n(samples, scores, 4)[0].completion == "text p 1"


class First:
    """Finds the first completion of each prompt the best."""

    settings: ClassVar = {}
    inputs: ClassVar = {}
    carry_over = ()

    @contextlib.contextmanager
    def open(self, folder):
        yield self

    def score(self, examples):
        self.ended = [example.ended for example in examples]
        return [-float(place) for place in range(len(examples))]


def test_the_best_of_n_are_not_the_baselines_completions(tmp_path):
    """Under the baseline's random numbers the first of the n would be the baseline's own completion."""
    (tmp_path / "prompts.jsonl").write_text("")
    run_evaluation(
        tmp_path / "evaluation",
        policy=ModelConfig(name="tiny", device="cpu"),
        reference=ModelConfig(name="tiny", device="cpu"),
        prompts=[Prompt(f"p{n}", ({"role": "user", "content": "ab" * n},)) for n in range(1, 5)],
        prompts_file=tmp_path / "prompts.jsonl",
        config=EvalConfig(gold="letters", max_new_tokens=8),
        row={"name": "bon"},
        seed=0,
        best_of=(2, first := First()),
    )
    found = read_samples(tmp_path / "evaluation" / "samples.jsonl")
    plain = sample_policy(
        ModelConfig(name="tiny", device="cpu"), None,
        [Prompt(row.prompt_id, tuple(row.prompt)) for row in found], EvalConfig(max_new_tokens=8), 0,
    )  # fmt: skip
    drawn = {row.prompt_id: row.completion for row in plain}
    assert all(row.completion != drawn[row.prompt_id] for row in found)
    # What chooses is told which completions were cut; the first of each two was kept.
    reasons = {row.prompt_id: row.finish_reason for row in found}
    assert sorted(first.ended[::2]) == sorted(reason == "stop" for reason in reasons.values())


def test_the_kl_bound_of_best_of_n():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
