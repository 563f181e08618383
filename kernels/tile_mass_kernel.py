"""Triton kernels of `tile_log_mass` and `slots_log_mass`, of `kernels/tile_mass.py`, and their launches.

Sampled query rows are multiplied with keys, a block of each at a time, and of the scores one number is kept for each
row and tile. A tile that no row of the block sees is not multiplied; only where some row sees a part of a tile are its
elements compared.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor

from mmcompile.kernels import hopper_support
from mmcompile.kernels.attention_config import Config, padded_head_dim, table_config
from mmcompile.kernels.bulk_copies import key_descriptor, takes_descriptors
from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.sample_mask import (
    as_bits,
    classify_tiles,
    element_allowed,
    load_keys,
    load_mask_tags,
    load_samples,
    load_tags,
    lowest_bit,
)
from mmcompile.kernels.tile_bounds import tile_count
from mmcompile.kernels.tile_mass import SampledRows
from mmcompile.kernels.unit_columns import unit_columns

RUN = 32  # most key tiles of one program, a bit each, with the rows' queries read once
REGISTERS = 128  # of a thread
# Launch shapes where shared memory is large, keyed as attention's: two programs fit a multiprocessor, so that one
# multiplies while the other takes exponentials.
LARGE = {(2, padded): Config(128, 64 if padded == 256 else 128, 8, 2) for padded in (16, 32, 64, 128, 256)}
ENOUGH_PROGRAMS = 2048  # some for each multiprocessor of the largest GPUs: with fewer, runs are shorter
# Code that knows a length to be 1 or divisible by 16 gains nothing, and would be compiled once more.
UNSPECIALIZED = [
    "plans",
    "query_orders",
    "key_orders",
    "samples",
    "query_length",
    "key_length",
    "run",
    "scale_log2",
    "window",
    "entries",
]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _tile_log_mass_kernel(
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
    walk,
    bias,
    output,
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
    run,
    scale_log2,
    window,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WALK: tl.constexpr,
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
    batch = program // plans // blocks // runs
    row = batch.to(tl.int64) * plans + plan
    query_order_row = batch.to(tl.int64) * query_orders + tl.load(query_row + row)
    key_order = tl.load(key_row + row)
    key_order_row = batch.to(tl.int64) * key_orders + key_order
    copy = tl.load(key_head + plan) + key_order
    query += batch.to(tl.int64) * query_batch_stride + tl.load(head + plan).to(tl.int64) * query_head_stride
    if not DESCRIPTOR:
        key += batch.to(tl.int64) * key_batch_stride + copy.to(tl.int64) * key_head_stride
        bias += row * key_tiles * TILE
    query_tags += query_order_row * 3 * query_length
    key_tags += key_order_row * 3 * key_length
    key_positions += key_order_row * key_tiles * TILE

    sample = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if WALK:
        sample = tl.load(walk + row * samples + sample, mask=sample < samples, other=samples)
    q, q_position, q_segment, q_span = load_samples(
        query,
        query_order + query_order_row * query_length,
        query_tags,
        slots + row * samples,
        sample,
        samples,
        query_row_stride,
        query_length,
        D,
        BLOCK_D,
        SEGMENTS,
        SPANS,
    )
    index = tl.arange(0, RUN)
    tile = first_tile + index
    inside = (index < run) & (tile < key_tiles)
    q_first = tl.min(tl.where(sample < samples, q_position, 2147483647))
    may, whole = classify_tiles(
        bounds + key_order_row * 3 * key_tiles,
        tile,
        inside,
        key_tiles,
        q_first,
        tl.max(q_position),
        window,
        WINDOW,
        SEGMENTS,
        SPANS,
    )
    output += row * samples * key_tiles + first_tile
    target = output + sample.to(tl.int64) * key_tiles
    unseen = (sample < samples)[:, None] & (inside & ~may)[None, :]
    tl.store(target[:, None] + index[None, :], tl.full([BLOCK_M, RUN], float("-inf"), tl.float32), mask=unseen)

    todo = as_bits(may, index)
    compared = as_bits(may & ~whole, index)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    SPLIT: tl.constexpr = TILE // BLOCK_N
    for step in range(tl.sum(may.to(tl.int32)) * SPLIT):
        next_tile, bit = lowest_bit(todo)
        start = (first_tile + next_tile) * TILE + step % SPLIT * BLOCK_N
        k = load_keys(key, batch, copy, start, key_row_stride, key_length, D, BLOCK_N, BLOCK_D, DESCRIPTOR)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        slot = start + tl.arange(0, BLOCK_N)
        if COLD:
            if DESCRIPTOR:
                scores += bias.load([row.to(tl.int32), start]).reshape(BLOCK_N)[None, :]
            else:
                scores += tl.load(bias + slot)[None, :]
        if (compared & bit) != 0:
            k_position = tl.load(key_positions + slot)
            k_segment, k_span = load_mask_tags(
                key_tags, k_position, slot, slot < key_length, key_length, SEGMENTS, SPANS
            )
            allowed = element_allowed(
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
            scores = tl.where(allowed, scores, float("-inf"))
        new_maximum = tl.max(scores, 1) * scale_log2
        if SPLIT > 1:  # a tile goes on where the last step left it
            maximum = tl.where(step % SPLIT == 0, float("-inf"), maximum)
            total = tl.where(step % SPLIT == 0, 0.0, total)
            new_maximum = tl.maximum(maximum, new_maximum)
        # Rows that see no key of the tile have a maximum of -inf; subtracting it would give NaN.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.sum(tl.math.exp2(tl.math.fma(scores, scale_log2, -shift[:, None])), 1)
        if SPLIT > 1:
            weights += total * tl.math.exp2(maximum - shift)
        maximum = new_maximum
        total = weights
        if step % SPLIT == SPLIT - 1:
            # A total of 0 has no logarithm; every other one is at least 1, its greatest term.
            log2_mass = tl.where(maximum == float("-inf"), maximum, maximum + tl.math.log2(tl.maximum(total, 1.0)))
            tl.store(target + next_tile, log2_mass * 0.6931471805599453, mask=sample < samples)
        todo = tl.where(step % SPLIT == SPLIT - 1, todo ^ bit, todo)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _slots_log_mass_kernel(
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
    key_slots,
    listed,
    output,
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
    entries,
    scale_log2,
    window,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPANS: tl.constexpr,
):
    program = tl.program_id(0)
    plan = program % plans
    blocks = tl.cdiv(samples, BLOCK_M)
    block = program // plans % blocks
    batch = (program // plans // blocks).to(tl.int64)
    row = batch * plans + plan
    query_order_row = batch * query_orders + tl.load(query_row + row)
    key_order = tl.load(key_row + row)
    copy = tl.load(key_head + plan) + key_order
    query += batch * query_batch_stride + tl.load(head + plan).to(tl.int64) * query_head_stride
    key += batch * key_batch_stride + copy.to(tl.int64) * key_head_stride
    key_tags += (batch * key_orders + key_order) * 3 * key_length
    key_slots += row * entries

    sample = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q, q_position, q_segment, q_span = load_samples(
        query,
        query_order + query_order_row * query_length,
        query_tags + query_order_row * 3 * query_length,
        slots + row * samples,
        sample,
        samples,
        query_row_stride,
        query_length,
        D,
        BLOCK_D,
        SEGMENTS,
        SPANS,
    )
    count = tl.load(listed + row)
    column = tl.arange(0, BLOCK_D)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for step in range(tl.cdiv(count, BLOCK_N)):
        entry = step * BLOCK_N + tl.arange(0, BLOCK_N)
        # Past the list the last key comes again, where no mask is needed to load it, and no query sees it.
        slot = tl.load(key_slots + tl.minimum(entry, count - 1))
        pointers = key + (slot.to(tl.int64)[:, None] * key_row_stride + column[None, :])
        k = tl.load(pointers) if D == BLOCK_D else tl.load(pointers, mask=column[None, :] < D, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        k_position, k_segment, k_span = load_tags(
            key_tags, slot, entry < count, key_length, 2147483647, SEGMENTS, SPANS
        )
        allowed = element_allowed(
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
        scores = tl.where(allowed, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.math.exp2(maximum - shift) + tl.sum(tl.math.exp2(scores - shift[:, None]), 1)
        maximum = new_maximum
    log2_mass = tl.where(maximum == float("-inf"), maximum, maximum + tl.math.log2(tl.maximum(total, 1.0)))
    tl.store(output + row * samples + sample, log2_mass * 0.6931471805599453, mask=sample < samples)


def tile_log_mass(sampled: SampledRows, cold: Tensor | None, config: Config | None = None) -> Tensor:
    """`tile_log_mass` of tile_mass.py for CUDA tensors.

    config: launch shape of the portable kernel, for tests and measurements: it runs that one everywhere.
    """
    sampled = sampled._replace(query=unit_columns(sampled.query), key=unit_columns(sampled.key))
    if config is None and hopper_support.estimates(sampled.query, sampled.key, sampled.slots.numel()):
        # Imported where it runs: another version of Triton may have no Gluon, or another one.
        from mmcompile.kernels import tile_mass_hopper

        return tile_mass_hopper.launch(sampled, cold)
    config = config or launch_config(sampled.query)
    batch, plans, samples = sampled.slots.shape
    key_tiles = tile_count(sampled.key.shape[2])
    output = torch.empty(batch, plans, samples, key_tiles, dtype=torch.float32, device=sampled.query.device)
    if output.numel() == 0:
        return output
    rows = batch * plans * triton.cdiv(samples, config.block_m)
    run = min(RUN, max(1, rows * key_tiles // ENOUGH_PROGRAMS))
    query, key = sampled.query, sampled.key
    descriptor = takes_descriptors(key)
    walk = sampled.walk() if samples > config.block_m else None
    with torch.cuda.device_of(key):
        # Everything on the first grid axis: the others end at 65,535.
        _tile_log_mass_kernel[(rows * triton.cdiv(key_tiles, run),)](
            query,
            key_descriptor(key, config.block_n) if descriptor else key,
            *shared_arguments(sampled),
            *sampled.key_positions,
            sampled.slots if walk is None else walk,  # not read where None
            sampled.key_row if cold is None else _bias(cold, config.block_n if descriptor else None),
            output,
            *query.stride()[:3],
            *key.stride()[:3],
            *lengths(sampled),
            run,
            sampled.scale / math.log(2.0),
            sampled.length,
            TILE=TILE,
            RUN=RUN,
            DESCRIPTOR=descriptor,
            WALK=walk is not None,
            COLD=cold is not None,
            **launch_shape(sampled, config),
        )
    return output


def slots_log_mass(sampled: SampledRows, key_slots: Tensor, listed: Tensor, config: Config | None = None) -> Tensor:
    """`slots_log_mass` of tile_mass.py for CUDA tensors. config: launch shape, for tests and measurements."""
    config = config or gather_config(sampled.query)
    batch, plans, samples = sampled.slots.shape
    output = torch.empty(batch, plans, samples, dtype=torch.float32, device=sampled.query.device)
    if output.numel() == 0:
        return output
    query, key = unit_columns(sampled.query), unit_columns(sampled.key)
    with torch.cuda.device_of(key):
        _slots_log_mass_kernel[(batch * plans * triton.cdiv(samples, config.block_m),)](
            query,
            key,
            *shared_arguments(sampled),
            key_slots.contiguous(),
            listed.contiguous(),
            output,
            *query.stride()[:3],
            *key.stride()[:3],
            *lengths(sampled),
            key_slots.shape[2],
            sampled.scale / math.log(2.0),
            sampled.length,
            **launch_shape(sampled, config),
        )
    return output


def _bias(cold: Tensor, descriptor_rows: int | None) -> Tensor | TensorDescriptor:
    bias = key_bias(cold)
    return bias if descriptor_rows is None else TensorDescriptor.from_tensor(bias, [1, descriptor_rows])


def key_bias(cold: Tensor) -> Tensor:
    """What is added to the scores of the keys of whole tiles: 0, or -inf where they count for nothing.

    cold: bool [B, P, Sk]. Returns float32 [B * P, nK * TILE].
    """
    missing = -cold.shape[2] % TILE
    cold = cold.flatten(0, 1)
    return (pad(cold, (0, missing), value=True) if missing else cold.contiguous()).log()


def launch_config(query: Tensor) -> Config:
    """Launch shape for queries [B, H, S, D]."""
    config = table_config(query.device, query.dtype, query.shape[3], LARGE)
    # With one stage float32 spills: the compiler loads whole rows ahead of the products.
    return config._replace(stages=2)


def gather_config(query: Tensor) -> Config:
    """Launch shape for keys that are loaded one by one: their addresses take registers."""
    config = launch_config(query)
    return config._replace(block_n=min(config.block_n, 64))


def shared_arguments(sampled: SampledRows) -> tuple[Tensor, ...]:
    """What the kernels take after query and key."""
    return (
        sampled.query_order.contiguous(),
        sampled.query_tags.contiguous(),
        sampled.key_tags.contiguous(),
        sampled.slots.contiguous(),
        sampled.query_row.contiguous(),
        sampled.key_row.contiguous(),
        head_indices(sampled.heads, sampled.query.device),
        head_indices(sampled.key_head, sampled.query.device),
    )


def lengths(sampled: SampledRows) -> tuple[int, ...]:
    """Rows, query orders, key orders, samples, queries and keys."""
    _, plans, samples = sampled.slots.shape
    orders = sampled.query_order.shape[1], sampled.key_tags.shape[1]
    return plans, *orders, samples, sampled.query.shape[2], sampled.key.shape[2]


def launch_shape(sampled: SampledRows, config: Config) -> dict[str, int | bool]:
    width = sampled.query.shape[3]
    causal = sampled.window is None and not sampled.segments and not sampled.spans
    shape = {
        "D": width,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": padded_head_dim(width),
        "WINDOW": sampled.window is not None,
        "SEGMENTS": sampled.segments,
        "SPANS": sampled.spans,
        "num_warps": config.warps,
        "num_stages": config.stages,
        # Named, because Triton 3.10 changes the default and 3.9 warns of it.
        "enable_fp_fusion": True,
    }
    if causal and sampled.query.is_cuda and not torch.version.hip:
        # Room for two programs of eight warps; with more of the mask, registers would spill.
        shape["maxnreg"] = REGISTERS
    return shape
