"""PPO on the tiny model: start checks and their detectors, gradients, resuming, learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlaif import losses
from rlaif.config import KLControl, LoraSettings, ModelConfig, PPOConfig, Tuning
from rlaif.methods.ppo import PPOTrainer, train_ppo
from rlaif.methods.ppo_checks import StartCheckError, check_start, more_padding
from rlaif.models import seed_everything
from rlaif.policy import load_policy
from rlaif.records import Prompt, UserError

TINY = ModelConfig(name="tiny", device="cpu")
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": "ab" * (i + 1)},)) for i in range(6)]


def vowels(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / 4 for text in texts]


def config(**changes: Any) -> PPOConfig:
    base = PPOConfig(
        iterations=2,
        rollouts=8,
        minibatch_size=4,
        micro_batch_size=4,
        max_new_tokens=6,
        learning_rate=1e-2,
        lora=LoraSettings(r=4, alpha=8),
    )
    return dataclasses.replace(base, **changes)


def trainer(tmp_path: Path, **changes: Any) -> PPOTrainer:
    seed_everything(0)
    settings = config(**changes)
    policy = load_policy(TINY, settings.tuning, settings.lora)
    return PPOTrainer(settings, policy, PROMPTS, vowels, tmp_path, seed=0)


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
    batch = rollouts.batch
    for row in range(len(batch)):
        ids = batch.ids[row][batch.mask[row].bool()]
        length = int(batch.completion_mask[row].sum())
        with torch.no_grad():
            logits = ppo.model(ids.unsqueeze(0)).logits[0] / 0.7
        expected = torch.log_softmax(logits, -1)[:-1].gather(-1, ids[1:, None]).squeeze(-1)[-length:]
        assert torch.allclose(rollouts.logps[row, :length], expected, atol=1e-4)
        assert torch.allclose(ppo.evaluate_policy(batch)[0][row, :length], expected, atol=1e-4)


def test_start_check_catches_a_policy_that_is_not_its_reference(tmp_path: Path) -> None:
    ppo = trainer(tmp_path)
    with torch.no_grad():
        for name, parameter in ppo.policy.trainable():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    with pytest.raises(StartCheckError, match="KL to the reference"):
        check_start(ppo, ppo.rollout(0))


def test_start_check_catches_a_value_head_that_is_not_zero(tmp_path: Path) -> None:
    ppo = trainer(tmp_path)
    torch.nn.init.ones_(ppo.value_head.linear.bias)
    with pytest.raises(StartCheckError, match="value"):
        check_start(ppo, ppo.rollout(0))


def test_start_check_catches_logps_scored_at_another_temperature(tmp_path: Path) -> None:
    ppo = trainer(tmp_path)
    rollouts = ppo.rollout(0)
    ppo.config = dataclasses.replace(ppo.config, temperature=0.5)
    with pytest.raises(StartCheckError, match="probability ratio"):
        check_start(ppo, rollouts)


def test_start_check_catches_dropout(tmp_path: Path) -> None:
    ppo = trainer(tmp_path)
    rollouts = ppo.rollout(0)
    handle = ppo.model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: torch.nn.functional.dropout(output, 0.3, training=True)
    )
    with pytest.raises(StartCheckError, match="probability ratio"):
        check_start(ppo, rollouts)
    handle.remove()


def test_start_check_catches_positions_that_count_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ppo = trainer(tmp_path)
    rollouts = ppo.rollout(0)
    plain = more_padding

    def broken(batch: Any, pad: int, columns: int = 3) -> Any:
        # What a forward pass without an attention mask amounts to: padding is seen as text.
        wide = plain(batch, pad, columns)
        return dataclasses.replace(wide, mask=torch.ones_like(wide.mask))

    monkeypatch.setattr("rlaif.methods.ppo_checks.more_padding", broken)
    with pytest.raises(StartCheckError, match="padding"):
        check_start(ppo, rollouts)


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


def test_gradients_are_clipped(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, max_grad_norm=1e-3)
    rollouts = ppo.rollout(0)
    advantages = torch.ones_like(rollouts.logps) * 100
    statistics = ppo.minibatch(torch.arange(4), rollouts, advantages, advantages, train_policy=True)
    assert statistics["grad_norm"] > 1e-3
    total = torch.cat([p.grad.flatten() for p in [*ppo.parameters, *ppo.value_head.parameters()]]).norm()
    assert float(total) == pytest.approx(1e-3, rel=1e-2)


def test_warmup_trains_only_the_value_head(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, warmup_iterations=1, iterations=1)
    before = {name: value.clone() for name, value in ppo.policy.trainable()}
    ppo.train()
    assert all(torch.equal(before[name], value) for name, value in ppo.policy.trainable())
    assert float(ppo.value_head.linear.weight.detach().abs().sum()) > 0


def test_scores_are_normalised_on_the_reference_and_clipped(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, score_clip=1.0)
    normalized = ppo.normalize(torch.tensor([1.0, 2.0, 3.0, 10.0]))
    assert ppo.progress.score_mean == 4.0
    assert ppo.progress.score_std == pytest.approx(3.5355339)
    assert normalized.tolist() == pytest.approx([-0.8485281, -0.5656854, -0.2828427, 1.0])
    assert ppo.normalize(torch.tensor([4.0])).tolist() == [0.0]


def test_every_prompt_is_used_once_per_round(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, rollouts=4)
    drawn = [index for iteration in range(3) for index in ppo.draw_prompts(iteration)]
    assert sorted(drawn[:6]) == list(range(6))
    assert sorted(drawn[6:12]) == list(range(6))


def test_long_prompts_are_left_out_and_none_left_is_an_error(tmp_path: Path) -> None:
    # The prompts have 21, 23, ... 31 tokens.
    assert len(trainer(tmp_path, max_prompt_length=25).prompts) == 3
    with pytest.raises(UserError, match="no prompt is that short"):
        trainer(tmp_path, max_prompt_length=3)


def weights(folder: Path) -> bytes:
    return (folder / "policy" / "adapter_model.safetensors").read_bytes()


def test_a_resumed_run_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(iterations=4, save_every=2, kl_control=KLControl.adaptive, epochs=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    train_ppo(settings, TINY, PROMPTS, vowels, whole, seed=3)
    step = PPOTrainer.step

    def dies(self: PPOTrainer, iteration: int) -> dict[str, Any]:
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
    settings = config(
        tuning=tuning,
        iterations=12,
        rollouts=32,
        minibatch_size=8,
        micro_batch_size=8,
        learning_rate=2e-2 if tuning is Tuning.lora else 2e-3,
        kl_coef=0.01,
    )
    train_ppo(settings, TINY, PROMPTS, vowels, tmp_path, seed=0)
    import json

    scores = [json.loads(line)["score"] for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert sum(scores[-3:]) / 3 > sum(scores[:2]) / 2 + 0.1


def test_a_strong_kl_penalty_holds_the_policy(tmp_path: Path) -> None:
    import json

    kls = []
    for kl_coef in (0.0, 5.0):
        folder = tmp_path / str(kl_coef)
        folder.mkdir()
        settings = config(iterations=8, rollouts=16, learning_rate=2e-2, kl_coef=kl_coef)
        train_ppo(settings, TINY, PROMPTS, vowels, folder, seed=0)
        kls.append(json.loads((folder / "training.jsonl").read_text().splitlines()[-1])["kl"])
    assert kls[1] < kls[0] / 2
