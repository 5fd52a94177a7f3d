"""PPO on the tiny model: start checks and their detectors, gradients, resuming, learning."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from rlaif import losses
from rlaif.config import Dtype, Keep, KLControl, KLEstimator, LoraSettings, ModelConfig, PPOConfig, Tuning, ValueInit
from rlaif.generation import generate, left_pad
from rlaif.methods.ppo import PPOTrainer, train_ppo
from rlaif.methods.ppo_checkpoint import Checkpoints, Progress
from rlaif.methods.ppo_checks import StartCheckError, check_lengths, check_start, more_padding
from rlaif.methods.ppo_rollout import Actor, PromptStream, ScoreFunction
from rlaif.models import load_sequence_scorer, load_tokenizer, lora_config, seed_everything
from rlaif.policy import Packed, has_plain_head, load_policy
from rlaif.prefix import positions_after
from rlaif.records import Example, Prompt, UserError
from rlaif.rewards import known_scores
from tests.adapters import fill
from tests.methods.problem import PROMPTS, TINY, VALIDATION, ppo_config, vowels


def trainer(
    tmp_path: Path,
    start: ModelConfig = TINY,
    dtype: Dtype = Dtype.auto,
    score: ScoreFunction = vowels,
    head: Any = None,
    **changes: Any,
) -> PPOTrainer:
    seed_everything(0)
    settings = ppo_config(**changes)
    policy = load_policy(dataclasses.replace(start, dtype=dtype), settings.tuning, settings.lora)
    return PPOTrainer(settings, policy, PROMPTS, score, tmp_path, seed=0, validation=VALIDATION, head=head)


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
def test_at_the_start_kl_is_zero_ratio_one_value_zero(tmp_path: Path, tuning: Tuning) -> None:
    ppo = trainer(tmp_path, tuning=tuning)
    rollouts = ppo.rollout(0)
    check_start(ppo, rollouts)
    assert torch.allclose(rollouts.logps, rollouts.ref_logps, atol=1e-5)
    assert torch.equal(rollouts.values, torch.zeros_like(rollouts.values))


def test_rollout_logps_are_those_of_the_tokens_without_padding(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, temperature=0.7)
    rollouts = ppo.rollout(0)
    batch = rollouts.batch.whole()
    for row in range(len(batch)):
        ids = batch.ids[row][batch.mask[row].bool()]
        length = int(batch.completion_mask[row].sum())
        with torch.no_grad():
            logits = ppo.actor.model(ids.unsqueeze(0)).logits[0] / 0.7
        expected = torch.log_softmax(logits, -1)[:-1].gather(-1, ids[1:, None]).squeeze(-1)[-length:]
        assert torch.allclose(rollouts.logps[row, :length], expected, atol=1e-4)
        for packed in (batch, rollouts.batch):
            assert torch.allclose(ppo.actor.evaluate(packed)[0][row, :length], expected, atol=1e-4)


@pytest.mark.parametrize("entropy", [False, True])
def test_a_head_with_something_after_it_gives_the_same_numbers(tmp_path: Path, entropy: bool) -> None:
    """Models whose logits are more than the output head of the last states take the long way."""
    ppo = trainer(tmp_path, temperature=0.7, value_init=ValueInit.zero)
    torch.nn.init.normal_(ppo.value_head.linear.weight)
    batch = ppo.rollout(0).batch
    assert ppo.actor.plain_head
    short = ppo.actor.forward(batch, entropy)
    ppo.actor.plain_head = False
    for one, other in zip(short, ppo.actor.forward(batch, entropy), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert bool(short[2].any()) == entropy


def test_the_precision_is_that_of_the_arithmetic_and_not_of_the_weights(tmp_path: Path) -> None:
    """Over 4-bit layers that compute in bfloat16, the first parameter is float32, and tells nothing."""
    policy = trainer(tmp_path, dtype=Dtype.bfloat16).policy
    policy.model.float()
    assert Actor(policy, ppo_config()).dtype is torch.bfloat16


def test_a_capped_head_is_not_plain(tmp_path: Path) -> None:
    model = trainer(tmp_path).actor.model
    assert has_plain_head(model)
    handle = model.get_base_model().register_forward_hook(
        lambda module, arguments, output: setattr(output, "logits", 3 * torch.tanh(output.logits / 3))
    )
    assert not has_plain_head(model)
    handle.remove()


# Each check before the first update sees the fault that it is there for.


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_start_checks_pass_in_either_precision(tmp_path: Path, dtype: Dtype) -> None:
    ppo = trainer(tmp_path, dtype=dtype)
    check_start(ppo, ppo.rollout(0))


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_start_check_catches_a_policy_that_is_not_its_reference(tmp_path: Path, dtype: Dtype) -> None:
    ppo = trainer(tmp_path, dtype=dtype)
    with torch.no_grad():
        for name, parameter in ppo.policy.trainable():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    with pytest.raises(StartCheckError, match="KL to the reference"):
        check_start(ppo, ppo.rollout(0))


def test_start_check_catches_a_value_head_that_is_not_zero(tmp_path: Path) -> None:
    ppo = trainer(tmp_path)
    torch.nn.init.constant_(ppo.value_head.linear.bias, 0.01)
    with pytest.raises(StartCheckError, match="value"):
        check_start(ppo, ppo.rollout(0))


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_start_check_catches_logps_scored_at_another_temperature(tmp_path: Path, dtype: Dtype) -> None:
    ppo = trainer(tmp_path, dtype=dtype)
    rollouts = ppo.rollout(0)
    ppo.actor.config = dataclasses.replace(ppo.config, temperature=0.7)
    with pytest.raises(StartCheckError, match="probability ratio"):
        check_start(ppo, rollouts)


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_start_check_catches_a_sampler_at_another_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Dtype
) -> None:
    monkeypatch.setattr(
        "rlaif.methods.ppo_rollout.generate", lambda *args, **options: generate(*args, **options | {"temperature": 0.7})
    )
    ppo = trainer(tmp_path, dtype=dtype)
    # In float32 the sampler's figures are taken for the policy's, so that an earlier check sees the fault.
    found = "the sampler's" if dtype is Dtype.bfloat16 else "KL"
    with pytest.raises(StartCheckError, match=found):
        check_start(ppo, ppo.rollout(0))


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_the_curve_says_how_far_the_sampler_is_from_the_policy(tmp_path: Path, dtype: Dtype) -> None:
    ppo = trainer(tmp_path, dtype=dtype)
    line, rollouts = ppo.step(0)
    difference = (rollouts.sampled - rollouts.logps)[rollouts.batch.completion_mask.bool()].abs().mean()
    assert line["sampler_difference"] == pytest.approx(float(difference))
    assert (line["sampler_difference"] > 0) == (dtype is Dtype.bfloat16)


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_start_check_catches_dropout(tmp_path: Path, dtype: Dtype) -> None:
    ppo = trainer(tmp_path, dtype=dtype)
    rollouts = ppo.rollout(0)
    handle = ppo.actor.model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: torch.nn.functional.dropout(output, 0.1, training=True)
    )
    with pytest.raises(StartCheckError, match="probability ratio"):
        check_start(ppo, rollouts)
    handle.remove()


@pytest.mark.parametrize("fault", ["mask", "positions"])
@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_start_check_catches_rows_that_are_packed_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, dtype: Dtype
) -> None:
    """Sampler, policy and reference share the fault, so that no other check sees it."""

    def seen_padding(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Any, Any]:
        ids, mask = left_pad(rows, pad, device)
        return ids, torch.ones_like(mask)

    def without_prefix(prefix: Any, mask: Any) -> Any:
        return positions_after(None, mask)

    if fault == "mask":
        monkeypatch.setattr("rlaif.generation.left_pad", seen_padding)
    else:
        for module in ("generation", "policy"):
            monkeypatch.setattr(f"rlaif.{module}.positions_after", without_prefix)
    ppo = trainer(tmp_path, dtype=dtype)
    with torch.no_grad():
        for name, parameter in ppo.actor.model.named_parameters():
            if "self_attn" in name:
                parameter.mul_(8)  # The tiny model hardly looks at other tokens as it is.
    with pytest.raises(StartCheckError, match="effect of packing"):
        check_start(ppo, ppo.rollout(0))


def test_start_check_catches_a_model_that_sees_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the rows that are looked at are as long as each other, and need none."""
    ppo = trainer(tmp_path)
    rollouts = ppo.rollout(0)
    evaluate = ppo.actor.evaluate

    def biased(batch: Packed, *rest: Any) -> Any:
        logps, values = evaluate(batch, *rest)
        return logps + 0.1 * (batch.mask == 0).any(), values

    part = rollouts.batch.select(torch.arange(4))
    assert bool(more_padding(part.whole(), ppo.actor.pad).mask[:, :3].eq(0).all())
    monkeypatch.setattr(ppo.actor, "evaluate", biased)
    with pytest.raises(StartCheckError, match=r"probability ratio|packing|padding"):
        check_start(ppo, rollouts)


@pytest.fixture(scope="module")
def sft_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SFT adapter that does something."""
    folder = tmp_path_factory.mktemp("sft")
    policy = load_policy(TINY, Tuning.lora, LoraSettings(r=4, alpha=8))
    fill(policy.trainable(), 0.3)
    policy.save(folder)
    return folder


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
@pytest.mark.parametrize("given_as", ["name", "adapter"])
def test_the_reference_is_the_sft_policy_where_that_is_an_adapter(
    tmp_path: Path, sft_adapter: Path, tuning: Tuning, given_as: str
) -> None:
    start = ModelConfig(name="tiny", device="cpu") if given_as == "adapter" else ModelConfig(device="cpu")
    setattr(start, given_as, str(sft_adapter))
    ppo = trainer(tmp_path, start=start, tuning=tuning)
    check_start(ppo, ppo.rollout(0))
    plain = trainer(tmp_path).rollout(0)
    assert not torch.allclose(ppo.actor.evaluate_reference(plain.batch), plain.ref_logps, atol=0.1)


def test_start_check_catches_a_reference_that_lost_its_sft_adapter(tmp_path: Path, sft_adapter: Path) -> None:
    """Policy and reference agree there, so that no other check sees it."""
    ppo = trainer(tmp_path)
    rollouts = ppo.rollout(0)
    check_start(ppo, rollouts)
    ppo.policy.start = dataclasses.replace(TINY, adapter=str(sft_adapter))
    with pytest.raises(StartCheckError, match="reference minus the starting policy"):
        check_start(ppo, rollouts)


# The value head.

HEAD = (torch.linspace(-1, 1, 48).unsqueeze(0), torch.tensor([0.3]))


@pytest.mark.parametrize("normalize", [False, True])
def test_values_start_from_the_pm_in_units_of_the_reward(tmp_path: Path, normalize: bool) -> None:
    ppo = trainer(tmp_path, head=HEAD, value_init=ValueInit.pm, normalize_scores=normalize)
    rollouts = ppo.rollout(0)
    check_start(ppo, rollouts)
    assert bool(rollouts.values.any())
    mean, deviation = float(rollouts.scores.mean()), float(rollouts.scores.std(unbiased=False))
    with torch.no_grad():
        batch = rollouts.batch.whole()
        ids = batch.ids[0][batch.mask[0].bool()].unsqueeze(0)
        length = int(batch.completion_mask[0].sum())
        state = ppo.actor.model(ids, output_hidden_states=True).hidden_states[-1][0, -length - 1]
        raw = float(HEAD[0][0] @ state + HEAD[1])
    expected = (raw - mean) / deviation if normalize else raw
    assert float(rollouts.values[0, 0]) == pytest.approx(expected, abs=1e-3)


def test_start_check_catches_values_in_other_units(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, head=HEAD, value_init=ValueInit.pm)
    rollouts = ppo.rollout(0)
    rollouts.values *= 1.5
    with pytest.raises(StartCheckError, match="value minus the PM's"):
        check_start(ppo, rollouts)


def test_start_check_catches_values_read_one_token_late(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, head=HEAD, value_init=ValueInit.pm)
    rollouts = ppo.rollout(0)
    rollouts.values = rollouts.values.roll(-1, dims=1)
    with pytest.raises(StartCheckError, match="value minus the PM's"):
        check_start(ppo, rollouts)


def test_a_head_of_another_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the PM's head reads 7 features, the policy has 48"):
        trainer(tmp_path, head=(torch.zeros(1, 7), torch.zeros(1)), value_init=ValueInit.pm)


@pytest.mark.parametrize("shared", [False, True])
def test_a_pm_scores_and_starts_the_value(tmp_path: Path, shared: bool) -> None:
    """Its head in the folder is that of the value; the PM is a second adapter where the policy's base is its own."""
    model = load_sequence_scorer(TINY, new_head=True)
    if shared:
        model = get_peft_model(model, lora_config(LoraSettings(r=2), model, "SEQ_CLS", ["score"]))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "score" in name:
                value.copy_(HEAD[0])
    model.save_pretrained(tmp_path / "pm")
    load_tokenizer(TINY).save_pretrained(tmp_path / "pm")
    settings = ppo_config(value_init=ValueInit.pm, eval_every=1, relative_reward=False)
    train_ppo(settings, TINY, PROMPTS, None, tmp_path, 0, VALIDATION, tmp_path / "pm")
    curve = lines_of(tmp_path / "training.jsonl")
    assert curve[0]["value_mean"] != 0
    assert (tmp_path / "policy" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "policy" / "preference_model").exists()


@pytest.mark.parametrize("backprop", [False, True])
def test_the_value_loss_reaches_the_policy_only_if_asked_to(tmp_path: Path, backprop: bool) -> None:
    ppo = trainer(tmp_path, value_backprop=backprop, max_grad_norm=1e9)
    torch.nn.init.normal_(ppo.value_head.linear.weight)
    rollouts = ppo.rollout(0)
    nothing = torch.zeros_like(rollouts.logps)
    ppo.minibatch(torch.arange(4), rollouts, nothing, nothing + 5, train_policy=True)
    moved = [bool(parameter.grad is not None and parameter.grad.abs().max() > 1e-9) for parameter in ppo.parameters]
    assert any(moved) == backprop


def test_micro_batches_do_not_change_the_gradient(tmp_path: Path) -> None:
    gradients = []
    for micro in (1, 2, 8):
        ppo = trainer(tmp_path, minibatch_size=8, micro_batch_size=micro, max_grad_norm=1e9)
        rollouts = ppo.rollout(0)
        mask = rollouts.batch.completion_mask
        advantages = losses.whiten(torch.randn(mask.shape, generator=torch.manual_seed(1)), mask)
        ppo.minibatch(torch.arange(8), rollouts, advantages, advantages, train_policy=True)
        gradients.append([parameter.grad.clone() for parameter in ppo.parameters])
    for other in gradients[1:]:
        for left, right in zip(gradients[0], other, strict=True):
            assert torch.allclose(left, right, atol=1e-5)


def test_gradients_are_clipped_apart(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, max_grad_norm=1e-3)
    rollouts = ppo.rollout(0)
    advantages = torch.ones_like(rollouts.logps) * 100
    statistics = ppo.minibatch(torch.arange(4), rollouts, advantages, advantages, train_policy=True)
    for name, parameters in (("grad_norm", ppo.parameters), ("value_grad_norm", ppo.value_parameters)):
        assert statistics[name] > 1e-3
        total = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()  # type: ignore[union-attr]
        assert float(total) == pytest.approx(1e-3, rel=1e-2)


def test_gradient_checkpointing_runs_layers_again_and_changes_no_number(tmp_path: Path) -> None:
    found = {}
    for again in (False, True):
        ppo = trainer(tmp_path, gradient_checkpointing=again, max_grad_norm=1e9, lora=LoraSettings(r=4, top_layers=0.5))
        fill(ppo.policy.trainable(), 0.3)
        ppo.actor.share = False
        rollouts = ppo.rollout(0)
        calls: list[int] = []
        layers = ppo.actor.model.get_base_model().model.layers
        for number, layer in enumerate(layers):

            def note(_: Any, inputs: Any, number: int = number, calls: list[int] = calls) -> None:
                calls.append(number)

            layer.mlp.register_forward_pre_hook(note)
        advantages = torch.ones_like(rollouts.logps)
        statistics = ppo.minibatch(torch.arange(4), rollouts, advantages, advantages, train_policy=True)
        # The lower layer does not train: the trunk has run it already.
        assert calls == ([1, 1] if again else [1])
        assert all("forward" not in vars(layer) for layer in layers)
        found[again] = statistics, [parameter.grad.clone() for parameter in ppo.parameters]  # type: ignore[union-attr]
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
    for one, other in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_sampling_is_the_same_with_gradient_checkpointing(tmp_path: Path) -> None:
    """Recomputing layers have no cache; a sampler that lost its cache would see one token at a time."""
    one, other = (trainer(tmp_path, gradient_checkpointing=again).rollout(0) for again in (False, True))
    assert torch.equal(one.batch.tokens, other.batch.tokens)
    assert one.batch.whole().mask.sum() == other.batch.whole().mask.sum()


def test_warmup_trains_only_the_value_head(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, warmup_iterations=1, iterations=1)
    before = {name: value.clone() for name, value in ppo.policy.trainable()}
    ppo.train()
    assert all(torch.equal(before[name], value) for name, value in ppo.policy.trainable())
    assert float(ppo.value_head.linear.weight.detach().abs().sum()) > 0


def reward(ppo: PPOTrainer, scores: Sequence[float], lengths: Sequence[int] = (), ended: Sequence[bool] = ()) -> Any:
    count = len(scores)
    return ppo.reward_scores(
        torch.tensor(scores), torch.tensor(lengths or [1] * count), torch.tensor(ended or [True] * count)
    ).tolist()


def test_scores_are_normalised_on_the_reference_and_clipped(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, score_clip=1.0)
    ppo.start_from(torch.tensor([1.0, 2.0, 3.0, 10.0]))
    assert ppo.progress.score_mean == 4.0
    assert ppo.progress.score_std == pytest.approx(3.5355339)
    assert reward(ppo, [1.0, 2.0, 3.0, 10.0]) == pytest.approx([-0.8485281, -0.5656854, -0.2828427, 1.0])
    assert reward(ppo, [4.0]) == [0.0]


@pytest.mark.parametrize("head", [None, HEAD])
def test_scores_that_are_all_equal_at_first_are_not_blown_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, head: Any
) -> None:
    """A sparse reward of 0 or 1 that the reference never gets: one that differs later must not be a million."""
    ppo = trainer(tmp_path, head=head)
    ppo.start_from(torch.full((8,), 0.1))
    assert reward(ppo, [0.1, 1.1, -0.4]) == pytest.approx([0.0, 1.0, -0.5], abs=1e-6)
    assert "the first round's scores are all 0.1, so scores are not scaled" in caplog.text
    if head is not None:
        torch.testing.assert_close(ppo.value_head.linear.weight.detach(), head[0])


def test_penalties_come_after_the_clip_and_know_the_true_end(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, normalize_scores=False, score_clip=2.0, missing_eos_penalty=0.5, length_penalty=0.1)
    ppo.start_from(torch.tensor([0.0]))
    # A completion that ended with its last possible token ended by itself.
    assert reward(ppo, [9.0, 9.0, 1.0], [6, 6, 2], [True, False, True]) == pytest.approx([1.4, 0.9, 0.8])


def test_an_end_token_in_the_last_place_counts_as_ended(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, max_new_tokens=1, rollouts=64)
    rollouts = ppo.rollout(0)
    mask, tokens = rollouts.batch.completion_mask.bool(), rollouts.batch.tokens
    last = tokens.gather(1, mask.sum(dim=1, keepdim=True) - 1).squeeze(1)
    assert torch.equal(rollouts.ended, torch.isin(last, torch.tensor(ppo.actor.eos)))
    full = mask.all(dim=1)
    assert bool((rollouts.ended & full).any())
    assert bool((~rollouts.ended).any())


@pytest.mark.parametrize("relative", [False, True])
def test_what_scores_is_told_which_completions_ended(tmp_path: Path, relative: bool) -> None:
    asked: list[Example] = []

    def recorded(examples: Sequence[Example]) -> list[float]:
        asked.extend(examples)
        return vowels(examples)

    ppo = trainer(tmp_path, max_new_tokens=16, rollouts=32, relative_reward=relative, score=recorded)
    rollouts = ppo.rollout(0)
    assert [example.ended for example in asked[:32]] == rollouts.ended.tolist()
    assert set(rollouts.ended.tolist()) == {True, False}
    if relative:
        # The reference's completions come from the same start, and are cut as often.
        assert {example.ended for example in asked[32:]} == {True, False}


def test_by_default_the_score_reaches_the_first_of_many_tokens(tmp_path: Path) -> None:
    """Also where the value function, as at the start, foresees nothing."""
    ppo = trainer(tmp_path, max_new_tokens=64, whiten_advantages=False, kl_coef=0.0)
    seen: list[torch.Tensor] = []
    ppo.update = lambda iteration, rollouts, advantages, returns: seen.append(advantages) or {}  # type: ignore[method-assign]
    _, rollouts = ppo.step(0)
    lengths = rollouts.batch.completion_mask.sum(dim=1)
    assert int(lengths.max()) == 64
    scores = ppo.reward_scores(rollouts.scores, lengths, rollouts.ended)
    assert float(scores.abs().max()) > 0.5
    torch.testing.assert_close(seen[0][:, 0], scores)


@pytest.mark.slow
@pytest.mark.parametrize("gae_lambda", [0.95, PPOConfig().gae_lambda])
def test_a_score_that_the_first_of_64_tokens_decides_is_learnt(tmp_path: Path, gae_lambda: float) -> None:
    def first(examples: Sequence[Example]) -> list[float]:
        return [float("a" <= example.completion[:1] <= "m") for example in examples]

    config = PPOConfig(
        iterations=20,
        max_new_tokens=64,
        learning_rate=3e-3,
        missing_eos_penalty=0.0,
        gae_lambda=gae_lambda,
        report_to=[],
        log_samples=0,
    )
    train_ppo(config, TINY, PROMPTS, first, tmp_path, seed=0)
    late = [line["score"] for line in lines_of(tmp_path / "training.jsonl")[-5:]]
    learnt = sum(late) / len(late)
    assert learnt > 0.5 if gae_lambda == 1 else learnt < 0.2


def test_the_learning_rate_follows_the_tuning(tmp_path: Path) -> None:
    for tuning, expected in ((Tuning.lora, PPOConfig.RATES.lora), (Tuning.full, PPOConfig.RATES.full)):
        ppo = trainer(tmp_path, tuning=tuning, learning_rate=None, linear_decay=False)
        ppo.step(0)
        assert [group["lr"] for group in ppo.optimizer.param_groups] == [expected, ppo.config.value_learning_rate]
        assert ppo.optimizer.param_groups[0]["eps"] == ppo.config.adam_epsilon
    assert trainer(tmp_path, learning_rate=3e-4).optimizer.param_groups[0]["lr"] == 3e-4


@pytest.mark.parametrize("estimator", list(KLEstimator))
def test_the_reward_takes_the_estimator_it_is_told(tmp_path: Path, estimator: KLEstimator) -> None:
    ppo = trainer(tmp_path, kl_estimator=estimator, normalize_scores=False, score=lambda examples: [0] * 8)
    rollouts = ppo.rollout(0)
    shift = 0.2 * rollouts.batch.completion_mask
    rollouts.ref_logps = rollouts.logps - shift
    ppo.rollout = lambda iteration: rollouts  # type: ignore[method-assign]
    ppo.progress.iteration = 1
    line, _ = ppo.step(1)
    # k1 = 0.2; k2 = 0.2^2 / 2 = 0.02; k3 = exp(-0.2) - 1 + 0.2 = 0.0187308. The curve's kl is k1 whatever the reward.
    each = {"k1": 0.2, "k2": 0.02, "k3": 0.0187308}[estimator.value]
    assert line["reward"] == pytest.approx(-0.05 * each * line["length"], rel=1e-4)
    assert line["kl"] == pytest.approx(0.2 * line["length"], rel=1e-4)


def test_rewards_are_whitened_before_the_advantages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    gae = losses.gae
    monkeypatch.setattr(losses, "gae", lambda rewards, *rest: seen.update(rewards=rewards) or gae(rewards, *rest))
    ppo = trainer(tmp_path, whiten_rewards=True)
    line, rollouts = ppo.step(0)
    mask = rollouts.batch.completion_mask
    mean = losses.masked_mean(seen["rewards"], mask)
    assert float(losses.masked_mean((seen["rewards"] - mean) ** 2, mask)) == pytest.approx(1, abs=1e-3)
    # The mean stays: rewards summed over all tokens are those of the curve.
    assert float(mean * mask.sum()) == pytest.approx(line["reward"] * len(mask), rel=1e-3, abs=1e-4)


def test_relative_rewards_subtract_the_references_score_on_the_same_prompt(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def recorded(examples: Sequence[Example]) -> list[float]:
        asked.extend((example.prompt[0]["content"], example.completion) for example in examples)
        return vowels(examples)

    ppo = trainer(tmp_path, relative_reward=True, score=recorded)
    fill(ppo.policy.trainable(), 1.0)
    rollouts = ppo.rollout(0)
    assert len(asked) == 8 + 6
    baselines = dict(asked[8:])
    assert set(baselines) == {prompt.text for prompt in PROMPTS}
    for prompt, text, score in zip(rollouts.prompts, rollouts.texts, rollouts.scores.tolist(), strict=True):
        own, baseline = vowels([Example(prompt.messages, each) for each in (text, baselines[prompt.text])])
        assert score == pytest.approx(own - baseline)
    # They are the reference's: another policy gets the same ones, and nothing is sampled twice.
    ppo.rollout(1)
    assert len(asked) == 8 + 6 + 8
    fresh = trainer(tmp_path, relative_reward=True, score=recorded)
    asked.clear()
    fresh.rollout(0)
    assert dict(asked[8:]) == baselines


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_the_entropy_bonus_raises_the_entropy(tmp_path: Path, coefficient: float) -> None:
    """With advantages of 0 nothing else moves the policy."""
    ppo = trainer(tmp_path, entropy_coef=coefficient)
    rollouts = ppo.rollout(0)
    nothing = torch.zeros_like(rollouts.logps)

    def entropy() -> float:
        with torch.no_grad():
            return float(ppo.actor.forward(rollouts.batch, with_entropy=True)[2].sum())

    before = entropy()
    ppo.minibatch(torch.arange(8), rollouts, nothing, nothing, train_policy=True)
    assert (entropy() > before + 1e-3) == (coefficient > 0)
    assert entropy() >= before


@pytest.mark.parametrize("linear", [False, True])
def test_learning_rates_fall_linearly_if_they_are_to(tmp_path: Path, linear: bool) -> None:
    ppo = trainer(tmp_path, iterations=4, linear_decay=linear, learning_rate=1e-2, value_learning_rate=1e-3)
    for iteration in range(3):
        ppo.step(iteration)
        rates = [group["lr"] for group in ppo.optimizer.param_groups]
        left = 1 - iteration / 4 if linear else 1
        assert rates == pytest.approx([1e-2 * left, 1e-3 * left])


@pytest.mark.parametrize(("target", "sign"), [(100.0, -1), (1e-6, 1)])
def test_adaptive_control_moves_the_price_of_kl(tmp_path: Path, target: float, sign: int) -> None:
    """By (clipped error) x episodes / horizon a round: 0.2 x 8 / 80 (Ziegler et al. 2019, section 2.2)."""
    ppo = trainer(tmp_path, kl_control=KLControl.adaptive, kl_target=target, kl_horizon=80)
    fill(ppo.policy.trainable(), 0.3)
    ppo.progress.iteration = 1
    rollouts = ppo.rollout(0)
    ppo.rollout = lambda iteration: rollouts  # type: ignore[method-assign]
    coefficients = [ppo.step(iteration)[0]["kl_coef"] for iteration in (1, 2)]
    assert coefficients == pytest.approx([0.05, 0.05 * (1 + sign * 0.02)])


def test_stop_kl_ends_the_updates_without_the_step_that_went_too_far(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, stop_kl=1e-4, learning_rate=0.1, epochs=2)
    line, _ = ppo.step(0)
    # 2 epochs of 2 minibatches: the first minibatch sees the policy that sampled, the second the one after a step.
    assert line["updates"] == 1
    assert ppo.optimizer.state[ppo.parameters[0]]["step"] == 1
    assert line["approx_kl"] > 1e-4 / 2
    assert trainer(tmp_path, stop_kl=1e9, learning_rate=0.1, epochs=2).step(0)[0]["updates"] == 4


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run(tmp_path: Path, score: ScoreFunction = vowels, **changes: Any) -> list[dict[str, Any]]:
    train_ppo(ppo_config(**changes), TINY, PROMPTS, score, tmp_path, 0, VALIDATION)
    return lines_of(tmp_path / "training.jsonl")


def test_validation_measures_every_n_iterations_and_at_the_end(tmp_path: Path) -> None:
    curve = run(tmp_path, iterations=5, eval_every=2, eval_prompts=3, kl_coef=0.3)
    assert [("validation_score" in line) for line in curve] == [False, True, False, True, True]
    for line in curve[1::2]:
        assert -4 <= line["validation_objective"] + 0.3 * line["validation_kl"] <= 4


def test_validation_is_repeatable_and_leaves_training_alone(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, eval_every=1)
    ppo.step(0)
    assert ppo.measure(0) == ppo.measure(0)
    plain, measured = tmp_path / "plain", tmp_path / "measured"
    plain.mkdir()
    measured.mkdir()
    run(plain, iterations=3)
    run(measured, iterations=3, eval_every=1)
    assert weights(plain) == weights(measured)


def test_the_best_policy_on_validation_prompts_is_kept(tmp_path: Path) -> None:
    """Scores fall with every iteration after the second, so the second is the best."""
    calls = 0

    def falling(examples: Sequence[Example]) -> list[float]:
        nonlocal calls
        calls += len(examples) == 5
        return [value - 5 * max(calls - 2, 0) for value in vowels(examples)]

    settings = {"iterations": 5, "eval_every": 1, "linear_decay": False, "score_clip": 1e6, "normalize_scores": False}
    for name, changes in {
        "best": {"keep": Keep.best, "score": falling},
        "last": {"keep": Keep.last, "score": falling},
    }.items():
        (tmp_path / name).mkdir()
        calls = 0
        curve = run(tmp_path / name, **settings, **changes)
        objectives = [line["validation_objective"] for line in curve]
        assert objectives.index(max(objectives)) in (0, 1)
    best = objectives.index(max(objectives))
    (tmp_path / "short").mkdir()
    calls = 0
    ppo = trainer(tmp_path / "short", score=falling, **settings)
    for iteration in range(best + 1):
        ppo.step(iteration)
        ppo.measure(iteration)
    ppo.policy.save(tmp_path / "short" / "policy")
    assert weights(tmp_path / "best") == weights(tmp_path / "short")
    assert weights(tmp_path / "best") != weights(tmp_path / "last")
    assert not (tmp_path / "best" / "checkpoints").exists()


def test_one_baseline_without_a_score_counts_as_average(tmp_path: Path) -> None:
    def last_is_missing(examples: Sequence[Example]) -> list[float]:
        return known_scores([*vowels(examples)[:-1], None])

    ppo = trainer(tmp_path, score=last_is_missing, relative_reward=True)
    ppo.progress.baselines = {prompt.prompt_id: 0.0 for prompt in PROMPTS[1:]}
    rollouts = ppo.rollout(0)
    pairs = zip(rollouts.prompts, rollouts.texts, strict=True)
    others = vowels([Example(prompt.messages, text) for prompt, text in pairs])
    assert ppo.progress.baselines["p0"] == pytest.approx(sum(others) / len(others))


def test_the_best_policy_that_a_checkpoint_knows_of_outlives_a_newer_one(tmp_path: Path) -> None:
    """A run that is killed after the newer one goes on from the checkpoint, and may not find that one again."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_best(1, {"x": torch.tensor(1.0)})
    checkpoints.save(Progress(iteration=2, best_iteration=1), {})
    checkpoints.save_best(3, {"x": torch.tensor(3.0)})
    assert [float(checkpoints.best(iteration)["x"]) for iteration in (1, 3)] == [1.0, 3.0]
    checkpoints.save(Progress(iteration=4, best_iteration=3), {})
    assert [file.name for file in (tmp_path / "checkpoints").glob("best*")] == ["best-000003.pt"]


BROKEN_CHECKPOINTS = {
    "state.pt": [b"", b"\0" * 100, b"not a checkpoint", None],
    "progress.json": [b"", b"\0", b"[1]", b'{"iteration": "a"}', b'{"iteration": 2, "more": 1}', b"\xff", None],
    "../best-000001.pt": [None],
}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(("name", "content"), [(n, c) for n, each in BROKEN_CHECKPOINTS.items() for c in each])
def test_a_checkpoint_that_is_not_whole_is_left_out(
    name: str, content: bytes | None, older: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    tensors: dict[str, Any] = {key: {} for key in ("policy", "value_head", "value_adapter", "optimizer")}
    if older:
        checkpoints.save(Progress(iteration=2), tensors)
        os.replace(tmp_path / "checkpoints" / "iteration-000002", tmp_path / "older")
    checkpoints.save_best(1, {})
    checkpoints.save(Progress(iteration=4, best_iteration=1, best_objective=0.5), tensors)
    if older:
        os.replace(tmp_path / "older", tmp_path / "checkpoints" / "iteration-000002")
    folder = tmp_path / "checkpoints" / "iteration-000004"
    found = checkpoints.newest()
    assert found is not None
    assert found[0].iteration == 4
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    found = checkpoints.newest()
    assert (found and found[0].iteration) == (2 if older else None)
    assert f"checkpoint {folder} cannot be used (" in caplog.text


def test_samples_are_logged_and_hostile_text_stays_inside_its_line(tmp_path: Path) -> None:
    hostile = "\x1b[2J\u202e\u2028\n</script>\ud800"
    asked = [Prompt("p\n", ({"role": "user", "content": "ab"},))]
    ppo = trainer(tmp_path, log_samples=3)
    rollouts = ppo.rollout(0)
    rollouts.texts[0], rollouts.prompts[0] = hostile, asked[0]
    lines = [json.dumps(sample) for sample in rollouts.samples(3)]
    assert len(lines) == 3
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert json.loads(lines[0])["completion"] == hostile
    run(tmp_path, log_samples=3)
    written = lines_of(tmp_path / "samples.jsonl")
    assert [line["iteration"] for line in written] == [0, 0, 0, 1, 1, 1]
    assert set(written[0]) == {
        "iteration", "prompt_id", "prompt", "completion", "score", "kl", "tokens", "finish_reason"
    }  # fmt: skip


def test_no_samples_are_logged_where_none_are_wanted(tmp_path: Path) -> None:
    run(tmp_path, log_samples=0)
    assert (tmp_path / "samples.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": Keep.best}, "ppo.eval_every"),
        ({"value_init": ValueInit.pm, "relative_reward": True}, "value_init=zero"),
        ({"stop_kl": 0.0}, "ppo.stop_kl=0.0: must be above 0 or null"),
        ({"length_penalty": -1.0}, "ppo.length_penalty=-1.0"),
        ({"eval_every": -1}, "ppo.eval_every=-1"),
        ({"eval_prompts": 0}, "ppo.eval_prompts=0"),
        ({"log_samples": -1}, "ppo.log_samples=-1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ppo_config(**changes)


def test_every_prompt_is_used_once_per_round(tmp_path: Path) -> None:
    stream = trainer(tmp_path).stream
    drawn, position = [], 0
    for _ in range(3):
        taken, position = stream.take(4, position)
        drawn += [prompt.prompt_id for prompt, _ in taken]
    names = [prompt.prompt_id for prompt in PROMPTS]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == names
    assert drawn[:6] != drawn[6:]


def test_long_prompts_are_left_out_and_none_left_is_an_error(tmp_path: Path) -> None:
    # The prompts have 21, 23, ... 31 tokens.
    stream = trainer(tmp_path, max_prompt_length=25).stream
    taken, position = stream.take(6, 0)
    assert sorted(prompt.prompt_id for prompt, _ in taken) == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert 6 < position <= 12
    with pytest.raises(UserError, match="no prompt is that short"):
        trainer(tmp_path, max_prompt_length=3)


def test_validation_prompts_keep_to_the_same_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Left out before so many are taken, so that as many are measured as there can be."""
    longest_first = VALIDATION[::-1]  # of 29, 27, ... 21 tokens
    settings = ppo_config(eval_every=1, eval_prompts=2, max_prompt_length=25)
    policy = load_policy(TINY, settings.tuning, settings.lora)
    ppo = PPOTrainer(settings, policy, PROMPTS, vowels, tmp_path, 0, longest_first)
    assert [prompt.prompt_id for prompt in ppo.validation] == ["v2", "v1"]
    assert "2 of 4 validation prompts have more than ppo.max_prompt_length=25 tokens" in caplog.text
    with pytest.raises(UserError, match=r"ppo.eval_every=1: none of 5 validation prompts has at most"):
        check_lengths(ppo_config(eval_every=1, max_prompt_length=3), TINY, VALIDATION)


def test_lengths_that_the_model_cannot_take_are_refused(tmp_path: Path) -> None:
    check_lengths(ppo_config(max_prompt_length=2042, max_new_tokens=6), TINY, [])
    load_policy(TINY, Tuning.lora, LoraSettings(r=4)).save(tmp_path)
    for start in (TINY, ModelConfig(name=str(tmp_path), device="cpu")):
        with pytest.raises(UserError, match=r"length=2043 .* make 2049 tokens, and policy.name=.* takes 2048"):
            check_lengths(ppo_config(max_prompt_length=2043, max_new_tokens=6), start, [])


def test_prompts_are_encoded_when_their_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    monkeypatch.setattr(
        "rlaif.methods.ppo_rollout.encode_chat", lambda tokenizer, messages: encoded.append(messages) or [1, 2]
    )
    stream = PromptStream([PROMPTS[0]] * 10_000, None, 5, seed=0)
    stream.take(8, 0)
    assert len(encoded) == 9


def weights(folder: Path) -> bytes:
    return (folder / "policy" / "adapter_model.safetensors").read_bytes()


def test_a_resumed_run_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ppo_config(iterations=4, save_every=2, kl_control=KLControl.adaptive, epochs=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    train_ppo(settings, TINY, PROMPTS, vowels, whole, seed=3)
    step = PPOTrainer.step

    def dies(self: PPOTrainer, iteration: int) -> Any:
        if iteration == 3:
            raise KeyboardInterrupt
        return step(self, iteration)

    monkeypatch.setattr(PPOTrainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_ppo(settings, TINY, PROMPTS, vowels, cut, seed=3)
    monkeypatch.undo()
    assert (cut / "checkpoints" / "iteration-000002").is_dir()
    train_ppo(settings, TINY, PROMPTS, vowels, cut, seed=3)
    assert weights(cut) == weights(whole)
    assert not (cut / "checkpoints").exists()

    def curve(folder: Path) -> list[str]:
        lines = (folder / "training.jsonl").read_text().splitlines()
        return [line.split('"seconds"')[0] for line in lines]

    assert curve(cut) == curve(whole)


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
def test_ppo_raises_the_score(tmp_path: Path, tuning: Tuning) -> None:
    settings = ppo_config(
        tuning=tuning,
        iterations=12,
        rollouts=32,
        minibatch_size=8,
        micro_batch_size=8,
        learning_rate=2e-2 if tuning is Tuning.lora else 2e-3,
        kl_coef=0.01,
    )
    train_ppo(settings, TINY, PROMPTS, vowels, tmp_path, seed=0)
    scores = [line["score"] for line in lines_of(tmp_path / "training.jsonl")]
    assert sum(scores[-3:]) / 3 > sum(scores[:2]) / 2 + 0.1


def test_a_strong_kl_penalty_holds_the_policy(tmp_path: Path) -> None:
    kls = []
    for kl_coef in (0.0, 5.0):
        folder = tmp_path / str(kl_coef)
        folder.mkdir()
        settings = ppo_config(iterations=8, rollouts=16, learning_rate=2e-2, kl_coef=kl_coef)
        train_ppo(settings, TINY, PROMPTS, vowels, folder, seed=0)
        kls.append(lines_of(folder / "training.jsonl")[-1]["kl"])
    assert kls[1] < kls[0] / 2
