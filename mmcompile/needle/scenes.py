"""The haystack: shots of moving, textured scenes, never the same twice.

Every scene is a sum of terms that are separable in x and y (drifting gratings, soft spots, hard boxes), so that frames
are one batched matrix product; a still grain lies over each shot.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SHOT_FRAMES = (8, 48)  # shortest and longest shot
GRATINGS, SPOTS, BOXES = 3, 4, 3
CHUNK = 512  # frames rendered at a time
CONTRAST, GRAIN = 0.5, 0.15
GRAIN_CROPS = 256  # places along each side that a crop of the field of grain may begin at


def scenes(frames: int, height: int, width: int, rng: np.random.Generator, device: torch.device | str) -> Tensor:
    """Draw frames, uint8 `[frames, height, width, 3]`, on `device`; what they show depends on `rng` alone."""
    lengths = rng.integers(SHOT_FRAMES[0], SHOT_FRAMES[1] + 1, size=frames // SHOT_FRAMES[0] + 1)
    shots = int(np.searchsorted(np.cumsum(lengths), frames)) + 1
    shot = np.repeat(np.arange(shots), lengths[:shots])[:frames]  # [frames]
    first = np.cumsum(lengths[:shots]) - lengths[:shots]
    time = (np.arange(frames) - first[shot]) / 24  # seconds since the cut
    terms = GRATINGS * 2 + SPOTS + BOXES
    colours = rng.normal(size=(shots, 3, terms)) * CONTRAST
    colours[:, :, 1 : 2 * GRATINGS : 2] = -colours[:, :, 0 : 2 * GRATINGS : 2]  # cos(a + b) = cos cos - sin sin
    base = rng.normal(size=(shots, 3)) * CONTRAST
    motion = _Motion(shots, rng)
    on_device = {
        name: torch.as_tensor(value, dtype=torch.float32, device=device)
        for name, value in (("colours", colours), ("base", base), ("time", time), *vars(motion).items())
    }
    shot_grain = grain(shots, height, width, rng, device) * GRAIN
    shot_index = torch.as_tensor(shot, device=device)
    out = torch.empty(frames, height, width, 3, dtype=torch.uint8, device=device)
    for start in range(0, frames, CHUNK):
        index = shot_index[start : start + CHUNK]
        moment = on_device["time"][start : start + CHUNK, None]
        across, down = _profiles({name: on_device[name][index] for name in vars(motion)}, moment, height, width)
        painted = on_device["colours"][index][:, :, None] * down.transpose(1, 2)[:, None]  # [F, 3, H, terms]
        light = torch.bmm(painted.flatten(1, 2), across).unflatten(1, (3, height))  # [F, 3, H, W]
        light += on_device["base"][index][:, :, None, None]
        light += shot_grain[index][:, None]
        out[start : start + CHUNK] = light.tanh_().mul_(110).add_(128).to(torch.uint8).permute(0, 2, 3, 1)
    return out


def grain(count: int, height: int, width: int, rng: np.random.Generator, device: torch.device | str) -> Tensor:
    """Noise between -1 and 1, float32 `[count, height, width]`: crops of one field, which is cheap to fill."""
    field = rng.integers(-128, 128, (height + GRAIN_CROPS, width + GRAIN_CROPS), dtype=np.int8)
    corners = rng.integers(GRAIN_CROPS, size=(2, count))
    crops = torch.as_tensor(field, device=device).unfold(0, height, 1).unfold(1, width, 1)
    y, x = torch.as_tensor(corners, device=device)
    return crops[y, x] / 128


class _Motion:
    """How the terms of every shot lie and move; arrays `[shots, 2, terms of that kind]`, x before y, in frame sides."""

    def __init__(self, shots: int, rng: np.random.Generator) -> None:
        self.waves = rng.normal(size=(shots, 2, GRATINGS)) * 4  # cycles across the frame
        self.drift = rng.normal(size=(shots, 2, GRATINGS)) * 6  # radians a second
        self.phase = rng.uniform(0, 2 * np.pi, size=(shots, 2, GRATINGS))
        self.centre = rng.uniform(0, 1, size=(shots, 2, SPOTS + BOXES))
        self.speed = rng.normal(size=(shots, 2, SPOTS + BOXES)) * 0.4
        self.size = rng.uniform(0.05, 0.3, size=(shots, 2, SPOTS + BOXES))


def _profiles(motion: dict[str, Tensor], moment: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Every term along x and along y, float32 `[frames, terms, width]` and `[frames, terms, height]`."""
    profiles = []
    for axis, side in enumerate((width, height)):
        place = torch.arange(side, device=moment.device) / side
        angle = motion["phase"][:, axis] + motion["drift"][:, axis] * moment
        angle = angle[:, :, None] + 2 * torch.pi * motion["waves"][:, axis, :, None] * place  # [F, gratings, side]
        gratings = torch.stack((angle.cos(), angle.sin()), dim=2).flatten(1, 2)
        centre = torch.remainder(motion["centre"][:, axis] + motion["speed"][:, axis] * moment + 0.2, 1.4) - 0.2
        distance = (place - centre[:, :, None]) / motion["size"][:, axis, :, None]
        spots = torch.exp(-distance[:, :SPOTS].square())
        boxes = (distance[:, SPOTS:].abs() < 1).float()
        profiles.append(torch.cat((gratings, spots, boxes), dim=1))
    return profiles[0], profiles[1]
