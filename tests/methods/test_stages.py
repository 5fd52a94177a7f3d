"""What a stage of training leaves behind."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from rlaif.config import DPOConfig, EvalConfig, Feedback, Method, TrainConfig, Tuning
from rlaif.train import fit
from tests.methods.problem import TINY


def models() -> set[int]:
    """Those in memory."""
    return {id(each) for each in gc.get_objects() if issubclass(type(each), PreTrainedModel)}


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
def test_no_model_outlives_its_training(tmp_path: Path, tuning: Tuning) -> None:
    """Not even until Python would look for what refers to itself: the evaluation loads its own."""
    rows = [{"prompt": f"say {i}", "chosen": "aa", "rejected": "bb"} for i in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = TrainConfig(
        method=Method.dpo,
        feedback=Feedback.human,
        preferences=str(tmp_path),
        policy=TINY,
        dpo=DPOConfig(tuning=tuning, max_steps=1, batch_size=2, report_to=[]),
        eval=EvalConfig(enabled=False),
    )
    gc.collect()
    before = models()
    gc.disable()
    try:
        fit(config, tmp_path / "out")
        assert models() <= before
    finally:
        gc.enable()
