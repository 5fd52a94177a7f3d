"""Rows behind each other get the states, and give the gradients, of rows side by side."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.attention import LONGEST
from rlaif.config import Dtype, LoraSettings, ModelConfig, Tuning
from rlaif.in_line import _STEP, Line, in_line, read_in_line
from rlaif.models import load_causal_lm
from rlaif.policy import completion_states, load_policy, pack
from rlaif.prefix import positions_after
from rlaif.trunk import with_trunk
from tests.adapters import fill
from tests.methods.families import FAMILIES, family

TINY = ModelConfig(name="tiny", device="cpu")
CPU = torch.device("cpu")
BESIDE = ("mistral", "gemma2", "gemma3_text", "bloom")
"""Families that keep their rows side by side: their attention ends at a distance, or is biased by column."""
PREFIX = torch.arange(40, 52)
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
IDS = torch.tensor([[256, 256, 5, 6, 7], [8, 9, 10, 11, 12], [256, 13, 14, 256, 256]])


def side_by_side(backbone, prefix, ids, mask):
    """Whole rows, with the prefix in each."""
    before = prefix.expand(len(ids), -1)
    mask = torch.cat([torch.ones_like(before), mask], dim=1)
    out = backbone(
        input_ids=torch.cat([before, ids], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
    )
    return out[0][:, len(prefix) :]


def states_and_gradients(model, states, mask):
    real = states[mask.bool()]
    weights = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    (real * weights).sum().backward()
    return real.detach(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("prefix", [PREFIX, PREFIX[:0]], ids=["prefix", "none"])
def test_states_and_gradients_are_those_of_whole_rows(prefix):
    model = load_causal_lm(TINY, trainable=True)
    assert in_line(model, 17)
    line = Line(prefix, MASK)
    expected, slopes = states_and_gradients(model, side_by_side(model.base_model, prefix, IDS, MASK), MASK)
    states = read_in_line(model.base_model, line, IDS, positions_after(prefix, MASK))
    found, again = states_and_gradients(model, states, MASK)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert again.keys() == slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(again[name], slope, rtol=1e-3, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=6),
    st.integers(0, 20),
)
def test_whatever_the_lengths(rows, own):
    width = max(left + count for left, count in rows)
    mask = torch.tensor([[0] * left + [1] * count + [0] * (width - left - count) for left, count in rows])
    ids = torch.randint(0, 250, mask.shape, generator=torch.Generator().manual_seed(width))
    prefix = PREFIX.repeat(2)[:own]
    model = load_causal_lm(TINY)
    line = Line(prefix, mask)
    assert line.end == own + int(mask.sum())
    assert line.tokens % _STEP == 0
    assert 0 <= line.tokens - line.end < _STEP
    with torch.no_grad():
        found = read_in_line(model.base_model, line, ids, positions_after(prefix, mask))
        expected = side_by_side(model.base_model, prefix, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


def test_a_row_sees_no_other():
    """Changed tokens of one row change nothing in the others, forward or backward."""
    model = load_causal_lm(TINY)
    changed = IDS.clone()
    changed[1] += 100
    embedded = []
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: embedded.append(out.requires_grad_()))
    line = Line(PREFIX, MASK)
    one, other = (read_in_line(model.base_model, line, ids, positions_after(PREFIX, MASK)) for ids in (IDS, changed))
    rows = torch.tensor([0, 2])
    assert torch.equal(one[rows][MASK[rows].bool()], other[rows][MASK[rows].bool()])
    (slope,) = torch.autograd.grad(one[0, 2:].sum(), embedded[0])
    touched = slope[0].abs().sum(dim=1) > 0
    # The prefix and the first row, whose three tokens stand after it.
    assert touched.nonzero().flatten().tolist() == [*range(len(PREFIX)), *range(len(PREFIX), len(PREFIX) + 3)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_in_line_alike_or_not_at_all(name, tmp_path):
    model = load_causal_lm(ModelConfig(name=str(family(name, tmp_path)), device="cpu"))
    assert in_line(model, 17) == (name not in BESIDE)
    if name not in BESIDE:
        with torch.no_grad():
            found = read_in_line(model.base_model, Line(PREFIX, MASK), IDS % 250, positions_after(PREFIX, MASK))
            expected = side_by_side(model.base_model, PREFIX, IDS % 250, MASK)
        torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-5)


def test_a_batch_is_read_in_line_only_where_rows_are_short():
    policy = load_policy(TINY, Tuning.lora, LoraSettings(r=4, alpha=8))
    assert in_line(policy.model, 17)
    seen: list[int] = []
    policy.model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    prompts = [[*PREFIX.tolist(), 5, 6, 7], [*PREFIX.tolist(), 8]]
    for length, passes in ((4, [1]), (LONGEST, [1, 2])):
        seen.clear()
        completion_states(policy.model, pack(prompts, [[20] * length, [21, 22]], 256, CPU, True))
        assert seen == passes
    seen.clear()
    completion_states(policy.model, pack(prompts, [[20], [21, 22]], 256, CPU, False))
    assert seen == [2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("top_layers", [1.0, 0.5])
def test_a_policys_states_and_gradients_in_any_precision(dtype, top_layers):
    """Also above a trunk, with a completion of no token, and as part of a batch."""
    precision = "bfloat16" if dtype == "bfloat16" else "float32"
    tuning = Tuning.full if dtype == "autocast" else Tuning.lora
    torch.manual_seed(0)
    start = ModelConfig(name="tiny", device="cpu", dtype=Dtype(precision))
    policy = load_policy(start, tuning, LoraSettings(r=4, alpha=8, top_layers=top_layers))
    fill(policy.trainable(), 0.2)
    prompts = [[*PREFIX.tolist(), *rest] for rest in ([5, 6, 7], [8], [9, 10, 11, 12], [13, 14])]
    batch = pack(prompts, [[20, 21, 22], [], [23], [24, 25]], 256, CPU, True)
    rows = torch.tensor([0, 1, 2])
    batch = with_trunk(policy.model, batch, [torch.arange(4)])
    found = []
    for part in (batch.select(rows), dataclasses.replace(batch.select(rows), in_line=False)):
        policy.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            states = completion_states(policy.model, part)
        real = states[part.completion_mask.bool()].float()
        (real * torch.linspace(-1, 1, real.shape[-1])).sum().backward()
        gradients = {name: value.grad for name, value in policy.trainable() if value.grad is not None}
        found.append((real.detach(), gradients))
    (one, slopes), (other, again) = found
    bound = 1e-5 if dtype == "float32" else 0.03
    assert (one - other).norm() <= bound * other.norm()
    assert slopes.keys() == again.keys()
    # Of all weights together: single small ones are mostly rounding in bfloat16.
    (one, other) = (torch.cat([each[name].flatten() for name in again]) for each in (slopes, again))
    assert (one - other).norm() <= bound * other.norm()


def test_a_model_in_training_mode_is_read_side_by_side():
    model = load_causal_lm(TINY)
    assert in_line(model, 17)
    assert not in_line(model.train(), 17)
    assert in_line(model.eval(), 17)


def test_another_attention_is_left_alone():
    model = load_causal_lm(ModelConfig(name="tiny", device="cpu", attn_implementation="eager"))
    assert not in_line(model, 17)
