"""The needles in a video: cards, each a shape in one colour with a number on it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmcompile.needle.scenes import grain
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
    """Draw cards, uint8 `[cards, height, width, 3]`, each with its own place, size, shade and grain, on `device`.

    colours, shapes, numbers: int64 `[cards]`, places in `COLOURS`, `SHAPES` and `NUMBERS`.
    """
    count = len(colours)
    centre, radius, pixel, paper, shade = (
        torch.as_tensor(rng.uniform(low, high, size=(count, size)), dtype=torch.float32, device=device)
        for low, high, size in ((-0.05, 0.05, 2), (0.42, 0.48, 1), (0.048, 0.056, 1), (60, 200, 1), (0.9, 1.05, 1))
    )  # lengths in sides of the frame; a pixel is a glyph's
    colour, shape, number = (torch.as_tensor(one, device=device) for one in (colours, shapes, numbers))
    x = (torch.arange(width, device=device) + 0.5) / width - 0.5 - centre[:, :1]  # [cards, width]
    y = (torch.arange(height, device=device) + 0.5) / height - 0.5 - centre[:, 1:]
    inside = _distance(shape, x[:, None], y[:, :, None]) < radius[:, :, None]
    column, row = (x / pixel + COLUMNS / 2).floor().long(), (y / pixel + ROWS / 2).floor().long()
    written = ((column >= 0) & (column < COLUMNS))[:, None] & ((row >= 0) & (row < ROWS))[:, :, None]
    written &= torch.as_tensor(BITMAPS, device=device)[
        number[:, None, None], row.clamp(0, ROWS - 1)[:, :, None], column.clamp(0, COLUMNS - 1)[:, None]
    ]
    paint = torch.as_tensor(PAINTS, device=device)[colour] * shade  # [cards, 3]
    drawn = torch.where(inside[..., None], paint[:, None, None], paper[:, None, None])
    drawn = torch.where(written[..., None], INK, drawn) + 12 * grain(count, height, width, rng, device)[..., None]
    return drawn.clamp_(0, 255).to(torch.uint8)


def _distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """How far pixels lie from the middle of a circle, square, diamond or hexagon, `[cards, height, width]`."""
    across, down = torch.broadcast_tensors(x.abs(), y.abs())
    distances = (
        torch.hypot(across, down),
        torch.maximum(across, down) * 1.1,
        (across + down) * 0.85,
        torch.maximum(down, across * 0.87 + down * 0.5),
    )
    return torch.stack(distances)[shape, torch.arange(len(shape), device=shape.device)]
