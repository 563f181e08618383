"""The needles in a video: cards, each a shape in one colour, with a number stamped all over it."""

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
STAMPS = 6  # of the number along each side of a card
PITCH = 16  # dots along each side of a stamp


def _bitmaps() -> NDArray[np.bool_]:
    """The ink of every number's stamp, bool `[numbers, 16, 16]`."""
    glyphs = np.array([[list(row) for row in glyph.split()] for glyph in GLYPHS]) == "1"  # [10, 7, 5]
    ink = np.zeros((len(NUMBERS), PITCH, PITCH), dtype=bool)
    for place, number in enumerate(NUMBERS):
        for digit, left in zip(number, (2, 8), strict=True):
            ink[place, 4:11, left : left + 5] = glyphs[int(digit)]
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
    centre, radius, slip, paper, shade = (
        torch.as_tensor(rng.uniform(low, high, size=(count, size)), dtype=torch.float32, device=device)
        for low, high, size in ((-0.05, 0.05, 2), (0.42, 0.48, 1), (0, 1.5 / PITCH, 2), (60, 200, 1), (0.9, 1.05, 1))
    )  # centre and radius in sides of the frame, the slip of the print in stamps
    colour, shape, number = (torch.as_tensor(one, device=device) for one in (colours, shapes, numbers))
    across, down = ((torch.arange(side, device=device) + 0.5) / side for side in (width, height))
    x, y = across - 0.5 - centre[:, :1], down - 0.5 - centre[:, 1:]  # [cards, width], [cards, height]
    inside = _distance(shape, x[:, None], y[:, :, None]) < radius[:, :, None]
    column, row = (
        (torch.remainder(STAMPS * place + slip[:, axis : axis + 1], 1) * PITCH).long()
        for axis, place in enumerate((across, down))
    )  # of the dot within its stamp
    written = torch.as_tensor(BITMAPS, device=device)[number[:, None, None], row[:, :, None], column[:, None]]
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
