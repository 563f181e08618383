"""Triton kernels of `kernels/tile_mass.py` and their launches.

Both multiply sampled query rows with keys, a block of each at a time, and keep of the scores one number for each row
and tile, or one for each key. A block whose keys all lie after its rows, or before their window, is not multiplied;
blocks between two that are needed are.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.attention_config import Config, attention_config, padded_head_dim
from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_bounds import tile_count
from mmcompile.kernels.tile_mass import SampledRows

RUN = 16  # most key tiles of one program, each with the rows' queries read once
ENOUGH_PROGRAMS = 1024  # some for each multiprocessor of the largest GPUs: with fewer, runs are shorter
# Code that knows a length to be 1 or divisible by 16 gains nothing, and would be compiled once more.
UNSPECIALIZED = ["plans", "orders", "samples", "key_length", "run", "scale_log2", "window", "skip_tiles"]


@triton.jit
def _load_rows(source, start, row_stride, length, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows from `start`, [ROWS, BLOCK_D]; zeros past the length and past D."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    # The tensor of offsets stays the same from step to step; only a scalar moves.
    offsets = row.to(tl.int64)[:, None] * row_stride + column[None, :]
    pointers = (source + start.to(tl.int64) * row_stride) + offsets
    return tl.load(pointers, mask=(row < length - start)[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _load_tags(tags, slot, length, ABSENT: tl.constexpr, SEGMENTS: tl.constexpr, SPANS: tl.constexpr):
    """Position, segment and span of some slots. Slots past the end have the position ABSENT and no span.

    Tags that the mask does not read are not loaded, and hold anything.
    """
    inside = slot < length
    position = tl.load(tags + slot, mask=inside, other=ABSENT)
    segment = position
    span = position
    # Lengths are added to the pointer one by one: their sum may pass 32 bits.
    if SEGMENTS:
        segment = tl.load(tags + length + slot, mask=inside, other=0)
    if SPANS:
        span = tl.load(tags + length + length + slot, mask=inside, other=-2)
    return position, segment, span


@triton.jit
def _allowed(
    q_position,
    q_segment,
    q_span,
    k_position,
    k_segment,
    k_span,
    window,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """The element mask of tags that broadcast against each other."""
    allowed = k_position <= q_position
    if SPANS:
        allowed |= (k_span == q_span) & (q_span >= 0)
    if WINDOW:
        allowed &= k_position > q_position - window
    if SEGMENTS:
        allowed &= k_segment == q_segment
    return allowed


@triton.jit
def _may_see(q_first, q_last, k_first, k_last, window, WINDOW: tl.constexpr, SPANS: tl.constexpr):
    """Whether queries and keys between these positions may hold an allowed element."""
    # A key of the query's span may come after it.
    may = SPANS | (k_first <= q_last)
    if WINDOW:
        may &= k_last > q_first - window
    return may


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _tile_log_mass_kernel(
    query,
    key,
    query_tags,
    key_tags,
    key_row,
    key_head,
    cold,
    output,
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    plans,
    orders,
    samples,
    key_length,
    run,
    scale_log2,
    window,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    COLD: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPANS: tl.constexpr,
):
    # Neighbouring programs read the same run of tiles, so that those with one key copy meet in the L2 cache.
    program = tl.program_id(0)
    plan = program % plans
    blocks = tl.cdiv(samples, BLOCK_M)
    block = program // plans % blocks
    key_tiles = tl.cdiv(key_length, TILE)
    runs = tl.cdiv(key_tiles, run)
    first_tile = program // plans // blocks % runs * run
    batch = (program // plans // blocks // runs).to(tl.int64)
    row = batch * plans + plan
    order = tl.load(key_row + row)
    copy = tl.load(key_head + plan) + order
    query += row * samples * D
    query_tags += row * 3 * samples
    key += batch * key_batch_stride + copy.to(tl.int64) * key_head_stride
    key_tags += (batch * orders + order) * 3 * key_length
    if COLD:
        cold += row * key_length

    q = _load_rows(query, block * BLOCK_M, D, samples, D, BLOCK_M, BLOCK_D)
    sample = block * BLOCK_M + tl.arange(0, BLOCK_M)
    # A row past the end sees nothing: no key lies at or before position -1.
    q_position, q_segment, q_span = _load_tags(query_tags, sample, samples, -1, SEGMENTS, SPANS)

    # The part of the run between the first and the last tile that the block may see.
    index = tl.arange(0, RUN)
    tile = first_tile + index
    slots = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = (index < run)[:, None] & (slots < key_length)
    positions = tl.load(key_tags + slots, mask=inside, other=2147483647)
    k_first = tl.min(positions, 1)
    k_last = tl.max(tl.where(positions == 2147483647, -1, positions), 1)
    q_first = tl.min(tl.where(sample < samples, q_position, 2147483647))
    may = (index < run) & (tile < key_tiles)
    may &= _may_see(q_first, tl.max(q_position), k_first, k_last, window, WINDOW, SPANS)
    begin = tl.min(tl.where(may, index, RUN))
    end = tl.max(tl.where(may, index + 1, 0))

    result = tl.full([BLOCK_M, RUN], float("-inf"), tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    SPLIT: tl.constexpr = TILE // BLOCK_N
    for step in range(begin * SPLIT, end * SPLIT):
        start = first_tile * TILE + step * BLOCK_N
        k = _load_rows(key, start, key_row_stride, key_length, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        slot = start + tl.arange(0, BLOCK_N)
        k_position, k_segment, k_span = _load_tags(key_tags, slot, key_length, 2147483647, SEGMENTS, SPANS)
        allowed = _allowed(
            q_position[:, None],
            q_segment[:, None],
            q_span[:, None],
            k_position[None, :],
            k_segment[None, :],
            k_span[None, :],
            window,
            WINDOW,
            SEGMENTS,
            SPANS,
        )
        if COLD:
            allowed &= (tl.load(cold + slot, mask=slot < key_length, other=0) != 0)[None, :]
        scores = tl.where(allowed, scores, float("-inf"))
        if SPLIT > 1:  # a tile goes on where the last step left it
            maximum = tl.where(step % SPLIT == 0, float("-inf"), maximum)
            total = tl.where(step % SPLIT == 0, 0.0, total)
            new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        else:
            new_maximum = tl.max(scores, 1)
        # Rows that see no key of the tile have a maximum of -inf; subtracting it would give NaN.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.sum(tl.math.exp2(scores - shift[:, None]), 1)
        if SPLIT > 1:
            weights += total * tl.math.exp2(maximum - shift)
        maximum = new_maximum
        total = weights
        # A total of 0 has no logarithm; every other one is at least 1, its greatest term.
        log2_mass = tl.where(maximum == float("-inf"), maximum, maximum + tl.math.log2(tl.maximum(total, 1.0)))
        result = tl.where((index == step // SPLIT)[None, :], log2_mass[:, None], result)

    output += row * samples * key_tiles + first_tile
    target = output + sample.to(tl.int64)[:, None] * key_tiles + index[None, :]
    inside = (sample < samples)[:, None] & ((index < run) & (tile < key_tiles))[None, :]
    tl.store(target, result * 0.6931471805599453, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _column_mass_kernel(
    query,
    key,
    query_tags,
    key_tags,
    key_row,
    key_head,
    log_total,
    own_tile,
    output,
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    plans,
    orders,
    samples,
    key_length,
    skip_tiles,
    scale_log2,
    window,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPANS: tl.constexpr,
):
    # Neighbouring programs read the same keys, so that those with one key copy meet in the L2 cache.
    program = tl.program_id(0)
    plan = program % plans
    key_blocks = tl.cdiv(key_length, BLOCK_M)
    start = program // plans % key_blocks * BLOCK_M
    batch = (program // plans // key_blocks).to(tl.int64)
    row = batch * plans + plan
    order = tl.load(key_row + row)
    copy = tl.load(key_head + plan) + order
    query += row * samples * D
    query_tags += row * 3 * samples
    log_total += row * samples
    own_tile += row * samples
    key += batch * key_batch_stride + copy.to(tl.int64) * key_head_stride
    key_tags += (batch * orders + order) * 3 * key_length

    # Keys are the rows of the product, so that a key's sum over samples stays within a warp.
    k = _load_rows(key, start, key_row_stride, key_length, D, BLOCK_M, BLOCK_D)
    slot = start + tl.arange(0, BLOCK_M)
    k_position, k_segment, k_span = _load_tags(key_tags, slot, key_length, 2147483647, SEGMENTS, SPANS)
    tile = start // TILE

    # The blocks of samples from the first to the last one that may see a key of these.
    k_first = tl.min(k_position)
    k_last = tl.max(tl.where(k_position == 2147483647, -1, k_position))
    blocks = tl.cdiv(samples, BLOCK_N)
    begin = blocks
    end = 0
    for first_block in range(0, blocks, RUN):
        index = first_block + tl.arange(0, RUN)
        several = index[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        positions = tl.load(query_tags + several, mask=several < samples, other=-1)
        q_first = tl.min(tl.where(several < samples, positions, 2147483647), 1)
        may = (index < blocks) & _may_see(q_first, tl.max(positions, 1), k_first, k_last, window, WINDOW, SPANS)
        begin = tl.minimum(begin, tl.min(tl.where(may, index, blocks)))
        end = tl.maximum(end, tl.max(tl.where(may, index + 1, 0)))

    total = tl.zeros([BLOCK_M], tl.float32)
    count = tl.zeros([BLOCK_M], tl.float32)
    for step in range(end - begin):
        block = begin + step
        q = _load_rows(query, block * BLOCK_N, D, samples, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        sample = block * BLOCK_N + tl.arange(0, BLOCK_N)
        q_position, q_segment, q_span = _load_tags(query_tags, sample, samples, -1, SEGMENTS, SPANS)
        log2_total = tl.load(log_total + sample, mask=sample < samples, other=float("-inf")) * 1.4426950408889634
        own = tl.load(own_tile + sample, mask=sample < samples, other=0)
        counted = (log2_total > float("-inf")) & ((tile <= own - skip_tiles) | (tile > own))
        # A row that does not count sees nothing, like one past the end.
        q_position = tl.where(counted, q_position, -1)
        if SPANS:
            q_span = tl.where(counted, q_span, -1)
        shift = tl.where(counted, log2_total, 0.0)
        allowed = _allowed(
            q_position[None, :],
            q_segment[None, :],
            q_span[None, :],
            k_position[:, None],
            k_segment[:, None],
            k_span[:, None],
            window,
            WINDOW,
            SEGMENTS,
            SPANS,
        )
        weights = tl.math.exp2(tl.where(allowed, scores * scale_log2 - shift[None, :], float("-inf")))
        total += tl.sum(weights, 1)
        count += tl.sum(allowed.to(tl.float32), 1)

    output += row * key_length
    tl.store(output + slot, total / tl.maximum(count, 1.0), mask=slot < key_length)


def tile_log_mass(sampled: SampledRows, cold: Tensor | None, config: Config | None = None) -> Tensor:
    """`tile_log_mass` of tile_mass.py for CUDA tensors. config: launch shape, for tests and measurements."""
    config = config or launch_config(sampled.query)
    batch, plans, samples, _ = sampled.query.shape
    key_tiles = tile_count(sampled.key.shape[2])
    output = torch.empty(batch, plans, samples, key_tiles, dtype=torch.float32, device=sampled.query.device)
    if output.numel() == 0:
        return output
    rows = batch * plans * triton.cdiv(samples, config.block_m)
    run = min(RUN, max(1, rows * key_tiles // ENOUGH_PROGRAMS))
    key = _unit_columns(sampled.key)
    with torch.cuda.device_of(key):
        # Everything on the first grid axis: the others end at 65,535.
        _tile_log_mass_kernel[(rows * triton.cdiv(key_tiles, run),)](
            *_shared_arguments(sampled, key),
            sampled.key_row if cold is None else cold.contiguous().view(torch.uint8),  # not read where None
            output,
            *key.stride()[:3],
            *_lengths(sampled),
            run,
            sampled.scale / math.log(2.0),
            sampled.window or 0,
            COLD=cold is not None,
            **_launch_shape(sampled, config),
        )
    return output


def column_mass(
    sampled: SampledRows, log_total: Tensor, own_tile: Tensor, skip_tiles: int, config: Config | None = None
) -> Tensor:
    """`column_mass` of tile_mass.py for CUDA tensors. config: launch shape, for tests and measurements."""
    config = config or launch_config(sampled.query)
    batch, plans = sampled.query.shape[:2]
    key_length = sampled.key.shape[2]
    output = torch.empty(batch, plans, key_length, dtype=torch.float32, device=sampled.query.device)
    if output.numel() == 0:
        return output
    key = _unit_columns(sampled.key)
    with torch.cuda.device_of(key):
        _column_mass_kernel[(batch * plans * triton.cdiv(key_length, config.block_m),)](
            *_shared_arguments(sampled, key),
            log_total.contiguous(),
            own_tile.contiguous(),
            output,
            *key.stride()[:3],
            *_lengths(sampled),
            skip_tiles,
            sampled.scale / math.log(2.0),
            sampled.window or 0,
            **_launch_shape(sampled, config),
        )
    return output


def launch_config(query: Tensor) -> Config:
    """Launch shape for samples [B, P, R, D]: attention's, made smaller.

    Steps are few, so that more programs at a time pay better than larger products.
    """
    config = attention_config(query)
    return config._replace(
        block_m=min(config.block_m, 64),
        block_n=min(config.block_n, 64),
        warps=4 if query.element_size() == 2 else config.warps,
        # With one stage float32 spills: the compiler loads whole rows ahead of the products.
        stages=max(config.stages, 2),
    )


def _unit_columns(key: Tensor) -> Tensor:
    return key if key.stride(3) == 1 else key.contiguous()


def _shared_arguments(sampled: SampledRows, key: Tensor) -> tuple[Tensor, ...]:
    """What both kernels take first."""
    return (
        sampled.query,
        key,
        sampled.query_tags,
        sampled.key_tags.contiguous(),
        sampled.key_row.contiguous(),
        head_indices(sampled.key_head, key.device),
    )


def _lengths(sampled: SampledRows) -> tuple[int, int, int, int]:
    """Rows, key orders, samples and keys."""
    return sampled.query.shape[1], sampled.key_tags.shape[1], sampled.query.shape[2], sampled.key.shape[2]


def _launch_shape(sampled: SampledRows, config: Config) -> dict[str, int | bool]:
    width = sampled.query.shape[3]
    return {
        "D": width,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": padded_head_dim(width),
        "TILE": TILE,
        "RUN": RUN,
        "WINDOW": sampled.window is not None,
        "SEGMENTS": sampled.segments,
        "SPANS": sampled.spans,
        "num_warps": config.warps,
        "num_stages": config.stages,
        # Named, because Triton 3.10 changes the default and 3.9 warns of it.
        "enable_fp_fusion": True,
    }
