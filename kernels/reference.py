"""The oracle: dense masks made from a plan, and attention in float64. Slow, small sizes only, any device.

Every executor of a plan is compared with this file, so nothing here shares code with the planners or kernels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompile.kernels.patterns import TILE


def selected_tiles(counts: Tensor, tiles: Tensor) -> Tensor:
    """Which tiles a plan lists.

    counts: int32 [B, P, nQ, 2] (full, partial). tiles: int32 [B, P, nQ, nK], full tiles from the front,
    partial tiles from the back. Returns bool [B, P, nQ, nK] over key tiles.
    """
    key_tiles = tiles.shape[-1]
    entry = torch.arange(key_tiles, device=tiles.device)
    full, partial = counts[..., 0:1], counts[..., 1:2]
    listed = (entry < full) | (entry >= key_tiles - partial)  # [B, P, nQ, nK], over entries
    selected = torch.zeros(*tiles.shape[:-1], key_tiles + 1, dtype=torch.bool, device=tiles.device)
    unused = torch.full_like(tiles, key_tiles)
    selected.scatter_(-1, torch.where(listed, tiles, unused).long(), True)
    return selected[..., :key_tiles]


def element_mask(query_tags: Tensor, key_tags: Tensor, window: int | None = None) -> Tensor:
    """Which elements attention may use, tiles aside, in slot order.

    query_tags: int32 [B, P, 3, Sq], key_tags: int32 [B, P, 3, Sk]; rows position, segment, span.
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


def plan_mask(query_tags: Tensor, key_tags: Tensor, counts: Tensor, tiles: Tensor, window: int | None = None) -> Tensor:
    """The mask that an executor of the plan applies: selected tiles and allowed elements, in slot order.

    Shapes as in `selected_tiles` and `element_mask`. Returns bool [B, P, Sq, Sk].
    """
    allowed = element_mask(query_tags, key_tags, window)
    by_key = selected_tiles(counts, tiles).repeat_interleave(TILE, -1)[..., : allowed.shape[-1]]
    return allowed & by_key.repeat_interleave(TILE, -2)[..., : allowed.shape[-2], :]


def in_positions(mask: Tensor, query_order: Tensor, key_order: Tensor) -> Tensor:
    """A mask in slot order, moved to token order.

    mask: bool [B, P, Sq, Sk]. query_order: int32 [B, P, Sq], key_order: int32 [B, P, Sk], slot -> position.
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
