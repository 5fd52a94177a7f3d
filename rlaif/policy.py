"""What every method needs of a policy: packed batches, completion logits, adapters, merged weights, saving."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlaif.config import LoraSettings, ModelConfig, Tuning
from rlaif.generation import left_pad_after
from rlaif.in_line import Line, in_line, read_in_line
from rlaif.lora import lean, rounded_once
from rlaif.losses import token_logps
from rlaif.models import inner, is_adapter, load_causal_lm, load_tokenizer, lora_config, merge, save_model
from rlaif.prefix import positions_after, read_after, shareable
from rlaif.sharding import gathered
from rlaif.trunk import starting_at


@dataclass(frozen=True)
class Packed:
    """Prompts padded on the left, completions on the right, so that all completions share their columns.

    ``ids``, ``mask``, ``positions``: (B, P + T). ``tokens``, ``completion_mask``: (B, T); the mask is float.
    ``prefix``: (L,), tokens before every row, which stand in none of the others; positions count them.
    ``trunk``: (B, P + T, H), what the first ``trunk_layers`` layers put out for the rows (:mod:`rlaif.trunk`), and
    ``prefix_trunk``: (1, L, H), for the prefix.
    ``in_line``: whether a pass may take the rows behind each other (:mod:`rlaif.in_line`).
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    tokens: Tensor
    completion_mask: Tensor
    prefix: Tensor | None = None
    trunk: Tensor | None = None
    prefix_trunk: Tensor | None = None
    trunk_layers: int = 0
    in_line: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Tensor) -> Packed:
        """Some of the rows, with columns that are padding in all of them removed."""
        columns = self.columns(rows)
        longest = columns.stop - self.prompt_width
        return Packed(
            self.ids[rows, columns],
            self.mask[rows, columns],
            self.positions[rows, columns],
            self.tokens[rows, :longest],
            self.completion_mask[rows, :longest],
            self.prefix,
            None if self.trunk is None else self.trunk[rows, columns],
            self.prefix_trunk,
            self.trunk_layers,
            self.in_line,
        )

    def whole(self) -> Packed:
        """The same rows, each with the prefix, and without a trunk."""
        if self.prefix is None:
            return replace(self, trunk=None)
        prefix = self.prefix.expand(len(self), -1)
        mask = torch.cat([torch.ones_like(prefix), self.mask], dim=1)
        positions = torch.cat([torch.arange(len(self.prefix), device=mask.device).expand_as(prefix), self.positions], 1)
        # Padding first, the other columns in their order.
        order = torch.arange(mask.shape[1], device=mask.device).repeat(len(self), 1)
        width = len(self.prefix) + self.prompt_width
        order[:, :width] = mask[:, :width].argsort(dim=1, stable=True)
        ids = torch.cat([prefix, self.ids], dim=1)
        ids, mask, positions = (each.gather(1, order) for each in (ids, mask, positions))
        return Packed(ids, mask, positions, self.tokens, self.completion_mask)

    def longest(self) -> int:
        """Tokens of the longest row, with the prefix."""
        return int(self.mask.sum(dim=1).max()) + (0 if self.prefix is None else len(self.prefix))

    @property
    def prompt_width(self) -> int:
        """Columns before the completions."""
        return self.ids.shape[1] - self.tokens.shape[1]

    def columns(self, rows: Tensor) -> slice:
        """The columns that are not padding in all of these rows."""
        longest = max(int(self.completion_mask[rows].sum(dim=1).max()), 1)
        used = int(self.mask[rows, : self.prompt_width].sum(dim=1).max())
        return slice(self.prompt_width - used, self.prompt_width + longest)


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad: int,
    device: torch.device,
    share: bool = False,
) -> Packed:
    """Pack token ids of prompts and their completions; with ``share``, what all prompts begin with stands apart."""
    prefix, left, left_mask = left_pad_after(prompts, pad, device, share)
    width = max(len(row) for row in completions)
    tokens = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for index, row in enumerate(completions):
        tokens[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    full_mask = torch.cat([left_mask, mask], dim=1)
    return Packed(
        ids=torch.cat([left, tokens], dim=1),
        mask=full_mask,
        positions=positions_after(prefix, full_mask),
        tokens=tokens,
        completion_mask=mask.float(),
        prefix=prefix,
        in_line=share,
    )


def _arguments(model: Any, batch: Packed, run: Any, **settings: Any) -> dict[str, Any]:
    """Arguments of a forward pass over the rows by (a part of) the model, once the prefix has been read."""
    with starting_at(model, batch.prefix_trunk, batch.trunk_layers):
        return read_after(model, batch.prefix, batch.ids, batch.mask, batch.positions, run, **settings)


def completion_logits(model: Any, batch: Packed, temperature: float = 1.0) -> Tensor:
    """Logits that predict each completion token: (B, T, V). Prompt positions get none."""
    keep = batch.tokens.shape[1] + 1
    arguments = _arguments(model, batch, model, logits_to_keep=1)
    with starting_at(model, batch.trunk, batch.trunk_layers):
        output = model(**arguments, logits_to_keep=keep)
    logits = output.logits[:, -keep:-1]
    return logits if temperature == 1 else logits / temperature


def completion_states(model: Any, batch: Packed) -> Tensor:
    """Hidden states that the output head turns into those logits: (B, T, H). No logits are made."""
    keep = batch.tokens.shape[1] + 1
    backbone = inner(model).base_model
    if batch.in_line and in_line(model, batch.longest()):
        line, trunk, before = Line(batch.prefix, batch.mask), batch.trunk, batch.prefix_trunk
        if trunk is not None:
            trunk = line.flat(trunk, trunk[0, :0] if before is None else before[0])
        with starting_at(model, trunk, batch.trunk_layers):
            return read_in_line(backbone, line, batch.ids, batch.positions)[:, -keep:-1]
    arguments = _arguments(model, batch, backbone)
    with starting_at(model, batch.trunk, batch.trunk_layers):
        output = backbone(**arguments)
    return output[0][:, -keep:-1]


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Whether logits are the output head of the backbone's states and nothing else (Gemma 2 caps them, for one)."""
    head, backbone = model.get_output_embeddings(), inner(model).base_model
    if head is None or backbone is model:
        return False
    ids = torch.arange(4, device=next(model.parameters()).device).unsqueeze(0)
    states = backbone(input_ids=ids, use_cache=False)[0]
    if states.shape[-1] != head.weight.shape[-1]:
        return False
    return torch.allclose(head(states), model(input_ids=ids, use_cache=False).logits, rtol=1e-2, atol=1e-2)


@torch.inference_mode()
def completion_logps(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad: int,
    batch_size: int = 16,
    temperature: float = 1.0,
) -> list[list[float]]:
    """Log-probability of every completion token, in batches of similar length."""
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(completions[i]))
    result: list[list[float]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = pack([prompts[i] for i in rows], [completions[i] for i in rows], pad, device, shareable(model))
        logps = token_logps(completion_logits(model, batch, temperature), batch.tokens)
        for row, values in zip(rows, logps.tolist(), strict=True):
            result[row] = values[: len(completions[row])]
    return result


@dataclass
class Policy:
    """A trainable policy and its reference.

    With LoRA the reference is the same model with the adapter off; with full tuning it is a frozen copy.
    """

    model: Any
    tokenizer: Any
    tuning: Tuning
    start: ModelConfig
    frozen: Any = None

    @contextlib.contextmanager
    def reference(self) -> Iterator[Any]:
        """The reference model, for the length of the block."""
        if self.frozen is not None:
            with gathered(self.frozen):
                yield self.frozen
        else:
            with self.model.disable_adapter():
                yield self.model

    def trainable(self) -> list[tuple[str, Any]]:
        """Names and parameters that training changes."""
        return [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]

    def save(self, folder: Path) -> None:
        """A standard PEFT adapter folder, or a standard model folder.

        A policy that started from a merged adapter is saved as a whole model, in float32: its adapter alone would
        miss what was merged.
        """
        model = self.model
        if self.tuning is Tuning.lora and (self.start.adapter or is_adapter(self.start.name)):
            model = merge(model)
        if hasattr(model, "peft_config"):
            # A preference model may be another adapter on the same base.
            save_model(model, folder, selected_adapters=["default"])
        else:
            save_model(model, folder)
        self.tokenizer.save_pretrained(folder)


def load_policy(config: ModelConfig, tuning: Tuning, lora: LoraSettings) -> Policy:
    """Load the starting policy and make it trainable. Dropout stays off: the model is in evaluation mode."""
    tokenizer = load_tokenizer(config)
    if tuning is not Tuning.full:
        from peft import get_peft_model

        base = load_causal_lm(config, quantized=tuning is Tuning.qlora, merged=True)
        model = lean(get_peft_model(base, lora_config(lora, base, "CAUSAL_LM", revision=config.revision))).eval()
        return Policy(model, tokenizer, tuning, config)
    model = load_causal_lm(config, trainable=True)
    frozen = load_causal_lm(config, merged=True).requires_grad_(False)
    return Policy(model, tokenizer, tuning, config, frozen)


@contextlib.contextmanager
def under(model: Any, adapter: str, trains: bool = False) -> Iterator[Any]:
    """The model with another adapter in place of the policy's; parameters of the others get no gradients."""
    policy = model.active_adapter
    model.set_adapter(adapter, inference_mode=not trains)
    try:
        yield model
    finally:
        model.set_adapter(policy)


def _is_sum(layer: Any) -> bool:
    """Whether what the active adapters do to a layer is all in one matrix that is added to its float32 weights."""
    products_alone = not any(
        name in layer.lora_variant or name in layer.lora_embedding_A or layer.lora_bias.get(name)
        for name in layer.active_adapters
    )
    return products_alone and layer.get_base_layer().weight.dtype == torch.float32


@contextlib.contextmanager
def merged(model: Any) -> Iterator[Any]:
    """The model with its LoRA updates added to the base weights, for fast sampling.

    The base weights are set aside and put back, not computed back: nothing drifts, however often it is done.
    Only float32 weights are added to: an update finer than a shorter float (or 4 bits) can hold would vanish, and the
    sampler would be another policy than the one that trains. There, and where an update is more than a product of two
    matrices, the adapter stays beside the weights.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers or not all(_is_sum(layer) for layer in layers):
        with rounded_once(model):
            yield model
        return
    kept: list[tuple[Any, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in layers:
                for name in layer.active_adapters:
                    if name in layer.lora_A:
                        weight = layer.get_base_layer().weight
                        kept.append((weight, weight.data))
                        weight.data = weight.data + layer.get_delta_weight(name)
        with model.disable_adapter():
            yield model
    finally:
        for weight, data in reversed(kept):
            weight.data = data
