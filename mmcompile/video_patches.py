"""Frames to the patches that Qwen2-VL's vision tower takes, as the model's documentation describes.

transformers does this in a processor that needs torchvision. This one needs torch alone, and is held to the
same numbers by a test against transformers' image processor.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MIN_PIXELS = 128 * 28 * 28  # of one frame
MAX_PIXELS = 768 * 28 * 28  # of one frame
MAX_ASPECT = 200


def fit_size(height: int, width: int, multiple: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The frame size that the tower sees: sides that divide by `multiple`, area within bounds, aspect kept.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"a frame of {width} x {height} is too long and thin: at most {MAX_ASPECT} to 1 will do")
    rows, columns = round(height / multiple), round(width / multiple)
    area = rows * columns * multiple**2
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / multiple))
        columns = max(1, math.floor(width / shrink / multiple))
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / multiple)
        columns = math.ceil(width * grow / multiple)
    return rows * multiple, columns * multiple


def video_patches(
    frames: torch.Tensor,
    *,
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize, normalise and cut a video into patches (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Args:
        frames: uint8 `[frames, height, width, 3]`, RGB. The last one is repeated to fill a temporal patch.
        patch_size: pixels of a patch along height and width.
        temporal_patch_size: frames in a patch.
        merge_size: patches that the tower merges into one token, along height and along width.
        min_pixels: least area of a resized frame.
        max_pixels: largest area of a resized frame.

    Returns:
        `pixel_values_videos`, float32 `[t * h * w, 3 * temporal_patch_size * patch_size ** 2]`, a token's
        patches side by side; and `video_grid_thw`, int64 `[1, 3]`, which holds t, h, w in patches.

    Raises:
        ValueError: `frames` has another shape or dtype, or an impossible aspect.
    """
    if frames.dim() != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or len(frames) == 0:
        raise ValueError(f"frames is {frames.dtype} {list(frames.shape)}; it must be uint8 [frames, height, width, 3]")
    video = _resize(frames, patch_size * merge_size, min_pixels, max_pixels)  # [T, 3, H, W]
    video = _normalise(video)
    missing = -len(video) % temporal_patch_size
    video = torch.cat((video, video[-1:].expand(missing, -1, -1, -1)))
    _, channels, height, width = video.shape
    t, h, w = len(video) // temporal_patch_size, height // patch_size, width // patch_size
    video = video.reshape(
        t, temporal_patch_size, channels,
        h // merge_size, merge_size, patch_size,
        w // merge_size, merge_size, patch_size,
    )  # fmt: skip
    # [t, token row, token column, row in token, column in token, channel, frame, y, x]
    patches = video.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return patches.reshape(t * h * w, -1), torch.tensor([[t, h, w]])


def _resize(frames: torch.Tensor, multiple: int, min_pixels: int, max_pixels: int) -> torch.Tensor:
    video = frames.permute(0, 3, 1, 2).contiguous()  # [T, 3, H, W]
    size = fit_size(video.shape[2], video.shape[3], multiple, min_pixels, max_pixels)
    if size == tuple(video.shape[2:]):
        return video
    # On uint8, as the processors do it: their rounding between the passes is part of what a model has seen.
    return functional.interpolate(video, size, mode="bicubic", antialias=True)


def _normalise(video: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor(CLIP_MEAN, device=video.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, device=video.device).view(3, 1, 1)
    return (video / 255 - mean) / std
