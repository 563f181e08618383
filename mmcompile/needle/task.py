"""Needle in a haystack over video, and over video with text between its clips: one sample, or a batch to train on.

    sample(task, tokens, depth, seed, layout) -> Sample
    model(**sample.inputs(model.dtype)).logits[0, -1].argmax() == sample.answer_id

What a prompt says depends on the arguments alone, and its frames too, to rounding, on whatever device they are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmcompile.needle.cards import cards
from mmcompile.needle.haystack import CARD, Haystack, Needle, plan
from mmcompile.needle.layout import Layout
from mmcompile.needle.scenes import scenes
from mmcompile.needle.vocabulary import COLOURS, NUMBERS
from mmcompile.video_patches import video_patches

FAMILY = {"video": 0, "mixed": 1}  # keeps the random streams of the two tasks apart


@dataclass(frozen=True)
class Sample:
    """One prompt of the task, on one device.

    frames: uint8 `[frames, height, width, 3]`, RGB, of all clips in a row. input_ids: int64 `[1, S]`.
    mm_token_type_ids: int32 `[1, S]`, 0 for text and 2 for video. video_grid_thw: int64 `[clips, 3]`.
    answer: the number asked for, as it is written. answer_id: the token that must follow the prompt (the first one
    that tells numbers apart, where a tokenizer cuts numbers up). needles: the one asked for, then its competitors.
    """

    task: str
    depth: float
    seed: int
    layout: Layout
    frames: Tensor
    input_ids: Tensor
    mm_token_type_ids: Tensor
    video_grid_thw: Tensor
    answer: str
    answer_id: int
    needles: tuple[Needle, ...]

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return self.input_ids.shape[1]

    @property
    def colour(self) -> str:
        """The colour that the question names."""
        return COLOURS[self.needles[0].colour]

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward and of `generate`, `pixel_values_videos` in `dtype`."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": torch.ones_like(self.input_ids),
            "mm_token_type_ids": self.mm_token_type_ids,
            "pixel_values_videos": pixel_values(self.frames, self.layout).to(dtype),
            "video_grid_thw": self.video_grid_thw,
        }


def sample(
    task: str,
    tokens: int,
    depth: float,
    seed: int,
    layout: Layout,
    *,
    asked: str | None = None,
    device: torch.device | str = "cpu",
) -> Sample:
    """Make one prompt of exactly `tokens` tokens.

    Args:
        task: "video", or "mixed", where a quarter of the tokens is text.
        tokens: from 128 ("video") or 512 ("mixed") on.
        depth: where the needle stands among the frames, or in the text: 0 first, 1 last.
        seed: another seed, other scenes, needles and words.
        layout: of the model, `Layout.of(config, tokenizer)`.
        asked: "card" or "text", what the question is about; None leaves it to the seed. Only cards in "video".
        device: where frames are drawn and tensors lie.

    Raises:
        ModelError: an unknown task, or too few tokens for it.
    """
    rng = np.random.default_rng((FAMILY.get(task, 0), tokens, round(depth * 1e6), seed))
    found = plan(task, tokens, depth, rng, layout, asked=asked)
    return Sample(
        task=task,
        depth=depth,
        seed=seed,
        layout=layout,
        frames=draw([found], layout, rng, device),
        input_ids=torch.as_tensor(found.ids, device=device)[None],
        mm_token_type_ids=torch.as_tensor(found.types, device=device)[None],
        video_grid_thw=torch.as_tensor(layout.grid(found.clips), device=device),
        answer=NUMBERS[found.needles[0].number],
        answer_id=int(found.questions[0, 1]),
        needles=found.needles,
    )


def draw(haystacks: list[Haystack], layout: Layout, rng: np.random.Generator, device: torch.device | str) -> Tensor:
    """The frames of prompts one after the other, uint8 `[frames, height, width, 3]`: scenes, and the cards in them."""
    height, width = layout.frame_size
    together = layout.temporal_patch_size
    counts = [sum(haystack.clips) for haystack in haystacks]
    frames = scenes(sum(counts) * together, height, width, rng, device)
    firsts = np.cumsum(counts) - counts
    shown = [
        (first + needle.frame, needle.colour, needle.shape, needle.number)
        for first, haystack in zip(firsts, haystacks, strict=True)
        for needle in haystack.needles
        if needle.modality == CARD
    ]
    places, colours, shapes, numbers = np.array(shown, dtype=np.int64).T
    drawn = cards(colours, shapes, numbers, height, width, rng, device)
    frames.unflatten(0, (-1, together))[torch.as_tensor(places, device=device)] = drawn[:, None]
    return frames


def pixel_values(frames: Tensor, layout: Layout) -> Tensor:
    """The documented preprocessing of frames that have the layout's size: float32 `[patches, values]`."""
    area = frames.shape[1] * frames.shape[2]
    patches, _ = video_patches(
        frames,
        patch_size=layout.patch_size,
        temporal_patch_size=layout.temporal_patch_size,
        merge_size=layout.merge_size,
        min_pixels=area,
        max_pixels=area,
    )
    return patches
