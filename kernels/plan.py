"""Planners: from boundaries, mask tensors and head patterns to orders, tags and tile lists.

Everything stays on the device and no shape depends on data, so that a prefill never waits for the host. All
masking comes from the tags; boundaries and patterns only steer which tiles are computed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import SymInt, Tensor

from mmcompile.kernels.a_shape import AShape, Intervals
from mmcompile.kernels.orders import key_modality, modality_order, raster_order, slots, token_modality
from mmcompile.kernels.patterns import HeadPattern, decode
from mmcompile.kernels.tags import in_slots, key_tags, query_tags
from mmcompile.kernels.tile_bounds import TileBounds, row_chunks, tile_count
from mmcompile.kernels.tile_list import TileChoice, choose, compact, distance_cut


class TilePlan(NamedTuple):
    """Orders, tags and tile lists of P patterns; all int32.

    A row of `tiles` holds the indices of key tiles: `counts[..., 0]` full ones from the front, `counts[...,
    1]` partial ones from the back (entry nK - 1 is a partial tile), -1 between. A full tile has every element
    allowed. A tile known to have no allowed element is never listed.
    """

    query_order: Tensor  # [B, P, Sq], slot -> query
    key_order: Tensor  # [B, P, Sk], slot -> key
    query_tags: Tensor  # [B, P, 3, Sq] in slot order: position (query + query_offset), segment, span
    key_tags: Tensor  # [B, P, 3, Sk] in slot order: position (2^31 - 1 where not valid), segment, span
    counts: Tensor  # [B, P, nQ, 2], full and partial
    tiles: Tensor  # [B, P, nQ, nK]


def plan_shapes(
    batch: int | SymInt, query_length: int | SymInt, key_length: int | SymInt, patterns: str
) -> tuple[tuple[int | SymInt, ...], ...]:
    """The shapes of a `TilePlan`, in its order. Lengths may be symbolic."""
    rows = len(decode(patterns))
    query_tiles, key_tiles = tile_count(query_length), tile_count(key_length)
    return (
        (batch, rows, query_length),
        (batch, rows, key_length),
        (batch, rows, 3, query_length),
        (batch, rows, 3, key_length),
        (batch, rows, query_tiles, 2),
        (batch, rows, query_tiles, key_tiles),
    )


def empty_plan(
    batch: int | SymInt,
    query_length: int | SymInt,
    key_length: int | SymInt,
    patterns: str,
    device: torch.device,
) -> TilePlan:
    """An uninitialised, contiguous plan. Lengths may be symbolic."""
    shapes = plan_shapes(batch, query_length, key_length, patterns)
    return TilePlan(*(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes))


def plan(
    query: Tensor | None,
    key: Tensor | None,
    offsets: Tensor,
    modality: Tensor,
    grid: Tensor,
    key_valid: Tensor | None,
    query_segment: Tensor | None,
    key_segment: Tensor | None,
    query_span: Tensor | None,
    key_span: Tensor | None,
    batch: int,
    query_length: int,
    key_length: int,
    query_offset: int,
    window: int | None,
    patterns: str,
    density: float | None,
    min_tokens: int,
) -> TilePlan:
    """Which tiles of attention to compute, for each of the P patterns.

    query, key: [B, H, S, D], for patterns that estimate from data; no pattern does yet, so None serves.
    offsets: int32 [M + 1], modality: int32 [M], grid: int32 [M, 3]: segments of the query tokens, laid end to
        end over the batch (`batch * query_length`). Key k is query token `k - query_offset`; other keys, such
        as a cached prefix, are modality 0. Segments may be empty, and may end past the tokens.
    key_valid: bool [B, Sk]. query_segment, query_span: integer [B, Sq]; key_segment, key_span: [B, Sk]. None
        where the mask has no such part. With tags.py's element mask they say what is allowed. A span is
        contiguous.
    query_offset: position of the first query among the keys. window: keys, or None.
    patterns: from `patterns.encode`. density: None for the patterns as they are; 1.0 for every tile with an
        allowed element; between, a cap on the listed tiles as a fraction of those, for each batch row and
        pattern: the tiles of the sink and of each query's nearest key stay, the rest is kept nearest first.
    min_tokens: shorter key lengths get raster orders and no tiles; attention then runs dense.

    Raises ValueError naming the argument, its value, and what would be right.
    """
    _require(batch, query_length, key_length, window, density)
    _require_pair("segment", query_segment, key_segment)
    _require_pair("span", query_span, key_span)
    device = offsets.device
    heads = decode(patterns)
    tags = (
        query_tags(batch, query_length, query_offset, query_segment, query_span, device),
        key_tags(batch, key_length, key_valid, key_segment, key_span, device),
    )
    result = empty_plan(batch, query_length, key_length, patterns, device)
    if key_length < min_tokens:
        return _without_tiles(result, *tags)
    of_query = token_modality(offsets, modality, batch, query_length)
    of_key = key_modality(of_query, key_length, query_offset)
    for row, pattern in enumerate(heads):
        one = TilePlan(*(part[:, row] for part in result))
        _arrange(one, pattern, tags, (of_query, of_key))
        bounds = TileBounds.of(one.query_tags, one.key_tags, window, query_segment is not None, query_span is not None)
        choice = _choice(one, pattern, bounds, tags[1], of_key, density)
        _list_tiles(one, choice, density)
    return result


def tile_counts(plan: TilePlan, window: int | None = None) -> Tensor:
    """Listed tiles and tiles that hold an allowed element, int64 [B, P, 2]. window: as given to `plan`."""
    batch, rows = plan.counts.shape[:2]
    bounds = TileBounds.of(plan.query_tags.flatten(0, 1), plan.key_tags.flatten(0, 1), window)
    non_empty = torch.zeros(batch * rows, dtype=torch.int64, device=plan.counts.device)
    for chunk in row_chunks(*bounds.shape):
        non_empty += bounds.non_empty(chunk).sum((1, 2))
    return torch.stack([plan.counts.sum((2, 3)), non_empty.view(batch, rows)], -1)


def density(plan: TilePlan, window: int | None = None, min_tokens: int = 0) -> Tensor:
    """Share of the tiles with an allowed element that the plan lists, float32 [B, P]; no host sync.

    window, min_tokens: as given to `plan`. 1 where the length is under `min_tokens`, 0 where nothing is
    allowed.
    """
    if plan.key_order.shape[-1] < min_tokens:
        return torch.ones(plan.counts.shape[:2], device=plan.counts.device)
    listed, non_empty = tile_counts(plan, window).unbind(-1)
    return (listed.double() / non_empty.clamp(min=1)).float()


def _arrange(one: TilePlan, pattern: HeadPattern, tags: Sequence[Tensor], modalities: Sequence[Tensor]) -> None:
    """Writes the pattern's orders, and the tags in them."""
    orders = (pattern.query_order, pattern.key_order)
    parts = ((one.query_order, one.query_tags), (one.key_order, one.key_tags))
    for order, (order_out, tags_out), tag, modality in zip(orders, parts, tags, modalities, strict=True):
        if order == "modality":
            order_out.copy_(modality_order(modality))
            tags_out.copy_(in_slots(tag, order_out))
        else:
            order_out.copy_(raster_order(modality.shape[0], modality.shape[1], modality.device))
            tags_out.copy_(tag)


def _choice(
    one: TilePlan,
    pattern: HeadPattern,
    bounds: TileBounds,
    key_tags: Tensor,
    key_modality: Tensor,
    density: float | None,
) -> TileChoice:
    """The tiles that the pattern chooses, and those that stay under any cap."""
    by_modality = key_modality if pattern.key_order == "modality" else None
    shape = AShape(one.query_tags, key_tags, by_modality, slots(one.key_order))
    must = Intervals.stack([shape.sink(pattern.sink), shape.nearest(bounds.window)])
    if pattern.kind == "dense" or density == 1.0:
        return TileChoice(bounds, must, None, None)
    may = shape.local(pattern.local)
    if pattern.kind == "tri_shape":
        may = Intervals.stack([may, shape.everything_for_last(pattern.last)])
    return TileChoice(bounds, must, may, pattern.local if bounds.spans else None)


def _list_tiles(one: TilePlan, choice: TileChoice, density: float | None) -> None:
    """Writes counts and tiles."""
    cut = None if density is None or density == 1.0 else distance_cut(choice, density)
    for rows in choice.bounds.chunks():
        counts, tiles = compact(choose(choice, rows, cut), choice.bounds.full(rows))
        one.counts[:, rows] = counts
        one.tiles[:, rows] = tiles


def _without_tiles(result: TilePlan, query_tags: Tensor, key_tags: Tensor) -> TilePlan:
    """Raster orders, tags in them, no tiles."""
    for order in (result.query_order, result.key_order):
        order.copy_(torch.arange(order.shape[-1], dtype=torch.int32, device=order.device))
    result.query_tags.copy_(query_tags.unsqueeze(1))
    result.key_tags.copy_(key_tags.unsqueeze(1))
    result.counts.zero_()
    result.tiles.fill_(-1)
    return result


def _require(batch: int, query_length: int, key_length: int, window: int | None, density: float | None) -> None:
    for name, size in (("batch", batch), ("query_length", query_length), ("key_length", key_length)):
        if size < 1:
            raise ValueError(f"{name}={size} has nothing to attend; at least 1")
    if window is not None and window < 1:
        raise ValueError(f"window={window} allows no key; at least 1, or None for no window")
    if density is not None and not 0.0 < density <= 1.0:
        raise ValueError(f"density={density} is not a fraction of the tiles; in (0, 1], or None")


def _require_pair(name: str, of_query: Tensor | None, of_key: Tensor | None) -> None:
    if (of_query is None) != (of_key is None):
        missing = f"query_{name}" if of_query is None else f"key_{name}"
        raise ValueError(f"{missing}=None while its pair is given; pass query_{name} and key_{name}, or neither")
