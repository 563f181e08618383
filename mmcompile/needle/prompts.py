"""Prompts to evaluate on: the synthetic task, over drawn scenes or real videos, in batches of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmcompile.needle.haystack import CARD, Haystack, Needle, plan
from mmcompile.needle.layout import Layout
from mmcompile.needle.task import FAMILY, draw, pixel_values
from mmcompile.video import VideoError, read_frames

SEEDS = 10**6  # from here on: none of training's


@dataclass(frozen=True)
class Asked:
    """One question. row: of the batch. positions: after which the answer's tokens must come; ids: these.

    depth: of the needle, 0 first and 1 last, among the frames or in the prompt. modality: "card" or "text".
    """

    row: int
    positions: tuple[int, ...]
    ids: tuple[int, ...]
    depth: float
    modality: str


@dataclass(frozen=True)
class Batch:
    """Prompts of one length. inputs: keyword arguments of the model's forward."""

    inputs: dict[str, Tensor]
    asked: tuple[Asked, ...]

    @property
    def tokens(self) -> int:
        """Length of each prompt."""
        return self.inputs["input_ids"].shape[1]


class Prompts(Protocol):
    """Where prompts come from."""

    tasks: tuple[str, ...]
    questions: int  # of a prompt, at most
    together: bool  # whether prompts may stand in one batch

    def batch(self, task: str, tokens: int, wanted: Sequence[tuple[float, int]]) -> Batch:
        """Prompts of about so many tokens, for each (depth, seed) one."""


class SyntheticPrompts:
    """Prompts of `mmcompile.needle.task`. With several questions each is asked of the same frames, one after the other.

    background: frames of real videos in place of drawn scenes; None draws them.
    """

    tasks: tuple[str, ...] = tuple(FAMILY)
    together = True

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        dtype: torch.dtype,
        questions: int = 1,
        background: RealFrames | None = None,
    ) -> None:
        self.questions = questions
        self._layout, self._device, self._dtype, self._background = layout, device, dtype, background

    def batch(self, task: str, tokens: int, wanted: Sequence[tuple[float, int]]) -> Batch:
        """Raises ModelError for too few tokens."""
        planned, frames = [], []
        for depth, seed in wanted:
            rng = np.random.default_rng((FAMILY[task], tokens, round(depth * 1e6), SEEDS + seed))
            planned.append(plan(task, tokens, depth, rng, self._layout, questions=self.questions))
            frames.append(self._frames(planned[-1], rng))
        ids = torch.as_tensor(np.stack([one.ids for one in planned]), device=self._device)
        clips = [count for one in planned for count in one.clips]
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": torch.as_tensor(np.stack([one.types for one in planned]), device=self._device),
            "pixel_values_videos": pixel_values(torch.cat(frames), self._layout).to(self._dtype),
            "video_grid_thw": torch.as_tensor(self._layout.grid(clips), device=self._device),
        }
        return Batch(inputs, tuple(one for row, found in enumerate(planned) for one in _asked(row, found)))

    def _frames(self, found: Haystack, rng: np.random.Generator) -> Tensor:
        frames = draw([found], self._layout, rng, self._device)
        if self._background is None:
            return frames
        real = self._background.frames(len(frames), *self._layout.frame_size, rng).to(self._device)
        for needle in found.needles:
            if needle.modality == CARD:
                card = slice(*(self._layout.temporal_patch_size * end for end in (needle.frame, needle.frame + 1)))
                real[card] = frames[card]
        return real


def _asked(row: int, found: Haystack) -> list[Asked]:
    frames = sum(found.clips)

    def depth(needle: Needle) -> float:
        return needle.frame / max(1, frames - 1) if needle.modality == CARD else needle.token / len(found.ids)

    return [
        Asked(row, (int(position),), (int(answer),), depth(needle), needle.modality)
        for needle, (position, answer) in zip(found.needles, found.questions, strict=False)
    ]


class RealFrames:
    """Frames of the videos in a folder, one video after another, from a random one on."""

    def __init__(self, folder: Path) -> None:
        """Raises VideoError where there is none."""
        if not folder.is_dir():
            raise VideoError(f"{folder}: no such folder; give one with videos in it")
        self._paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
        if not self._paths:
            raise VideoError(f"{folder}: holds no video ({', '.join(_ENDINGS)})")

    def frames(self, count: int, height: int, width: int, rng: np.random.Generator) -> Tensor:
        """uint8 `[count, height, width, 3]`, RGB."""
        first, missing = int(rng.integers(len(self._paths))), count
        found: list[Tensor] = []
        while missing > 0:
            path = self._paths[(first + len(found)) % len(self._paths)]
            found.append(_resized(path, missing, height, width))
            missing -= len(found[-1])
        return torch.cat(found)

    def size(self) -> tuple[int, int]:
        """Height and width of the first video's frames."""
        _, height, width, _ = read_frames(self._paths[0], 1).shape
        return height, width


_ENDINGS = (".mp4", ".mkv", ".webm", ".mov", ".avi")


@lru_cache(maxsize=8)
def _resized(path: Path, count: int, height: int, width: int) -> Tensor:
    frames = read_frames(path, count).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(frames, (height, width), mode="bilinear", antialias=True)
    return small.permute(0, 2, 3, 1).contiguous()
