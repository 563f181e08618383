"""Triton kernels of `kernels/search_stride.py`: what a few queries attend to, by distance and by key, and their sums at
the multiples of every stride. No sum is atomic, so that every run gives the same stride."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.attention_config import attention_config, padded_head_dim

BLOCK = 128  # keys, or distances, of one program


@triton.jit(do_not_specialize=["rows", "keys", "key_length", "offset", "scale_log2"])
def _scores_kernel(
    query,
    key,
    row,
    end,
    scores,
    log_sums,
    query_batch_stride,
    query_head_stride,
    query_row_stride,
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    heads,
    group,
    rows,
    keys,
    key_length,
    offset,
    scale_log2,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Base-2 scores of some rows of one head on one block of keys, and the logarithm of each row's sum there."""
    blocks = tl.cdiv(keys, BLOCK)
    block = tl.program_id(0) % blocks
    parts: tl.constexpr = ROWS // BLOCK_R
    plane = tl.program_id(0) // blocks // parts  # batch row and head
    batch = (plane // heads).to(tl.int64)
    head = (plane % heads).to(tl.int64)
    index = tl.program_id(0) // blocks % parts * BLOCK_R + tl.arange(0, BLOCK_R)
    token = tl.load(row + batch * rows + index, mask=index < rows, other=-1)
    column = tl.arange(0, BLOCK_D)
    q = tl.load(
        query
        + batch * query_batch_stride
        + head * query_head_stride
        + (token[:, None] * query_row_stride + column[None, :]),
        mask=(index < rows)[:, None] & (column < D)[None, :],
        other=0.0,
    )
    entry = block * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(end + batch) - (keys - 1) + entry
    inside = (entry < keys) & (position >= 0) & (position < key_length)
    k = tl.load(
        key
        + batch * key_batch_stride
        + head // group * key_head_stride
        + (position[:, None] * key_row_stride + column[None, :]),
        mask=inside[:, None] & (column < D)[None, :],
        other=0.0,
    )
    usable = inside[None, :] & (position[None, :] <= token[:, None] + offset) & (index < rows)[:, None]
    found = tl.where(usable, tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2, float("-inf"))
    maximum = tl.max(found, 1)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.math.exp2(found - shift[:, None]), 1)
    log_sum = tl.where(maximum == float("-inf"), maximum, maximum + tl.math.log2(tl.maximum(total, 1.0)))
    tl.store(log_sums + (plane.to(tl.int64) * blocks + block) * ROWS + index, log_sum)
    target = scores + (plane.to(tl.int64) * ROWS + index)[:, None] * keys + entry[None, :]
    tl.store(target, found, mask=(entry < keys)[None, :])


@triton.jit(do_not_specialize=["rows", "keys", "offset", "near"])
def _profile_kernel(
    scores,
    log_sums,
    row,
    end,
    by_distance,
    by_key,
    heads,
    rows,
    keys,
    offset,
    near,
    ROWS: tl.constexpr,
    SCORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights of one head, summed over the rows at some distances, and averaged over them at some keys."""
    blocks = tl.cdiv(keys, BLOCK)
    block = tl.program_id(0) % blocks
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    batch = plane // heads
    index = tl.arange(0, ROWS)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    scored = tl.cdiv(keys, SCORED)
    for other in range(scored):
        log_sum = tl.load(log_sums + (plane * scored + other) * ROWS + index)
        new_maximum = tl.maximum(maximum, log_sum)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.math.exp2(maximum - shift) + tl.math.exp2(log_sum - shift)
        maximum = new_maximum
    # A row that sees no key has no weights.
    log_total = tl.where(maximum == float("-inf"), 0.0, maximum + tl.math.log2(tl.maximum(total, 1.0)))

    entry = block * BLOCK + tl.arange(0, BLOCK)
    scores += plane * ROWS * keys
    inside = (index < rows)[:, None] & (entry < keys)[None, :]
    of_key = tl.load(scores + index[:, None] * keys + entry[None, :], mask=inside, other=float("-inf"))
    mean = tl.sum(tl.math.exp2(of_key - log_total[:, None]), 0) / rows
    tl.store(by_key + plane * keys + entry, mean, mask=entry < keys)

    distance = entry + 1
    token = tl.load(row + batch * rows + index, mask=index < rows, other=0) + offset
    at = (token - tl.load(end + batch) + (keys - 1))[:, None] - distance[None, :]
    inside = (index < rows)[:, None] & (at >= 0) & (at < keys) & (distance >= near)[None, :]
    at_distance = tl.load(scores + index[:, None] * keys + at, mask=inside, other=float("-inf"))
    held = tl.sum(tl.math.exp2(at_distance - log_total[:, None]), 0)
    tl.store(by_distance + plane * (keys + 1) + distance, held, mask=entry < keys)


@triton.jit(do_not_specialize=["heads", "keys"])
def _multiples_kernel(by_distance, held, heads, strides, keys, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """What some heads hold at the multiples of one stride."""
    stride = tl.program_id(0) % strides + 1
    batch = (tl.program_id(0) // strides).to(tl.int64)
    head = tl.arange(0, HEADS)
    source = by_distance + (batch * heads + head)[:, None] * (keys + 1)
    total = tl.zeros([HEADS, BLOCK], tl.float32)
    for first in range(1, keys // stride + 1, BLOCK):
        multiple = (first + tl.arange(0, BLOCK)) * stride
        total += tl.load(
            source + multiple[None, :], mask=(head < heads)[:, None] & (multiple <= keys)[None, :], other=0.0
        )
    target = held + (batch * heads + head) * (strides + 1) + stride
    tl.store(target, tl.sum(total, 1), mask=head < heads)


def profiles(
    query: Tensor, key: Tensor, row: Tensor, end: Tensor, keys: int, offset: int, near: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`_profiles` of search_stride.py for CUDA tensors."""
    batch, heads, _, width = query.shape
    rows = row.shape[1]
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    config = attention_config(query)
    padded = max(16, triton.next_power_of_2(rows))
    block_rows, block_keys = min(config.block_m, padded), min(config.block_n, BLOCK)
    blocks = triton.cdiv(keys, block_keys)
    scores = torch.empty(batch * heads, padded, keys, dtype=torch.float32, device=query.device)
    log_sums = scores.new_empty(batch * heads, blocks, padded)
    by_distance = scores.new_zeros(batch, heads, keys + 1)
    by_key = scores.new_empty(batch, heads, keys)
    with torch.cuda.device_of(query):
        _scores_kernel[(batch * heads * (padded // block_rows) * blocks,)](
            query,
            key,
            row,
            end,
            scores,
            log_sums,
            *query.stride()[:3],
            *key.stride()[:3],
            heads,
            heads // key.shape[1],
            rows,
            keys,
            key.shape[2],
            offset,
            scale / math.log(2.0),
            D=width,
            ROWS=padded,
            BLOCK_R=block_rows,
            BLOCK=block_keys,
            BLOCK_D=padded_head_dim(width),
            num_warps=8,
        )
        _profile_kernel[(batch * heads * triton.cdiv(keys, BLOCK),)](
            scores,
            log_sums,
            row,
            end,
            by_distance,
            by_key,
            heads,
            rows,
            keys,
            offset,
            near,
            ROWS=padded,
            SCORED=block_keys,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return by_distance, by_key


def at_multiples(by_distance: Tensor, max_stride: int) -> Tensor:
    """`_at_multiples` of search_stride.py for CUDA tensors."""
    batch, heads, keys = by_distance.shape
    held = by_distance.new_zeros(batch, heads, max_stride + 1)
    with torch.cuda.device_of(by_distance):
        _multiples_kernel[(batch * max_stride,)](
            by_distance, held, heads, max_stride, keys - 1, HEADS=triton.next_power_of_2(heads), BLOCK=32
        )
    return held
