"""Triton kernel of `column_mass`, of `kernels/tile_mass.py`, and its launch.

Keys are multiplied with the sampled query rows of one group, a tile of keys at a time; of the scores one number is
kept for each key. Tiles that no row of the group sees are not multiplied, and only where some row sees a part of a
tile are its elements compared.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.attention_config import Config
from mmcompile.kernels.bulk_copies import key_descriptor, takes_descriptors
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.sample_mask import (
    as_bits,
    classify_tiles,
    element_allowed,
    load_keys,
    load_mask_tags,
    load_rows,
    load_tags,
    lowest_bit,
)
from mmcompile.kernels.tile_bounds import tile_count
from mmcompile.kernels.tile_mass import SampledRows
from mmcompile.kernels.tile_mass_kernel import (
    ENOUGH_PROGRAMS,
    RUN,
    UNSPECIALIZED,
    launch_config,
    launch_shape,
    lengths,
    shared_arguments,
)
from mmcompile.kernels.unit_columns import unit_columns


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "groups", "skip_tiles"])
def _column_mass_kernel(
    query,
    key,
    query_order,
    query_tags,
    key_tags,
    slots,
    query_row,
    key_row,
    head,
    key_head,
    key_positions,
    bounds,
    log_total,
    own_tile,
    output,
    counts,
    query_batch_stride,
    query_head_stride,
    query_row_stride,
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    plans,
    query_orders,
    key_orders,
    samples,
    query_length,
    key_length,
    groups,
    run,
    skip_tiles,
    scale_log2,
    window,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPANS: tl.constexpr,
):
    # Neighbouring programs read the same run of tiles, so that those with one key copy meet in the L2 cache.
    program = tl.program_id(0)
    plan = program % plans
    group = program // plans % groups
    key_tiles = tl.cdiv(key_length, TILE)
    runs = tl.cdiv(key_tiles, run)
    first_tile = program // plans // groups % runs * run
    batch = program // plans // groups // runs
    row = batch.to(tl.int64) * plans + plan
    query_order_row = batch.to(tl.int64) * query_orders + tl.load(query_row + row)
    key_order = tl.load(key_row + row)
    key_order_row = batch.to(tl.int64) * key_orders + key_order
    copy = tl.load(key_head + plan) + key_order
    query += batch.to(tl.int64) * query_batch_stride + tl.load(head + plan).to(tl.int64) * query_head_stride
    if not DESCRIPTOR:
        key += batch.to(tl.int64) * key_batch_stride + copy.to(tl.int64) * key_head_stride
    query_order += query_order_row * query_length
    query_tags += query_order_row * 3 * query_length
    key_tags += key_order_row * 3 * key_length
    key_positions += key_order_row * key_tiles * TILE
    of_group = samples // groups
    slots += row * samples + group * of_group
    log_total += row * samples + group * of_group
    own_tile += row * samples + group * of_group
    output += (row * groups + group) * key_length
    counts += (row * groups + group) * key_length

    # The first and last query that counts, and the tiles that some of them are too close to.
    index = tl.arange(0, RUN)
    tile = first_tile + index
    inside = (index < run) & (tile < key_tiles)
    q_first = tl.full([], 2147483647, tl.int32)
    q_last = tl.full([], -1, tl.int32)
    close = tl.zeros([RUN], tl.int32)
    blocks = 1 if ONE_BLOCK else tl.cdiv(of_group, BLOCK_N)
    for block in range(blocks):
        sample = block * BLOCK_N + tl.arange(0, BLOCK_N)
        counted = tl.load(log_total + sample, mask=sample < of_group, other=float("-inf")) > float("-inf")
        position = tl.load(query_tags + tl.load(slots + sample, mask=counted, other=0), mask=counted, other=-1)
        own = tl.load(own_tile + sample, mask=counted, other=-1)
        q_first = tl.minimum(q_first, tl.min(tl.where(counted, position, 2147483647)))
        q_last = tl.maximum(q_last, tl.max(position))
        is_close = (tile[None, :] > own[:, None] - skip_tiles) & (tile[None, :] <= own[:, None])
        close = tl.maximum(close, tl.max(is_close.to(tl.int32), 0))
    may, _ = classify_tiles(
        bounds + key_order_row * 3 * key_tiles,
        tile,
        inside,
        key_tiles,
        q_first,
        q_last,
        window,
        WINDOW,
        SEGMENTS,
        SPANS,
    )
    of_run = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    unseen = (inside & ~may)[:, None] & (of_run < key_length)
    tl.store(output + of_run, tl.zeros([RUN, TILE], tl.float32), mask=unseen)

    near = as_bits(close > 0, index)
    SPLIT: tl.constexpr = TILE // BLOCK_M
    for block in range(blocks):
        if not ONE_BLOCK:
            tl.debug_barrier()  # what one thread leaves of a block another may add to
        sample = block * BLOCK_N + tl.arange(0, BLOCK_N)
        q, shift, q_position, q_segment, q_span = _load_counted(
            query,
            query_order,
            query_tags,
            slots,
            log_total,
            sample,
            of_group,
            query_row_stride,
            query_length,
            D,
            BLOCK_D,
            SEGMENTS,
            SPANS,
        )
        todo = as_bits(may, index)
        for step in range(tl.sum(may.to(tl.int32)) * SPLIT):
            next_tile, bit = lowest_bit(todo)
            start = (first_tile + next_tile) * TILE + step % SPLIT * BLOCK_M
            slot = start + tl.arange(0, BLOCK_M)
            k_position = tl.load(key_positions + slot)
            k_segment, k_span = load_mask_tags(
                key_tags, k_position, slot, slot < key_length, key_length, SEGMENTS, SPANS
            )
            k = load_keys(key, batch, copy, start, key_row_stride, key_length, D, BLOCK_M, BLOCK_D, DESCRIPTOR)
            # Keys are the rows of the product, so that a key's sum over samples stays within a warp.
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")
            # A row that does not count sees nothing: no key lies at or before position -1.
            position = q_position
            span = q_span
            if (near & bit) != 0:
                own = tl.load(own_tile + sample, mask=sample < of_group, other=-1)
                is_far = (first_tile + next_tile <= own - skip_tiles) | (first_tile + next_tile > own)
                position = tl.where(is_far, position, -1)
                span = tl.where(is_far, span, -1)
            # Samples stand all over the sequence, so that few tiles are seen by all of them, or by none.
            allowed = element_allowed(
                position[None, :],
                q_segment[None, :],
                span[None, :],
                k_position[:, None],
                k_segment[:, None],
                k_span[:, None],
                window,
                WINDOW,
                SEGMENTS,
                SPANS,
            )
            scores = tl.where(allowed, tl.math.fma(scores, scale_log2, -shift[None, :]), float("-inf"))
            weights = tl.sum(tl.math.exp2(scores), 1)
            seen = tl.sum(allowed.to(tl.float32), 1)
            if ONE_BLOCK:
                weights = weights / tl.maximum(seen, 1.0)
            else:  # what all blocks but the last leave is not the mean yet
                later = (slot < key_length) & (block > 0)
                weights += tl.load(output + slot, mask=later, other=0.0)
                seen += tl.load(counts + slot, mask=later, other=0.0)
                tl.store(counts + slot, seen, mask=slot < key_length)
                weights = tl.where(block == blocks - 1, weights / tl.maximum(seen, 1.0), weights)
            tl.store(output + slot, weights, mask=slot < key_length)
            todo = tl.where(step % SPLIT == SPLIT - 1, todo ^ bit, todo)


@triton.jit
def _load_counted(
    query,
    order,
    tags,
    slots,
    log_total,
    sample,
    samples,
    row_stride,
    length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Query rows, [sample, BLOCK_D], the base-2 logarithms of their totals, and their tags. A row that does not count
    has zeros, and tags that see nothing."""
    log2_total = tl.load(log_total + sample, mask=sample < samples, other=float("-inf")) * 1.4426950408889634
    counted = log2_total > float("-inf")
    slot = tl.load(slots + sample, mask=counted, other=0)
    rows = load_rows(query, order, slot, counted, row_stride, D, BLOCK_D)
    position, segment, span = load_tags(tags, slot, counted, length, -1, SEGMENTS, SPANS)
    return rows, tl.where(counted, log2_total, 0.0), position, segment, span


def column_mass(
    sampled: SampledRows,
    log_total: Tensor,
    own_tile: Tensor,
    skip_tiles: int,
    groups: int,
    config: Config | None = None,
) -> Tensor:
    """`column_mass` of tile_mass.py for CUDA tensors. config: launch shape, for tests and measurements."""
    batch, plans, samples = sampled.slots.shape
    config = config or column_config(sampled.query, samples // groups)
    key_length = sampled.key.shape[2]
    output = torch.empty(batch, plans, groups, key_length, dtype=torch.float32, device=sampled.query.device)
    if output.numel() == 0 or samples == 0:
        return output.zero_()
    key_tiles = tile_count(key_length)
    run = min(RUN, max(1, batch * plans * groups * key_tiles // ENOUGH_PROGRAMS))
    one_block = samples // groups <= config.block_n
    query, key = unit_columns(sampled.query), unit_columns(sampled.key)
    descriptor = takes_descriptors(key)
    with torch.cuda.device_of(key):
        # Everything on the first grid axis: the others end at 65,535.
        _column_mass_kernel[(batch * plans * groups * triton.cdiv(key_tiles, run),)](
            query,
            key_descriptor(key, config.block_m) if descriptor else key,
            *shared_arguments(sampled),
            *sampled.key_positions,
            log_total.contiguous(),
            own_tile.contiguous(),
            output,
            output if one_block else torch.empty_like(output),  # not read where one block is all
            *query.stride()[:3],
            *key.stride()[:3],
            *lengths(sampled),
            groups,
            run,
            skip_tiles,
            sampled.scale / math.log(2.0),
            sampled.length,
            TILE=TILE,
            RUN=RUN,
            DESCRIPTOR=descriptor,
            ONE_BLOCK=one_block,
            **launch_shape(sampled, config),
        )
    return output


def column_config(query: Tensor, samples: int) -> Config:
    """Launch shape for queries [B, H, Sq, D] of which `samples` are multiplied with each key: no more columns of the
    product than these need, and no more than leave room for what is known of each sample in registers."""
    config = launch_config(query)
    most = 64 if samples <= 64 else 32  # what is added up from block to block takes registers too
    return config._replace(block_n=min(config.block_n, most, max(16, triton.next_power_of_2(samples))))
