"""FlexAttention as a second executor of the same plan, for devices that our kernel does not know."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_walk import TileWalk


def block_mask(walk: TileWalk) -> BlockMask:
    """The walk as FlexAttention's block mask: its full and partial tiles, its element mask as `mask_mod`.

    Uncompiled FlexAttention ignores tiles and applies `mask_mod` alone, so that also knows the listed tiles.
    """
    plans = sorted(set(walk.head_plan))
    # One row for all heads where they agree: FlexAttention broadcasts it, and its lists stay small.
    rows = head_indices(walk.head_plan if len(plans) > 1 else (plans[0],), walk.tiles.device)
    counts, tiles = (
        walk.counts.index_select(1, rows),
        walk.tiles.index_select(1, rows),
    )  # [B, H or 1, nQ, ...]
    full, partial = (part.contiguous() for part in counts.unbind(-1))
    # Unused entries are read ahead, so they must be tiles that exist.
    tiles = tiles.clamp(min=0)
    return BlockMask.from_kv_blocks(
        partial,
        tiles.flip(-1),
        full,
        tiles,
        BLOCK_SIZE=TILE,
        mask_mod=_mask_mod(walk),
        seq_lengths=(walk.query_tags.shape[3], walk.key_tags.shape[3]),
    )


def flex_attention_on_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    walk: TileWalk,
    scale: float,
    mask: BlockMask | None = None,
    execute: Callable[..., Tensor] = flex_attention,
) -> Tensor:
    """`block_sparse_attention` by FlexAttention. Shapes as in the op; returns [B, H, Sq, D].

    mask: `block_mask(walk)`, where the caller has it already.
    execute: `torch.compile(flex_attention)` where speed matters; plain FlexAttention is dense.
    """
    heads, copies = query.shape[1], key.shape[1]
    grouped = walk.key_head == tuple(head * copies // heads for head in range(heads)) and heads % copies == 0
    if not grouped:
        of_head = head_indices(walk.key_head, key.device)
        key, value = key.index_select(1, of_head), value.index_select(1, of_head)
    mask = block_mask(walk) if mask is None else mask
    return execute(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped and copies < heads)


def _mask_mod(walk: TileWalk) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    plan_of = head_indices(walk.head_plan, walk.tiles.device)
    query_tags, key_tags, window = walk.query_tags, walk.key_tags, walk.window
    listed = _listed(walk)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        plan = plan_of[h]
        q_position, k_position = query_tags[b, plan, 0, q], key_tags[b, plan, 0, k]
        allowed = k_position <= q_position
        if walk.spans:
            q_span = query_tags[b, plan, 2, q]
            allowed = allowed | ((q_span == key_tags[b, plan, 2, k]) & (q_span >= 0))
        if window is not None:
            allowed = allowed & (k_position > q_position - window)
        if walk.segments:
            allowed = allowed & (query_tags[b, plan, 1, q] == key_tags[b, plan, 1, k])
        return allowed & listed[b, plan, q // TILE, k // TILE]

    return mask_mod


def _listed(walk: TileWalk) -> Tensor:
    """Which tiles the walk lists, bool [B, P, nQ, nK] over key tiles."""
    key_tiles = walk.tiles.shape[3]
    entry = torch.arange(key_tiles, device=walk.tiles.device)
    used = (entry < walk.counts[..., :1]) | (entry >= key_tiles - walk.counts[..., 1:])
    # Unused entries go to one column too many, which is then cut off.
    column = torch.where(used, walk.tiles, key_tiles).long()
    listed = torch.zeros(*walk.tiles.shape[:3], key_tiles + 1, dtype=torch.bool, device=walk.tiles.device)
    return listed.scatter_(3, column, True)[..., :key_tiles]
