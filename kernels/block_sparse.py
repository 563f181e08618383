"""Block-sparse attention over the tile lists of a plan: which kernel runs, and the portable Triton one.

One program computes one block of query rows of one head. It walks the row's full tiles with no mask
arithmetic, then its partial tiles with the element mask read from the tags, then its columns: single keys,
gathered from wherever they lie. One running softmax (base 2, float32) spans all three.
"""

import math
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels import hopper_support
from mmcompile.kernels.attention_config import UNSPECIALIZED, Config, padded_head_dim
from mmcompile.kernels.bulk_copies import key_descriptor, takes_descriptors
from mmcompile.kernels.choose_config import choose_config
from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.measure_configs import measure
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.permute import permute, unpermute
from mmcompile.kernels.tile_walk import MAX_WINDOW, TileWalk
from mmcompile.kernels.unit_columns import unit_columns


@triton.jit
def _load_tile(
    source,
    batch,
    copy,
    start,
    row_stride,
    length,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """Rows from `start` of one head of K or V, [BLOCK_N, BLOCK_D]; zeros past the length and past D."""
    if DESCRIPTOR:
        tile = source.load([batch, copy, start, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        row = tl.arange(0, BLOCK_N)
        column = tl.arange(0, BLOCK_D)
        # The tensor of offsets stays the same from step to step; only a scalar moves.
        offsets = row.to(tl.int64)[:, None] * row_stride + column[None, :]
        pointers = (source + start.to(tl.int64) * row_stride) + offsets
        if not INSIDE:
            tile = tl.load(pointers, mask=(row[:, None] < length - start) & (column[None, :] < D), other=0.0)
        elif D == BLOCK_D:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=column[None, :] < D, other=0.0)
    return tile


@triton.jit
def _gather_rows(source, slot, row_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows at some slots of one head of K or V, [slots, BLOCK_D]; zeros past D."""
    column = tl.arange(0, BLOCK_D)
    pointers = source + (slot.to(tl.int64)[:, None] * row_stride + column[None, :])
    return tl.load(pointers) if D == BLOCK_D else tl.load(pointers, mask=column[None, :] < D, other=0.0)


@triton.jit
def _allowed(
    query_tags,
    key_tags,
    q_position,
    row,
    slot,
    query_length,
    key_length,
    window,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """The element mask of one step, [BLOCK_M, slots]. Rows and slots past the end are never allowed."""
    inside = slot < key_length
    k_position = tl.load(key_tags + slot, mask=inside, other=2147483647)
    allowed = k_position[None, :] <= q_position[:, None]
    if SPANS:
        q_span = tl.load(query_tags + 2 * query_length + row, mask=row < query_length, other=-1)
        k_span = tl.load(key_tags + 2 * key_length + slot, mask=inside, other=-2)
        allowed |= (k_span[None, :] == q_span[:, None]) & (q_span >= 0)[:, None]
    if WINDOW:
        allowed &= k_position[None, :] > (q_position - window)[:, None]
    if SEGMENTS:
        q_segment = tl.load(query_tags + query_length + row, mask=row < query_length, other=0)
        k_segment = tl.load(key_tags + key_length + slot, mask=inside, other=0)
        allowed &= k_segment[None, :] == q_segment[:, None]
    return allowed


@triton.jit
def _masked_weights(scores, allowed, maximum, total):
    """One masked step of the softmax: weights, the decay of what was summed before, new maximum, new total."""
    scores = tl.where(allowed, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # Rows that have seen no key yet keep a maximum of -inf; subtracting it would give NaN.
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.math.exp2(scores - shift[:, None])
    decay = tl.math.exp2(maximum - shift)
    return weights, decay, new_maximum, total * decay + tl.sum(weights, 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_kernel(
    query,
    key,
    value,
    key_descriptor,
    value_descriptor,
    output,
    query_tags,
    key_tags,
    query_row,
    key_row,
    counts,
    tiles,
    columns,
    cold,
    head_plan,
    key_head,
    query_batch_stride,
    query_head_stride,
    query_row_stride,
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    value_batch_stride,
    value_head_stride,
    value_row_stride,
    batches,
    heads,
    plans,
    query_orders,
    key_orders,
    tile_entries,
    column_entries,
    query_length,
    key_length,
    scale_log2,
    window,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPANS: tl.constexpr,
):
    # Neighbouring programs are the heads of one query block, so that those with one key copy meet in the L2
    # cache. The last query blocks come first: under a causal mask they have the most tiles.
    program = tl.program_id(0)
    block = tl.cdiv(query_length, BLOCK_M) - 1 - program // (batches * heads)
    batch = (program // heads) % batches
    head = program % heads
    plan = batch.to(tl.int64) * plans + tl.load(head_plan + head)
    key_order = tl.load(key_row + plan)
    copy = tl.load(key_head + head) + key_order
    query += batch.to(tl.int64) * query_batch_stride + head.to(tl.int64) * query_head_stride
    output += (batch.to(tl.int64) * query_length * heads + head) * D
    key += batch.to(tl.int64) * key_batch_stride + copy.to(tl.int64) * key_head_stride
    value += batch.to(tl.int64) * value_batch_stride + copy.to(tl.int64) * value_head_stride
    if DESCRIPTORS:
        keys, values = key_descriptor, value_descriptor
    else:
        keys, values = key, value
    query_tags += (batch.to(tl.int64) * query_orders + tl.load(query_row + plan)) * 3 * query_length
    key_tags += (batch.to(tl.int64) * key_orders + key_order) * 3 * key_length
    counts += (plan * tl.cdiv(query_length, TILE) + block * BLOCK_M // TILE) * 5
    full = tl.load(counts + 1)
    partial = tl.load(counts + 2)
    tiles += plan * tile_entries + tl.load(counts)

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    inside = (row < query_length)[:, None] & (column < D)[None, :]
    q = tl.load(query + row.to(tl.int64)[:, None] * query_row_stride + column[None, :], mask=inside, other=0.0)
    # A row past the end sees nothing: no key lies at or before position -1.
    q_position = tl.load(query_tags + row, mask=row < query_length, other=-1)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    SPLIT: tl.constexpr = TILE // BLOCK_N
    for step in range(full * SPLIT):
        start = tl.load(tiles + step // SPLIT) * TILE + step % SPLIT * BLOCK_N
        k = _load_tile(keys, batch, copy, start, key_row_stride, key_length, D, BLOCK_N, BLOCK_D, DESCRIPTORS, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
        weights = tl.math.exp2(tl.math.fma(scores, scale_log2, -new_maximum[:, None]))
        decay = tl.math.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights, 1)
        v = _load_tile(values, batch, copy, start, value_row_stride, key_length, D, BLOCK_N, BLOCK_D, DESCRIPTORS, True)
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision="ieee")
        maximum = new_maximum

    for step in range(partial * SPLIT):
        start = tl.load(tiles + full + step // SPLIT) * TILE + step % SPLIT * BLOCK_N
        k = _load_tile(keys, batch, copy, start, key_row_stride, key_length, D, BLOCK_N, BLOCK_D, DESCRIPTORS, False)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        slot = start + tl.arange(0, BLOCK_N)
        allowed = _allowed(
            query_tags,
            key_tags,
            q_position,
            row,
            slot,
            query_length,
            key_length,
            window,
            WINDOW,
            SEGMENTS,
            SPANS,
        )
        if COLUMNS:
            allowed &= tl.load(cold + plan * key_length + slot, mask=slot < key_length, other=False)[None, :]
        weights, decay, maximum, total = _masked_weights(scores, allowed, maximum, total)
        v = _load_tile(
            values, batch, copy, start, value_row_stride, key_length, D, BLOCK_N, BLOCK_D, DESCRIPTORS, False
        )
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision="ieee")

    if COLUMNS:
        columns += plan * column_entries + tl.load(counts + 3)
        single = tl.load(counts + 4)
        # Addresses of single rows take registers, which half as many scores leave free.
        STEP: tl.constexpr = max(BLOCK_N // 2, 32)
        for step in range(tl.cdiv(single, STEP)):
            entry = step * STEP + tl.arange(0, STEP)
            # Past the list the last column comes again, where no mask is needed to load it, and no query sees it.
            source = tl.load(columns + tl.minimum(entry, single - 1))
            slot = tl.where(entry < single, source, key_length)
            k = _gather_rows(key, source, key_row_stride, D, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            allowed = _allowed(
                query_tags,
                key_tags,
                q_position,
                row,
                slot,
                query_length,
                key_length,
                window,
                WINDOW,
                SEGMENTS,
                SPANS,
            )
            weights, decay, maximum, total = _masked_weights(scores, allowed, maximum, total)
            v = _gather_rows(value, source, value_row_stride, D, BLOCK_D)
            accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision="ieee")

    result = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
    target = output + row.to(tl.int64)[:, None] * (heads * D) + column[None, :]
    tl.store(target, result.to(output.dtype.element_ty), mask=inside)


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float, query_order: Tensor | None = None
) -> Tensor:
    """The op of that name for CUDA tensors; arguments as there. [B, H, Sq, D] in [B, Sq, H, D] memory."""
    query, key, value = (unit_columns(x) for x in (query, key, value))
    hopper = hopper_support.runs(query, key, value, walk.columns.shape[2])
    if query_order is not None and not (hopper and query.shape[2] >= hopper_support.FOLDS_FROM):
        query = permute(query, query_order, walk.query_row, range(query.shape[1]), walk.head_plan)
        output = block_sparse_attention(query, key, value, walk, scale)
        return unpermute(output, query_order, walk.query_row, walk.head_plan)
    if hopper:
        # Imported where it runs: another version of Triton may have no Gluon, or another one.
        from mmcompile.kernels import block_sparse_hopper

        return block_sparse_hopper.launch(query, key, value, walk, scale, query_order)
    return portable_attention(query, key, value, walk, scale)


def portable_attention(query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float) -> Tensor:
    """`block_sparse_attention` by the portable kernel, for tensors with contiguous rows."""
    config = choose_config(query, partial(measure, run))
    descriptors = takes_descriptors(key) and takes_descriptors(value)
    return launch(query, key, value, walk, scale, config, descriptors)


def launch(
    query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float, config: Config, descriptors: bool
) -> Tensor:
    """`block_sparse_attention` with the caller's launch shape, for measurements and the interpreter."""
    batch, heads, query_length, width = query.shape
    output = query.new_empty(batch, query_length, heads, width)  # [B, Sq, H, D]
    if output.numel() == 0 or key.shape[2] == 0:
        output.zero_()
    else:
        run(output, query, key, value, walk, scale, config, descriptors)
    return output.transpose(1, 2)


def run(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    walk: TileWalk,
    scale: float,
    config: Config,
    descriptors: bool,
) -> Any:
    """Fills an output [B, Sq, H, D] that is not empty; returns the compiled kernel."""
    batch, heads, query_length, width = query.shape
    padded = padded_head_dim(width)
    # Everything on the first grid axis: the others end at 65,535.
    grid = (batch * heads * triton.cdiv(query_length, config.block_m),)
    with torch.cuda.device_of(query):
        compiled = _attention_kernel[
            grid
        ](
            query,
            key,  # columns are gathered through pointers, whatever loads the tiles
            value,
            key_descriptor(key, config.block_n) if descriptors else key,
            key_descriptor(value, config.block_n) if descriptors else value,
            output,
            *(tensor.contiguous() for tensor in walk[:8]),
            head_indices(walk.head_plan, query.device),
            head_indices(walk.key_head, query.device),
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            batch,
            heads,
            walk.counts.shape[1],
            walk.query_tags.shape[1],
            walk.key_tags.shape[1],
            walk.tiles.shape[2],
            walk.columns.shape[2],
            query_length,
            key.shape[2],
            scale / math.log(2.0),
            min(walk.window or 0, MAX_WINDOW),
            D=width,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=padded,
            TILE=TILE,
            DESCRIPTORS=descriptors,
            COLUMNS=walk.columns.shape[2] > 0,
            WINDOW=walk.window is not None,
            SEGMENTS=walk.segments,
            SPANS=walk.spans,
            num_warps=config.warps,
            num_stages=config.stages,
            # Named, because Triton 3.10 changes the default and 3.9 warns of it.
            enable_fp_fusion=True,
        )
    return compiled
