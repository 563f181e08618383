"""The needles in a video: cards, each a shape in one colour with a number on it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmcompile.needle.vocabulary import NUMBERS

# In the order of vocabulary.COLOURS.
PAINTS = np.array(
    [
        (225, 35, 35), (245, 140, 20), (240, 225, 40), (40, 180, 60),
        (60, 220, 225), (70, 90, 240), (150, 60, 200), (250, 140, 190),
    ]
)  # fmt: skip
INK = 15
GLYPHS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)  # rows of five
ROWS, COLUMNS = 7, 11  # of two glyphs and the gap between them


def _bitmaps() -> NDArray[np.bool_]:
    """The ink of every number, bool `[numbers, 7, 11]`."""
    glyphs = np.array([[list(row) for row in glyph.split()] for glyph in GLYPHS]) == "1"  # [10, 7, 5]
    ink = np.zeros((len(NUMBERS), ROWS, COLUMNS), dtype=bool)
    for place, number in enumerate(NUMBERS):
        ink[place, :, :5], ink[place, :, 6:] = glyphs[int(number[0])], glyphs[int(number[1])]
    return ink


BITMAPS = _bitmaps()


def cards(
    colours: NDArray[np.int64],
    shapes: NDArray[np.int64],
    numbers: NDArray[np.int64],
    height: int,
    width: int,
    rng: np.random.Generator,
    device: torch.device | str,
) -> Tensor:
    """Draw cards, uint8 `[cards, height, width, 3]`, each with its own place, size, shade and grain.

    colours, shapes, numbers: int64 `[cards]`, places in `COLOURS`, `SHAPES` and `NUMBERS`.
    """
    count = len(colours)
    centre = rng.uniform(-0.05, 0.05, size=(2, count, 1))  # from the middle, in sides
    x = (np.arange(width) + 0.5) / width - 0.5 - centre[0]  # [cards, width]
    y = (np.arange(height) + 0.5) / height - 0.5 - centre[1]
    inside = _shape_mask(shapes, x[:, None], y[:, :, None], rng.uniform(0.42, 0.48, size=(count, 1, 1)))
    pixel = rng.uniform(0.048, 0.056, size=(count, 1))  # of a glyph, in sides
    column = np.floor(x / pixel + COLUMNS / 2).astype(np.int64)
    row = np.floor(y / pixel + ROWS / 2).astype(np.int64)
    seen = ((column >= 0) & (column < COLUMNS))[:, None] & ((row >= 0) & (row < ROWS))[:, :, None]
    ink = BITMAPS[
        numbers[:, None, None], row.clip(0, ROWS - 1)[:, :, None], column.clip(0, COLUMNS - 1)[:, None]
    ]  # [cards, height, width]
    paper = rng.uniform(60, 200, size=(count, 1, 1, 1))
    paint = PAINTS[colours][:, None, None] * rng.uniform(0.9, 1.05, size=(count, 1, 1, 1))
    drawn = np.where(inside[..., None], paint, paper)
    drawn = np.where((ink & seen)[..., None], INK, drawn)
    drawn = drawn + rng.integers(-12, 13, size=(count, height, width, 1))
    return torch.as_tensor(drawn.clip(0, 255).astype(np.uint8), device=device)


def _shape_mask(
    shapes: NDArray[np.int64], x: NDArray[np.float64], y: NDArray[np.float64], radius: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """The pixels of a circle, square, diamond or hexagon around 0, bool `[cards, height, width]`."""
    across, down = np.abs(x), np.abs(y)
    distances = (
        np.hypot(across, down),
        np.maximum(across, down) * 1.1,
        (across + down) * 0.85,
        np.maximum(down, across * 0.87 + down * 0.5),
    )
    return np.choose(shapes[:, None, None], [distance < radius for distance in np.broadcast_arrays(*distances)])
