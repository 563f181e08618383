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
    Raises ValueError where the walk has columns, which no block mask can say.
    """
    if walk.columns.shape[2]:
        raise ValueError(f"columns has shape {list(walk.columns.shape)}; FlexAttention takes none, [B, P, 0]")
    plans = sorted(set(walk.head_plan))
    # One row for all heads where they agree: FlexAttention broadcasts it, and its lists stay small.
    rows = head_indices(walk.head_plan if len(plans) > 1 else (plans[0],), walk.tiles.device)
    full, partial = (part.index_select(1, rows).contiguous() for part in walk.counts[..., 1:3].unbind(-1))
    full_tiles, partial_tiles = (lists.clamp(min=0).index_select(1, rows) for lists in _lists(walk))
    return BlockMask.from_kv_blocks(
        partial,
        partial_tiles,
        full,
        full_tiles,
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
    mask = block_mask(walk) if mask is None else mask
    heads, copies = query.shape[1], key.shape[1]
    # Never where there are several key orders: then no head begins at the last copy.
    grouped = walk.key_head == tuple(head * copies // heads for head in range(heads)) and heads % copies == 0
    if not grouped:
        key, value = _of_heads(key, walk), _of_heads(value, walk)
    return execute(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped and copies < heads)


def _of_heads(tensor: Tensor, walk: TileWalk) -> Tensor:
    """Keys or values [B, C, Sk, D] as each head reads them, [B, H, Sk, D]."""
    key_row = walk.key_row.index_select(1, head_indices(walk.head_plan, tensor.device))
    copy = head_indices(walk.key_head, tensor.device) + key_row  # [B, H]
    return tensor[torch.arange(len(tensor), device=tensor.device).unsqueeze(1), copy]


def _mask_mod(walk: TileWalk) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    plan_of = head_indices(walk.head_plan, walk.tiles.device)
    query_tags, key_tags, window = walk.query_tags, walk.key_tags, walk.window
    query_row, key_row = walk.query_row, walk.key_row
    listed = _listed(walk)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        plan = plan_of[h]
        q_row, k_row = query_row[b, plan], key_row[b, plan]
        q_position, k_position = query_tags[b, q_row, 0, q], key_tags[b, k_row, 0, k]
        allowed = k_position <= q_position
        if walk.spans:
            q_span = query_tags[b, q_row, 2, q]
            allowed = allowed | ((q_span == key_tags[b, k_row, 2, k]) & (q_span >= 0))
        if window is not None:
            allowed = allowed & (k_position > q_position - window)
        if walk.segments:
            allowed = allowed & (query_tags[b, q_row, 1, q] == key_tags[b, k_row, 1, k])
        return allowed & listed[b, plan, q // TILE, k // TILE]

    return mask_mod


def _lists(walk: TileWalk) -> tuple[Tensor, Tensor]:
    """Full and partial tiles of each query tile from the front of a row of its own, int32 [B, P, nQ, nK], then -1."""
    key_tiles = -(-walk.key_tags.shape[3] // TILE)
    entry = torch.arange(key_tiles, dtype=torch.int32, device=walk.tiles.device)
    first, full, partial, _, _ = (part.unsqueeze(-1) for part in walk.counts.unbind(-1))

    def rows(start: Tensor, length: Tensor) -> Tensor:
        source = (start + entry).clamp(max=walk.tiles.shape[2] - 1).flatten(2).long()
        return walk.tiles.gather(2, source).view(*walk.counts.shape[:3], -1).masked_fill(entry >= length, -1)

    return rows(first, full), rows(first + full, partial)


def _listed(walk: TileWalk) -> Tensor:
    """Which tiles the walk lists, bool [B, P, nQ, nK] over key tiles."""
    tiles = torch.cat(_lists(walk), 3).long()
    key_tiles = tiles.shape[3] // 2
    listed = torch.zeros(*tiles.shape[:3], key_tiles + 1, dtype=torch.bool, device=tiles.device)
    # Unused entries go to one column too many, which is then cut off.
    return listed.scatter_(3, tiles.where(tiles >= 0, key_tiles), True)[..., :key_tiles]
