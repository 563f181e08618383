"""Triton kernels of what `kernels/tile_mass.py` makes of logarithms of mass: shares of tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # tiles of one step


@triton.jit(do_not_specialize=["tiles", "key_tiles"])
def _shares_kernel(
    log_mass,
    of_columns,
    shares,
    figure,
    tiles,
    key_tiles,
    SAMPLES: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One query tile. figure: what its columns hold, or the log of the total where there are none."""
    program = tl.program_id(0)
    plan = (program // tiles).to(tl.int64)
    tile = program % tiles
    sample = tl.arange(0, PADDED)
    row = (plan * SAMPLES + sample) * tiles + tile
    inside = sample < SAMPLES
    column = tl.arange(0, BLOCK)
    source = log_mass + row[:, None] * key_tiles + column[None, :]
    maximum = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    for start in range(0, key_tiles, BLOCK):
        some = tl.load(
            source + start, mask=inside[:, None] & (column < key_tiles - start)[None, :], other=float("-inf")
        )
        new_maximum = tl.maximum(maximum, tl.max(some, 1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(some - shift[:, None]), 1)
        maximum = new_maximum
    log_total = tl.where(maximum == float("-inf"), maximum, maximum + tl.log(tl.maximum(total, 1.0)))
    if COLUMNS:
        single = tl.load(of_columns + row, mask=inside, other=float("-inf"))
        greater = tl.maximum(log_total, single)
        shift = tl.where(greater == float("-inf"), 0.0, greater)
        every = tl.exp(log_total - shift) + tl.exp(single - shift)
        held = tl.exp(single - shift) / tl.maximum(every, 1.0)
        tl.store(figure + program, tl.sum(held) / SAMPLES)
        log_total = shift + tl.log(tl.maximum(every, 1.0))
    else:
        tl.store(figure + row, log_total, mask=inside)
        log_total = tl.where(log_total == float("-inf"), 0.0, log_total)
    shares += program.to(tl.int64) * key_tiles
    for start in range(0, key_tiles, BLOCK):
        some = tl.load(
            source + start, mask=inside[:, None] & (column < key_tiles - start)[None, :], other=float("-inf")
        )
        mean = tl.sum(tl.exp(some - log_total[:, None]), 0) / SAMPLES
        tl.store(shares + start + column, mean, mask=column < key_tiles - start)


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
    shares = torch.empty_like(log_mass)
    total = log_mass.new_empty(log_mass.shape[:2])
    _launch(log_mass, log_mass, shares, total, 1, False)
    return shares, total


def mean_shares(log_mass: Tensor, of_columns: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """The function of that name of tile_mass.py for CUDA tensors."""
    shape = log_mass.shape[0], log_mass.shape[1] // samples
    shares, held = log_mass.new_empty(*shape, log_mass.shape[2]), log_mass.new_empty(shape)
    _launch(log_mass, of_columns.contiguous(), shares, held, samples, True)
    return shares, held


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


def _launch(log_mass: Tensor, of_columns: Tensor, shares: Tensor, figure: Tensor, samples: int, columns: bool) -> None:
    count, tiles, key_tiles = shares.shape
    if shares.numel() == 0:
        return
    with torch.cuda.device_of(log_mass):
        _shares_kernel[(count * tiles,)](
            log_mass.contiguous(),
            of_columns,
            shares,
            figure,
            tiles,
            key_tiles,
            SAMPLES=samples,
            PADDED=triton.next_power_of_2(samples),
            COLUMNS=columns,
            **_block(key_tiles),
        )
