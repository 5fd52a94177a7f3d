"""Scoring completions with a preference model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlaif.chat import encode_chat
from rlaif.config import ModelConfig
from rlaif.generation import left_pad
from rlaif.models import load_sequence_scorer, load_tokenizer
from rlaif.records import Message, UserError


def encode_example(tokenizer: Any, prompt: Sequence[Message], completion: str) -> list[int]:
    """Token ids of the whole conversation, as the chat template renders it; the score is read at the last one."""
    messages = [*prompt, {"role": "assistant", "content": completion}]
    return encode_chat(tokenizer, messages, generation_prompt=False)


def separate_pad_token(tokenizer: Any) -> None:
    """Give the tokenizer a pad token that no conversation ends with.

    transformers' classification models find the last token by looking for padding. Where pad equals eos and a
    template ends with eos, they would read the score one token early.
    """
    last = encode_example(tokenizer, [{"role": "user", "content": "a"}], "b")[-1]
    if tokenizer.pad_token_id != last:
        return
    others = [
        str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special and number != last
    ]
    if others:
        tokenizer.pad_token = others[0]


class PreferenceModel:
    """A sequence-classification model with one output, and its tokenizer."""

    def __init__(self, config: ModelConfig, batch_tokens: int = 8192) -> None:
        path = str(config.name)
        if Path(path).is_dir() and not any(
            (Path(path) / name).is_file() for name in ("config.json", "adapter_config.json")
        ):
            raise UserError(f"preference_model={path}: not a model folder (no config.json or adapter_config.json)")
        self.tokenizer = load_tokenizer(config, "preference_model")
        self.model = load_sequence_scorer(config, "preference_model")
        if hasattr(self.model, "merge_and_unload"):
            # Only scored with, never trained further: without the adapter's extra products it is faster.
            self.model = self.model.merge_and_unload()
        self.batch_tokens = batch_tokens

    def score(self, examples: Sequence[tuple[Sequence[Message], str]]) -> list[float]:
        """The score of each (prompt, completion)."""
        encoded = [encode_example(self.tokenizer, prompt, completion) for prompt, completion in examples]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        scores = [0.0] * len(encoded)
        batch: list[int] = []
        for index in order:
            if batch and len(encoded[index]) * (len(batch) + 1) > self.batch_tokens:
                self._score_batch(batch, encoded, scores)
                batch = []
            batch.append(index)
        if batch:
            self._score_batch(batch, encoded, scores)
        return scores

    @torch.inference_mode()
    def _score_batch(self, batch: list[int], encoded: list[list[int]], scores: list[float]) -> None:
        device = next(self.model.parameters()).device
        ids, mask = left_pad([encoded[index] for index in batch], self.tokenizer.pad_token_id, device)
        hidden = last_hidden(self.model, ids, mask)
        for index, score in zip(batch, head_scores(self.model, hidden).tolist(), strict=True):
            scores[index] = score


def last_hidden(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hidden state of the last token of left-padded rows: (B, T) -> (B, H).

    Read from the backbone by position, not by searching for padding: where pad equals eos, such a search (the one
    in transformers' classification models) would stop one token early.
    """
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    backbone = _classifier(model).base_model
    return backbone(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)[0][:, -1]


def head_scores(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Scores of last hidden states: (B, H) -> (B,), float32."""
    head = _classifier(model).score
    weight = next(head.parameters())
    return head(hidden.to(weight.dtype)).squeeze(-1).float()


def _classifier(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper (whose layers are replaced in place), or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
