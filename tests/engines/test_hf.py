"""The in-process engine on the tiny model, against plain computations."""

from __future__ import annotations

import pytest
import torch

from rlaif.chat import encode_chat, encode_text
from rlaif.config import LabelerConfig, LabelerType, ModelConfig
from rlaif.engines import build_labeler
from rlaif.engines.base import (
    CompletionRequest,
    Failure,
    Likelihood,
    OptionMass,
    OptionRequest,
    Sampled,
    SampleRequest,
)
from rlaif.engines.hf import HFEngine
from rlaif.records import UserError


@pytest.fixture(scope="module")
def engine() -> HFEngine:
    return HFEngine(ModelConfig(name="tiny", device="cpu"), batch_size=4, batch_tokens=200)


def request(text: str, *options: tuple[str, ...], stem: str = "") -> OptionRequest:
    return OptionRequest(({"role": "user", "content": text},), options, stem)


def test_option_mass_is_the_sum_over_spellings_including_long_ones(engine: HFEngine) -> None:
    # The tiny tokenizer has one token per byte, so "at" takes two forward passes.
    requests = [request("x" * size, ("a", "bt", "a"), ("b",), stem="so ") for size in (1, 30, 7)]
    results = dict(engine.score_options(requests))
    for index, asked in enumerate(requests):
        ids = encode_chat(engine.tokenizer, asked.messages, asked.stem)
        with torch.no_grad():
            first = engine.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
            b = engine.tokenizer.convert_tokens_to_ids("b")
            second = engine.model(torch.tensor([[*ids, b]])).logits[0, -1].softmax(-1)
        a, t = engine.tokenizer.convert_tokens_to_ids(["a", "t"])
        result = results[index]
        assert isinstance(result, OptionMass)
        expected = float(first[a]) + (float(first[b] * second[t]) if first[b] > 1e-3 else 0.0)
        assert result.masses == pytest.approx((expected, float(first[b])), abs=1e-5)
        assert result.method == "logprob"


def test_a_spelling_that_starts_with_another_adds_no_mass(engine: HFEngine) -> None:
    plain, doubled = (
        dict(engine.score_options([request("q", options, ("z",))]))[0] for options in (("a",), ("a", "ab", "abc"))
    )
    assert isinstance(plain, OptionMass)
    assert isinstance(doubled, OptionMass)
    assert plain.masses == doubled.masses


def test_what_goes_on_to_be_another_option_is_not_counted_twice(engine: HFEngine) -> None:
    # "10" is two tokens here, and begins with "1".
    numbers = tuple((str(number),) for number in range(1, 11))
    requests = [request("x" * size, *numbers, stem="I give it a ") for size in (3, 40)]
    results = dict(engine.score_options(requests))
    for index, asked in enumerate(requests):
        ids = encode_chat(engine.tokenizer, asked.messages, asked.stem)
        one, nought = engine.tokenizer.convert_tokens_to_ids(["1", "0"])
        with torch.no_grad():
            first = engine.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
            second = engine.model(torch.tensor([[*ids, one]])).logits[0, -1].softmax(-1)
        assert float(first[one]) > 1e-3
        ten = float(first[one] * second[nought])
        result = results[index]
        assert isinstance(result, OptionMass)
        assert result.masses[0] == pytest.approx(float(first[one]) - ten, abs=1e-6)
        assert result.masses[9] == pytest.approx(ten, abs=1e-6)
        assert sum(mass or 0.0 for mass in result.masses[1:9]) == pytest.approx(
            float(sum(first[engine.tokenizer.convert_tokens_to_ids(str(n))] for n in range(2, 10))), abs=1e-6
        )


def test_the_likelihood_of_a_completion_is_that_of_its_tokens(engine: HFEngine) -> None:
    texts = ["yes", "", "a much longer completion than the others", "<s>no</s>"]
    messages = [({"role": "user", "content": "q" * size},) for size in (3, 30, 9, 60)]
    requests = [CompletionRequest(asked, text) for asked, text in zip(messages, texts, strict=True)]
    results = dict(engine.score_completions(requests))
    for index, asked in enumerate(requests):
        prompt, tokens = encode_chat(engine.tokenizer, asked.messages), encode_text(engine.tokenizer, asked.completion)
        with torch.no_grad():
            logps = engine.model(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
        total = sum(float(logps[len(prompt) + place - 1, token]) for place, token in enumerate(tokens))
        result = results[index]
        assert isinstance(result, Likelihood)
        assert result.logp == pytest.approx(total, abs=1e-4)
        assert (result.tokens, result.prompt_tokens) == (len(tokens), len(prompt))
    # Nothing but empty completions is a batch too.
    [(_, empty)] = engine.score_completions([CompletionRequest(messages[0], "")])
    assert isinstance(empty, Likelihood)
    assert (empty.logp, empty.tokens) == (0.0, 0)


def test_samples_do_not_depend_on_batch_or_order(engine: HFEngine) -> None:
    requests = [SampleRequest(({"role": "user", "content": "y" * i},), 8, seed=i) for i in range(1, 11)]
    together = dict(engine.sample(requests))
    alone = [dict(engine.sample([one]))[0] for one in requests]
    assert [together[i] for i in range(10)] == alone
    assert all(isinstance(result, Sampled) and 1 <= result.tokens <= 8 for result in alone)


def test_a_prompt_beyond_the_context_fails_alone(engine: HFEngine) -> None:
    # One token per byte: find the text that leaves room for the longer option ("bt") and not one token more.
    limit = engine.model.config.max_position_embeddings
    frame = len(encode_chat(engine.tokenizer, request("").messages))
    fits, beyond = limit - frame - 2, limit - frame - 1
    asked = [request("x" * size, ("a", "bt"), ("b",)) for size in (5, 100_000, fits, beyond)]
    results = dict(engine.score_options(asked))
    assert isinstance(results[0], OptionMass)
    assert isinstance(results[2], OptionMass)
    assert results[1] == Failure("too_long", f"{100_000 + frame} tokens, and the model takes {limit}")
    assert results[3] == Failure("too_long", f"{limit - 1} tokens, and the model takes {limit}")


def test_a_completion_ends_where_the_context_does(engine: HFEngine) -> None:
    limit = engine.model.config.max_position_embeddings
    frame = len(encode_chat(engine.tokenizer, request("").messages))
    asked = [
        SampleRequest(({"role": "user", "content": "x" * size},), 8, seed=3)
        for size in (5, limit - frame - 2, limit - frame)
    ]
    results = dict(engine.sample(asked))
    assert isinstance(results[0], Sampled)
    assert isinstance(results[1], Sampled)
    assert results[1].tokens <= 2
    assert results[2] == Failure("too_long", f"{limit} tokens, and the model takes {limit}")


def test_labeler_from_config_names_what_decides_its_answers() -> None:
    with build_labeler(LabelerConfig(type=LabelerType.hf, model="tiny", device="cpu"), seed=0) as labeler:
        assert labeler.name == "tiny"
        assert labeler.identity["engine"] == "hf"
        assert {"model", "revision", "dtype", "template"} <= set(labeler.identity)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LabelerConfig(), "labeler is not set"),
        (LabelerConfig(type=LabelerType.hf), "labeler.model is not set"),
        (LabelerConfig(type=LabelerType.hf, model="no/such-folder/here"), "labeler.model=no/such-folder/here"),
        (LabelerConfig(type=LabelerType.hf, model="tiny", device="cuda:99"), "device=cuda:99"),
    ],
)
def test_a_labeler_that_cannot_be_built_says_why(config: LabelerConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_labeler(config, seed=0)
