"""Supervised fine-tuning on demonstrations, with TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig as TRLSFTConfig
from trl import SFTTrainer

from rlaif.chat import encode_chat, encode_text, turn_end
from rlaif.config import ModelConfig, TrainerSettings
from rlaif.demonstrations import Demonstration
from rlaif.methods.dpo import completion_ids
from rlaif.methods.supervised import (
    drop_long,
    load_start,
    on_one_device,
    peft_arguments,
    run_trainer,
    save_result,
    trainer_arguments,
)
from rlaif.models import load_tokenizer, seed_everything
from rlaif.policy import Policy


def train_sft(
    config: TrainerSettings,
    start: ModelConfig,
    demonstrations: Sequence[Demonstration],
    folder: Path,
    seed: int,
    method: str = "sft",
) -> Path:
    """Fine-tune on demonstrations; writes ``policy/`` and ``training.jsonl``.

    The loss is on completion tokens only; of a plain text, on all of it.
    """
    seed_everything(seed)
    tokenizer = load_tokenizer(start)
    rows = list(_rows(tokenizer, demonstrations, config.max_length))
    kept = drop_long(rows, lambda row: len(row["input_ids"]), config.max_length, method)
    model = load_start(start, config.tuning)
    arguments = TRLSFTConfig(
        **trainer_arguments(config, start, folder, seed, len(kept)),
        max_length=config.max_length,
        completion_only_loss=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=on_one_device(arguments, start),
        train_dataset=Dataset.from_list(kept),
        processing_class=tokenizer,
        **peft_arguments(config, start, model, "CAUSAL_LM"),
    )
    run_trainer(trainer, folder, method)
    policy = Policy(trainer.model, tokenizer, config.tuning, start)
    save_result(trainer, folder, method, lambda: policy.save(folder / "policy"))
    return folder / "policy"


def _rows(tokenizer: Any, demonstrations: Sequence[Demonstration], max_length: int) -> Iterator[dict[str, Any]]:
    """Token ids with 1 where there is a loss. Plain text is cut into pieces of ``max_length`` tokens."""
    end = turn_end(tokenizer)
    for demonstration in demonstrations:
        if demonstration.prompt:
            prompt = encode_chat(tokenizer, demonstration.prompt)
            completion = completion_ids(tokenizer, demonstration.completion, end if demonstration.ended else None)
            yield {
                "input_ids": prompt + completion,
                "completion_mask": [0] * len(prompt) + [1] * len(completion),
            }
            continue
        # The end of a text is eos, not the end of a turn; it starts as the tokenizer starts any text.
        first = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
        ids = [*first, *encode_text(tokenizer, demonstration.completion), tokenizer.eos_token_id]
        for begin in range(0, len(ids), max_length):
            piece = ids[begin : begin + max_length]
            yield {"input_ids": piece, "completion_mask": [1] * len(piece)}
