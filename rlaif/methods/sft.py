"""Supervised fine-tuning on chosen completions, with TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig as TRLSFTConfig
from trl import SFTTrainer

from rlaif.chat import encode_chat
from rlaif.config import ModelConfig, SFTConfig, Tuning
from rlaif.methods.dpo import completion_ids
from rlaif.methods.supervised import (
    clear_checkpoints,
    drop_long,
    peft_arguments,
    run_trainer,
    trainer_arguments,
)
from rlaif.models import load_causal_lm, load_tokenizer, seed_everything
from rlaif.policy import Policy
from rlaif.records import Preference


def train_sft(config: SFTConfig, start: ModelConfig, train: Sequence[Preference], folder: Path, seed: int) -> Path:
    """Fine-tune on each pair's chosen completion; writes ``policy/`` and ``training.jsonl``.

    The loss is on completion tokens only. A completion that is chosen in several pairs counts once.
    """
    seed_everything(seed)
    tokenizer = load_tokenizer(start)
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for preference in train:
        prompt = encode_chat(tokenizer, preference.prompt)
        completion = completion_ids(tokenizer, preference.chosen, preference.chosen_ended)
        seen[preference.prompt_id, preference.chosen] = {
            "input_ids": prompt + completion,
            "completion_mask": [0] * len(prompt) + [1] * len(completion),
        }
    kept = drop_long(list(seen.values()), lambda row: len(row["input_ids"]), config.max_length, "sft")
    model = load_causal_lm(start, trainable=config.tuning is Tuning.full)
    trainer = SFTTrainer(
        model=model,
        args=TRLSFTConfig(
            **trainer_arguments(config, folder, seed, len(kept)),
            max_length=config.max_length,
            completion_only_loss=True,
        ),
        train_dataset=Dataset.from_list(kept),
        processing_class=tokenizer,
        **peft_arguments(config, model, "CAUSAL_LM"),
    )
    run_trainer(trainer, folder, "sft")
    Policy(trainer.model, tokenizer, config.tuning, start).save(folder / "policy")
    clear_checkpoints(folder)
    return folder / "policy"
