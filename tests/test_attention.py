"""Attention by plain products gives the numbers and gradients of transformers' own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlaif import attention
from rlaif.attention import _attend, plain_attention
from rlaif.config import ModelConfig
from rlaif.models import load_causal_lm

ROWS, HEADS, SHARED, SIZE = 3, 6, 2, 8
MODULE = SimpleNamespace(num_key_value_groups=HEADS // SHARED, is_causal=True)


def states(width: int, length: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(width * 100 + length)
    shapes = [(ROWS, HEADS, width, SIZE), (ROWS, SHARED, length, SIZE), (ROWS, SHARED, length, SIZE)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def results(function, inputs, mask, **settings):
    """Output and gradients."""
    output, _ = function(MODULE, *inputs, mask, scaling=0.3, **settings)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, weights)]


def seen(width: int, length: int, heads: int = 1) -> torch.Tensor:
    """A random mask in which every token sees the first."""
    mask = torch.rand(ROWS, heads, width, length, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize(("width", "length"), [(1, 7), (5, 5), (4, 9), (200, 200)])
@pytest.mark.parametrize("additive", [False, True])
def test_numbers_and_gradients_are_those_of_transformers(heads, width, length, additive):
    inputs, mask = states(width, length), seen(width, length, heads)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for found, expected in zip(
        results(_attend, inputs, mask), results(sdpa_attention_forward, inputs, mask), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize(("width", "length"), [(5, 5), (3, 7)])
def test_without_a_mask_the_module_says_whether_tokens_see_later_ones(is_causal, width, length):
    inputs = states(width, length)
    for found, expected in zip(
        results(_attend, inputs, None, is_causal=is_causal),
        results(sdpa_attention_forward, inputs, None, is_causal=is_causal),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_token_that_sees_nothing_spoils_nothing():
    inputs, mask = states(4, 4), seen(4, 4)
    mask[0, 0, 0] = False  # padding before a prompt
    output, _ = _attend(MODULE, *inputs, mask)
    output[1:].sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in inputs)
    assert not inputs[0].grad[0].any()


def test_gradients_in_bfloat16_are_closer_than_the_fused_kernels():
    mask = seen(40, 60)
    short = states(40, 60, torch.bfloat16)
    double = [each.detach().double().requires_grad_() for each in short]
    exact = results(sdpa_attention_forward, double, mask)

    def error(function):
        return [float((a.detach() - b.detach()).norm() / b.detach().norm()) for a, b in
                zip(results(function, short, mask), exact, strict=True)]  # fmt: skip

    ours, fused = error(_attend), error(sdpa_attention_forward)
    assert max(ours) < 5e-3
    assert sum(ours[1:]) < sum(fused[1:])


def test_autocast_decides_what_weights_of_values_are_computed_in():
    inputs, mask = states(5, 5), seen(5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (f(MODULE, *inputs, mask)[0] for f in (_attend, sdpa_attention_forward))
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_model_gives_the_same_logits_and_gradients(monkeypatch):
    model = load_causal_lm(ModelConfig(name="tiny", device="cpu"))
    ids = torch.arange(24).reshape(2, 12) % 250
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    calls = []
    apply = attention._Attention.apply
    monkeypatch.setattr(attention._Attention, "apply", lambda *given: calls.append(1) or apply(*given))

    def run():
        logits = model(input_ids=ids, attention_mask=mask).logits
        (gradient,) = torch.autograd.grad(logits[mask.bool()].square().sum(), weight)
        return logits[mask.bool()], gradient

    expected = run()
    assert not calls
    with plain_attention(model):
        found = run()
    assert len(calls) == model.config.num_hidden_layers
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_blocks_within_blocks_put_back_what_was_there():
    model = load_causal_lm(ModelConfig(name="tiny", device="cpu"))
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with plain_attention(model):
        with pytest.raises(KeyError), attention.attending_by(sdpa_attention_forward, model):
            raise KeyError
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is _attend
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
