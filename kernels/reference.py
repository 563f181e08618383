"""The oracle: dense masks made from a plan, and attention in float64. Slow, small sizes only, any device.

Every executor of a plan is compared with this file, so nothing here shares code with the planners or kernels.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from mmcompile.kernels.patterns import TILE


def by_plan_row(rows: Tensor, row: Tensor) -> Tensor:
    """The order, or the tags, of each plan row. rows: [B, O, ...], row: int32 [B, P]. Returns [B, P, ...]."""
    return torch.stack([rows[b].index_select(0, row[b]) for b in range(len(rows))])


def selected_tiles(counts: Tensor, tiles: Tensor, key_tiles: int) -> Tensor:
    """Which tiles a plan lists.

    counts: int32 [B, P, nQ, 5] (first tile entry, full, partial, first column entry, columns). tiles: int32
    [B, P, T]. Returns bool [B, P, nQ, nK] over key tiles.
    """
    full, partial = _listed_tiles(counts, tiles, key_tiles)
    return (full + partial) > 0


def element_mask(query_tags: Tensor, key_tags: Tensor, window: int | None = None) -> Tensor:
    """Which elements attention may use, tiles aside, in slot order.

    query_tags: int32 [B, P, 3, Sq], key_tags: int32 [B, P, 3, Sk]; rows position, segment, span. Those of each
    plan row: see `by_plan_row`.
    Returns bool [B, P, Sq, Sk].
    """
    query_position, query_segment, query_span = (row.unsqueeze(-1) for row in query_tags.long().unbind(2))
    key_position, key_segment, key_span = (row.unsqueeze(-2) for row in key_tags.long().unbind(2))
    allowed = (key_position <= query_position) | ((query_span == key_span) & (query_span >= 0))
    allowed &= key_position != torch.iinfo(torch.int32).max
    allowed &= query_segment == key_segment
    if window is not None:
        allowed &= key_position > query_position - window
    return allowed


def times_attended(
    query_tags: Tensor,
    key_tags: Tensor,
    query_row: Tensor,
    key_row: Tensor,
    counts: Tensor,
    tiles: Tensor,
    columns: Tensor,
    cold: Tensor,
    window: int | None = None,
) -> Tensor:
    """How often an executor of the plan counts each element, in slot order: int64 [B, P, Sq, Sk].

    query_tags: int32 [B, Oq, 3, Sq], key_tags: int32 [B, Ok, 3, Sk]. query_row, key_row: int32 [B, P]. counts: int32
    [B, P, nQ, 5] and tiles: int32 [B, P, T], as in `selected_tiles`. columns: int32 [B, P, C], key slots. cold: bool
    [B, P, Sk], or [B, P, 0] where C is 0. Full tiles count with every element, as an executor takes them.
    """
    allowed = element_mask(by_plan_row(query_tags, query_row), by_plan_row(key_tags, key_row), window)
    queries, keys = allowed.shape[2:]
    full, partial = (
        listed.repeat_interleave(TILE, 2)[:, :, :queries].repeat_interleave(TILE, 3)[..., :keys]
        for listed in _listed_tiles(counts, tiles, -(-keys // TILE))
    )
    through_tiles = allowed & cold.unsqueeze(2) if columns.shape[2] else allowed
    times = full + partial * through_tiles
    for b, p, i in product(*map(range, counts.shape[:3])):
        _, _, _, start, single = counts[b, p, i].tolist()
        for slot in columns[b, p, start : start + single].tolist():
            rows = slice(i * TILE, (i + 1) * TILE)
            times[b, p, rows, slot] += allowed[b, p, rows, slot]
    return times


def plan_mask(
    query_tags: Tensor,
    key_tags: Tensor,
    query_row: Tensor,
    key_row: Tensor,
    counts: Tensor,
    tiles: Tensor,
    columns: Tensor,
    cold: Tensor,
    window: int | None = None,
) -> Tensor:
    """What an executor of the plan attends to, in slot order: bool [B, P, Sq, Sk]. Arguments of `times_attended`."""
    return times_attended(query_tags, key_tags, query_row, key_row, counts, tiles, columns, cold, window) > 0


def attended_twice(
    query_tags: Tensor,
    key_tags: Tensor,
    query_row: Tensor,
    key_row: Tensor,
    counts: Tensor,
    tiles: Tensor,
    columns: Tensor,
    cold: Tensor,
    window: int | None = None,
) -> Tensor:
    """What would count double in the softmax, in slot order: bool [B, P, Sq, Sk]. No plan has any.

    A tile or a column listed twice, or a column inside a listed tile where the key is cold. Arguments of
    `times_attended`.
    """
    return times_attended(query_tags, key_tags, query_row, key_row, counts, tiles, columns, cold, window) > 1


def in_positions(mask: Tensor, query_order: Tensor, key_order: Tensor) -> Tensor:
    """A mask in slot order, moved to token order.

    mask: bool [B, P, Sq, Sk]. query_order: int32 [B, P, Sq], key_order: int32 [B, P, Sk], slot -> position: those of
    each plan row, see `by_plan_row`.
    """
    by_query = torch.zeros_like(mask).scatter_(2, query_order.long().unsqueeze(-1).expand_as(mask), mask)
    return torch.zeros_like(mask).scatter_(3, key_order.long().unsqueeze(-2).expand_as(mask), by_query)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float | None = None,
    key_head: Sequence[int] | None = None,
) -> Tensor:
    """softmax(query key^T * scale) value in float64; a row with no key gives 0.

    query: [B, H, Sq, D], key and value: [B, C, Sk, D], mask: bool, broadcasts to [B, H, Sq, Sk].
    scale: 1/sqrt(D) when None. key_head: the key head of each query head; grouped evenly when None.
    Returns float64 [B, H, Sq, D].
    """
    heads, key_heads = query.shape[1], key.shape[1]
    if key_head is None:
        if heads % key_heads:
            raise ValueError(f"{heads} query heads cannot share {key_heads} key heads evenly; pass key_head")
        key_head = [head // (heads // key_heads) for head in range(heads)]
    query, key, value = query.double(), key.double()[:, list(key_head)], value.double()[:, list(key_head)]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    # softmax of a row of -inf is NaN; only those rows, so that a NaN of the inputs still shows.
    weights = torch.softmax(scores, dim=-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return weights @ value


def _listed_tiles(counts: Tensor, tiles: Tensor, key_tiles: int) -> tuple[Tensor, Tensor]:
    """How often each tile is listed as full and as partial, int64 [B, P, nQ, nK] each."""
    full, partial = torch.zeros(2, *counts.shape[:3], key_tiles, dtype=torch.int64, device=counts.device)
    for b, p, i in product(*map(range, counts.shape[:3])):
        start, of_full, of_partial, _, _ = counts[b, p, i].tolist()
        for times, length in ((full, of_full), (partial, of_partial)):
            listed = tiles[b, p, start : start + length].long()
            times[b, p, i] = torch.bincount(listed, minlength=key_tiles)
            start += length
    return full, partial
