"""Triton kernel of `kernels/compare_with_dense.py`: dense attention of drawn query tiles, and a plan's share of it."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.attention_config import SMALL, padded_head_dim
from mmcompile.kernels.block_sparse import _allowed, _masked_weights
from mmcompile.kernels.compare_with_dense import Drawn
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_walk import MAX_WINDOW, TileWalk
from mmcompile.kernels.unit_columns import unit_columns

UNSPECIALIZED = ["key_orders", "key_length", "window"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _dense_kernel(
    query,
    key,
    value,
    batch_of,
    head_of,
    copy_of,
    key_row_of,
    token,
    query_tags,
    computed,
    key_tags,
    result,
    held,
    query_batch_stride,
    query_head_stride,
    query_row_stride,
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    value_batch_stride,
    value_head_stride,
    value_row_stride,
    key_orders,
    key_length,
    scale_log2,
    window,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPANS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    batch, copy = tl.load(batch_of + n), tl.load(copy_of + n)
    query += batch * query_batch_stride + tl.load(head_of + n) * query_head_stride
    key += batch * key_batch_stride + copy * key_head_stride
    value += batch * value_batch_stride + copy * value_head_stride
    query_tags += n * 3 * TILE
    key_tags += (batch * key_orders + tl.load(key_row_of + n)) * 3 * key_length
    computed += n * key_length

    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    in_head = (column < D)[None, :]
    place = tl.load(token + n * TILE + row)
    q = tl.load(query + place[:, None] * query_row_stride + column[None, :], mask=in_head, other=0.0)
    q_position = tl.load(query_tags + row)
    latest = tl.max(q_position, 0)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    listed = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, key_length, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        inside = slot < key_length
        first = tl.min(tl.load(key_tags + slot, mask=inside, other=2147483647), 0)
        if (first <= latest) | SPANS:  # half of all keys come after their queries
            wide = inside[:, None] & in_head
            at = slot.to(tl.int64)[:, None]
            k = tl.load(key + at * key_row_stride + column[None, :], mask=wide, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            allowed = _allowed(
                query_tags, key_tags, q_position, row, slot, TILE, key_length, window, WINDOW, SEGMENTS, SPANS
            )
            weights, decay, maximum, total = _masked_weights(scores, allowed, maximum, total)
            of_plan = tl.load(computed + slot, mask=inside, other=0).to(tl.float32)
            listed = listed * decay + tl.sum(weights * of_plan[None, :], 1)
            v = tl.load(value + at * value_row_stride + column[None, :], mask=wide, other=0.0)
            accumulator = accumulator * decay[:, None]
            accumulator = tl.dot(weights.to(v.dtype), v, accumulator, input_precision="ieee")
    # A row with no key: 0, and a share that is not a number.
    dense = tl.where((total > 0.0)[:, None], accumulator / total[:, None], 0.0)
    at = n * TILE + row
    tl.store(result + at[:, None] * D + column[None, :], dense, mask=in_head)
    tl.store(held + at, tl.where(total > 0.0, listed / total, float("nan")))


def attend(
    drawn: Drawn, query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense attention of the drawn queries, and what the plan holds of it: see `compare_with_dense._attend`."""
    query, key, value = (unit_columns(x) for x in (query, key, value))
    # Few programs, each with all keys: what fits any GPU is as good as another shape.
    config = SMALL[query.element_size(), padded_head_dim(query.shape[3])]
    count, width = len(drawn.batch), query.shape[3]
    result = torch.empty(count, TILE, width, device=query.device)
    held = torch.empty(count, TILE, device=query.device)
    with torch.cuda.device_of(query):
        _dense_kernel[(count, TILE // config.block_m)](
            query,
            key,
            value,
            drawn.batch,
            drawn.head,
            drawn.copy,
            drawn.key_row,
            drawn.token,
            drawn.query_tags,
            drawn.computed,
            walk.key_tags.contiguous(),
            result,
            held,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            walk.key_tags.shape[1],
            key.shape[2],
            scale / math.log(2.0),
            min(walk.window or 0, MAX_WINDOW),
            D=width,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=padded_head_dim(width),
            TILE=TILE,
            WINDOW=walk.window is not None,
            SEGMENTS=walk.segments,
            SPANS=walk.spans,
            num_warps=config.warps,
            num_stages=config.stages,
            # Named, because Triton 3.10 changes the default and 3.9 warns of it.
            enable_fp_fusion=True,
        )
    return result, held
