"""DPO and SFT on the tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlaif.config import DPOConfig, LoraSettings, ModelConfig, SFTConfig, Tuning
from rlaif.methods.dpo import train_dpo
from rlaif.methods.sft import train_sft
from rlaif.models import load_causal_lm, load_tokenizer
from rlaif.policy import completion_logps
from rlaif.records import Preference

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
    completion_tokens = completion_ids(tokenizer, completion, True)
    return sum(completion_logps(model, [prompt], [completion_tokens], tokenizer.pad_token_id)[0])


@pytest.mark.parametrize("tuning", list(Tuning))
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


@pytest.mark.parametrize("tuning", list(Tuning))
def test_sft_raises_the_probability_of_chosen_completions(tmp_path: Path, tuning: Tuning) -> None:
    settings = SFTConfig(tuning=tuning, learning_rate=1e-2, batch_size=8, epochs=3, lora=LoraSettings(r=4, alpha=8))
    target = train_sft(settings, TINY, DATA, tmp_path, seed=0)
    assert logp(ModelConfig(name=str(target), device="cpu"), "aaaa") > logp(TINY, "aaaa") + 1


def test_the_sft_loss_is_that_of_completion_tokens_alone(tmp_path: Path) -> None:
    from rlaif.chat import encode_chat
    from rlaif.methods.dpo import completion_ids

    settings = SFTConfig(learning_rate=1e-5, batch_size=4, max_steps=1, lora=LoraSettings(r=4, alpha=8))
    train_sft(settings, TINY, DATA[:4], tmp_path, seed=0)
    tokenizer, model = load_tokenizer(TINY), load_causal_lm(TINY)
    prompts = [encode_chat(tokenizer, row.prompt) for row in DATA[:4]]
    completions = [completion_ids(tokenizer, row.chosen, True) for row in DATA[:4]]
    logps = completion_logps(model, prompts, completions, tokenizer.pad_token_id)
    tokens = [value for row in logps for value in row]
    assert curve(tmp_path)[0]["loss"] == pytest.approx(-sum(tokens) / len(tokens), abs=1e-3)
