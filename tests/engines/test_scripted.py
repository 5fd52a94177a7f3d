"""The scripted labeler does what its settings say, the same way every time."""

import math
import time
from statistics import mean, stdev
from typing import Any

import pytest

from rlaif.config import LabelerConfig, LabelerType, ScriptedConfig
from rlaif.engines import build_labeler
from rlaif.engines.base import CompletionRequest, Failure, Likelihood, OptionMass, OptionRequest, Sampled, SampleRequest
from rlaif.engines.scripted import ScriptedEngine
from rlaif.records import UserError

AB = ((" A", "A"), (" B", "B"))


def ask(number: int, **meta: Any) -> OptionRequest:
    return OptionRequest(({"role": "user", "content": f"question {number}"},), AB, meta=meta)


def pair(first: str, second: str, number: int = 0) -> OptionRequest:
    return ask(number, mode="pairwise", first=first, second=second, principle="p")


def point(completion: str, number: int = 0) -> OptionRequest:
    return ask(number, mode="pointwise", completion=completion, principle="p")


def score(engine: ScriptedEngine, request: OptionRequest) -> OptionMass:
    [(index, result)] = engine.score_options([request])
    assert index == 0
    assert isinstance(result, OptionMass)
    return result


def logit(result: OptionMass) -> float:
    first, second = result.masses
    assert first is not None
    assert second is not None
    return math.log(first / second)


def test_pairwise_masses_by_hand() -> None:
    # length: 3 - 1 = 2 words; logit 0.5 * 2 + 0.25 = 1.25; sigmoid(1.25) = 0.777300.
    config = ScriptedConfig(utility="length", sharpness=0.5, position_bias=0.25, option_mass=0.8)
    engine = ScriptedEngine(config, seed=1)
    result = score(engine, pair("a b c", "a"))
    assert result.masses == pytest.approx((0.8 * 0.777300, 0.8 * 0.222700), abs=1e-6)
    assert result.method == "logprob"
    assert result.reply == " A"
    # The other order: -1 + 0.25 = -0.75, so the mean of both logits is free of the bias.
    swapped = score(engine, pair("a", "a b c"))
    assert logit(swapped) == pytest.approx(-0.75)
    assert swapped.reply == " B"
    assert (logit(result) - logit(swapped)) / 2 == pytest.approx(1.0)


def test_pointwise_masses_by_hand() -> None:
    # letters("aab") = 2/3; logit 3 * 2/3 = 2; the position bias has no place in a pointwise verdict.
    config = ScriptedConfig(utility="letters", sharpness=3, position_bias=9, option_mass=1)
    result = score(ScriptedEngine(config, seed=1), point("aab"))
    assert result.masses == pytest.approx((0.880797, 0.119203), abs=1e-6)


def test_numbers_have_the_wanted_mean() -> None:
    # length: 2 words; sigmoid(0.5 * 2) = 0.731059; 1 + 8 * 0.731059 = 6.848469.
    request = OptionRequest(
        ({"role": "user", "content": "q"},),
        tuple((str(n),) for n in range(1, 10)),
        meta={"mode": "score", "completion": "a b"},
    )
    config = ScriptedConfig(utility="length", sharpness=0.5, option_mass=0.8, position_bias=9)
    masses = [mass or 0.0 for mass in score(ScriptedEngine(config, seed=1), request).masses]
    assert sum(masses) == pytest.approx(0.8)
    assert sum(n * mass for n, mass in enumerate(masses, 1)) / 0.8 == pytest.approx(6.848469, abs=1e-6)


def test_the_best_of_a_list_by_hand() -> None:
    # exp(0.5 + 1.5), exp(1), exp(0.5): 7.389056, 2.718282, 1.648721 of 11.756059.
    request = OptionRequest(
        ({"role": "user", "content": "q"},),
        (("A",), ("B",), ("C",)),
        meta={"mode": "listwise", "completions": ["a", "a b", "c"]},
    )
    config = ScriptedConfig(utility="length", sharpness=0.5, option_mass=1, position_bias=1.5)
    result = score(ScriptedEngine(config, seed=1), request)
    assert result.masses == pytest.approx((0.628532, 0.231224, 0.140244), abs=1e-6)
    with pytest.raises(ValueError, match="takes 3 options here, got 2"):
        score(ScriptedEngine(config, seed=1), OptionRequest(request.messages, AB, meta=request.meta))


def test_likelihoods_by_hand() -> None:
    engine = ScriptedEngine(ScriptedConfig(utility="length", sharpness=0.5), seed=0)
    requests = [
        CompletionRequest((), "a b c", meta={"mode": "contrastive", "encouraged": side}) for side in (True, False)
    ]
    found = [result for _, result in engine.score_completions(requests)]
    # Two nats a word, and half of 0.5 * 3 more or less.
    assert [result.logp for result in found if isinstance(result, Likelihood)] == pytest.approx([-5.25, -6.75])


def test_extreme_logits_do_not_overflow() -> None:
    result = score(ScriptedEngine(ScriptedConfig(utility="length", sharpness=1e6), seed=0), pair("a", "a b"))
    assert result.masses == pytest.approx((0.0, 0.9))


def test_noise_is_repeatable_gaussian_and_depends_on_seed_and_order() -> None:
    config = ScriptedConfig(utility="length", sharpness=0, noise=2)
    requests = [pair("x", "y", number) for number in range(2000)]
    draws = [logit(r) for _, r in ScriptedEngine(config, 3).score_options(requests) if isinstance(r, OptionMass)]
    assert mean(draws) == pytest.approx(0, abs=0.2)
    assert stdev(draws) == pytest.approx(2, abs=0.15)
    again = ScriptedEngine(config, 3)
    assert logit(score(again, requests[5])) == draws[5]
    assert logit(score(again, requests[5])) == draws[5]
    assert logit(score(ScriptedEngine(config, 4), requests[5])) != draws[5]
    assert logit(score(again, pair("y", "x", 5))) != pytest.approx(-draws[5])


def test_faults_have_the_rate_and_a_second_attempt_draws_anew() -> None:
    config = ScriptedConfig(fault_rate=0.3)
    requests = [point("text", number) for number in range(1000)]
    engine = ScriptedEngine(config, seed=0)
    first = [isinstance(result, Failure) for _, result in engine.score_options(requests)]
    second = [isinstance(result, Failure) for _, result in engine.score_options(requests)]
    assert mean(first) == pytest.approx(0.3, abs=0.05)
    assert mean(a and b for a, b in zip(first, second, strict=True)) == pytest.approx(0.09, abs=0.04)
    repeated = [isinstance(r, Failure) for _, r in ScriptedEngine(config, 0).score_options(requests)]
    assert repeated == first
    [(_, failure)] = ScriptedEngine(ScriptedConfig(fault_rate=1), 0).score_options(requests[:1])
    assert failure == Failure("scripted_fault", "attempt 1", 0.0)


def test_delay() -> None:
    start = time.perf_counter()
    result = score(ScriptedEngine(ScriptedConfig(delay_s=0.05), 0), point("a"))
    assert time.perf_counter() - start >= 0.05
    assert result.latency_s == 0.05


def test_requests_are_pulled_one_at_a_time() -> None:
    pulled = []

    def source() -> Any:
        for number in range(10):
            pulled.append(number)
            yield point("a", number)

    stream = ScriptedEngine(ScriptedConfig(), 0).score_options(source())
    assert next(stream)[0] == 0
    assert pulled == [0]


@pytest.mark.parametrize("meta", [None, {}, {"mode": "sideways"}])
def test_request_without_meaning_is_refused(meta: Any) -> None:
    request = OptionRequest(({"role": "user", "content": "q"},), AB, meta=meta)
    with pytest.raises(ValueError, match="needs meta"):
        list(ScriptedEngine(ScriptedConfig(), 0).score_options([request]))


def test_unknown_utility_fails_at_construction() -> None:
    with pytest.raises(UserError, match="'beauty'"):
        ScriptedEngine(ScriptedConfig(utility="beauty"), 0)


def test_identity_holds_every_setting() -> None:
    config = LabelerConfig(type=LabelerType.scripted, scripted=ScriptedConfig(noise=0.5))
    engine = build_labeler(config, seed=7)
    assert engine.name == "scripted"
    assert engine.identity == {
        "engine": "scripted",
        "utility": "letters",
        "sharpness": 4.0,
        "position_bias": 0.0,
        "noise": 0.5,
        "option_mass": 0.9,
        "fault_rate": 0.0,
        "delay_s": 0.0,
        "seed": 7,
    }


def samples(seed: int, max_new_tokens: int = 50) -> list[Sampled]:
    requests = [
        SampleRequest(({"role": "user", "content": "Tell me"},), max_new_tokens, seed=number) for number in range(40)
    ]
    results = [result for _, result in ScriptedEngine(ScriptedConfig(), seed).sample(requests)]
    return [result for result in results if isinstance(result, Sampled)]


def test_samples_are_repeatable_and_vary() -> None:
    texts = [sample.text for sample in samples(1)]
    assert texts == [sample.text for sample in samples(1)]
    assert texts != [sample.text for sample in samples(2)]
    assert len(set(texts)) > 30
    assert all(sample.finish_reason == "stop" and sample.text.endswith(".") for sample in samples(1))


def test_samples_are_cut_at_the_limit() -> None:
    for sample in samples(1, max_new_tokens=2):
        assert (sample.finish_reason, sample.tokens, len(sample.text.split())) == ("length", 2, 2)
