"""Tiny Qwen2.5-VL prompts for tests: any number of images and videos, texts between them, a padded batch."""

import torch

from mmcompile.huggingface import Text, Vision
from mmcompile.tiny_qwen import tiny_qwen2_5_vl

__all__ = ["Text", "image", "tiny_qwen2_5_vl", "video"]


def video(steps: int, height: int, width: int, *, seed: int = 0) -> Vision:
    """A video of random patches: temporal steps, and patches along height and width (both even)."""
    return _vision("video", (steps, height, width), seed)


def image(height: int, width: int, *, seed: int = 0) -> Vision:
    """An image of random patches, `height` by `width` of them (both even)."""
    return _vision("image", (1, height, width), seed)


def _vision(modality: str, grid: tuple[int, int, int], seed: int) -> Vision:
    generator = torch.Generator().manual_seed(seed)
    t, h, w = grid
    return Vision(modality, torch.randn(t * h * w, 3 * 2 * 14 * 14, generator=generator), grid)
