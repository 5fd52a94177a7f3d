"""The in-process engine: any transformers causal language model."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlaif.artifacts import input_hash
from rlaif.chat import encode_chat, encode_text
from rlaif.config import LabelerConfig, ModelConfig
from rlaif.engines.base import (
    CompletionRequest,
    Engine,
    Failure,
    Likelihood,
    OptionMass,
    OptionRequest,
    Sampled,
    SampleRequest,
)
from rlaif.engines.options import Spelling, beginnings, sequence_masses, spellings
from rlaif.generation import generate, left_pad_after
from rlaif.losses import token_logps
from rlaif.models import eos_ids, load_causal_lm, load_tokenizer
from rlaif.policy import completion_logits, pack
from rlaif.prefix import positions_after, read_after, shareable
from rlaif.records import content_hash

_WINDOW = 512


class HFEngine(Engine):
    """Serves a model with transformers, on whatever device it is on."""

    def __init__(self, config: LabelerConfig | ModelConfig, batch_size: int = 64, batch_tokens: int = 4096) -> None:
        if isinstance(config, LabelerConfig):
            batch_tokens = config.batch_tokens
            config = ModelConfig(
                name=config.model,
                revision=config.revision,
                dtype=config.dtype,
                device=config.device,
                trust_remote_code=config.trust_remote_code,
                chat_template_kwargs=config.chat_template_kwargs,
            )
            key = "labeler"
        else:
            key = "policy"
        self.tokenizer = load_tokenizer(config, key)
        self.model = load_causal_lm(config, key)
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.eos = eos_ids(self.model, self.tokenizer)
        # A model without a limit on positions (ALiBi) takes any length.
        self.context: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._spelled: dict[tuple[tuple[str, ...], ...], list[Spelling]] = {}
        self.identity = {
            "engine": "hf",
            "model": config.name,
            "revision": config.revision or getattr(self.model.config, "_commit_hash", None),
            "adapter": config.adapter,
            # A folder's name stays when its weights change.
            "weights": input_hash(Path(config.name)) if config.name and Path(config.name).is_dir() else None,
            "dtype": str(self.model.dtype),
            "template": content_hash(self.tokenizer.chat_template),
        }

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[tuple[int, Sampled | Failure]]:
        """Sample in batches of prompts of similar length; completions end where the context does."""
        return self.told(self._sample(requests), "completions")

    def _sample(self, requests: Iterable[SampleRequest]) -> Iterator[tuple[int, Sampled | Failure]]:
        for window in _windows(enumerate(requests), self.batch_size * 8):
            encoded = []
            for index, request in window:
                ids = encode_chat(self.tokenizer, request.messages)
                if self._beyond(len(ids) + 1):
                    yield index, self._too_long(len(ids))
                    continue
                room = request.max_new_tokens if self.context is None else self.context - len(ids)
                settings = (min(request.max_new_tokens, room), request.temperature, request.top_p)
                # Equal system messages together: a batch reads once what its prompts begin with.
                system = next((m["content"] for m in request.messages if m["role"] == "system"), "")
                encoded.append((settings, system, len(ids), index, ids, request.seed))
            encoded.sort(key=lambda row: row[:3])
            for (max_new_tokens, temperature, top_p), group in itertools.groupby(encoded, key=lambda row: row[0]):
                for batch in _windows(group, self.batch_size):
                    generations = generate(
                        self.model,
                        [ids for *_, ids, _ in batch],
                        [[seed] for *_, seed in batch],
                        max_new_tokens=max_new_tokens,
                        temperature=temperature,
                        top_p=top_p,
                        eos=self.eos,
                        pad=self.tokenizer.pad_token_id,
                    )
                    for (*_, length, index, _, _), generation in zip(batch, generations, strict=True):
                        text = self.tokenizer.decode(generation.tokens, skip_special_tokens=True)
                        yield (
                            index,
                            Sampled(text.strip(), generation.finish_reason, len(generation.tokens), length),
                        )

    def score_options(self, requests: Iterable[OptionRequest]) -> Iterator[tuple[int, OptionMass | Failure]]:
        """One forward pass a request, and one more for each beginning of a longer spelling that may have mass."""
        return self.told(self._score_options(requests), "verdicts")

    def _score_options(self, requests: Iterable[OptionRequest]) -> Iterator[tuple[int, OptionMass | Failure]]:
        for window in _windows(enumerate(requests), _WINDOW):
            encoded = []
            for index, request in window:
                ids = encode_chat(self.tokenizer, request.messages, request.stem)
                if request.options not in self._spelled:
                    self._spelled[request.options] = spellings(self.tokenizer, request.options)
                longest = max(len(spelling.tokens) for spelling in self._spelled[request.options])
                if self._beyond(len(ids) + longest):
                    yield index, self._too_long(len(ids))
                    continue
                encoded.append((len(ids), index, ids, request))
            encoded.sort(key=lambda row: row[0])
            for batch in _token_batches(encoded, self.batch_tokens):
                started = time.perf_counter()
                masses = self._masses([(ids, request.options) for _, _, ids, request in batch])
                seconds = (time.perf_counter() - started) / len(batch)
                for (length, index, _, _), mass in zip(batch, masses, strict=True):
                    yield index, OptionMass(mass, "logprob", prompt_tokens=length, latency_s=seconds)

    def _beyond(self, length: int) -> bool:
        return self.context is not None and length > self.context

    def _too_long(self, length: int) -> Failure:
        return Failure("too_long", f"{length} tokens, and the model takes {self.context}")

    def score_completions(self, requests: Iterable[CompletionRequest]) -> Iterator[tuple[int, Likelihood | Failure]]:
        """One forward pass a request; logits of the completion's positions only."""
        return self.told(self._score_completions(requests), "likelihoods")

    def _score_completions(self, requests: Iterable[CompletionRequest]) -> Iterator[tuple[int, Likelihood | Failure]]:
        for window in _windows(enumerate(requests), _WINDOW):
            encoded = []
            for index, request in window:
                ids = encode_chat(self.tokenizer, request.messages)
                completion = encode_text(self.tokenizer, request.completion)
                if self._beyond(len(ids) + len(completion)):
                    yield index, self._too_long(len(ids) + len(completion))
                    continue
                encoded.append((len(ids) + len(completion), index, ids, completion))
            encoded.sort(key=lambda row: row[0])
            for batch in _token_batches(encoded, self.batch_tokens):
                started = time.perf_counter()
                logps = self._likelihoods([ids for _, _, ids, _ in batch], [tokens for *_, tokens in batch])
                seconds = (time.perf_counter() - started) / len(batch)
                for (_, index, ids, tokens), logp in zip(batch, logps, strict=True):
                    yield index, Likelihood(logp, len(tokens), len(ids), seconds)

    @torch.inference_mode()
    def _likelihoods(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[float]:
        """log P(completion | prompt) of each row; 0 for a completion without tokens."""
        if not any(completions):
            return [0.0] * len(prompts)
        pad, share = self.tokenizer.pad_token_id, shareable(self.model)
        batch = pack(prompts, completions, pad, self.model.device, share)
        logps = token_logps(completion_logits(self.model, batch), batch.tokens)
        return [float(total) for total in (logps * batch.completion_mask).sum(dim=1)]

    @torch.inference_mode()
    def _masses(self, rows: Sequence[tuple[list[int], tuple[tuple[str, ...], ...]]]) -> list[tuple[float, ...]]:
        """Mass of each option of each row, summed over the distinct tokenisations of its spellings."""
        spelled = self._spelled
        following = self._next_logps([ids for ids, _ in rows])
        logps: list[dict[tuple[int, ...], float]] = []
        for row, (_, options) in enumerate(rows):
            logps.append({(first,): float(following[row, first]) for first in {s.tokens[0] for s in spelled[options]}})
        asked = [
            (len(ids) + len(begun), row, begun, wanted)
            for row, (ids, options) in enumerate(rows)
            for begun, wanted in beginnings(spelled[options], logps[row]).items()
        ]
        found: dict[tuple[int, tuple[int, ...]], float] = {}
        for batch in _token_batches(sorted(asked, key=lambda ask: ask[0]), self.batch_tokens):
            following = self._next_logps([[*rows[row][0], *begun] for _, row, begun, _ in batch])
            for place, (_, row, begun, wanted) in enumerate(batch):
                found |= {(row, (*begun, token)): float(following[place, token]) for token in wanted}
        for row, tokens in sorted(found, key=lambda ask: len(ask[1])):
            logps[row][tokens] = logps[row][tokens[:-1]] + found[row, tokens]
        return [
            sequence_masses(spelled[options], known, len(options))
            for (_, options), known in zip(rows, logps, strict=True)
        ]

    def _next_logps(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """Log-probabilities of the token after each row: (rows, vocabulary), float32."""
        pad, share = self.tokenizer.pad_token_id, shareable(self.model)
        prefix, padded, mask = left_pad_after(rows, pad, self.model.device, share)
        arguments = read_after(self.model, prefix, padded, mask, positions_after(prefix, mask), logits_to_keep=1)
        logits = self.model(**arguments, logits_to_keep=1).logits
        return torch.log_softmax(logits[:, -1].float(), dim=-1)

    def close(self) -> None:
        """Free the model."""
        self.model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _windows(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while window := list(itertools.islice(iterator, size)):
        yield window


def _token_batches(rows: Sequence[tuple[int, Any, Any, Any]], limit: int) -> Iterator[list[Any]]:
    """Batches of rows sorted by length, with at most ``limit`` padded tokens (at least one row)."""
    batch: list[Any] = []
    for row in rows:
        if batch and row[0] * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
