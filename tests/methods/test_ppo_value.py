"""PPO's value function with an adapter of its own: apart from the policy's, resumed exactly, checked at the start."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from rlaif.config import Dtype, LoraSettings, ModelConfig, PPOConfig, Tuning, ValueInit
from rlaif.methods.ppo import PPOTrainer, train_ppo
from rlaif.methods.ppo_checks import StartCheckError, check_start
from rlaif.methods.ppo_rollout import Rollouts
from rlaif.models import load_sequence_scorer, load_tokenizer, lora_config, seed_everything
from rlaif.policy import completion_states, load_policy, under
from rlaif.preference_model import AdapterPreferenceModel, load_preference_model, pm_config, read_head
from rlaif.records import Example
from rlaif.trunk import frozen_layers
from tests.adapters import fill
from tests.methods.problem import PROMPTS, TINY, ppo_config, vowels


def config(top_layers: float = 1.0, **changes: Any) -> PPOConfig:
    lora = LoraSettings(r=4, alpha=8, top_layers=top_layers)
    return ppo_config(**{"lora": lora, "value_adapter": True, "report_to": [], **changes})


def trainer(folder: Path, start: ModelConfig = TINY, pm: Path | None = None, **changes: Any) -> PPOTrainer:
    seed_everything(0)
    settings = config(**changes)
    policy = load_policy(start, settings.tuning, settings.lora)
    score = vowels
    if pm is not None:
        model = load_preference_model(pm_config(start, pm), policy)
        score = model.score

    head = read_head(pm) if pm else None
    return PPOTrainer(settings, policy, PROMPTS, score, folder, seed=0, head=head, preference_model=pm)


@pytest.fixture(scope="module", params=[1.0, 0.5], ids=["pm on all layers", "pm on the upper layer"])
def pm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PM that is an adapter of another shape on the tiny model."""
    folder = tmp_path_factory.mktemp("pm")
    model = load_sequence_scorer(TINY, new_head=True)
    settings = LoraSettings(r=2, top_layers=request.param)
    model = get_peft_model(model, lora_config(settings, model, "SEQ_CLS", ["score"]))
    fill(model.named_parameters(), 0.3, ("lora_B", "score"))
    model.save_pretrained(folder)
    load_tokenizer(TINY).save_pretrained(folder)
    return folder


def shaken(folder: Path, share: bool = True, **changes: Any) -> tuple[PPOTrainer, Rollouts]:
    """A trainer whose value function says something, with its rollouts."""
    ppo = trainer(folder, **changes)
    assert ppo.value_adapter is not None
    ppo.actor.share &= share
    fill([("head", ppo.value_head.linear.weight), *ppo.value_adapter.named.items()], 0.3, ("head", "lora_B"))
    return ppo, ppo.rollout(0)


def moved(parameters: Sequence[torch.Tensor]) -> list[bool]:
    return [bool(parameter.grad is not None and parameter.grad.abs().max() > 1e-9) for parameter in parameters]


@pytest.mark.parametrize("top_layers", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_it_starts_at_zero_beside_a_policy_at_its_reference(tmp_path: Path, dtype: Dtype, top_layers: float) -> None:
    ppo = trainer(tmp_path, dataclasses.replace(TINY, dtype=dtype), top_layers=top_layers)
    rollouts = ppo.rollout(0)
    check_start(ppo, rollouts)
    assert not rollouts.values.any()
    assert ppo.value_adapter is not None
    assert all(value.dtype is torch.float32 for value in ppo.value_adapter.named.values())
    # As many as the policy's, and others.
    assert len(ppo.value_adapter.named) == len(ppo.parameters)
    assert not {id(value) for value in ppo.value_parameters} & {id(value) for value in ppo.parameters}


@pytest.mark.parametrize("again", [False, True], ids=["", "layers run again"])
@pytest.mark.parametrize("top_layers", [1.0, 0.5])
def test_neither_loss_reaches_the_others_adapter(tmp_path: Path, top_layers: float, again: bool) -> None:
    changes = {"max_grad_norm": 1e9, "top_layers": top_layers, "gradient_checkpointing": again}
    ppo, rollouts = shaken(tmp_path, **changes)
    nothing = torch.zeros_like(rollouts.logps)
    ppo.minibatch(torch.arange(4), rollouts, nothing, rollouts.values + 5, train_policy=True)
    assert not any(moved(ppo.parameters))
    assert all(moved(ppo.value_parameters))
    ppo, rollouts = shaken(tmp_path, value_coef=0.0, **changes)
    ppo.minibatch(torch.arange(4), rollouts, nothing + 1, rollouts.values + 5, train_policy=True)
    # The policy's own lora_A gets none as long as its lora_B is zero.
    assert any(moved(ppo.parameters))
    assert not any(moved(ppo.value_parameters))


def test_layers_that_run_again_change_no_gradient(tmp_path: Path) -> None:
    found = []
    for again in (False, True):
        ppo, rollouts = shaken(tmp_path, share=False, gradient_checkpointing=again, max_grad_norm=1e9)
        fill(ppo.policy.trainable(), 0.3)
        advantages = torch.ones_like(rollouts.logps)
        ppo.minibatch(torch.arange(4), rollouts, advantages, rollouts.values + 1, train_policy=True)
        found.append([value.grad.clone() for value in (*ppo.parameters, *ppo.value_parameters)])  # type: ignore[union-attr]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_in_the_warm_up_only_the_value_function_trains(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, warmup_iterations=1, iterations=1)
    assert ppo.value_adapter is not None
    policy, value = ({k: v.clone() for k, v in each.items()} for each in (ppo.weights(), ppo.value_adapter.weights()))
    ppo.train()
    assert all(torch.equal(policy[name], weight) for name, weight in ppo.weights().items())
    assert not any(torch.equal(value[name], weight) for name, weight in ppo.value_adapter.weights().items())


@pytest.mark.parametrize("top_layers", [1.0, 0.5])
def test_values_are_those_of_a_pass_of_their_own_without_padding(tmp_path: Path, top_layers: float) -> None:
    ppo, rollouts = shaken(tmp_path, top_layers=top_layers)
    assert (rollouts.batch.trunk is None) == (top_layers == 1)
    batch = rollouts.batch.whole()
    for row in range(len(batch)):
        ids = batch.ids[row][batch.mask[row].bool()].unsqueeze(0)
        length = int(batch.completion_mask[row].sum())
        with torch.no_grad(), under(ppo.policy.model, "value"):
            states = ppo.policy.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        expected = ppo.value_head(states)[0, -length - 1 : -1]
        torch.testing.assert_close(rollouts.values[row, :length], expected, rtol=1e-4, atol=1e-5)
        assert not rollouts.values[row, length:].any()


def test_a_head_with_something_after_it_gives_the_same_values(tmp_path: Path) -> None:
    ppo, rollouts = shaken(tmp_path)
    ppo.actor.plain_head = False
    torch.testing.assert_close(ppo.actor.evaluate_values(rollouts.batch), rollouts.values, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_it_learns_what_a_head_alone_cannot(tmp_path: Path) -> None:
    """Returns at random: a linear function of 48 features fits fewer of them than features that may move."""
    left = {}
    for own in (False, True):
        ppo = trainer(
            tmp_path, value_adapter=own, value_clip_range=1e9, rollouts=16, minibatch_size=16, max_new_tokens=10
        )
        rollouts = ppo.rollout(0)
        returns = torch.randn(rollouts.logps.shape, generator=torch.Generator().manual_seed(0))
        for group in ppo.optimizer.param_groups:
            group["lr"] = 2e-2
        nothing = torch.zeros_like(returns)
        for _ in range(25):
            left[own] = ppo.minibatch(torch.arange(16), rollouts, nothing, returns, train_policy=False)["value_loss"]
    assert left[True] < 0.9 * left[False], left


class KilledError(Exception):
    """Stands for a kill."""


def run(folder: Path, kill_in_round: int = 0, **changes: Any) -> tuple[bytes, list[dict[str, Any]]]:
    rounds = 0

    def score(examples: Sequence[Example]) -> list[float]:
        nonlocal rounds
        rounds += 1
        if rounds == kill_in_round:
            raise KilledError
        return vowels(examples)

    folder.mkdir(exist_ok=True)
    train_ppo(config(**{"iterations": 4, "save_every": 2} | changes), TINY, PROMPTS, score, folder, 0)
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    figures = [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]
    return (folder / "policy" / "adapter_model.safetensors").read_bytes(), figures


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "cut", kill_in_round=4)
    assert run(tmp_path / "cut") == whole
    # It is the adapter that decides: with one that says nothing the curve is another.
    with pytest.raises(KilledError):
        run(tmp_path / "fresh", kill_in_round=4)
    (state,) = (tmp_path / "fresh" / "checkpoints").glob("iteration-*/state.pt")
    tensors = torch.load(state, weights_only=True)
    assert tensors["value_adapter"]
    torch.save(tensors | {"value_adapter": {k: v * 0 for k, v in tensors["value_adapter"].items()}}, state)
    assert run(tmp_path / "fresh")[1] != whole[1]


def test_the_saved_policy_has_the_policys_adapter_alone(tmp_path: Path) -> None:
    run(tmp_path, iterations=1)
    assert not (tmp_path / "policy" / "value").exists()
    names = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    assert len(names) == len(load_policy(TINY, Tuning.lora, LoraSettings()).trainable())
    assert not [name for name in names if "value" in name]


def test_a_policy_that_started_from_an_adapter_is_saved_without_the_values(tmp_path: Path) -> None:
    policy = load_policy(TINY, Tuning.lora, LoraSettings(r=4))
    fill(policy.trainable(), 0.3)
    policy.save(tmp_path / "sft")
    ppo, rollouts = shaken(tmp_path, start=ModelConfig(name=str(tmp_path / "sft"), device="cpu"))
    expected = ppo.actor.evaluate(rollouts.batch)[0]
    ppo.policy.save(tmp_path / "saved")
    saved = load_policy(ModelConfig(name=str(tmp_path / "saved"), device="cpu"), Tuning.full, LoraSettings())
    with torch.no_grad():
        again = torch.log_softmax(
            saved.model.lm_head(completion_states(saved.model, rollouts.batch.whole())), -1
        ).gather(-1, rollouts.batch.tokens.unsqueeze(-1))
    difference = (again.squeeze(-1) - expected) * rollouts.batch.completion_mask
    assert difference.abs().max() < 1e-4


# The value function that starts as the PM.


@pytest.mark.parametrize("top_layers", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_it_starts_as_the_pm_whatever_layers_that_has_adapted(
    tmp_path: Path, pm: Path, dtype: Dtype, top_layers: float
) -> None:
    start = dataclasses.replace(TINY, dtype=dtype)
    ppo = trainer(tmp_path, start, pm, top_layers=top_layers, value_init=ValueInit.pm)
    assert ppo.value_adapter is not None
    assert ppo.value_adapter.from_pm
    rollouts = ppo.rollout(0)
    check_start(ppo, rollouts)
    # The policy's layers below its adapter have not run for the values, unless they are the same.
    with ppo.value_adapter.active():
        own = len(frozen_layers(ppo.policy.model))
    assert (ppo.value_adapter.fitting(rollouts.batch).trunk is not None) == (own == 1 and top_layers == 0.5)
    assert {value.dtype for value in ppo.value_adapter.named.values()} == {torch.float32}


def test_start_check_catches_a_value_function_that_is_not_the_pm(tmp_path: Path, pm: Path) -> None:
    ppo = trainer(tmp_path, TINY, pm, value_init=ValueInit.pm)
    assert ppo.value_adapter is not None
    with torch.no_grad():
        for name, value in ppo.value_adapter.named.items():
            if "lora_B" in name:
                value.zero_()
    with pytest.raises(StartCheckError, match="value minus the PM's"):
        check_start(ppo, ppo.rollout(0))


def test_training_the_value_function_leaves_the_pm_alone(tmp_path: Path, pm: Path) -> None:
    ppo = trainer(tmp_path, TINY, pm, value_init=ValueInit.pm)
    before = {
        name: value.clone()
        for name, value in ppo.policy.model.named_parameters()
        if f".{AdapterPreferenceModel.ADAPTER}." in name
    }
    assert before
    ppo.train()
    now = dict(ppo.policy.model.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in before.items())


def test_a_pm_with_weights_of_its_own_gives_the_head(tmp_path: Path) -> None:
    model = load_sequence_scorer(TINY, new_head=True)
    fill(model.named_parameters(), 0.3, ("score",))
    model.save_pretrained(tmp_path / "pm")
    load_tokenizer(TINY).save_pretrained(tmp_path / "pm")
    ppo = trainer(tmp_path, TINY, tmp_path / "pm", value_init=ValueInit.pm)
    assert ppo.value_adapter is not None
    assert not ppo.value_adapter.from_pm
    rollouts = ppo.rollout(0)
    check_start(ppo, rollouts)
    assert rollouts.values.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": Tuning.full}, "ppo.value_adapter=true needs a base that does not train: give ppo.tuning=lora"),
        ({"value_backprop": True}, "leave one out"),
    ],
)
def test_what_cannot_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)
