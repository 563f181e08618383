"""Models and example inputs by way of transformers: load from a path, make a prompt without a processor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmcompile.errors import MMCompileError
from mmcompile.video_patches import MAX_PIXELS, MIN_PIXELS, video_patches

# Families whose prompt holds a video as one run of placeholder tokens between two marks.
WHOLE_VIDEO_FAMILIES = ("qwen2_vl", "qwen2_5_vl")
MODALITIES = ("text", "image", "video")  # in the order of their `mm_token_type_ids`
QUESTION_TOKENS = 32


class ModelError(MMCompileError):
    """A model cannot be loaded, or cannot take what it was to be given."""


@dataclass(frozen=True)
class Text:
    """So many random tokens of text."""

    tokens: int


@dataclass(frozen=True)
class Vision:
    """An image or a video, cut into patches.

    patches: `[t * h * w, channels * frames * side * side]`. grid: t, h, w in patches.
    """

    modality: str
    patches: torch.Tensor
    grid: tuple[int, int, int]


def load_model(path: str | Path, *, dtype: str = "auto", device: str | None = None) -> Any:
    """Load a vision-language model, or a text model, as transformers loads it, in eval mode.

    Args:
        path: folder made by `save_pretrained`, or a name on a model hub.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", ...; None takes the GPU where there is one.

    Raises:
        ModelError: nothing there that transformers can load, an unknown dtype, or no such device.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as VISION_LANGUAGE
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ModelError(f"dtype={dtype!r}: must be auto, float32, bfloat16 or float16")
    target = _device(device)
    require_source(path)
    try:
        config = AutoConfig.from_pretrained(path)
        auto = AutoModelForImageTextToText if type(config) in VISION_LANGUAGE else AutoModelForCausalLM
        model = auto.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: transformers cannot load a model from here: {first_line(error)}") from error
    return model.eval().to(target)


def example_inputs(
    model: Any,
    *,
    frames: torch.Tensor | None = None,
    tokens: int = 8192,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """One prompt for `model`, on its device, as its processor would lay it out; the words are random.

    Args:
        model: from transformers; its config says how a prompt looks.
        frames: uint8 `[frames, height, width, 3]` for a model that reads videos; None for text alone.
        tokens: length of a text prompt; with `frames`, the most that the whole prompt may have.
        seed: of the random words.

    Returns:
        Keyword arguments of the model's forward: `input_ids` int64 `[1, S]` and `attention_mask`, and with a
        video `pixel_values_videos`, `video_grid_thw` and `mm_token_type_ids`.

    Raises:
        ModelError: the model's family has no video layout known here, or the video does not fit in `tokens`.
    """
    if frames is None:
        return prompts(model, [[Text(tokens)]], seed=seed)
    family = model.config.model_type
    if family not in WHOLE_VIDEO_FAMILIES:
        raise ModelError(
            f"{family}: no video layout is known here for this family, only for "
            f"{' and '.join(WHOLE_VIDEO_FAMILIES)}; leave the video out for a prompt of text, or give your "
            "processor's output to mmcompile.explain"
        )
    video = video_of(model.config, frames, tokens - 2 * QUESTION_TOKENS - 2)
    return prompts(model, [[Text(QUESTION_TOKENS), video, Text(QUESTION_TOKENS)]], seed=seed)


def video_of(config: Any, frames: torch.Tensor, tokens: int) -> Vision:
    """Patches of a video whose frames are small enough for `tokens` tokens; ModelError if nothing is."""
    vision = config.vision_config
    merge, patch, together = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
    steps = -(-len(frames) // together)
    if tokens < steps:
        raise ModelError(
            f"{len(frames)} frames need at least {steps} tokens and {max(tokens, 0)} are left for them: "
            "allow more tokens or take fewer frames"
        )
    largest = min(MAX_PIXELS, tokens // steps * (patch * merge) ** 2)
    patches, grid = video_patches(
        frames,
        patch_size=patch,
        temporal_patch_size=together,
        merge_size=merge,
        min_pixels=min(MIN_PIXELS, largest // 2),
        max_pixels=largest,
    )
    t, h, w = grid[0].tolist()
    return Vision("video", patches, (t, h, w))


def prompts(model: Any, rows: Sequence[Sequence[Text | Vision]], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of prompts, padded on the left, on the model's device and in its dtype.

    Args:
        model: from transformers.
        rows: the parts of each prompt, in order. Images and videos need a config with placeholder ids and a
            `vision_config` as Qwen2-VL's.
        seed: of the random words.

    Returns:
        `input_ids` int64 `[B, S]` and `attention_mask` int64 `[B, S]`; where there are images or videos also
        `mm_token_type_ids` int32 `[B, S]`, `pixel_values` and `image_grid_thw` int64 `[images, 3]`,
        `pixel_values_videos` and `video_grid_thw` int64 `[videos, 3]`, in order of appearance.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    words = _word_ids(config)
    laid_out = [list(_row_tokens(config, row, words, generator)) for row in rows]
    length = max(len(tokens) for tokens in laid_out)
    padding = getattr(config.get_text_config(), "pad_token_id", None) or 0
    ids = torch.full((len(rows), length), padding)
    types = torch.zeros(len(rows), length, dtype=torch.int32)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, tokens in enumerate(laid_out):
        start = length - len(tokens)
        ids[row, start:] = torch.tensor([token for token, _ in tokens])
        types[row, start:] = torch.tensor([kind for _, kind in tokens], dtype=torch.int32)
        mask[row, start:] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    seen = [part for row in rows for part in row if isinstance(part, Vision)]
    if seen:
        inputs["mm_token_type_ids"] = types
    for modality, values, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        parts = [part for part in seen if part.modality == modality]
        if parts:
            inputs[values] = torch.cat([part.patches for part in parts]).to(model.dtype)
            inputs[grids] = torch.tensor([part.grid for part in parts])
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _row_tokens(
    config: Any, row: Sequence[Text | Vision], words: torch.Tensor, generator: torch.Generator
) -> Iterator[tuple[int, int]]:
    """Token and modality of every position of one prompt."""
    for part in row:
        if isinstance(part, Text):
            picks = torch.randint(len(words), (part.tokens,), generator=generator)
            yield from ((token, 0) for token in words[picks].tolist())
            continue
        t, h, w = part.grid
        placeholder = config.image_token_id if part.modality == "image" else config.video_token_id
        yield config.vision_start_token_id, 0
        count = t * h * w // config.vision_config.spatial_merge_size**2
        yield from [(placeholder, MODALITIES.index(part.modality))] * count
        yield config.vision_end_token_id, 0


def _word_ids(config: Any) -> torch.Tensor:
    """Token ids that mean nothing special to the model."""
    special: set[int] = set()
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if name.endswith(("token_id", "token_index")) and value is not None:
                special.update(value if isinstance(value, list) else [value])
    vocabulary = torch.arange(config.get_text_config().vocab_size)
    return vocabulary[~torch.isin(vocabulary, torch.tensor(sorted(special), dtype=torch.int64))]


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ModelError(f"device={name!r}: must be cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device={name!r}: torch {torch.__version__} sees no CUDA device here; try cpu")
    return device


def require_source(path: str | Path) -> None:
    """ModelError for what looks like a folder and is none."""
    if not Path(path).exists() and str(path).startswith(("/", ".", "~")):
        raise ModelError(f"{path}: no such folder; give one made by save_pretrained, or a name on a model hub")


def first_line(error: Exception) -> str:
    """An error in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
