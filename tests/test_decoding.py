"""A cache that is not copied, and heads that are not repeated, give the states that transformers' own give."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlaif.config import ModelConfig
from rlaif.decoding import RoomyLayer, _attend, grouped_heads, with_room
from rlaif.generation import generate
from rlaif.models import load_causal_lm

ROWS, HEADS, SIZE = 3, 2, 4
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def states(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, ROWS, HEADS, tokens, SIZE, generator=generator)
    return first, second


@pytest.mark.parametrize("room", [1, 3, 100])
def test_a_layer_with_room_holds_what_a_plain_one_does(room):
    plain, start = DynamicLayer(), DynamicLayer()
    for layer in (plain, start):
        layer.update(*states(5, 0))
    roomy = RoomyLayer(start, room)
    assert roomy.get_seq_length() == 5
    for step in range(6):
        if step in (0, 3):
            for layer in (plain, roomy):
                layer.batch_select_indices(torch.tensor([2, 0] if step == 0 else [1]))
        new = [each[: plain.keys.shape[0]] for each in states(1 + step % 2, step)]
        for one, other in zip(plain.update(*new), roomy.update(*new), strict=True):
            assert torch.equal(one, other)
        assert plain.get_seq_length() == roomy.get_seq_length()


def test_a_step_writes_in_place_and_leaves_what_is_shared_alone():
    shared = torch.zeros(1, HEADS, 5, SIZE)
    layer = DynamicLayer()
    layer.lazy_initialization(shared, shared)
    layer.keys = layer.values = shared.expand(ROWS, -1, -1, -1)
    cache = DynamicCache()
    cache.layers = [layer]
    (roomy,) = with_room(cache, 4).layers
    first, _ = roomy.update(*states(1, 1))
    again, _ = roomy.update(*states(1, 2))
    assert first.data_ptr() == again.data_ptr()
    assert (shared == 0).all()


def test_other_caches_are_left_as_they_are():
    other = object()
    assert with_room(other, 3) is other


def test_heads_that_share_keys_are_not_given_copies_of_them(monkeypatch):
    model = load_causal_lm(ModelConfig(name="tiny", device="cpu"))
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads
    heads = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *arguments, **settings):
        heads.append((query.shape[2], key.shape[1]))
        return attend(query, key, *arguments, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    generate(model, PROMPTS, [(row, 1) for row in range(3)], max_new_tokens=3, temperature=1.0, eos=[], pad=0)
    grouped = (config.num_attention_heads // config.num_key_value_heads, config.num_key_value_heads)
    assert heads[-2 * config.num_hidden_layers :] == [grouped] * 2 * config.num_hidden_layers


@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("width", [1, 3])
def test_any_mask_is_that_of_transformers_own(heads, width):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, width, 4, generator=generator)
    key, value = torch.randn(2, 3, 2, 7, 4, generator=generator)
    mask = torch.rand(3, heads, width, 7, generator=generator) < 0.7
    mask[..., 0] = True
    module = SimpleNamespace(num_key_value_groups=3)
    (found, _), (expected, _) = (
        function(module, query, key, value, mask, scaling=0.3) for function in (_attend, sdpa_attention_forward)
    )
    torch.testing.assert_close(found, expected)


def test_attention_is_put_back_after_an_error():
    model = load_causal_lm(ModelConfig(name="tiny", device="cpu"))
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(KeyError), grouped_heads(model):
        raise KeyError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_what_has_ended_needs_no_further_positions():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=18, n_embd=16, n_layer=1, n_head=2)).eval()
    prompts = [list(range(15)), *([row] for row in range(11))]
    settings = {"max_new_tokens": 12, "temperature": 1.0, "pad": 0}
    seeds = [(row, 1) for row in range(12)]
    (first,) = generate(model, prompts[:1], seeds[:1], eos=[], **settings | {"max_new_tokens": 1})
    found = generate(model, prompts, seeds, eos=first.tokens, **settings)
    assert found[0].tokens == first.tokens
    assert max(len(one.tokens) for one in found) == 12


def test_rows_that_have_ended_stay_a_while_and_change_nothing():
    model = load_causal_lm(ModelConfig(name="tiny", device="cpu"))
    prompts = [[5 + row, 6, 7][: 1 + row % 3] for row in range(20)]
    ends = list(range(0, 257, 6))  # about one token in six

    def sample(rows):
        seeds = [(row, 1) for row in rows]
        settings = {"max_new_tokens": 12, "temperature": 1.0, "eos": ends, "pad": 0}
        return generate(model, [prompts[row] for row in rows], seeds, **settings)

    together = sample(range(20))
    assert len({len(one.tokens) for one in together}) > 4
    for row, found in enumerate(together):
        (alone,) = sample([row])
        assert (found.tokens, found.ended) == (alone.tokens, alone.ended)
        assert found.logps == pytest.approx(alone.logps, abs=1e-4)
        assert found.ended == (found.tokens[-1] in ends)
        assert not set(found.tokens[:-1]) & set(ends)
