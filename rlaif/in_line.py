"""Rows of a batch as one row without padding, for short rows on a CPU: less to compute, in fewer passes.

All that a decoder layer does but attention, it does to each token alone. So tokens may stand in any order, as long as
attention knows which row a token is of: what all rows begin with stands first, once, and then row behind row. Uneven
rows that share a prefix take one pass over their tokens; side by side they take one over the prefix, and one over
tokens and padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlaif.attention import LONGEST, as_autocast, attending_by, is_unusual, scale_of, weigh, weigh_back
from rlaif.models import inner
from rlaif.prefix import agree, positions_after, shareable

_STEP = 32
"""Tokens that a line has a multiple of: products are compiled for each shape, and so few shapes come back often."""

_IN_LINE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Line:
    """Where the tokens of a batch stand: L of the prefix, M of the rows, and fillers up to N in all.

    Args:
        prefix: (L,) token ids before every row, or None.
        mask: (B, T), 1 for tokens and 0 for padding.
    """

    def __init__(self, prefix: Tensor | None, mask: Tensor) -> None:
        self.prefix = mask.new_zeros(0) if prefix is None else prefix
        self.real = mask.bool()
        lengths = self.real.sum(dim=1)
        self.own, self.rows, self.width = len(self.prefix), len(mask), int(lengths.max())
        self.end = self.own + int(lengths.sum())
        self.tokens = -(-self.end // _STEP) * _STEP
        columns = torch.arange(self.width, device=mask.device)
        self.held = columns < lengths.unsqueeze(1)
        """(B, W): whether a row has so many tokens."""
        self.row, self.column = self.held.nonzero(as_tuple=True)
        self.before = torch.arange(self.own, device=mask.device)
        self.places = torch.zeros(self.held.shape, dtype=torch.long, device=mask.device)
        """(B, W): where they stand; beyond a row's end, any token."""
        self.places[self.held] = torch.arange(self.own, self.end, device=mask.device)
        # What is beyond a row's end none of its tokens see: they see what comes before them.
        self.seen = torch.ones(1, 1, self.width, self.own + self.width, dtype=torch.bool, device=mask.device)
        self.seen = self.seen.tril(self.own)
        self.causal = self.seen.new_ones(1, 1, self.own, self.own).tril()
        self.indices: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def flat(self, values: Tensor, before: Tensor) -> Tensor:
        """Values of the rows' tokens (B, T, ...) and of the prefix (L, ...), in line: (1, N, ...)."""
        filler = values.new_zeros(self.tokens - self.end, *values.shape[2:])
        return torch.cat([before, values[self.real], filler]).unsqueeze(0)

    def side_by_side(self, values: Tensor) -> Tensor:
        """Values in line (1, N, ...) of the rows' tokens: (B, T, ...), of any token in place of padding."""
        index = self.real.long()
        index[self.real] = torch.arange(self.own, self.end, device=index.device)
        return values[0].index_select(0, index.flatten()).view(*index.shape, *values.shape[2:])

    def by_head(self, heads: int, shared: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where :func:`rlaif.attention.weigh` finds what it takes of a model with H heads, K of which have keys.

        Returns:
            where queries (B H W,) stand among (H N), where keys (B K (L + W),) stand among (K N); and back, where the
            rows' M tokens stand among those queries, (H M,), and among those keys, (K M,).
        """
        if (heads, shared) not in self.indices:
            keys = self.own + self.width

            def starts(count: int, step: int) -> Tensor:
                return torch.arange(0, count * step, step, device=self.places.device).unsqueeze(1)

            seen = torch.cat([self.before.expand(self.rows, -1), self.places], dim=1)
            found = (
                starts(heads, self.tokens) + self.places.unsqueeze(1),
                starts(shared, self.tokens) + seen.unsqueeze(1),
                starts(heads, self.width) + self.row * heads * self.width + self.column,
                starts(shared, keys) + self.row * shared * keys + self.own + self.column,
            )
            of_queries, of_keys, to_queries, to_keys = (index.flatten() for index in found)
            self.indices[heads, shared] = of_queries, of_keys, to_queries, to_keys
        return self.indices[heads, shared]

    def joined(self, before: Tensor | None, rows: Tensor, index: Tensor, heads: int) -> Tensor:
        """By head and place in line, (heads, N, D): of the prefix (heads, L, D), of the rows by index, and zeros."""
        size = rows.shape[-1]
        result = rows.new_empty(heads, self.tokens, size)
        if before is not None:
            result[:, : self.own] = before.view(heads, self.own, size)
        result[:, self.own : self.end] = rows.reshape(-1, size).index_select(0, index).view(heads, -1, size)
        result[:, self.end :] = 0
        return result


def read_in_line(run: Callable[..., Any], line: Line, ids: Tensor, positions: Tensor) -> Tensor:
    """Hidden states (B, T, H) of rows (B, T), read as one row: a single pass, also backward.

    Args:
        run: a backbone of which :func:`in_line` says that it reads rows so.
        line: the order of their tokens.
        ids: (B, T).
        positions: (B, T), counted from the start of the prefix.
    """
    with attending_by(partial(_attend, line), run):
        output = run(
            input_ids=line.flat(ids, line.prefix),
            position_ids=line.flat(positions, line.before),
            # Models pass a mask of four dimensions on as it is. What tokens see, attention knows.
            attention_mask=line.seen.new_ones(1, 1, 1, 1),
            use_cache=False,
        )
    return line.side_by_side(output[0])


def in_line(model: Any, longest: int) -> bool:
    """Whether :func:`read_in_line` gives rows of up to so many tokens the states that they get side by side.

    Not in training mode, in which attention may drop out. Whether the model takes its tokens so is tried, once a model.
    """
    core = inner(model)
    on_cpu = core.device.type == "cpu" and core.config._attn_implementation == "sdpa"
    if longest > LONGEST or core.training or not on_cpu:
        return False
    if core not in _IN_LINE:
        _IN_LINE[core] = shareable(core) and _same_states(core)
    return _IN_LINE[core]


@torch.no_grad()
def _same_states(model: Any) -> bool:
    backbone, device = model.base_model, next(model.parameters()).device
    prefix = torch.arange(1, 5, device=device)
    ids = torch.tensor([[5, 6, 7, 8, 9], [7, 6, 8, 5, 9]], device=device)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]], device=device)
    positions = positions_after(prefix, mask)
    real = mask.bool()

    def whole() -> Tensor:
        arguments = {
            "input_ids": torch.cat([prefix.expand(2, -1), ids], dim=1),
            "attention_mask": torch.cat([mask.new_ones(2, 4), mask], dim=1),
            "position_ids": torch.cat([torch.arange(4, device=device).expand(2, -1), positions], dim=1),
        }
        states: Tensor = backbone(**arguments, use_cache=False)[0]
        return states[:, 4:][real]

    return agree(whole, lambda: read_in_line(backbone, Line(prefix, mask), ids, positions)[real])


def _attend(
    line: Line, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """As transformers' own: queries (1, H, N, D), keys and values (1, K, N, D) -> (1, N, H, D)."""
    if is_unusual(settings) or {query.shape[2], key.shape[2]} != {line.tokens}:
        raise NotImplementedError("attention with more than queries, keys and values")
    output: Tensor = _Attention.apply(*as_autocast(query, key, value), line, scale_of(query, settings))
    return output, None


class _Attention(torch.autograd.Function):
    """The prefix sees itself, and each row the prefix and itself."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, line: Line, scale: float) -> Tensor:
        heads, shared = query.shape[1], key.shape[1]
        of_queries, of_keys, to_queries, _ = line.by_head(heads, shared)

        def taken(each: Tensor, index: Tensor) -> Tensor:
            size = each.shape[-1]
            return each.reshape(-1, size).index_select(0, index).view(line.rows * shared, -1, size)

        queries, keys, values = taken(query, of_queries), taken(key, of_keys), taken(value, of_keys)
        before = None
        with torch.autocast("cpu", enabled=False):
            output, weights = weigh(queries, keys, values, line.seen, scale)
            saved = [queries, keys, values, weights]
            if line.own:
                queries, keys, values = (
                    each[0, :, : line.own].reshape(shared, -1, each.shape[-1]) for each in (query, key, value)
                )
                before, weights = weigh(queries, keys, values, line.causal, scale)
                saved += [queries, keys, values, weights]
        ctx.save_for_backward(*saved)
        ctx.line, ctx.scale, ctx.heads = line, scale, (heads, shared)
        return line.joined(before, output, to_queries, heads).transpose(0, 1).contiguous().unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        line, (heads, shared) = ctx.line, ctx.heads
        queries, keys, values, weights, *own = ctx.saved_tensors
        of_queries, _, to_queries, to_keys = line.by_head(heads, shared)
        gradient = gradient[0].transpose(0, 1).contiguous()
        size = gradient.shape[-1]
        rows = gradient.view(-1, size).index_select(0, of_queries).view(line.rows, heads, line.width, size)
        # Beyond a row's end stands the gradient of another token.
        rows.masked_fill_(~line.held[:, None, :, None], 0)
        before: Sequence[Tensor | None] = [None] * 3
        with torch.autocast("cpu", enabled=False):
            found = weigh_back(rows.view(*queries.shape[:2], size), queries, keys, values, weights, ctx.scale)
            if line.own:
                first = gradient[:, : line.own].reshape(shared, -1, size)
                queries, keys, values, weights = own
                of_query, *others = weigh_back(first, queries, keys, values, weights, ctx.scale)
                # All rows have seen the prefix.
                by_row = (each.view(line.rows, shared, *each.shape[1:])[:, :, : line.own] for each in found[1:])
                before = [of_query, *(mine + each.sum(dim=0) for mine, each in zip(others, by_row, strict=True))]
        query, key, value = (
            line.joined(first, each, index, count).unsqueeze(0)
            for first, each, index, count in zip(
                before, found, (to_queries, to_keys, to_keys), (heads, shared, shared), strict=True
            )
        )
        return query, key, value, None, None
