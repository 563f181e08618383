"""Triton kernels of `MassLevels`, of `kernels/levels.py`, and their launches: one program makes the levels of one query
tile of one plan row."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.levels import MASS_LEVELS, OCTAVE, MassLevels
from mmcompile.kernels.tile_classes import NON_EMPTY
from mmcompile.kernels.tile_list_kernel import Steps

PUT = Steps(512, 4)
SIZES = ["part", "first_row", "query_tiles", "key_tiles", "whole"]


@triton.jit
def _level_of(share, choice, whole, OCTAVE: tl.constexpr, LEVELS: tl.constexpr):
    """The level of tiles with a share of the attention. choice: the share of the tiles that there is to choose from."""
    step = -OCTAVE * tl.log2(tl.where(choice < whole, 1.0, share * choice))
    # What is not a number is next to nothing, like no attention at all.
    return tl.where(step < LEVELS - 1, tl.maximum(step, 0.0), LEVELS - 1).to(tl.int16)


@triton.jit(do_not_specialize=SIZES)
def _put_mass_kernel(
    mass, levels, classes, pair, part, first_row, query_tiles, key_tiles, whole,
    OCTAVE: tl.constexpr, LEVELS: tl.constexpr, NON_EMPTY: tl.constexpr, KEY_TILES: tl.constexpr,
):  # fmt: skip
    """mass: float32 [N, part, nK], of the query tiles from `first_row`. levels: int16 [N, nQ, nK]."""
    program = tl.program_id(0).to(tl.int64)
    n = program // part
    query_tile = first_row + program % part
    mass += program * key_tiles
    levels += (n * query_tiles + query_tile) * key_tiles
    classes += (tl.load(pair + n) * query_tiles + query_tile) * key_tiles
    choices = tl.zeros([KEY_TILES], tl.int32)
    for start in range(0, key_tiles, KEY_TILES):
        tile = start + tl.arange(0, KEY_TILES)
        choices += ((tl.load(classes + tile, mask=tile < key_tiles, other=0) & NON_EMPTY) != 0).to(tl.int32)
    choice = tl.div_rn(tl.sum(choices).to(tl.float32), key_tiles.to(tl.float32))
    for start in range(0, key_tiles, KEY_TILES):
        tile = start + tl.arange(0, KEY_TILES)
        some = (tl.load(classes + tile, mask=tile < key_tiles, other=0) & NON_EMPTY) != 0
        share = tl.load(mass + tile, mask=some, other=0.0)
        tl.store(levels + tile, _level_of(share, choice, whole, OCTAVE, LEVELS), mask=some)


@triton.jit(do_not_specialize=SIZES)
def _put_samples_kernel(
    log_mass, of_columns, held, levels, classes, pair, part, first_row, query_tiles, key_tiles, whole,
    SAMPLES: tl.constexpr, PADDED: tl.constexpr, OCTAVE: tl.constexpr, LEVELS: tl.constexpr,
    NON_EMPTY: tl.constexpr, KEY_TILES: tl.constexpr,
):  # fmt: skip
    """log_mass: float32 [N, SAMPLES, part, nK], read where a tile may hold an allowed element. of_columns: float32
    [N, SAMPLES, part], or None, and `held` with it: float32 [N, part], what columns have of the attention."""
    program = tl.program_id(0).to(tl.int64)
    n = program // part
    query_tile = first_row + program % part
    levels += (n * query_tiles + query_tile) * key_tiles
    classes += (tl.load(pair + n) * query_tiles + query_tile) * key_tiles
    sample = tl.arange(0, PADDED)
    row = (n * SAMPLES + sample) * part + program % part
    is_sample = sample < SAMPLES
    choices = tl.zeros([KEY_TILES], tl.int32)
    maximum = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    for start in range(0, key_tiles, KEY_TILES):
        tile = start + tl.arange(0, KEY_TILES)
        some = (tl.load(classes + tile, mask=tile < key_tiles, other=0) & NON_EMPTY) != 0
        choices += some.to(tl.int32)
        of_tile = tl.load(
            log_mass + row[:, None] * key_tiles + tile[None, :],
            mask=is_sample[:, None] & some[None, :],
            other=float("-inf"),
        )
        new_maximum = tl.maximum(maximum, tl.max(of_tile, 1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(of_tile - shift[:, None]), 1)
        maximum = new_maximum
    log_total = tl.where(maximum == float("-inf"), maximum, maximum + tl.log(tl.maximum(total, 1.0)))
    if of_columns is not None:
        single = tl.load(of_columns + row, mask=is_sample, other=float("-inf"))
        greater = tl.maximum(log_total, single)
        shift = tl.where(greater == float("-inf"), 0.0, greater)
        every = tl.exp(log_total - shift) + tl.exp(single - shift)
        tl.store(held + program, tl.sum(tl.exp(single - shift) / tl.maximum(every, 1.0)) / SAMPLES)
        log_total = shift + tl.log(tl.maximum(every, 1.0))
    log_total = tl.where(log_total == float("-inf"), 0.0, log_total)
    choice = tl.div_rn(tl.sum(choices).to(tl.float32), key_tiles.to(tl.float32))
    for start in range(0, key_tiles, KEY_TILES):
        tile = start + tl.arange(0, KEY_TILES)
        some = (tl.load(classes + tile, mask=tile < key_tiles, other=0) & NON_EMPTY) != 0
        of_tile = tl.load(
            log_mass + row[:, None] * key_tiles + tile[None, :],
            mask=is_sample[:, None] & some[None, :],
            other=float("-inf"),
        )
        share = tl.sum(tl.exp(of_tile - log_total[:, None]), 0) / SAMPLES
        tl.store(levels + tile, _level_of(share, choice, whole, OCTAVE, LEVELS), mask=some)


def put(levels: MassLevels, rows: slice, mass: Tensor) -> None:
    """`MassLevels.put_cpu` for CUDA tensors."""
    program, arguments, options = _launch(levels, rows)
    with torch.cuda.device_of(mass):
        _put_mass_kernel[program](mass.contiguous(), *arguments, **options)


def put_samples(
    levels: MassLevels, rows: slice, log_mass: Tensor, of_columns: Tensor | None, samples: int
) -> Tensor | None:
    """`MassLevels.put_samples_cpu` for CUDA tensors."""
    program, arguments, options = _launch(levels, rows)
    held = None if of_columns is None else log_mass.new_empty(levels.layout.shape[0], rows.stop - rows.start)
    of_columns = None if of_columns is None else of_columns.contiguous()
    with torch.cuda.device_of(log_mass):
        _put_samples_kernel[program](
            log_mass.contiguous(), of_columns, held, *arguments,
            SAMPLES=samples, PADDED=triton.next_power_of_2(samples), **options,
        )  # fmt: skip
    return held


def _launch(levels: MassLevels, rows: slice) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """The grid, what the kernels have in common, and their constants."""
    layout, part = levels.layout, rows.stop - rows.start
    sizes = part, rows.start, *layout.shape[1:], levels.whole
    constants = {"OCTAVE": OCTAVE, "LEVELS": MASS_LEVELS, "NON_EMPTY": NON_EMPTY, "KEY_TILES": PUT.key_tiles}
    arguments = levels.levels, layout.places.classes, layout.pair, *sizes
    return (layout.shape[0] * part,), arguments, {**constants, **PUT.options}
