"""What all rows begin with is read once, and no number changes by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlaif.config import LoraSettings, ModelConfig, Tuning
from rlaif.generation import generate, left_pad
from rlaif.models import load_causal_lm, load_sequence_scorer
from rlaif.policy import completion_logits, completion_states, load_policy, pack
from rlaif.preference_model import last_hidden, training_scores
from rlaif.prefix import _SHORTEST, positions_after, shareable, split_prefix
from rlaif.trunk import with_trunk
from tests.adapters import fill

TINY = ModelConfig(name="tiny", device="cpu")
CPU = torch.device("cpu")
SYSTEM = list(range(40, 52))
PROMPTS = [[*SYSTEM, 5, 6, 7], [*SYSTEM, 8], [*SYSTEM, 9, 10, 11, 12, 13]]
COMPLETIONS = [[20], [21, 22, 23, 24], [25, 26]]


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1))
def test_prefix_and_rest_are_the_rows(start, ends):
    rows = [[*start, *end, 9] for end in ends]
    prefix, rest = split_prefix(rows)
    assert [[*prefix, *row] for row in rest] == rows
    assert all(rest)
    if prefix:
        assert len(prefix) >= _SHORTEST
        # No longer one would do, but for the last token of a row.
        assert len({row[0] for row in rest}) > 1 or min(map(len, rest)) == 1
    elif len(rows) > 1:
        assert len(start) < _SHORTEST or min(map(len, rows)) <= _SHORTEST


def policy_of(tuning: Tuning, top_layers: float = 1.0):
    policy = load_policy(TINY, tuning, LoraSettings(r=4, alpha=8, top_layers=top_layers))
    fill(policy.trainable())
    return policy


@pytest.mark.parametrize("read", [completion_logits, completion_states])
@pytest.mark.parametrize(
    ("tuning", "top_layers"), [(Tuning.lora, 1.0), (Tuning.lora, 0.5), (Tuning.full, 1.0)], ids=["lora", "top", "full"]
)
def test_a_shared_prefix_changes_neither_figures_nor_gradients(tuning, top_layers, read):
    policy = policy_of(tuning, top_layers)
    assert shareable(policy.model)
    alone, shared = (pack(PROMPTS, COMPLETIONS, 256, CPU, share) for share in (False, True))
    assert shared.prefix.tolist() == SYSTEM
    assert shared.ids.shape[1] == alone.ids.shape[1] - len(SYSTEM)
    parts = [torch.tensor([1, 0]), torch.tensor([2])]
    rows = torch.tensor([2, 0])

    def gradients(batch):
        part = with_trunk(policy.model, batch, parts).select(rows)
        assert (part.trunk is not None) == (top_layers < 1)
        found = read(policy.model, part)
        policy.model.zero_grad()
        (torch.log_softmax(found, -1)[..., 7] * part.completion_mask).sum().backward()
        return found.detach(), {
            name: value.grad.clone() for name, value in policy.trainable() if value.grad is not None
        }

    (expected, slopes), (found, again) = gradients(alone), gradients(shared)
    real = alone.select(rows).completion_mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    assert again.keys() == slopes.keys()
    assert sum(float(value.abs().sum()) for value in slopes.values()) > 0
    for name, slope in slopes.items():
        torch.testing.assert_close(again[name], slope, rtol=1e-3, atol=1e-4)


def test_the_whole_of_a_shared_batch_is_the_batch():
    alone, shared = (pack(PROMPTS, COMPLETIONS, 256, CPU, share) for share in (False, True))
    again = shared.whole()
    assert again.prefix is None
    assert again.ids.tolist() == alone.ids.tolist()
    assert again.mask.tolist() == alone.mask.tolist()
    for row in range(3):
        for name in ("ids", "positions"):
            expected, found = (getattr(batch, name)[row][batch.mask[row].bool()] for batch in (alone, again))
            assert found.tolist() == expected.tolist()


def test_the_prefix_is_read_once():
    model = load_causal_lm(TINY)
    seen: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    for share in (False, True):
        seen.clear()
        batch = pack(PROMPTS, COMPLETIONS, 256, CPU, share)
        completion_logits(model, batch)
        assert sum(seen) == (batch.ids.numel() if not share else batch.ids.numel() + len(SYSTEM))
    handle.remove()
    assert batch.ids.numel() == 3 * 9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_does_not_depend_on_what_its_batch_shares(temperature):
    model = load_causal_lm(TINY)
    settings = {"max_new_tokens": 12, "temperature": temperature, "eos": [258, 3, 4], "pad": 256}
    seeds = [(1, row) for row in range(len(PROMPTS))]
    together = generate(model, PROMPTS, seeds, **settings)
    for prompt, seed, found in zip(PROMPTS, seeds, together, strict=True):
        [alone] = generate(model, [prompt], [seed], **settings)
        assert found.tokens == alone.tokens
        assert found.logps == pytest.approx(alone.logps, abs=1e-4)


def test_scores_and_their_gradients():
    model = load_sequence_scorer(TINY, new_head=True)
    model.config.pad_token_id = 256
    whole, mask = left_pad(PROMPTS, 256, CPU)
    prefix, rest = split_prefix(PROMPTS)
    ids, short = left_pad(rest, 256, CPU)
    before = torch.tensor(prefix)
    assert prefix == SYSTEM
    with torch.no_grad():
        torch.testing.assert_close(
            last_hidden(model, ids, short, before), last_hidden(model, whole, mask), rtol=1e-4, atol=1e-4
        )
    slopes = []
    for asked in (
        (whole, mask, positions_after(None, mask)),
        (ids, short, positions_after(before, short), before),
    ):
        model.zero_grad()
        training_scores(model, *asked)[0, -1].backward()
        slopes.append({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})
    assert slopes[0].keys() == slopes[1].keys()
    for name, slope in slopes[0].items():
        torch.testing.assert_close(slopes[1][name], slope, rtol=1e-3, atol=1e-5)


def test_models_whose_attention_ends_are_read_whole():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    assert not shareable(MistralForCausalLM(MistralConfig(**sizes, sliding_window=64)))
    assert shareable(MistralForCausalLM(MistralConfig(**sizes, sliding_window=None)))


def test_a_model_that_takes_no_cache_as_it_should_is_read_whole(monkeypatch):
    monkeypatch.setattr("rlaif.prefix._SHAREABLE", {})
    model = load_causal_lm(TINY)
    forward = model.base_model.forward

    def forgetful(past_key_values=None, **arguments):
        if past_key_values is not None and past_key_values.get_seq_length():
            arguments["attention_mask"] = arguments["attention_mask"][:, -arguments["input_ids"].shape[1] :]
            past_key_values = None
        return forward(past_key_values=past_key_values, **arguments)

    monkeypatch.setattr(model.base_model, "forward", forgetful)
    assert not shareable(model)
