"""Triton kernels of what `kernels/tile_mass.py` makes of logarithms of mass: shares of tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # tiles of one step


@triton.jit(do_not_specialize=["key_tiles"])
def _shares_kernel(log_mass, shares, log_totals, key_tiles, BLOCK: tl.constexpr):
    """One sample."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    log_mass += row.to(tl.int64) * key_tiles
    shares += row.to(tl.int64) * key_tiles
    maximum = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for start in range(0, key_tiles, BLOCK):
        some = tl.load(log_mass + start + column, mask=column < key_tiles - start, other=float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(some))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(some - shift))
        maximum = new_maximum
    log_total = tl.where(maximum == float("-inf"), maximum, maximum + tl.log(tl.maximum(total, 1.0)))
    tl.store(log_totals + row, log_total)
    log_total = tl.where(log_total == float("-inf"), 0.0, log_total)
    for start in range(0, key_tiles, BLOCK):
        some = tl.load(log_mass + start + column, mask=column < key_tiles - start, other=float("-inf"))
        tl.store(shares + start + column, tl.exp(some - log_total), mask=column < key_tiles - start)


@triton.jit(do_not_specialize=["times", "key_tiles"])
def _spread_out_kernel(log_mass, of_columns, output, times, key_tiles, BLOCK: tl.constexpr):
    """One sample."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    log_mass += row.to(tl.int64) * key_tiles
    maximum = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for start in range(0, key_tiles, BLOCK):
        some = tl.load(log_mass + start + column, mask=column < key_tiles - start, other=float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(some))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(some - shift))
        maximum = new_maximum
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.maximum(total, 1e-30)
    seen = tl.zeros([], tl.float32)
    for start in range(0, key_tiles, BLOCK):
        some = tl.load(log_mass + start + column, mask=column < key_tiles - start, other=float("-inf"))
        seen += tl.sum((tl.exp(some - shift) / total > 0).to(tl.float32))
    even = times / tl.maximum(seen, 1.0)
    held = tl.zeros([], tl.float32)
    for start in range(0, key_tiles, BLOCK):
        some = tl.load(log_mass + start + column, mask=column < key_tiles - start, other=float("-inf"))
        share = tl.exp(some - shift) / total
        held += tl.sum(tl.where(share < even, share, 0.0))
    # What tiles hold of all: 1 / (1 + exp(columns - tiles)), 0 for a query that sees no key.
    others = tl.exp(tl.load(of_columns + row) - shift - tl.log(total))
    tl.store(output + row, held / (1.0 + others))


def tile_shares(log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """The function of that name of tile_mass.py for CUDA tensors."""
    shares = torch.empty_like(log_mass, memory_format=torch.contiguous_format)
    log_totals = log_mass.new_empty(log_mass.shape[:2])
    key_tiles = log_mass.shape[2]
    if shares.numel():
        with torch.cuda.device_of(log_mass):
            _shares_kernel[(log_totals.numel(),)](
                log_mass.contiguous(), shares, log_totals, key_tiles, **_block(key_tiles)
            )
    return shares, log_totals


def spread_out_share(log_mass: Tensor, of_columns: Tensor, times: float) -> Tensor:
    """The function of that name of tile_mass.py for CUDA tensors."""
    output = torch.empty_like(of_columns, memory_format=torch.contiguous_format)
    key_tiles = log_mass.shape[2]
    with torch.cuda.device_of(log_mass):
        _spread_out_kernel[(output.numel(),)](
            log_mass.contiguous(), of_columns.contiguous(), output, times, key_tiles, **_block(key_tiles)
        )
    return output


def _block(key_tiles: int) -> dict[str, int]:
    block = min(BLOCK, triton.next_power_of_2(key_tiles))
    return {"BLOCK": block, "num_warps": 4 if block >= 512 else 1}
