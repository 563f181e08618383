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

Keys and values that a plan row lists are finite: what a query does not see of a listed tile, or of the columns that
follow its own list in the last step, is multiplied by 0. What no list names is never read: zeros are, in its place.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mmcompile.kernels.attention_config import UNSPECIALIZED, padded_head_dim
from mmcompile.kernels.gather_columns import gather_columns
from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.hopper_attend import attend_first, attend_second
from mmcompile.kernels.hopper_feed import fetch, schedule
from mmcompile.kernels.hopper_launch import multiprocessors, tile_descriptor
from mmcompile.kernels.hopper_ring import BLOCK_M, FIELDS, ROWS, make_barriers
from mmcompile.kernels.hopper_support import LEAST_SCALE
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_walk import MAX_WINDOW, TileWalk


class Shape(NamedTuple):
    """Keys of one step, and how many buffers of tiles, of queries and of tags go round."""

    block_n: int
    stages: int
    queries: int
    slots: int = 4


# Keyed on the padded head dim, which `hopper_support.HEAD_DIMS` lists. Measured on an H200; 227 KiB of shared memory
# hold no more.
SHAPES = {64: Shape(128, 4, 2), 128: Shape(128, 2, 2), 256: Shape(64, 2, 1)}
CONSUMER_REGISTERS, OTHER_REGISTERS = gl.constexpr(216), gl.constexpr(72)


@gluon.jit(do_not_specialize=[*UNSPECIALIZED, "programs"])
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
    query_full = make_barriers(QUERIES, 2)  # the copy, and the fields
    query_empty = make_barriers(QUERIES, 3)
    key_full = make_barriers(STAGES, 1)
    key_empty = make_barriers(STAGES, 2)
    value_full = make_barriers(STAGES, 1)
    value_empty = make_barriers(STAGES, 2)
    tags_full = make_barriers(SLOTS, 1)
    tags_empty = make_barriers(SLOTS, 2)
    sizes = (batches, heads, gl.cdiv(query_length, BLOCK_M))
    # Constants in a variable would become numbers known at run time, so the arguments are written out.
    gl.warp_specialize(
        [
            (attend_first, (
                output, order, sizes, query_length, query_orders, scale_log2, window,
                (queries, keys, values, info), (row_tags, slot_tags), (query_full, query_empty),
                (key_full, key_empty, value_full, value_empty), (tags_full, tags_empty),
                D, BLOCK_D, BLOCK_N, STAGES, QUERIES, SLOTS, WINDOW, SEGMENTS, SPANS, ORDERED,
            )),
            (attend_second, (
                output, order, sizes, query_length, query_orders, scale_log2, window,
                (queries, keys, values, info), (row_tags, slot_tags), (query_full, query_empty),
                (key_full, key_empty, value_full, value_empty), (tags_full, tags_empty),
                D, BLOCK_D, BLOCK_N, STAGES, QUERIES, SLOTS, WINDOW, SEGMENTS, SPANS, ORDERED,
            )),
            (fetch, (
                (key, value), (column_key, column_value), tiles, tile_entries, sizes,
                (keys, values, info), (query_full, query_empty), (key_full, key_empty, value_full, value_empty),
                BLOCK_N, STAGES, QUERIES, COLUMNS,
            )),
            (schedule, (
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


def launch(
    query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float, query_order: Tensor | None = None
) -> Tensor:
    """[B, H, Sq, D] in [B, Sq, H, D] memory. query_order: as in the op."""
    batch, heads, query_length, width = query.shape
    padded = padded_head_dim(width)
    shape = SHAPES[padded]
    output = query.new_empty(batch, query_length, heads, width)  # [B, Sq, H, D]
    items = batch * heads * triton.cdiv(query_length, TILE)
    programs = min(items, multiprocessors(query.device))
    columns = walk.columns.shape[2]
    head_plan, key_head = (head_indices(values, query.device) for values in (walk.head_plan, walk.key_head))
    gathered = gather_columns(key, value, walk) if columns else (key, value)
    with torch.cuda.device_of(query):
        _attention_kernel[(programs,)](
            tile_descriptor(query, int(ROWS), padded),
            query,
            *(tile_descriptor(tensor, shape.block_n, padded) for tensor in (key, value, *gathered)),
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
            # Never 0: masked scores are -inf before they are scaled.
            max(scale / math.log(2.0), LEAST_SCALE),
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
