"""What the frozen layers give is computed once, and changes no number."""

from __future__ import annotations

import pytest
import torch

from rlaif.config import LoraSettings, ModelConfig, Tuning
from rlaif.policy import completion_logits, load_policy, pack
from rlaif.trunk import frozen_layers, starting_at, with_trunk
from tests.adapters import fill

TINY = ModelConfig(name="tiny", device="cpu")
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
COMPLETIONS = [[20], [21, 22, 23, 24], [25, 26]]


def policy_of(top_layers: float, tuning: Tuning = Tuning.lora, **settings: object):
    policy = load_policy(TINY, tuning, LoraSettings(r=4, alpha=8, top_layers=top_layers, **settings))  # type: ignore[arg-type]
    fill(policy.trainable())
    return policy


def batch():
    return pack(PROMPTS, COMPLETIONS, 256, torch.device("cpu"))


PARTS = [torch.tensor([1, 0]), torch.tensor([2])]


def test_passes_from_the_trunk_give_the_same_logits_and_gradients():
    policy = policy_of(0.5)
    assert len(frozen_layers(policy.model)) == 1
    whole, cut = batch(), with_trunk(policy.model, batch(), PARTS)
    assert cut.trunk.shape == (*whole.ids.shape, 48)

    def gradients(packed):
        rows = torch.tensor([2, 0])
        part = packed.select(rows)
        logits = completion_logits(policy.model, part)
        policy.model.zero_grad()
        (torch.log_softmax(logits, -1)[..., 7] * part.completion_mask).sum().backward()
        return logits.detach(), {name: value.grad.clone() for name, value in policy.trainable()}

    (logits, expected), (again, found) = gradients(whole), gradients(cut)
    mask = whole.select(torch.tensor([2, 0])).completion_mask.bool()
    torch.testing.assert_close(logits[mask], again[mask], rtol=1e-4, atol=1e-4)
    for name in expected:
        torch.testing.assert_close(expected[name], found[name], rtol=1e-3, atol=1e-4)

    everywhere = whole.completion_mask.bool()
    with policy.reference() as reference, torch.no_grad():
        one, other = (completion_logits(reference, packed)[everywhere] for packed in (whole, cut))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_frozen_layers_really_are_skipped_and_put_back():
    policy = policy_of(0.5)
    cut = with_trunk(policy.model, batch(), PARTS)
    calls = []
    handle = frozen_layers(policy.model)[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    completion_logits(policy.model, cut)
    with policy.reference() as reference:
        completion_logits(reference, cut)
    assert not calls
    completion_logits(policy.model, batch())
    assert calls
    handle.remove()
    with pytest.raises(KeyError), starting_at(policy.model, cut.trunk, cut.trunk_layers):
        raise KeyError
    assert all("forward" not in vars(layer) for layer in frozen_layers(policy.model))


@pytest.mark.parametrize(
    ("top_layers", "tuning", "settings"),
    [
        (1.0, Tuning.lora, {}),
        (0.5, Tuning.full, {}),
        (1.0, Tuning.lora, {"target_modules": ["embed_tokens", "q_proj"]}),
    ],
)
def test_nothing_is_kept_where_the_first_layer_trains(top_layers, tuning, settings):
    policy = policy_of(top_layers, tuning, **settings)
    assert with_trunk(policy.model, batch(), PARTS).trunk is None
