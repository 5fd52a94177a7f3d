"""Preference model training: the loss, the export, the metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlaif.config import LoraSettings, ModelConfig, PMConfig, Tuning
from rlaif.methods.pm import train_pm
from rlaif.preference_model import PreferenceModel, separate_pad_token
from rlaif.records import Preference, UserError

TINY = ModelConfig(name="tiny", device="cpu")


def preferences(count: int, p_chosen: float = 0.95) -> list[Preference]:
    """Chosen completions are made of a, rejected ones of z."""
    return [
        Preference(
            prompt_id=f"p{i}",
            prompt=({"role": "user", "content": f"question {i}"},),
            chosen="a" * (3 + i % 4),
            rejected="z" * (3 + (i + 1) % 4),
            chosen_id="0",
            rejected_id="1",
            p_chosen=p_chosen,
            labeler="test",
            feedback="ai",
        )
        for i in range(count)
    ]


def settings(**changes: object) -> PMConfig:
    values = {"learning_rate": 1e-2, "batch_size": 8, "lora": LoraSettings(r=4, alpha=8)} | changes
    return PMConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
def test_a_pm_learns_and_its_folder_gives_the_same_scores(tmp_path: Path, tuning: Tuning) -> None:
    data = preferences(64)
    target = train_pm(settings(tuning=tuning), TINY, data, preferences(20), tmp_path, seed=0)
    metrics = json.loads((tmp_path / "pm_metrics.json").read_text())
    assert metrics["accuracy"] > 0.9
    assert metrics["nll"] < 0.6
    assert metrics["train_pairs"] == 64
    model = PreferenceModel(ModelConfig(name=str(target), device="cpu"))
    example = (data[0].prompt, "aaaa")
    alone = model.score([example])[0]
    together = model.score([example, (data[0].prompt, "z" * 60), (data[3].prompt, "a")])[0]
    assert alone == pytest.approx(together, abs=1e-4)


def test_soft_labels_of_one_half_teach_nothing(tmp_path: Path) -> None:
    train_pm(settings(center_coefficient=0.0), TINY, preferences(32, 0.5), preferences(10), tmp_path, seed=0)
    metrics = json.loads((tmp_path / "pm_metrics.json").read_text())
    assert metrics["nll"] == pytest.approx(0.6931, abs=2e-2)


def test_soft_labels_are_learnt_as_probabilities(tmp_path: Path) -> None:
    train_pm(settings(epochs=4.0), TINY, preferences(64, 0.7), preferences(20, 0.7), tmp_path, seed=0)
    metrics = json.loads((tmp_path / "pm_metrics.json").read_text())
    # The least possible loss is the entropy of a 0.7 coin: 0.6109.
    assert metrics["nll"] == pytest.approx(0.6109, abs=0.02)


def test_long_pairs_are_dropped_and_counted(tmp_path: Path) -> None:
    data = preferences(16)
    long = [Preference(**{**vars(data[0]), "prompt_id": "long", "chosen": "a" * 400})]
    train_pm(settings(max_length=128), TINY, data + long, data, tmp_path, seed=0)
    assert json.loads((tmp_path / "pm_metrics.json").read_text())["dropped_long"] == 1
    with pytest.raises(UserError, match="max_length=8"):
        train_pm(settings(max_length=8), TINY, data, data, tmp_path / "none", seed=0)


def test_the_pad_token_is_never_the_last_token() -> None:
    from rlaif.models import load_tokenizer

    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
    tokenizer.pad_token = "<|im_end|>"
    separate_pad_token(tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_new_head_scores_everything_zero() -> None:
    from rlaif.models import load_sequence_scorer

    model = load_sequence_scorer(TINY, new_head=True)
    assert torch.count_nonzero(model.score.weight) == 0
