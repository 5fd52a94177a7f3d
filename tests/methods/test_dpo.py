"""DPO and SFT on the tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlaif.config import DPOConfig, DPOLoss, LoraSettings, ModelConfig, SFTConfig, Tuning
from rlaif.demonstrations import Demonstration, chosen_completions
from rlaif.methods.dpo import train_dpo
from rlaif.methods.sft import _rows, train_sft
from rlaif.models import check_tuning, load_causal_lm, load_tokenizer
from rlaif.policy import completion_logps
from rlaif.records import Preference, UserError

TINY = ModelConfig(name="tiny", device="cpu")
DATA = [
    Preference(
        prompt_id=f"p{i}",
        prompt=({"role": "user", "content": f"question {i}"},),
        chosen="aaaa",
        rejected="zzzzzz",
        chosen_id="0",
        rejected_id="1",
        p_chosen=0.9,
        labeler="test",
        feedback="ai",
        rejected_ended=i % 2 == 0,
    )
    for i in range(32)
]


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def logp(model_config: ModelConfig, completion: str) -> float:
    tokenizer = load_tokenizer(model_config)
    model = load_causal_lm(model_config)
    from rlaif.chat import encode_chat
    from rlaif.methods.dpo import completion_ids

    prompt = encode_chat(tokenizer, DATA[0].prompt)
    completion_tokens = completion_ids(tokenizer, completion, tokenizer.eos_token_id)
    return sum(completion_logps(model, [prompt], [completion_tokens], tokenizer.pad_token_id)[0])


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
def test_dpo_starts_at_log_two_and_separates_the_pair(tmp_path: Path, tuning: Tuning) -> None:
    settings = DPOConfig(
        tuning=tuning, learning_rate=1e-2, batch_size=8, epochs=3, lora=LoraSettings(r=4, alpha=8), warmup_ratio=0.0
    )
    target = train_dpo(settings, TINY, DATA, tmp_path, seed=0)
    lines = curve(tmp_path)
    # At the first step policy and reference agree: the margin is 0, whatever the label.
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert lines[-1]["loss"] < lines[0]["loss"]
    trained = ModelConfig(name=str(target), device="cpu")
    gain = logp(trained, "aaaa") - logp(TINY, "aaaa")
    loss = logp(trained, "zzzzzz") - logp(TINY, "zzzzzz")
    assert gain > loss


def test_dpo_on_labels_of_one_half_leaves_the_policy(tmp_path: Path) -> None:
    even = [Preference(**{**vars(row), "p_chosen": 0.5}) for row in DATA]
    settings = DPOConfig(learning_rate=1e-3, batch_size=8, lora=LoraSettings(r=4, alpha=8))
    target = train_dpo(settings, TINY, even, tmp_path, seed=0)
    trained = ModelConfig(name=str(target), device="cpu")
    assert logp(trained, "aaaa") == pytest.approx(logp(TINY, "aaaa"), abs=0.05)


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
def test_sft_raises_the_probability_of_chosen_completions(tmp_path: Path, tuning: Tuning) -> None:
    settings = SFTConfig(tuning=tuning, learning_rate=1e-2, batch_size=8, epochs=3, lora=LoraSettings(r=4, alpha=8))
    target = train_sft(settings, TINY, chosen_completions(DATA), tmp_path, seed=0)
    assert logp(ModelConfig(name=str(target), device="cpu"), "aaaa") > logp(TINY, "aaaa") + 1


def test_the_sft_loss_is_that_of_completion_tokens_alone(tmp_path: Path) -> None:
    from rlaif.chat import encode_chat
    from rlaif.methods.dpo import completion_ids

    settings = SFTConfig(learning_rate=1e-5, batch_size=4, max_steps=1, lora=LoraSettings(r=4, alpha=8))
    train_sft(settings, TINY, chosen_completions(DATA[:4]), tmp_path, seed=0)
    tokenizer, model = load_tokenizer(TINY), load_causal_lm(TINY)
    prompts = [encode_chat(tokenizer, row.prompt) for row in DATA[:4]]
    completions = [completion_ids(tokenizer, row.chosen, tokenizer.eos_token_id) for row in DATA[:4]]
    logps = completion_logps(model, prompts, completions, tokenizer.pad_token_id)
    tokens = [value for row in logps for value in row]
    assert curve(tmp_path)[0]["loss"] == pytest.approx(-sum(tokens) / len(tokens), abs=1e-3)


@pytest.mark.parametrize("kind", list(DPOLoss))
def test_every_loss_trains(tmp_path: Path, kind: DPOLoss) -> None:
    settings = DPOConfig(
        loss_type=kind,
        label_smoothing=0.01,
        learning_rate=1e-3,
        batch_size=8,
        max_steps=2,
        lora=LoraSettings(r=4, alpha=8),
    )
    train_dpo(settings, TINY, DATA, tmp_path, seed=0)
    lines = curve(tmp_path)
    assert len(lines) == 2
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[0]["grad_norm"] > 0


def test_accumulated_steps_are_those_of_a_whole_batch(tmp_path: Path) -> None:
    weights = []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        settings = DPOConfig(
            learning_rate=1e-3,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            lora=LoraSettings(r=4, alpha=8),
        )
        target = train_dpo(settings, TINY, DATA, tmp_path / str(batch_size), seed=0)
        weights.append(load_file(target / "adapter_model.safetensors"))
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-5), name


def test_plain_text_is_trained_on_whole_and_in_pieces(tmp_path: Path) -> None:
    """Continued pre-training: no chat template, a loss on every token, long texts in pieces of max_length."""
    tokenizer = load_tokenizer(TINY)
    text = "abcdefghij" * 5
    rows = list(_rows(tokenizer, [Demonstration((), text)], max_length=20))
    assert [len(row["input_ids"]) for row in rows] == [20, 20, 11]
    ids = [token for row in rows for token in row["input_ids"]]
    assert tokenizer.decode(ids[:-1]) == text
    assert ids[-1] == tokenizer.eos_token_id
    assert all(set(row["completion_mask"]) == {1} for row in rows)
    settings = SFTConfig(learning_rate=1e-2, batch_size=4, epochs=10, max_length=20, lora=LoraSettings(r=4, alpha=8))
    train_sft(settings, TINY, [Demonstration((), text)] * 8, tmp_path, seed=0)
    lines = curve(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"] - 1


def test_qlora_without_a_gpu_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"dpo.tuning=qlora needs a CUDA GPU.*dpo.tuning=lora"):
        check_tuning(Tuning.qlora, TINY, "dpo")
    check_tuning(Tuning.lora, TINY, "dpo")
