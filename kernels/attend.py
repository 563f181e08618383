"""The ops of one attention in their order, for eager use: arrange, permute the keys, plan, attend.

The compiled graph holds the same calls, made by `passes/rewrite_attention.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mmcompile.kernels.ops  # noqa: F401  registers torch.ops.mminference
from mmcompile.kernels.arrange import Arrangement
from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.patterns import (
    HeadPattern,
    KeyCopies,
    Order,
    PlanRows,
    distinct_orders,
    encode,
    encode_orders,
    plan_rows,
)
from mmcompile.kernels.plan import TilePlan

_OPS = torch.ops.mminference
_RASTER = (Order(),)


class Planned(NamedTuple):
    """One attention, planned: what to compute, and the keys in the orders that it is computed in."""

    arrangement: Arrangement
    lists: TilePlan
    density: Tensor  # float32 [B, P]: computed tiles over those of dense attention
    recall: Tensor  # float32 [B, P]: estimated share of the attention; NaN where nothing was estimated
    rows: PlanRows
    orders: tuple[tuple[Order, ...], tuple[Order, ...]]  # of queries, of keys
    copies: KeyCopies
    key: Tensor  # [B, C, Sk, D] in slot order
    scale: float
    window: int | None
    segments: bool = False  # whether the mask has such parts
    spans: bool = False

    def of_heads(self, figure: Tensor) -> Tensor:
        """`density` or `recall` of each head, [B, H]."""
        return figure.index_select(1, head_indices(self.rows.of_head, figure.device))

    def attend(self, query: Tensor, value: Tensor) -> Tensor:
        """query: [B, H, Sq, D], value: [B, KV, Sk, D]. Returns [B, H, Sq, D] in [B, Sq, H, D] memory."""
        heads, row = query.shape[1], self.rows.of_head
        value = _in_orders(value, self.arrangement.key_order, self.copies, self.orders[1])
        return _OPS.block_sparse_attention(
            query,
            self.key,
            value,
            self.arrangement.query_tags,
            self.arrangement.key_tags,
            *self.lists,
            row,
            self.copies.of_head(heads),
            self.scale,
            self.window,
            self.segments,
            self.spans,
            None if self.orders[0] == _RASTER else self.arrangement.query_order,
        )

    def compare(
        self, query: Tensor, value: Tensor, output: Tensor, seed: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        """How far `attend`'s output is from dense: error and true recall of each head, float32 [H] each. seed and share
        as the op `compare_with_dense` has them."""
        heads, row = query.shape[1], self.rows.of_head
        return _OPS.compare_with_dense(
            query,
            self.key,
            _in_orders(value, self.arrangement.key_order, self.copies, self.orders[1]),
            output,
            self.arrangement.query_order,
            self.arrangement.query_tags,
            self.arrangement.key_tags,
            *self.lists,
            row,
            self.copies.of_head(heads),
            self.scale,
            self.window,
            self.segments,
            self.spans,
            seed,
            0,
            share,
        )


class Arranged(NamedTuple):
    """One attention before it is planned: its orders, which all layers of a prefill share."""

    query: Tensor  # [B, H, Sq, D]
    key: Tensor  # [B, KV, Sk, D] in token order
    boundaries: tuple[Tensor, Tensor, Tensor]
    arrangement: Arrangement
    rows: PlanRows
    orders: tuple[tuple[Order, ...], tuple[Order, ...]]  # of queries, of keys
    copies: KeyCopies
    query_offset: int
    scale: float
    window: int | None
    segments: bool
    spans: bool
    density: float | None
    recall: float | None

    def plan(self) -> Planned:
        """Put the keys into their orders, estimate, and list what is computed."""
        key = _in_orders(self.key, self.arrangement.key_order, self.copies, self.orders[1])
        data = (self.query, key) if any(pattern.needs_data for pattern in self.rows.patterns) else (None, None)
        parts = (self.query_offset, self.scale, self.window, self.segments, self.spans)
        *lists, planned, held = _OPS.plan(
            *data,
            *self.arrangement,
            *self.boundaries,
            *parts,
            encode(self.rows.patterns),
            self.rows.heads,
            self.density,
            self.recall,
        )
        results = (self.arrangement, TilePlan(*lists), planned, held, self.rows, self.orders, self.copies, key)
        return Planned(*results, self.scale, self.window, self.segments, self.spans)


def arrange_attention(
    query: Tensor,
    key: Tensor,
    patterns: HeadPattern | Sequence[HeadPattern],
    boundaries: tuple[Tensor, Tensor, Tensor],
    *,
    scale: float | None = None,
    density: float | None = None,
    recall: float | None = None,
    key_valid: Tensor | None = None,
    window: int | None = None,
    query_offset: int | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    spans: tuple[Tensor, Tensor] | None = None,
) -> Arranged:
    """Make the orders that the patterns of a causal attention need.

    query: [B, H, Sq, D], key: [B, KV, Sk, D]. patterns: one for every head, or one a head.
    boundaries: offsets int32 [M + 1], modality int32 [M], grid int32 [M, 3] of the query tokens.
    scale: 1/sqrt(D) when None. density, recall: as in `plan`. key_valid: bool [B, Sk] or None. window: keys or None.
    query_offset: position of the first query among the keys; Sk - Sq when None. segments, spans: integer [B, Sq] and
        [B, Sk] of queries and keys, as in `arrange`.
    Raises ValueError naming the argument, its value, and what would be right.
    """
    batch, heads, query_length, width = query.shape
    kv_heads, key_length = key.shape[1:3]
    of_head = (patterns,) * heads if isinstance(patterns, HeadPattern) else tuple(patterns)
    if len(of_head) != heads:
        raise ValueError(f"patterns has {len(of_head)} entries; {heads}, one for each of the heads of query")
    offset = key_length - query_length if query_offset is None else query_offset
    scale = width**-0.5 if scale is None else scale
    rows = plan_rows(of_head)
    orders = distinct_orders(rows.patterns)
    searches = any(order.searches for order in (*orders[0], *orders[1]))
    sizes = (batch, query_length, key_length, offset)
    mask = (key_valid, *(segments or (None, None)), *(spans or (None, None)))
    data = (query, key) if searches else (None, None)
    arrangement = Arrangement(*_OPS.arrange(*data, *boundaries, *mask, *sizes, encode_orders(*orders), scale))
    copies = KeyCopies.of(kv_heads, len(orders[1]))
    given = (query, key, boundaries, arrangement, rows, orders, copies)
    return Arranged(*given, offset, scale, window, segments is not None, spans is not None, density, recall)


def plan_attention(
    query: Tensor,
    key: Tensor,
    patterns: HeadPattern | Sequence[HeadPattern],
    boundaries: tuple[Tensor, Tensor, Tensor],
    **options: Any,
) -> Planned:
    """Plan causal attention over what the patterns choose. The arguments are those of `arrange_attention`."""
    return arrange_attention(query, key, patterns, boundaries, **options).plan()


def _in_orders(x: Tensor, order: Tensor, copies: KeyCopies, orders: tuple[Order, ...]) -> Tensor:
    """Keys or values [B, KV, Sk, D] in each order: [B, C, Sk, D]."""
    return x if orders == _RASTER else _OPS.permute(x, order, None, copies.sources, copies.rows)


class Attended(NamedTuple):
    """What one attention returned, and what its plan was."""

    output: Tensor  # [B, H, Sq, D] in [B, Sq, H, D] memory
    density: Tensor  # float32 [B, H]
    recall: Tensor  # float32 [B, H], NaN where nothing was estimated


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patterns: HeadPattern | Sequence[HeadPattern],
    boundaries: tuple[Tensor, Tensor, Tensor],
    **options: Any,
) -> Attended:
    """Plan and run: arguments of `plan_attention`, and value [B, KV, Sk, D]."""
    planned = plan_attention(query, key, patterns, boundaries, **options)
    output = planned.attend(query, value)
    return Attended(output, planned.of_heads(planned.density), planned.of_heads(planned.recall))
