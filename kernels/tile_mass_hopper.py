"""`tile_log_mass` for Hopper GPUs, in Triton's Gluon dialect: bulk copies, and warps with a part each.

A program stays on its multiprocessor and takes items, 128 sampled queries of a head and a run of key tiles each, until
none is left. Eighteen warps share the work: one *schedules* (takes the next item, finds the tiles that its queries may
see, gathers the queries), one *fetches* tiles of keys through a ring of buffers, and four groups of four *sum*: two
take half of the queries and every other tile, two the tiles between. Products of some groups are made while others take
exponentials.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mmcompile.kernels.attention_config import padded_head_dim
from mmcompile.kernels.hopper_launch import multiprocessors, tile_descriptor
from mmcompile.kernels.hopper_log_mass import sum_first, sum_fourth, sum_second, sum_third
from mmcompile.kernels.hopper_ring import FIELDS, make_barriers
from mmcompile.kernels.hopper_samples import BLOCK_M, GROUP, GROUPS, ROW_SLOTS, RUN, TILE, fetch, schedule
from mmcompile.kernels.hopper_support import LEAST_SCALE
from mmcompile.kernels.tags import INVALID_SPAN
from mmcompile.kernels.tile_mass import SampledRows
from mmcompile.kernels.tile_mass_kernel import UNSPECIALIZED, key_bias, lengths, shared_arguments

ENOUGH_ITEMS = 8  # for each multiprocessor: with fewer, runs are shorter
SUM_REGISTERS, OTHER_REGISTERS = gl.constexpr(104), gl.constexpr(64)


class Shape(NamedTuple):
    """How many buffers of tiles and of queries go round."""

    stages: int
    queries: int


# Keyed on the padded head dim, which `hopper_support.HEAD_DIMS` lists. 227 KiB of shared memory hold no more.
SHAPES = {64: Shape(4, 2), 128: Shape(4, 2), 256: Shape(2, 1)}


@gluon.jit(do_not_specialize=[*UNSPECIALIZED, "batches", "programs"])
def _log_mass_kernel(
    query,
    key,
    query_order,
    query_tags,
    slots,
    query_row,
    key_row,
    head,
    key_head,
    bounds,
    key_positions,
    key_tags,
    walk,
    bias,
    output,
    counter,
    query_batch_stride,
    query_head_stride,
    query_row_stride,
    batches,
    plans,
    query_orders,
    key_orders,
    samples,
    query_length,
    key_length,
    run,
    scale_log2,
    window,
    programs,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    QUERIES: gl.constexpr,
    WALK: gl.constexpr,
    COLD: gl.constexpr,
    WINDOW: gl.constexpr,
    SEGMENTS: gl.constexpr,
    SPANS: gl.constexpr,
):
    TAGS: gl.constexpr = 4 if SEGMENTS or SPANS else 1  # positions, segments, spans, and one to make it a power of two
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    OF_QUERY: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, GROUP, BLOCK_D], key.dtype)
    queries = gl.allocate_shared_memory(key.dtype, [QUERIES * 2, 1, 1, GROUP, BLOCK_D], OF_QUERY)
    keys = gl.allocate_shared_memory(key.dtype, [STAGES, 1, 1, TILE, BLOCK_D], key.layout)
    biases = gl.allocate_shared_memory(gl.float32, [STAGES if COLD else 1, 1, TILE], key_positions.layout)
    slot_tags = gl.allocate_shared_memory(gl.int32, [STAGES * TAGS, 1, TILE], key_positions.layout)
    steps = gl.allocate_shared_memory(gl.int32, [STAGES, 1], FLAT)
    info = gl.allocate_shared_memory(gl.int32, [QUERIES, FIELDS], FLAT)
    row_tags = gl.allocate_shared_memory(gl.int32, [ROW_SLOTS * TAGS, BLOCK_M], FLAT)
    row_targets = gl.allocate_shared_memory(gl.int32, [ROW_SLOTS, BLOCK_M], FLAT)
    targets = gl.allocate_shared_memory(gl.int32, [BLOCK_M], FLAT)
    tokens = gl.allocate_shared_memory(gl.int32, [BLOCK_M], FLAT)
    query_full = make_barriers(QUERIES, 1)
    query_empty = make_barriers(QUERIES, GROUPS + 1)
    key_full = make_barriers(STAGES, 1)
    key_empty = make_barriers(STAGES, 2)
    key_tiles = gl.cdiv(key_length, TILE)
    # Constants in a variable would become numbers known at run time, so the arguments are written out.
    gl.warp_specialize(
        [
            (sum_first, (
                output, key_tiles, scale_log2, window, (queries, keys, biases, steps),
                (row_tags, row_targets, slot_tags), query_empty, key_full, key_empty,
                BLOCK_D, STAGES, COLD, WINDOW, SEGMENTS, SPANS,
            )),
            (sum_second, (
                output, key_tiles, scale_log2, window, (queries, keys, biases, steps),
                (row_tags, row_targets, slot_tags), query_empty, key_full, key_empty,
                BLOCK_D, STAGES, COLD, WINDOW, SEGMENTS, SPANS,
            )),
            (sum_third, (
                output, key_tiles, scale_log2, window, (queries, keys, biases, steps),
                (row_tags, row_targets, slot_tags), query_empty, key_full, key_empty,
                BLOCK_D, STAGES, COLD, WINDOW, SEGMENTS, SPANS,
            )),
            (sum_fourth, (
                output, key_tiles, scale_log2, window, (queries, keys, biases, steps),
                (row_tags, row_targets, slot_tags), query_empty, key_full, key_empty,
                BLOCK_D, STAGES, COLD, WINDOW, SEGMENTS, SPANS,
            )),
            (fetch, (
                key, bias, key_positions, key_tags, (keys, biases, slot_tags, steps, info), (query_full, query_empty),
                (key_full, key_empty), STAGES, QUERIES, COLD, SEGMENTS, SPANS,
            )),
            (schedule, (
                query, (query_order, query_tags, slots, walk, query_row, key_row, head, key_head, bounds), output,
                counter, (batches, plans, query_orders, key_orders), (samples, query_length, key_length),
                (query_batch_stride, query_head_stride, query_row_stride), run, window, programs,
                (queries, info, row_tags, row_targets, targets, tokens), (query_full, query_empty),
                D, BLOCK_D, QUERIES, WALK, WINDOW, SEGMENTS, SPANS,
            )),
        ],
        [4, 4, 4, 1, 1],
        [SUM_REGISTERS, SUM_REGISTERS, SUM_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )  # fmt: skip


def launch(sampled: SampledRows, cold: Tensor | None) -> Tensor:
    """`tile_log_mass` of tile_mass.py."""
    query, key = sampled.query, sampled.key
    batch, plans, samples = sampled.slots.shape
    width = query.shape[3]
    padded = padded_head_dim(width)
    shape = SHAPES[padded]
    key_tiles = triton.cdiv(key.shape[2], int(TILE))
    output = torch.empty(batch, plans, samples, key_tiles, dtype=torch.float32, device=query.device)
    rows = batch * plans * triton.cdiv(samples, int(BLOCK_M))
    programs = multiprocessors(query.device)
    run = min(int(RUN), max(1, rows * key_tiles // (programs * ENOUGH_ITEMS)))
    programs = min(programs, rows * triton.cdiv(key_tiles, run))
    walk = sampled.walk() if samples > int(BLOCK_M) else None
    positions = _row_descriptor(sampled.key_positions.every.flatten(2).flatten(0, 1))
    query_order, query_tags, key_tags, *places = shared_arguments(sampled)
    tagged = sampled.segments or sampled.spans
    with torch.cuda.device_of(key):
        _log_mass_kernel[(programs,)](
            query,
            tile_descriptor(key, int(TILE), padded),
            query_order,
            query_tags,
            *places,
            sampled.key_positions.bounds,
            positions,
            _row_descriptor(_padded_tags(key_tags)) if tagged else positions,
            sampled.slots if walk is None else walk,  # not read where None
            positions if cold is None else _row_descriptor(key_bias(cold)),
            output,
            torch.zeros(1, dtype=torch.int32, device=query.device),
            *query.stride()[:3],
            batch,
            *lengths(sampled),
            run,
            # Never 0: masked scores are -inf before they are scaled.
            max(sampled.scale / math.log(2.0), LEAST_SCALE),
            sampled.length,
            programs,
            D=width,
            BLOCK_D=padded,
            STAGES=shape.stages,
            QUERIES=shape.queries,
            WALK=walk is not None,
            COLD=cold is not None,
            WINDOW=sampled.window is not None,
            SEGMENTS=sampled.segments,
            SPANS=sampled.spans,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return output


def _padded_tags(key_tags: Tensor) -> Tensor:
    """Tags int32 [B, Ok, 3, Sk] as [B * Ok * 3, nK * TILE]. No query is of what is added at the end."""
    missing = -key_tags.shape[3] % int(TILE)
    return (pad(key_tags, (0, missing), value=INVALID_SPAN) if missing else key_tags).flatten(0, 2)


def _row_descriptor(rows: Tensor) -> TensorDescriptor:
    """[N, nK * TILE], of 4 bytes each, for the bulk copy engine, a tile at a time."""
    block = [1, int(TILE)]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.int32)
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), block, layout)
