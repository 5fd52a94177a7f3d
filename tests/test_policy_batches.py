"""Packing changes no number, and merging adapters leaves no trace."""

import dataclasses

import pytest
import torch

from rlaif import models
from rlaif.config import Dtype, LoraSettings, ModelConfig, Tuning
from rlaif.generation import head_inputs
from rlaif.losses import token_logps
from rlaif.models import load_causal_lm
from rlaif.policy import completion_logits, completion_logps, load_policy, merged, pack
from tests.adapters import fill

CPU = torch.device("cpu")
TINY = ModelConfig(name="tiny", device="cpu")
PAD = 256
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
COMPLETIONS = [[20], [21, 22, 23, 24], [25, 26]]


@pytest.fixture(scope="module")
def base():
    return load_causal_lm(TINY)


@pytest.fixture
def policy():
    """A LoRA policy whose adapter does something."""
    policy = load_policy(TINY, Tuning.lora, LoraSettings(r=4, alpha=8))
    fill(policy.trainable())
    return policy


def logits_of(model):
    with torch.inference_mode():
        return completion_logits(model, pack(PROMPTS, COMPLETIONS, PAD, CPU))


def test_pack():
    batch = pack(PROMPTS, COMPLETIONS, PAD, CPU)
    assert len(batch) == 3
    assert batch.ids.tolist() == [
        [PAD, PAD, 5, 6, 7, 20, PAD, PAD, PAD],
        [PAD, PAD, PAD, PAD, 8, 21, 22, 23, 24],
        [9, 10, 11, 12, 13, 25, 26, PAD, PAD],
    ]
    assert batch.mask.tolist() == [
        [0, 0, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 0, 0],
    ]
    assert batch.tokens.tolist() == [[20, PAD, PAD, PAD], [21, 22, 23, 24], [25, 26, PAD, PAD]]
    assert batch.completion_mask.tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.completion_mask.is_floating_point()
    # The first real token is at position 0, whatever stands before it.
    assert [row[m.bool()].tolist() for row, m in zip(batch.positions, batch.mask, strict=True)] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5, 6],
    ]


@pytest.mark.parametrize("rows", [[0], [1], [2], [0, 1], [1, 0], [2, 0], [0, 1, 2]])
def test_select_equals_packing_those_rows(rows):
    chosen = pack(PROMPTS, COMPLETIONS, PAD, CPU).select(torch.tensor(rows))
    expected = pack([PROMPTS[i] for i in rows], [COMPLETIONS[i] for i in rows], PAD, CPU)
    for name in ("ids", "mask", "tokens", "completion_mask"):
        assert getattr(chosen, name).tolist() == getattr(expected, name).tolist(), name
    real = expected.mask.bool()
    assert chosen.positions[real].tolist() == expected.positions[real].tolist()


def one_by_one(model, temperature):
    result = []
    with torch.inference_mode():
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            logps = torch.log_softmax(logits / temperature, -1)
            result.append([float(row[token]) for row, token in zip(logps, completion, strict=True)])
    return result


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_completion_logps_equal_the_unpadded_ones(base, temperature, batch_size):
    found = completion_logps(base, PROMPTS, COMPLETIONS, PAD, batch_size, temperature)
    for row, expected in zip(found, one_by_one(base, temperature), strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


def test_an_empty_completion_has_no_logps(base):
    assert completion_logps(base, [[5], [6]], [[], [7]], PAD)[0] == []


def test_select_changes_no_logps(base):
    batch = pack(PROMPTS, COMPLETIONS, PAD, CPU)
    with torch.inference_mode():
        whole = token_logps(completion_logits(base, batch), batch.tokens)
        part = batch.select(torch.tensor([2, 0]))
        chosen = token_logps(completion_logits(base, part), part.tokens)
    torch.testing.assert_close(chosen[0, :2], whole[2, :2], atol=1e-4, rtol=0)
    torch.testing.assert_close(chosen[1, :1], whole[0, :1], atol=1e-4, rtol=0)


def test_a_fresh_adapter_changes_nothing(base):
    fresh = load_policy(TINY, Tuning.lora, LoraSettings(r=4, alpha=8))
    torch.testing.assert_close(logits_of(fresh.model), logits_of(base), atol=0, rtol=0)


def test_the_reference_is_the_base(base, policy):
    before = logits_of(policy.model)
    assert (before - logits_of(base)).abs().max() > 0.1
    with policy.reference() as reference:
        torch.testing.assert_close(logits_of(reference), logits_of(base), atol=0, rtol=0)
    torch.testing.assert_close(logits_of(policy.model), before, atol=0, rtol=0)


def test_the_reference_of_full_tuning_is_a_frozen_copy(base):
    full = load_policy(TINY, Tuning.full, LoraSettings())
    with torch.no_grad():
        for _, value in full.trainable():
            value.add_(0.01)
    with full.reference() as reference:
        torch.testing.assert_close(logits_of(reference), logits_of(base), atol=0, rtol=0)
        assert not any(value.requires_grad for value in reference.parameters())
    assert not torch.equal(logits_of(full.model), logits_of(base))


def test_the_frozen_copy_is_as_small_as_the_device_allows(monkeypatch):
    """Where ``auto`` means bfloat16 (a GPU), only the weights that train are float32."""
    plain = models.pick_dtype
    monkeypatch.setattr(
        models, "pick_dtype", lambda dtype, device: torch.bfloat16 if dtype is Dtype.auto else plain(dtype, device)
    )
    full = load_policy(TINY, Tuning.full, LoraSettings())
    assert {value.dtype for value in full.model.parameters()} == {torch.float32}
    assert {value.dtype for value in full.frozen.parameters()} == {torch.bfloat16}


def test_merged_gives_the_adapters_logits_and_puts_every_bit_back(policy):
    weights = {name: value.detach().clone() for name, value in policy.model.named_parameters()}
    wanted = logits_of(policy.model)
    for _ in range(100):
        with merged(policy.model):
            pass
    with merged(policy.model) as model:
        torch.testing.assert_close(logits_of(model), wanted, atol=1e-4, rtol=0)
    with pytest.raises(RuntimeError), merged(policy.model):
        raise RuntimeError("while sampling")
    assert torch.equal(logits_of(policy.model), wanted)
    for name, value in policy.model.named_parameters():
        assert torch.equal(value, weights[name]), name


def test_a_sampler_in_a_short_float_keeps_an_update_finer_than_its_weights():
    """Rounded into bfloat16 weights, most of this update would be gone, and the sampler would be another policy."""
    config = dataclasses.replace(TINY, dtype=Dtype.bfloat16)
    policy, base = load_policy(config, Tuning.lora, LoraSettings(r=4, alpha=8)), load_causal_lm(config)
    with torch.no_grad():
        for name, value in policy.trainable():
            if "lora_B" in name:
                value.fill_(1e-3)
    with merged(policy.model) as sampler:
        found = logits_of(sampler)
    assert torch.equal(found, logits_of(policy.model))
    assert not torch.equal(found, logits_of(base))


def test_merged_keeps_what_is_trained(policy):
    names = [name for name, _ in policy.trainable()]
    with merged(policy.model):
        pass
    assert [name for name, _ in policy.trainable()] == names
    assert names
    assert all("lora_" in name for name in names)


def test_merged_without_an_adapter_is_the_model(base):
    with merged(base) as model:
        assert model is base


def test_head_inputs_are_what_the_head_reads(base):
    batch = pack(PROMPTS, COMPLETIONS, PAD, CPU)
    before = dict(base.get_output_embeddings()._forward_pre_hooks)
    with torch.inference_mode(), head_inputs(base) as caught:
        logits = completion_logits(base, batch)
        again = base.get_output_embeddings()(caught())[:, :-1]
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=0)
    assert dict(base.get_output_embeddings()._forward_pre_hooks) == before
