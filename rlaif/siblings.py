"""Completions of one prompt in one row: the prompt passes through the model once, not once a completion.

In a row ``prompt, completion, completion ...`` a token sees the prompt and what stands before it in its own
completion, and its position is counted as if nothing else stood there. So it gets the state that it gets in a row that
holds its completion alone, and all gradients of the completions meet in one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlaif.models import inner
from rlaif.prefix import agree, shareable, shared_length, split_prefix

_LONGEST = 4096
"""Tokens in a joined row: its mask has as many columns and rows."""

_JOINABLE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def lay_out(groups: Sequence[Sequence[list[int]]], pad: int, share: bool, hidden: int | None) -> dict[str, Tensor]:
    """Rows of a batch, right-padded, as the arguments that trainers move to their device.

    Args:
        groups: sequences (prompt and completion) of one prompt each.
        pad: what to fill rows up with.
        share: whether what all sequences begin with stands apart.
        hidden: width of the model, or None for a row of its own for each sequence.

    Returns:
        ``input_ids``, ``positions`` and ``part`` (B, T): 0 for what all completions of a row share, their number in it
        from 1 on, -1 for padding; ``row`` and ``column`` (S,) of the last token of each sequence; and ``prefix`` (L,)
        before all rows, if there is one. ``positions`` count from its start.
    """
    sequences = [sequence for group in groups for sequence in group]
    prefix, rest = split_prefix(sequences) if share else ([], sequences)
    waiting = iter(rest)
    rows: list[list[Sequence[int]]] = []
    for group in groups:
        own: list[list[Sequence[int]]] = []
        for tokens in (next(waiting) for _ in group):
            if own and hidden is not None and _pays(own[-1], tokens, hidden):
                own[-1].append(tokens)
            else:
                own.append([tokens])
        rows += own
    laid = [_joined(row, len(prefix)) for row in rows]
    width = max(len(ids) for ids, _, _, _ in laid)

    def padded(column: int, filler: int) -> Tensor:
        return torch.tensor([[*row[column], *[filler] * (width - len(row[column]))] for row in laid])

    result = {
        "input_ids": padded(0, pad),
        "positions": padded(1, 0),
        "part": padded(2, -1),
        "row": torch.tensor([number for number, (*_, ends) in enumerate(laid) for _ in ends]),
        "column": torch.tensor([end for *_, ends in laid for end in ends]),
    }
    return result | ({"prefix": torch.tensor(prefix)} if prefix else {})


def _joined(row: Sequence[Sequence[int]], before: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Tokens, positions, parts and the place of the last token of each sequence."""
    start = shared_length(row)
    ids, positions, part = list(row[0][:start]), list(range(before, before + start)), [0] * start
    ends = []
    for number, tokens in enumerate(row, 1):
        ids += tokens[start:]
        positions += range(before + start, before + len(tokens))
        part += [number] * (len(tokens) - start)
        ends.append(len(ids) - 1)
    return ids, positions, part, ends


def _pays(row: Sequence[Sequence[int]], tokens: Sequence[int], hidden: int) -> bool:
    """Whether one more sequence in a row costs less than a row of its own.

    A token costs about 24 ``hidden``^2 operations in each layer's products, and 4 ``hidden`` for each token of its row
    in attention, seen or not.
    """

    def length(together: Sequence[Sequence[int]]) -> int:
        start = shared_length(together)
        return start + sum(len(each) - start for each in together)

    def cost(tokens: int) -> float:
        return tokens + tokens**2 / (6 * hidden)

    joined = length([*row, tokens])
    return joined <= _LONGEST and cost(joined) < cost(length(row)) + cost(len(tokens))


def visible(part: Tensor) -> Tensor:
    """The attention mask of rows (B, T): (B, T) where each holds one sequence, else (B, 1, T, T)."""
    if not bool((part > 1).any()):
        return (part >= 0).long()
    same = part.unsqueeze(2) == part.unsqueeze(1)
    # Padding stands after everything, and sees itself: a token that sees nothing would be no number.
    return ((part == 0).unsqueeze(1) | same).tril().unsqueeze(1)


def joinable(model: Any) -> bool:
    """Whether completions in one row get the states that they get in rows of their own: tried, once a model."""
    core = inner(model)
    if core not in _JOINABLE:
        # Other implementations of attention take no mask of any shape, or add it to their logits.
        masked = core.config._attn_implementation == "sdpa"
        _JOINABLE[core] = masked and shareable(core) and _same_states(core)
    return _JOINABLE[core]


@torch.no_grad()
def _same_states(model: Any) -> bool:
    backbone, device = model.base_model, next(model.parameters()).device

    def states(hidden: int | None) -> Tensor:
        batch = lay_out([[[1, 2, 3, 4, 5], [1, 2, 3, 6, 7, 8], [1, 2, 3, 9]]], 0, False, hidden)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        mask = visible(batch["part"])
        out = backbone(
            input_ids=batch["input_ids"], attention_mask=mask, position_ids=batch["positions"], use_cache=False
        )
        return out[0][batch["row"], batch["column"]]

    return agree(lambda: states(None), lambda: states(2**20))
