"""The lean LoRA layer computes what PEFT's computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch.utils._python_dispatch import TorchDispatchMode

from rlaif.config import LoraSettings, ModelConfig, Tuning
from rlaif.lora import lean, product, rounded_once
from rlaif.models import load_causal_lm
from rlaif.policy import load_policy, merged
from tests.adapters import fill
from tests.methods.families import family

TINY = ModelConfig(name="tiny", device="cpu")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def filled(model: Any) -> Any:
    fill(model.named_parameters(), 0.2)
    return model


def peft_model(**settings: Any) -> Any:
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    return filled(get_peft_model(load_causal_lm(TINY), LoraConfig(r=4, lora_alpha=12, **settings)))


def run(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)  # of dropout
    logits = model(input_ids=IDS).logits
    logits.square().mean().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return logits.detach(), gradients


@pytest.mark.parametrize(
    ("settings", "training"),
    [
        ({}, False),
        ({"lora_dropout": 0.5}, False),
        ({"lora_dropout": 0.5}, True),
        ({"lora_bias": True}, False),
        ({"use_dora": True}, False),
        ({"use_rslora": True}, True),
    ],
)
def test_logits_and_gradients_are_those_of_peft(settings: dict[str, Any], training: bool) -> None:
    plain = peft_model(**settings).train(training)
    ours = lean(copy.deepcopy(plain))
    (expected, wanted), (found, gradients) = run(plain), run(ours)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert wanted.keys() == gradients.keys()
    for name in wanted:
        torch.testing.assert_close(gradients[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_beside_weights_of_16_bits_only_products_are_rounded() -> None:
    """Adapters and gradients stay float32; both are as near to float32's as PEFT's are."""
    exact = peft_model()
    plain = copy.deepcopy(exact)
    for name, parameter in plain.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    ours = lean(copy.deepcopy(plain))
    (truth, best), (expected, wanted), (found, gradients) = run(exact), run(plain), run(ours)
    assert found.dtype is torch.bfloat16
    assert all(gradient.dtype is torch.float32 for gradient in gradients.values())

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one.float() - other.float()).norm() / other.float().norm())

    assert distance(found, truth) < 1.5 * distance(expected, truth) < 0.05
    for name in best:
        assert distance(gradients[name], best[name]) < max(1.5 * distance(wanted[name], best[name]), 0.03)


def test_another_adapter_none_and_merged_ones() -> None:
    plain = peft_model()
    plain.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    filled(plain)
    ours = lean(copy.deepcopy(plain))
    for name in ("default", "other"):
        for model in (plain, ours):
            model.set_adapter(name)
        torch.testing.assert_close(run(ours)[0], run(plain)[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        with plain.disable_adapter(), ours.disable_adapter():
            assert torch.equal(ours(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        with merged(ours) as model:
            torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    folded = copy.deepcopy(ours).merge_and_unload()
    assert not any(isinstance(module, Linear) for module in folded.modules())
    torch.testing.assert_close(folded(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}],
    ids=["plain", "dora", "embeddings"],
)
@torch.no_grad()
def test_merged_for_a_while_or_left_beside_the_model_says_the_same(settings: dict[str, Any]) -> None:
    model = peft_model(**settings)
    expected = model(input_ids=IDS).logits
    with merged(model) as sampler:
        torch.testing.assert_close(sampler(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_a_copy_has_weights_of_its_own() -> None:
    ours = lean(peft_model())
    twin = copy.deepcopy(ours)
    before = ours(input_ids=IDS).logits
    with torch.no_grad():
        for name, value in twin.named_parameters():
            if "lora_B" in name:
                value.zero_()
    assert torch.equal(ours(input_ids=IDS).logits, before)
    assert not torch.allclose(twin(input_ids=IDS).logits, before)


def products_of(run: Callable[[], Any]) -> list[tuple[int, ...]]:
    """Shapes of the results of all products, by which anything is computed in the meantime."""
    shapes: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
            result = function(*arguments, **(settings or {}))
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                shapes.append(tuple(result.shape))
            return result

    with Watch():
        run()
    return shapes


def test_no_wide_product_is_made_beside_the_layers_own() -> None:
    policy = load_policy(TINY, Tuning.lora, LoraSettings(r=4, alpha=8))
    layer = next(module for module in policy.model.modules() if isinstance(module, Linear))
    x = torch.randn(2, 3, layer.in_features)
    wide = (6, layer.out_features)
    # The thin product, the layer's own, and the second factor's, which is added to it.
    assert products_of(lambda: layer(x)) == [(6, 4), wide, wide]
    # What does not train has no gradient made.
    result = layer(x)
    back = products_of(lambda: result.sum().backward())
    assert sorted(back) == sorted([(6, 4), (4, layer.in_features), (layer.out_features, 4)])


def test_what_others_have_wrapped_is_called() -> None:
    """Hooks on a factor or on the base, and another forward in place of the layer's own."""
    model = peft_model()
    layer = next(module for module in model.modules() if isinstance(module, Linear))
    x = torch.randn(2, 3, layer.in_features)
    calls: list[str] = []
    own = layer.forward
    layer.forward = lambda *arguments, **settings: (calls.append("forward"), own(*arguments, **settings))[1]
    lean(model)
    layer(x)
    assert calls == ["forward"]
    ours = lean(peft_model())
    layer = next(module for module in ours.modules() if isinstance(module, Linear))
    layer.base_layer.register_forward_hook(lambda *_: calls.append("base"))
    layer.lora_A["default"].register_forward_pre_hook(lambda *_: calls.append("A"))
    layer(x)
    assert set(calls) == {"forward", "base", "A"}


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (5,)])
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    layer = next(module for module in lean(peft_model()).modules() if isinstance(module, Linear))
    assert layer(torch.randn(*shape, layer.in_features)).shape == (*shape, layer.out_features)


def test_a_base_with_a_bias_and_rows_that_do_not_lie_side_by_side(tmp_path: Path) -> None:
    """Qwen2 has biases in its attention."""
    base = load_causal_lm(ModelConfig(name=str(family("qwen2", tmp_path)), device="cpu"))
    plain = filled(get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")))
    ours = lean(copy.deepcopy(plain))
    (expected, wanted), (found, gradients) = run(plain), run(ours)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name in wanted:
        torch.testing.assert_close(gradients[name], wanted[name], rtol=1e-4, atol=1e-6)
    pairs = zip(plain.modules(), ours.modules(), strict=True)
    one, other = next(both for both in pairs if isinstance(both[0], Linear))
    assert one.base_layer.bias is not None
    x = torch.randn(one.in_features, 6, 2).transpose(0, 2)
    torch.testing.assert_close(other(x), one(x), rtol=1e-5, atol=1e-5)


def test_adapters_are_rounded_once_while_nothing_trains() -> None:
    model = lean(peft_model())
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("default")
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        model.set_adapter("other")
        another = model(input_ids=IDS).logits
        model.set_adapter("default")
        with rounded_once(model):
            assert torch.equal(model(input_ids=IDS).logits, expected)
            model.set_adapter("other")
            assert torch.equal(model(input_ids=IDS).logits, another)
            model.set_adapter("default")
            [first, _] = layers[0].rounded["default"]
            assert first.dtype is torch.bfloat16
        assert not any("rounded" in vars(layer) for layer in layers)
        filled(model)
        assert not torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 512, 513, 1025, 1699, 1700])
@pytest.mark.parametrize(("depth", "width"), [(24, 512), (24, 1024), (40, 96)])
def test_a_product_in_parts_is_that_of_torch(rows: int, depth: int, width: int, dtype: torch.dtype) -> None:
    left, right, bias = (torch.randn(shape).to(dtype) for shape in ((rows, depth), (depth, width), (width,)))
    exact = left.double() @ right.double()
    close = {"rtol": 1e-2, "atol": 0.1} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for weight in (right, right.t().contiguous().t()):
        torch.testing.assert_close(product(left, weight).double(), exact, **close)
        torch.testing.assert_close(product(left, weight, bias).double(), exact + bias.double(), **close)
