"""Block-sparse attention for Hopper GPUs, in Triton's Gluon dialect: bulk copies, asynchronous matrix products, and
warps with a part each.

A program stays on its multiprocessor and takes items, a query tile of a head each, until none is left. Ten warps share
the work: one *schedules* (takes the next item, starts the copy of its queries, reads the tags of the tiles that need a
mask), one *fetches* tiles of keys and values through a ring of buffers, and two groups of four *attend*, half of the
query rows each. A group makes the scores of a tile while the products with the values of the tile before are made, and
the first scores of an item while the last products of the item before are. So the matrix units wait neither for
exponentials nor for the beginning or the end of an item.

Buffers go round by barriers: `full` says that what is in one may be used, `empty` that it may be written again; `turn`
counts items, `index` tiles, `masked` tiles with a mask.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mmcompile.kernels.attention_config import padded_head_dim, takes_descriptors
from mmcompile.kernels.gather_columns import gather_columns
from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_walk import MAX_WINDOW, TileWalk

# Gluon changes from one version to the next; elsewhere the portable kernel runs.
MEASURED_ON = ("3.6",)
# Query tokens from which the kernel itself gathers and scatters rows. Measured on an H200: 128K tokens take 5.12 ms
# where permute, kernel and unpermute take 6.04; at 32K one warp's gathering costs what the two copies do.
FOLDS_FROM = 65536
MOST_COLUMNS = 8192  # of a plan row; they are gathered for each head, which for many more would take the keys' own room
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


class Shape(NamedTuple):
    """Keys of one step, and how many buffers of tiles, of queries and of tags go round."""

    block_n: int
    stages: int
    queries: int
    slots: int = 4


# Keyed on the padded head dim. Measured on an H200; 227 KiB of shared memory hold no more.
SHAPES = {64: Shape(128, 4, 2), 128: Shape(128, 2, 2), 256: Shape(64, 2, 1)}
CONSUMER_REGISTERS, OTHER_REGISTERS = gl.constexpr(216), gl.constexpr(72)
BLOCK_M = gl.constexpr(TILE)
ROWS = gl.constexpr(TILE // 2)  # query rows of one of the two groups that attend

COPIED = gl.constexpr(16)  # query rows whose addresses a warp holds at once

# What `_schedule` tells the other warps of an item.
ITEM, PLAN, QUERY_ROW, COPY, FIRST_TILE, FULL, TILE_STEPS, STEPS, FIRST_COLUMN = [gl.constexpr(i) for i in range(9)]
FIELDS = gl.constexpr(16)
NEVER = gl.constexpr(2**31 - 1)  # a position that no query sees


@gluon.jit
def _wait_full(barriers, index, NUMBER: gl.constexpr):
    mbarrier.wait(barriers.index(index % NUMBER), index // NUMBER & 1)


@gluon.jit
def _wait_empty(barriers, index, NUMBER: gl.constexpr):
    mbarrier.wait(barriers.index(index % NUMBER), index // NUMBER & 1 ^ 1)


@gluon.jit
def _put(fields, NAME: gl.constexpr, value, entry):
    return gl.where(entry == NAME, value, fields)


@gluon.jit
def _get(fields, NAME: gl.constexpr, entry):
    return gl.sum(gl.where(entry == NAME, fields, 0), 0)


@gluon.jit
def _place(item, sizes):
    """Query tile, batch row and head. Heads of one tile follow each other, so that those with one key copy meet in the
    L2 cache; the last tiles come first: under a causal mask they take longest."""
    batches, heads, blocks = sizes
    return blocks - 1 - item // (batches * heads), item // heads % batches, item % heads


@gluon.jit
def _gather_queries(source, row_stride, order, first, length, buffers, slot, D: gl.constexpr, BLOCK_D: gl.constexpr):
    """The queries of an item, row by row from where their tokens stand."""
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [1, 1], [1, 0])  # 16 bytes each
    column = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, COPY))
    for half in gl.static_range(2):
        for part in gl.static_range(ROWS // COPIED):
            row = first + half * ROWS + part * COPIED + gl.arange(0, COPIED, layout=gl.SliceLayout(1, COPY))
            token = gl.load(order + row, mask=row < length, other=0).to(gl.int64)
            into = buffers.index(slot * 2 + half).reshape([ROWS, BLOCK_D]).slice(part * COPIED, COPIED)
            # Rows start at 16 bytes, as the bulk copy engine wants it too.
            pointers = source + (token * row_stride)[:, None] + column[None, :]
            pointers = gl.max_contiguous(gl.multiple_of(pointers, [16, 16]), [1, 8])
            async_copy.async_copy_global_to_shared(into, pointers, (row < length)[:, None] & (column < D)[None, :])
    async_copy.commit_group()
    async_copy.wait_group(0)
    # The matrix units read shared memory by another way than these copies write it.
    hopper.fence_async_shared()


@gluon.jit
def _schedule(
    query,
    source,
    source_strides,
    order,
    lists,
    tags,
    counter,
    sizes,
    lengths,
    entries,
    programs,
    buffers,
    barriers,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SLOTS: gl.constexpr,
    QUERIES: gl.constexpr,
    COLUMNS: gl.constexpr,
    SEGMENTS: gl.constexpr,
    SPANS: gl.constexpr,
    ORDERED: gl.constexpr,
):
    """Items in turn: where their lists are, their queries, and the tags of the queries and of the keys to be masked."""
    query_row, key_row, counts, tiles, columns, cold, head_plan, key_head = lists
    query_tags, key_tags = tags
    batches, heads, blocks = sizes
    query_length, key_length = lengths
    plans, query_orders, key_orders, tile_entries, column_entries = entries
    queries, info, row_tags, slot_tags = buffers
    query_full, query_empty, tags_full, tags_empty = barriers
    SPLIT: gl.constexpr = BLOCK_M // BLOCK_N
    TAGS: gl.constexpr = 4 if SEGMENTS or SPANS else 1
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    entry = gl.arange(0, FIELDS, layout=LANES)
    key_entry = gl.arange(0, BLOCK_N, layout=LANES)
    row_entry = gl.arange(0, BLOCK_M, layout=LANES)
    items = batches * heads * blocks
    turn = 0
    masked = 0
    item = gl.program_id(0)
    while item < items:
        block, batch, head = _place(item, sizes)
        plan_row = gl.load(head_plan + head)
        first_copy = gl.load(key_head + head)
        plan = batch.to(gl.int64) * plans + plan_row
        query_order = gl.load(query_row + plan)
        key_order = gl.load(key_row + plan)
        counted = counts + (plan * blocks + block) * 5
        first_tile = gl.load(counted)
        full = gl.load(counted + 1) * SPLIT
        tile_steps = full + gl.load(counted + 2) * SPLIT
        first_column = gl.load(counted + 3)
        single = gl.load(counted + 4)
        steps = tile_steps
        if COLUMNS:
            steps += gl.cdiv(single, BLOCK_N)
        # An empty list is one tile of which nothing is seen, so that every item is alike.
        steps = gl.maximum(steps, 1)
        fields = gl.full([FIELDS], 0, gl.int32, LANES)
        fields = _put(fields, ITEM, item, entry)
        fields = _put(fields, PLAN, plan.to(gl.int32), entry)
        fields = _put(fields, QUERY_ROW, query_order, entry)
        fields = _put(fields, COPY, first_copy + key_order, entry)
        fields = _put(fields, FIRST_TILE, first_tile, entry)
        fields = _put(fields, FULL, full, entry)
        fields = _put(fields, TILE_STEPS, tile_steps, entry)
        fields = _put(fields, STEPS, steps, entry)
        fields = _put(fields, FIRST_COLUMN, first_column, entry)
        turn_slot = turn % QUERIES
        _wait_empty(query_empty, turn, QUERIES)
        if ORDERED:
            batch_stride, head_stride, row_stride = source_strides
            its_source = source + batch.to(gl.int64) * batch_stride + head.to(gl.int64) * head_stride
            its_order = order + (batch.to(gl.int64) * query_orders + query_order) * query_length
            _gather_queries(
                its_source, row_stride, its_order, block * BLOCK_M, query_length, queries, turn_slot, D, BLOCK_D
            )
            mbarrier.arrive(query_full.index(turn_slot))
        else:
            mbarrier.expect(query_full.index(turn_slot), 2 * query.block_type.nbytes)
            for half in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    query,
                    [batch, head, block * BLOCK_M + half * ROWS, 0],
                    query_full.index(turn_slot),
                    queries.index(turn_slot * 2 + half),
                )
        its_query_tags = query_tags + (batch.to(gl.int64) * query_orders + query_order) * 3 * query_length
        row = block * BLOCK_M + row_entry
        # A row past the end sees nothing: no key lies at or before position -1.
        position = gl.load(its_query_tags + row, mask=row < query_length, other=-1)
        row_tags.index(turn_slot * TAGS).store(position)
        if SEGMENTS:
            segment = gl.load(its_query_tags + query_length + row, mask=row < query_length, other=0)
            row_tags.index(turn_slot * TAGS + 1).store(segment)
        if SPANS:
            span = gl.load(its_query_tags + 2 * query_length + row, mask=row < query_length, other=-1)
            row_tags.index(turn_slot * TAGS + 2).store(span)
        info.index(turn_slot).store(fields)
        mbarrier.arrive(query_full.index(turn_slot))
        turn += 1
        its_tags = key_tags + (batch.to(gl.int64) * key_orders + key_order) * 3 * key_length
        its_tiles = tiles + plan * tile_entries + first_tile
        its_columns = columns + plan * column_entries + first_column
        its_cold = cold + plan * key_length
        for step in range(full, steps):
            of_tile = step < tile_steps
            tile = gl.load(its_tiles + step // SPLIT, mask=of_tile, other=0)
            key_slot = tile * BLOCK_M + step % SPLIT * BLOCK_N + key_entry
            seen = (key_slot < key_length) & of_tile
            if COLUMNS:
                listed = (step - tile_steps) * BLOCK_N + key_entry
                in_list = (listed >= 0) & (listed < single)
                key_slot = gl.where(of_tile, key_slot, gl.load(its_columns + listed, mask=in_list, other=0))
                is_cold = gl.load(its_cold + key_slot, mask=seen, other=0)
                seen = (seen & (is_cold != 0)) | in_list
            key_position = gl.load(its_tags + key_slot, mask=seen, other=NEVER)
            _wait_empty(tags_empty, masked, SLOTS)
            slot_tags.index(masked % SLOTS * TAGS).store(key_position)
            if SEGMENTS:
                key_segment = gl.load(its_tags + key_length + key_slot, mask=seen, other=-1)
                slot_tags.index(masked % SLOTS * TAGS + 1).store(key_segment)
            if SPANS:
                key_span = gl.load(its_tags + 2 * key_length + key_slot, mask=seen, other=-2)
                slot_tags.index(masked % SLOTS * TAGS + 2).store(key_span)
            mbarrier.arrive(tags_full.index(masked % SLOTS))
            masked += 1
        item = programs + gl.atomic_add(counter, 1, sem="relaxed")
    _wait_empty(query_empty, turn, QUERIES)
    info.index(turn % QUERIES).store(gl.full([FIELDS], -1, gl.int32, LANES))
    mbarrier.arrive(query_full.index(turn % QUERIES), count=2)


@gluon.jit
def _copy_tile(descriptor, batch, copy, start, tiles, full, empty, index, STAGES: gl.constexpr):
    _wait_empty(empty, index, STAGES)
    mbarrier.expect(full.index(index % STAGES), descriptor.block_type.nbytes)
    tma.async_copy_global_to_shared(
        descriptor, [batch, copy, start, 0], full.index(index % STAGES), tiles.index(index % STAGES)
    )


@gluon.jit
def _fetch(
    tile_sources,
    column_sources,
    tiles,
    tile_entries,
    sizes,
    buffers,
    query_barriers,
    tile_barriers,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    QUERIES: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """The keys and values of each item, a step at a time: its tiles, then its gathered columns."""
    key, value = tile_sources
    column_key, column_value = column_sources
    keys, values, info = buffers
    query_full, query_empty = query_barriers
    key_full, key_empty, value_full, value_empty = tile_barriers
    SPLIT: gl.constexpr = BLOCK_M // BLOCK_N
    WIDE: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [1], [0])
    entry = gl.arange(0, FIELDS, layout=WIDE)
    index = 0
    turn = 0
    _wait_full(query_full, turn, QUERIES)
    fields = info.index(turn % QUERIES).load(WIDE)
    item = _get(fields, ITEM, entry)
    while item >= 0:
        copy = _get(fields, COPY, entry)
        tile_steps = _get(fields, TILE_STEPS, entry)
        steps = _get(fields, STEPS, entry)
        its_tiles = tiles + _get(fields, PLAN, entry).to(gl.int64) * tile_entries + _get(fields, FIRST_TILE, entry)
        first_column = _get(fields, FIRST_COLUMN, entry)
        mbarrier.arrive(query_empty.index(turn % QUERIES))
        _, batch, head = _place(item, sizes)
        next_tile = gl.load(its_tiles, mask=tile_steps > 0, other=0)
        of_tiles = tile_steps if COLUMNS else steps
        for step in range(of_tiles):
            start = next_tile * BLOCK_M + step % SPLIT * BLOCK_N
            # The next tile's number is on its way while this step waits for room.
            next_tile = gl.load(its_tiles + (step + 1) // SPLIT, mask=step + 1 < tile_steps, other=0)
            _copy_tile(key, batch, copy, start, keys, key_full, key_empty, index, STAGES)
            _copy_tile(value, batch, copy, start, values, value_full, value_empty, index, STAGES)
            index += 1
        if COLUMNS:
            for step in range(of_tiles, steps):
                start = first_column + (step - tile_steps) * BLOCK_N
                _copy_tile(column_key, batch, head, start, keys, key_full, key_empty, index, STAGES)
                _copy_tile(column_value, batch, head, start, values, value_full, value_empty, index, STAGES)
                index += 1
        turn += 1
        _wait_full(query_full, turn, QUERIES)
        fields = info.index(turn % QUERIES).load(WIDE)
        item = _get(fields, ITEM, entry)


@gluon.jit
def _scores(
    query, keys, index, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr
):
    tile = keys.index(index % STAGES).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    return hopper.warpgroup_mma(query.reshape([ROWS, BLOCK_D]), tile, zero, use_acc=False, is_async=True)


@gluon.jit
def _products(weights, values, full, index, output, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
    _wait_full(full, index, STAGES)
    tile = values.index(index % STAGES).reshape([BLOCK_N, BLOCK_D])
    return hopper.warpgroup_mma(weights, tile, output, is_async=True)


@gluon.jit
def _mask(
    scores,
    half: gl.constexpr,
    turn,
    masked,
    window,
    buffers,
    barriers,
    SLOTS: gl.constexpr,
    QUERIES: gl.constexpr,
    WINDOW: gl.constexpr,
    SEGMENTS: gl.constexpr,
    SPANS: gl.constexpr,
):
    """Scores with -inf where the element mask of `kernels/tags.py` allows nothing."""
    row_tags, slot_tags = buffers
    full, empty = barriers
    TAGS: gl.constexpr = 4 if SEGMENTS or SPANS else 1
    OF_ROW: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    OF_KEY: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    rows = turn % QUERIES * TAGS
    slots = masked % SLOTS * TAGS
    _wait_full(full, masked, SLOTS)
    position = row_tags.index(rows).slice(half * ROWS, ROWS).load(OF_ROW)[:, None]
    key_position = slot_tags.index(slots).load(OF_KEY)[None, :]
    allowed = key_position <= position
    if SPANS:
        span = row_tags.index(rows + 2).slice(half * ROWS, ROWS).load(OF_ROW)[:, None]
        allowed |= (slot_tags.index(slots + 2).load(OF_KEY)[None, :] == span) & (span >= 0)
    if WINDOW:
        allowed &= key_position > position - window
    if SEGMENTS:
        segment = row_tags.index(rows + 1).slice(half * ROWS, ROWS).load(OF_ROW)[:, None]
        allowed &= slot_tags.index(slots + 1).load(OF_KEY)[None, :] == segment
    mbarrier.arrive(empty.index(masked % SLOTS))
    return gl.where(allowed, scores, float("-inf"))


@gluon.jit
def _softmax(scores, maximum, total, scale_log2):
    """One step: weights, the decay of what was summed before, new maximum, new total. In base 2."""
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale_log2)
    # Rows that have seen no key yet keep a maximum of -inf; subtracting it would give NaN.
    shift = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = gl.exp2(scores * scale_log2 - shift[:, None])
    decay = gl.exp2(maximum - shift)
    return weights, decay, new_maximum, total * decay + gl.sum(weights, 1)


@gluon.jit
def _attend(
    half: gl.constexpr,
    output,
    order,
    sizes,
    query_length,
    query_orders,
    scale_log2,
    window,
    buffers,
    tag_buffers,
    query_barriers,
    tile_barriers,
    tag_barriers,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    QUERIES: gl.constexpr,
    SLOTS: gl.constexpr,
    WINDOW: gl.constexpr,
    SEGMENTS: gl.constexpr,
    SPANS: gl.constexpr,
    ORDERED: gl.constexpr,
):
    """Half of the rows of each item."""
    queries, keys, values, info = buffers
    query_full, query_empty = query_barriers
    key_full, key_empty, value_full, value_empty = tile_barriers
    OF_SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OF_OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    OF_WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OF_OUTPUT, 2)
    SCORE_ROW: gl.constexpr = gl.SliceLayout(1, OF_SCORES)
    OUTPUT_ROW: gl.constexpr = gl.SliceLayout(1, OF_OUTPUT)
    WIDE: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [4], [0])
    dtype: gl.constexpr = output.dtype.element_ty
    entry = gl.arange(0, FIELDS, layout=WIDE)
    lowest = gl.full([ROWS], float("-inf"), gl.float32, SCORE_ROW)
    nothing = gl.zeros([ROWS], gl.float32, SCORE_ROW)
    accumulator = gl.zeros([ROWS, BLOCK_D], gl.float32, OF_OUTPUT)
    index = 0
    masked = 0
    turn = 0
    _wait_full(query_full, turn, QUERIES)
    fields = info.index(turn % QUERIES).load(WIDE)
    item = _get(fields, ITEM, entry)
    query_row = _get(fields, QUERY_ROW, entry)
    full = _get(fields, FULL, entry)
    steps = _get(fields, STEPS, entry)
    # The first step of the first item: nothing goes on meanwhile.
    _wait_full(key_full, index, STAGES)
    scores = _scores(queries.index(half), keys, index, OF_SCORES, BLOCK_N, BLOCK_D, STAGES)
    scores = hopper.warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(key_empty.index(index % STAGES))
    if full == 0:
        scores = _mask(
            scores, half, turn, masked, window, tag_buffers, tag_barriers, SLOTS, QUERIES, WINDOW, SEGMENTS, SPANS
        )
        masked += 1
    p, decay, maximum, total = _softmax(scores, lowest, nothing, scale_log2)
    weights = gl.convert_layout(p.to(dtype), OF_WEIGHTS)
    index += 1
    mbarrier.wait(key_full.index(index % STAGES), index // STAGES & 1, pred=steps > 1)
    while item >= 0:
        query = queries.index(turn % QUERIES * 2 + half)
        # One loop for tiles with and without a mask: with a loop each, ptxas of CUDA 12.8 computes the address of the
        # queries in the first alone, which may have no step.
        for step in range(1, steps):
            scores = _scores(query, keys, index, OF_SCORES, BLOCK_N, BLOCK_D, STAGES)
            products = _products(weights, values, value_full, index - 1, accumulator, BLOCK_N, BLOCK_D, STAGES)
            scores = hopper.warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(key_empty.index(index % STAGES))
            if step >= full:
                scores = _mask(
                    scores,
                    half,
                    turn,
                    masked,
                    window,
                    tag_buffers,
                    tag_barriers,
                    SLOTS,
                    QUERIES,
                    WINDOW,
                    SEGMENTS,
                    SPANS,
                )
                masked += 1
            p, decay, maximum, total = _softmax(scores, maximum, total, scale_log2)
            # This wait is a loop, behind which the assembler moves no exponential: they belong beside the products.
            mbarrier.wait(key_full.index((index + 1) % STAGES), (index + 1) // STAGES & 1, pred=step + 1 < steps)
            accumulator, p, weights = hopper.warpgroup_mma_wait(0, deps=[products, p, weights])
            mbarrier.arrive(value_empty.index((index - 1) % STAGES))
            accumulator = accumulator * gl.convert_layout(decay, OUTPUT_ROW)[:, None]
            weights = gl.convert_layout(p.to(dtype), OF_WEIGHTS)
            index += 1
        block, batch, head = _place(item, sizes)
        row = block * BLOCK_M + half * ROWS + gl.arange(0, ROWS, layout=OUTPUT_ROW)
        token = row
        if ORDERED:
            its_order = order + (batch.to(gl.int64) * query_orders + query_row) * query_length
            token = gl.load(its_order + row, mask=row < query_length, other=0)
        share = 1.0 / gl.where(total == 0.0, 1.0, total)
        mbarrier.arrive(query_empty.index(turn % QUERIES))
        turn += 1
        _wait_full(query_full, turn, QUERIES)
        fields = info.index(turn % QUERIES).load(WIDE)
        item = _get(fields, ITEM, entry)
        query_row = _get(fields, QUERY_ROW, entry)
        full = _get(fields, FULL, entry)
        steps = _get(fields, STEPS, entry)
        if item >= 0:
            # The first step of the next item, while the last products of this one are made.
            _wait_full(key_full, index, STAGES)
            query = queries.index(turn % QUERIES * 2 + half)
            scores = _scores(query, keys, index, OF_SCORES, BLOCK_N, BLOCK_D, STAGES)
            products = _products(weights, values, value_full, index - 1, accumulator, BLOCK_N, BLOCK_D, STAGES)
            scores = hopper.warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(key_empty.index(index % STAGES))
            if full == 0:
                scores = _mask(
                    scores,
                    half,
                    turn,
                    masked,
                    window,
                    tag_buffers,
                    tag_barriers,
                    SLOTS,
                    QUERIES,
                    WINDOW,
                    SEGMENTS,
                    SPANS,
                )
                masked += 1
            p, decay, maximum, total = _softmax(scores, lowest, nothing, scale_log2)
            mbarrier.wait(key_full.index((index + 1) % STAGES), (index + 1) // STAGES & 1, pred=steps > 1)
            accumulator, p, weights = hopper.warpgroup_mma_wait(0, deps=[products, p, weights])
            mbarrier.arrive(value_empty.index((index - 1) % STAGES))
            weights = gl.convert_layout(p.to(dtype), OF_WEIGHTS)
            index += 1
        else:
            products = _products(weights, values, value_full, index - 1, accumulator, BLOCK_N, BLOCK_D, STAGES)
            accumulator, weights = hopper.warpgroup_mma_wait(0, deps=[products, weights])
        result = accumulator * gl.convert_layout(share, OUTPUT_ROW)[:, None]
        column = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, OF_OUTPUT))
        _, heads, _ = sizes
        its_output = output + (batch.to(gl.int64) * query_length * heads + head) * D
        gl.store(
            its_output + token.to(gl.int64)[:, None] * (heads * D) + column[None, :],
            result.to(dtype),
            mask=(row < query_length)[:, None] & (column < D)[None, :],
        )
        accumulator = gl.zeros([ROWS, BLOCK_D], gl.float32, OF_OUTPUT)


@gluon.jit
def _attend_first(
    output, order, sizes, query_length, query_orders, scale_log2, window,
    buffers, tag_buffers, query_barriers, tile_barriers, tag_barriers,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr,
    SLOTS: gl.constexpr, WINDOW: gl.constexpr, SEGMENTS: gl.constexpr, SPANS: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    _attend(
        0, output, order, sizes, query_length, query_orders, scale_log2, window,
        buffers, tag_buffers, query_barriers, tile_barriers, tag_barriers,
        D, BLOCK_D, BLOCK_N, STAGES, QUERIES, SLOTS, WINDOW, SEGMENTS, SPANS, ORDERED,
    )  # fmt: skip


@gluon.jit
def _attend_second(
    output, order, sizes, query_length, query_orders, scale_log2, window,
    buffers, tag_buffers, query_barriers, tile_barriers, tag_barriers,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr,
    SLOTS: gl.constexpr, WINDOW: gl.constexpr, SEGMENTS: gl.constexpr, SPANS: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    _attend(
        1, output, order, sizes, query_length, query_orders, scale_log2, window,
        buffers, tag_buffers, query_barriers, tile_barriers, tag_barriers,
        D, BLOCK_D, BLOCK_N, STAGES, QUERIES, SLOTS, WINDOW, SEGMENTS, SPANS, ORDERED,
    )  # fmt: skip


@gluon.jit
def _barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for each in gl.static_range(NUMBER):
        mbarrier.init(made.index(each), count=ARRIVALS)
    return made


@gluon.jit(
    do_not_specialize=[
        "batches",
        "heads",
        "plans",
        "query_orders",
        "key_orders",
        "tile_entries",
        "column_entries",
        "query_length",
        "key_length",
        "scale_log2",
        "window",
        "programs",
    ]
)
def _attention_kernel(
    query,
    source,
    key,
    value,
    column_key,
    column_value,
    output,
    order,
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
    counter,
    batch_stride,
    head_stride,
    row_stride,
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
    programs,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    QUERIES: gl.constexpr,
    SLOTS: gl.constexpr,
    COLUMNS: gl.constexpr,
    WINDOW: gl.constexpr,
    SEGMENTS: gl.constexpr,
    SPANS: gl.constexpr,
    ORDERED: gl.constexpr,
):
    queries = gl.allocate_shared_memory(query.dtype, [2 * QUERIES, 1, 1, ROWS, BLOCK_D], query.layout)
    keys = gl.allocate_shared_memory(key.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], key.layout)
    values = gl.allocate_shared_memory(value.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], value.layout)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    TAGS: gl.constexpr = 4 if SEGMENTS or SPANS else 1  # positions, segments, spans, and one to make it a power of two
    info = gl.allocate_shared_memory(gl.int32, [QUERIES, FIELDS], FLAT)
    row_tags = gl.allocate_shared_memory(gl.int32, [QUERIES * TAGS, BLOCK_M], FLAT)
    slot_tags = gl.allocate_shared_memory(gl.int32, [SLOTS * TAGS, BLOCK_N], FLAT)
    query_full = _barriers(QUERIES, 2)  # the copy, and the fields
    query_empty = _barriers(QUERIES, 3)
    key_full = _barriers(STAGES, 1)
    key_empty = _barriers(STAGES, 2)
    value_full = _barriers(STAGES, 1)
    value_empty = _barriers(STAGES, 2)
    tags_full = _barriers(SLOTS, 1)
    tags_empty = _barriers(SLOTS, 2)
    sizes = (batches, heads, gl.cdiv(query_length, BLOCK_M))
    # Constants in a variable would become numbers known at run time, so the arguments are written out.
    gl.warp_specialize(
        [
            (_attend_first, (
                output, order, sizes, query_length, query_orders, scale_log2, window,
                (queries, keys, values, info), (row_tags, slot_tags), (query_full, query_empty),
                (key_full, key_empty, value_full, value_empty), (tags_full, tags_empty),
                D, BLOCK_D, BLOCK_N, STAGES, QUERIES, SLOTS, WINDOW, SEGMENTS, SPANS, ORDERED,
            )),
            (_attend_second, (
                output, order, sizes, query_length, query_orders, scale_log2, window,
                (queries, keys, values, info), (row_tags, slot_tags), (query_full, query_empty),
                (key_full, key_empty, value_full, value_empty), (tags_full, tags_empty),
                D, BLOCK_D, BLOCK_N, STAGES, QUERIES, SLOTS, WINDOW, SEGMENTS, SPANS, ORDERED,
            )),
            (_fetch, (
                (key, value), (column_key, column_value), tiles, tile_entries, sizes,
                (keys, values, info), (query_full, query_empty), (key_full, key_empty, value_full, value_empty),
                BLOCK_N, STAGES, QUERIES, COLUMNS,
            )),
            (_schedule, (
                query, source, (batch_stride, head_stride, row_stride), order,
                (query_row, key_row, counts, tiles, columns, cold, head_plan, key_head), (query_tags, key_tags),
                counter, sizes, (query_length, key_length),
                (plans, query_orders, key_orders, tile_entries, column_entries), programs,
                (queries, info, row_tags, slot_tags), (query_full, query_empty, tags_full, tags_empty),
                D, BLOCK_D, BLOCK_N, SLOTS, QUERIES, COLUMNS, SEGMENTS, SPANS, ORDERED,
            )),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )  # fmt: skip


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this kernel does not run there; None where it does."""
    if dtype not in DTYPES:
        return f"{dtype} has no matrix units that this kernel uses"
    if padded_head_dim(head_dim) not in SHAPES:
        return f"head dim {head_dim} was not measured"
    return _why_not_there(device)


@lru_cache
def _why_not_there(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return "not a Hopper GPU"
    version = ".".join(triton.__version__.split(".")[:2])
    return None if version in MEASURED_ON else f"not measured on Triton {version}"


def runs(query: Tensor, key: Tensor, value: Tensor, columns: int) -> bool:
    """Whether this kernel takes these tensors. query: [B, H, Sq, D], key, value: [B, C, Sk, D]. columns: the most that
    a plan row may list."""
    return (
        why_not(query.device, query.dtype, query.shape[3]) is None
        and columns <= MOST_COLUMNS
        and all(takes_descriptors(tensor) for tensor in (query, key, value))
    )


def launch(
    query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float, query_order: Tensor | None = None
) -> Tensor:
    """[B, H, Sq, D] in [B, Sq, H, D] memory. query_order: as in the op."""
    batch, heads, query_length, width = query.shape
    padded = padded_head_dim(width)
    shape = SHAPES[padded]
    output = query.new_empty(batch, query_length, heads, width)  # [B, Sq, H, D]
    items = batch * heads * triton.cdiv(query_length, TILE)
    programs = min(items, _multiprocessors(query.device))
    columns = walk.columns.shape[2]
    head_plan, key_head = (head_indices(values, query.device) for values in (walk.head_plan, walk.key_head))
    gathered = gather_columns(key, value, walk) if columns else (key, value)
    with torch.cuda.device_of(query):
        _attention_kernel[(programs,)](
            _descriptor(query, int(ROWS), padded),
            query,
            *(_descriptor(tensor, shape.block_n, padded) for tensor in (key, value, *gathered)),
            output,
            walk.query_row if query_order is None else query_order.contiguous(),
            *(tensor.contiguous() for tensor in walk[:8]),
            head_plan,
            key_head,
            torch.zeros(1, dtype=torch.int32, device=query.device),
            *query.stride()[:3],
            batch,
            heads,
            walk.counts.shape[1],
            walk.query_tags.shape[1],
            walk.key_tags.shape[1],
            walk.tiles.shape[2],
            columns,
            query_length,
            key.shape[2],
            scale / math.log(2.0),
            min(walk.window or 0, MAX_WINDOW),
            programs,
            D=width,
            BLOCK_D=padded,
            BLOCK_N=shape.block_n,
            STAGES=shape.stages,
            QUERIES=shape.queries,
            SLOTS=shape.slots,
            COLUMNS=columns > 0,
            WINDOW=walk.window is not None,
            SEGMENTS=walk.segments,
            SPANS=walk.spans,
            ORDERED=query_order is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return output.transpose(1, 2)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _descriptor(tensor: Tensor, rows: int, width: int) -> TensorDescriptor:
    """[B, C, S, D] for the bulk copy engine, which minds the stride even of a dimension of size 1."""
    row = triton.cdiv(tensor.shape[3], 16) * 16
    strides = [row if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    block = [1, 1, rows, width]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:3], 1], block, layout)
