"""A prompt as long as one likes: some text, one video, some text; and the head patterns that are measured on it."""

import torch
from torch import Tensor

from mmcompile.input_boundaries import BoundaryTensors
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.options import AUTO_PATTERN

FRAME = (16, 16)  # rows and columns of tokens in a frame
TEXT = 64  # tokens of text before and after the video
SHORTEST = 2 * TEXT + FRAME[0] * FRAME[1]  # has one frame

PATTERNS = {
    "auto": AUTO_PATTERN,
    "vertical_slash": HeadPattern("vertical_slash", vertical=1000, slash=4096),
    "grid": HeadPattern("grid", lines="vs"),
    "a_shape": HeadPattern("a_shape", sink=128, local=4096),
}


def frame_count(tokens: int) -> int:
    """Whole frames between the texts."""
    return (tokens - 2 * TEXT) // (FRAME[0] * FRAME[1])


def boundaries(tokens: int, device: str) -> BoundaryTensors:
    """The prompt's segments as the ops take them."""
    frames = frame_count(tokens)
    offsets = [0, TEXT, TEXT + frames * FRAME[0] * FRAME[1], tokens]
    grid = [[0, 0, 0], [frames, *FRAME], [0, 0, 0]]
    return BoundaryTensors(
        *(torch.tensor(values, dtype=torch.int32, device=device) for values in (offsets, [0, 2, 0], grid))
    )


def positions(tokens: int) -> Tensor:
    """Multimodal rotary positions [3, 1, S]: time, row and column."""
    index = torch.arange(frame_count(tokens) * FRAME[0] * FRAME[1])
    before = torch.arange(TEXT).expand(3, -1)
    video = torch.stack([index // (FRAME[0] * FRAME[1]), index // FRAME[1] % FRAME[0], index % FRAME[1]]) + TEXT
    after = torch.arange(tokens - TEXT - len(index)).expand(3, -1) + int(video.max()) + 1
    return torch.cat([before, video, after], dim=1)[:, None]
