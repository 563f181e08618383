"""Modality boundaries read from a model's own inputs, on their device and without waiting for it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from mmcompile.errors import BoundaryError

TEXT, IMAGE, VIDEO, AUDIO = 0, 1, 2, 3
_PLACEHOLDER_MASKS = {IMAGE: ("images_seq_mask", "visual_pos_masks", "image_mask"), VIDEO: ("video_mask",)}


class BoundaryTensors(NamedTuple):
    """The graph's three boundary inputs: int32 offsets [M + 1], modality [M], grid [M, 3], on one device.

    Unlike `ModalityBoundaries` they may end in empty segments (offsets that repeat the last value), so that
    they can be made on the device, where the number of segments is not known to the host.
    """

    offsets: torch.Tensor
    modality: torch.Tensor
    grid: torch.Tensor


def boundary_tensors_of(config: Any, inputs: Mapping[str, Any]) -> BoundaryTensors | None:
    """Boundaries from a model's keyword inputs, made on their device without waiting for it; None when
    nothing among them tells modalities.

    Grids are told, first found first used, by `image_grid_thw` and `video_grid_thw`, by multimodal `position_ids`, or
    by the config's sizes of an image. One is given only where it holds a segment's tokens exactly; zeros elsewhere.
    Raises BoundaryError for `mm_token_type_ids` of fewer tokens than the prompt has.
    """
    kinds = _token_modality(config, inputs)
    positions = inputs.get("position_ids")
    if not isinstance(positions, torch.Tensor) or not is_multimodal_positions(positions):
        positions = None
    if kinds is None:
        return None if positions is None else boundaries_from_positions(positions)
    start = torch.ones_like(kinds, dtype=torch.bool)
    start[:, 1:] = kinds[:, 1:] != kinds[:, :-1]
    flat = kinds.reshape(-1)
    frames = _Frames.unknown(start.reshape(-1))
    for kind, name in ((IMAGE, "image"), (VIDEO, "video")):
        grids = inputs.get(f"{name}_grid_thw")
        if isinstance(grids, torch.Tensor) and grids.numel() > 0:
            merge = inputs.get(f"{name}_merge_sizes")
            frames = frames.or_else(
                _frames_of_grids(flat == kind, grids, _merge_size(config) if merge is None else merge)
            )
        elif positions is None:
            features = getattr((inputs.get("mm_encoder_outputs") or {}).get(name), "pooler_output", None)
            each = features.shape[1] if isinstance(features, torch.Tensor) and features.dim() == 3 else None
            frames = frames.or_else(_frames_of_config(flat == kind, frames.start, config, kind, each))
    offsets, modality = _segments(flat, frames.start)
    grid = frames.grid(offsets)
    if positions is not None and positions.shape[1:] == kinds.shape:
        told, _ = _grids_of_segments(offsets, modality, *positions[-3:].to(torch.int64))
        vision = (modality == IMAGE) | (modality == VIDEO)
        grid = torch.where((vision & (grid[:, 0] == 0))[:, None], told, grid)
    return BoundaryTensors(offsets, modality, grid)


def _token_modality(config: Any, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """The modality of each of a call's tokens, int32 [B, S]; None where nothing tells it."""
    types, ids = inputs.get("mm_token_type_ids"), inputs.get("input_ids")
    tokens = ids if isinstance(ids, torch.Tensor) else inputs.get("inputs_embeds")
    length = tokens.shape[1] if isinstance(tokens, torch.Tensor) and tokens.dim() >= 2 else None
    if isinstance(types, torch.Tensor) and types.dim() == 2:
        if length is not None and types.shape[1] < length:
            raise BoundaryError(f"mm_token_type_ids: {types.shape[1]} tokens; must be at least {length}, as the prompt")
        # After a prefix, and in chunks of a prompt, types may go back to the first token of all.
        return types[:, -length:].to(torch.int32) if length else types.to(torch.int32)
    if isinstance(ids, torch.Tensor) and ids.dim() == 2 and placeholder_ids(config):
        kinds = torch.zeros_like(ids, dtype=torch.int32)
        for kind, token_id in reversed(placeholder_ids(config).items()):
            kinds = torch.where(ids == token_id, kind, kinds)
        return kinds
    for kind, names in _PLACEHOLDER_MASKS.items():
        for name in names:
            mask = inputs.get(name)
            if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.dim() in (2, 3):
                mask = mask if mask.dim() == 2 else mask[..., 0]
                return mask.to(torch.int32) * kind
    return None


def placeholder_ids(config: Any) -> dict[int, int]:
    """The token ids that stand for the features of each modality, from a model's config; empty where it names none."""
    names = {
        IMAGE: ("image_token_id", "image_token_index", "image_patch_id"),
        VIDEO: ("video_token_id", "video_token_index"),
        AUDIO: ("audio_token_id", "audio_token_index"),
    }
    found = {}
    for modality, candidates in names.items():
        for name in candidates:
            value = getattr(config, name, None)
            if isinstance(value, int):
                found[modality] = value
                break
    return found


class _Frames(NamedTuple):
    """Where frames lie among the tokens of a batch, laid end to end. Each [T].

    start: bool, where a segment starts. rows, columns: int32, of the token's frame; 0 where unknown. phase: int32,
    tokens since the frame's first.
    """

    start: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    phase: torch.Tensor

    @classmethod
    def unknown(cls, start: torch.Tensor) -> "_Frames":
        nothing = torch.zeros_like(start, dtype=torch.int32)
        return cls(start, nothing, nothing, nothing)

    def or_else(self, other: "_Frames") -> "_Frames":
        """These frames, and the other's where these are unknown; the starts of both."""
        known = self.rows > 0
        return _Frames(
            self.start | other.start,
            *(torch.where(known, mine, theirs) for mine, theirs in zip(self[1:], other[1:], strict=True)),
        )

    def grid(self, offsets: torch.Tensor) -> torch.Tensor:
        """Grid [M, 3] of the segments that hold whole frames; zeros for the others."""
        first = offsets[:-1].clamp(max=self.start.numel() - 1).long()
        rows, columns, phase = (one[first] for one in self[1:])
        lengths, frame = offsets[1:] - offsets[:-1], (rows * columns).clamp(min=1)
        whole = (rows > 0) & (phase == 0) & (lengths > 0) & (lengths % frame == 0)
        return torch.where(whole[:, None], torch.stack([lengths // frame, rows, columns], dim=1), 0).to(torch.int32)


def _frames_of_grids(placeholders: torch.Tensor, grids: torch.Tensor, merge: int | torch.Tensor) -> _Frames:
    """Frames of the images or videos whose sizes the call tells, their tokens taken in order.

    placeholders: bool [T]. grids: integer [N, 3], frames, rows and columns in patches. merge: patches along a side of
    what becomes one token, for all or [N]. A video may stand as one run of tokens, or be cut between its frames by
    timestamps. Where the placeholders of the batch are not as many as the grids have tokens, nothing is known.
    """
    grids = grids.to(placeholders.device, torch.int64)
    merge = merge.to(grids) if isinstance(merge, torch.Tensor) else merge
    times, rows, columns = grids[:, 0], grids[:, 1] // merge, grids[:, 2] // merge
    ends = (times * rows * columns).cumsum(0)
    index = placeholders.cumsum(0) - 1
    known = placeholders & (placeholders.sum() == ends[-1])
    item = torch.searchsorted(ends, index, right=True).clamp(max=grids.shape[0] - 1)
    place = index - (ends - times * rows * columns)[item]
    rows, columns = rows[item], columns[item]
    phase = place % (rows * columns).clamp(min=1)
    return _Frames(
        known & (place == 0), *(torch.where(known, one, 0).to(torch.int32) for one in (rows, columns, phase))
    )


def _frames_of_config(
    placeholders: torch.Tensor, start: torch.Tensor, config: Any, kind: int, each: int | None
) -> _Frames:
    """Frames of images or videos that all have the size which the config tells.

    placeholders, start: bool [T]. each: tokens of one image or frame where the encoder's output tells them. A run of
    tokens has the grid of which it holds a whole number, where there is just one such grid.
    """
    frames = _Frames.unknown(torch.zeros_like(start))
    candidates = [(*size, 0) for size in _frame_sizes(config, kind) if each is None or size[0] * size[1] == each]
    if kind == VIDEO and hasattr(config, "image_grid_pinpoints"):
        # LLaVA-OneVision halves the sides of a video's frames, and one token for the line's end closes the video.
        candidates += [(-(-rows // 2), -(-columns // 2), 1) for rows, columns in _patch_grids(config)]
    if not candidates:
        return frames
    tokens = torch.arange(start.numel(), device=start.device, dtype=torch.int32)
    run = start.cumsum(0) - 1
    offsets, _ = _segments(torch.zeros_like(tokens), start)
    lengths = offsets[1:] - offsets[:-1]
    # A run of image tiles with line ends between them may happen to have a length that fits several tiles.
    single = kind == IMAGE and hasattr(config, "image_grid_pinpoints")
    place, length = tokens - offsets[run], lengths[run]
    rows, columns, ends, found = frames.rows, frames.rows, frames.rows, frames.rows
    for height, width, extra in candidates:
        counted = length - extra
        fits = counted == height * width if single else (counted > 0) & (counted % (height * width) == 0)
        fits = fits & placeholders
        found = found + fits
        rows, columns, ends = (
            torch.where(fits, to, now) for to, now in ((height, rows), (width, columns), (extra, ends))
        )
    inside = (found == 1) & (place < length - ends)
    line_end = (found == 1) & (ends > 0) & (place == length - ends)
    phase = place % (rows * columns).clamp(min=1)
    return _Frames(line_end, *(torch.where(inside, one, 0).to(torch.int32) for one in (rows, columns, phase)))


def _frame_sizes(config: Any, kind: int) -> list[tuple[int, int]]:
    """The rows and columns of an image's or a frame's tokens that a config's fields tell, each once."""
    sizes = [(1, count) for count in _numbers(config, "tokens_per_frame", "mm_tokens_per_frame") if kind == VIDEO]
    if sizes:
        return sizes
    for count in _numbers(config, "mm_tokens_per_image"):
        side = math.isqrt(count)
        sizes += [(side, side)] if side * side == count else []
    if sizes:
        return sizes
    factors = _numbers(config, "downsample_factor", "scale_factor", "projector_pooling_ratio", "spatial_merge_size")
    factors += [round(1 / ratio) for ratio in [getattr(config, "downsample_ratio", None)] if ratio]
    factors += _numbers(config, "spatial_pool_stride") if kind == VIDEO else []
    for rows, columns in _patch_grids(config):
        reduced = [(rows // factor, columns // factor) for factor in factors if min(rows, columns) >= factor > 1]
        sizes += reduced or [(rows, columns)]
    if not sizes:
        squares = ((math.isqrt(count), count) for count in _numbers(config, "image_seq_length", "image_seq_len"))
        sizes = [(side, side) for side, count in squares if side * side == count]
    return list(dict.fromkeys(sizes))


def _patch_grids(config: Any) -> list[tuple[int, int]]:
    """Rows and columns of the patches of an image as the vision tower takes it; empty where it takes any size."""
    vision = getattr(config, "vision_config", None)
    sides = [_pair(getattr(vision, name, None)) for name in ("image_size", "patch_size")]
    if None in sides:
        return []
    (height, width), (patch_height, patch_width) = sides  # type: ignore[misc]
    return [(height // patch_height, width // patch_width)] if min(height // patch_height, width // patch_width) else []


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int) and size > 0:
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(one, int) and one > 0 for one in size):
        return size[0], size[1]
    return None


def _numbers(config: Any, *names: str) -> list[int]:
    values = (getattr(config, name, None) for name in names)
    return [value for value in values if isinstance(value, int) and value > 0]


def _merge_size(config: Any) -> int:
    """Patches along a side of what becomes one token."""
    return next(iter(_numbers(getattr(config, "vision_config", None), "spatial_merge_size", "merge_size")), 1)


def is_multimodal_positions(positions: torch.Tensor) -> bool:
    """Whether a tensor has the form of multimodal rotary positions: integer [3, B, S], or [4, B, S] with the
    text positions first."""
    return positions.dim() == 3 and positions.shape[0] in (3, 4) and not positions.is_floating_point()


def boundaries_from_positions(positions: torch.Tensor) -> BoundaryTensors:
    """Boundaries from multimodal rotary positions (frame, row, column) [3, B, S], on their device.

    Text has all three equal and moves them on by one together. A vision segment walks its grid in raster order,
    which never does that; only its first token looks like text, and the token after it gives it away. Padding
    repeats one position and counts as text. A vision segment whose frame number changes is a video, else an image.
    """
    frame, row, column = positions[-3:].to(torch.int64)  # [B, S] each
    text = _is_text(frame, row, column)
    first_vision = torch.zeros_like(text)
    first_vision[:, :-1] = text[:, :-1] & ~text[:, 1:]
    vision = ~text | first_vision
    # A segment's first token starts it even where two vision segments touch.
    start = first_vision.clone()
    start[:, 1:] |= vision[:, 1:] != vision[:, :-1]
    start[:, 0] = True
    offsets, is_vision = _segments(vision.to(torch.int32).reshape(-1), start.reshape(-1))
    grid, moves = _grids_of_segments(offsets, is_vision, frame, row, column)
    modality = torch.where(is_vision > 0, torch.where(moves, VIDEO, IMAGE), TEXT).to(torch.int32)
    return BoundaryTensors(offsets, modality, grid)


def _is_text(frame: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Tokens that look like text or padding by their positions, bool [B, S]: a vision segment's first among them."""
    equal = (frame == row) & (row == column)
    both = equal[:, 1:] & equal[:, :-1]
    step = column[:, 1:] - column[:, :-1]
    beside = both & ((step == 1) | (step == 0))  # neighbours in one run of text, or of padding
    text = torch.zeros_like(equal)
    text[:, 1:] |= beside
    text[:, :-1] |= beside
    # One token of text may end the sequence, and one token of padding start it.
    text[:, -1] |= equal[:, -1]
    text[:, :1] |= equal[:, :1] & equal[:, 1:2].any(dim=1, keepdim=True)
    # The last token of a grid as long as it is high and wide has all three equal, and text may go on from it.
    walks = (frame[:, 1:] == frame[:, :-1]) & (row[:, 1:] == row[:, :-1]) & (step == 1)
    text[:, 1:] &= ~walks
    return text


def _grids_of_segments(
    offsets: torch.Tensor,
    is_vision: torch.Tensor,
    frame: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grid [M, 3] of each vision segment from its positions' ranges, and whether its frame number changes."""
    tokens = frame.numel()
    segment = torch.bucketize(torch.arange(tokens, device=frame.device, dtype=torch.int32), offsets[1:], right=True)

    def extent(positions: torch.Tensor) -> torch.Tensor:
        high = torch.zeros(is_vision.numel(), dtype=torch.int64, device=frame.device)
        low = torch.zeros_like(high)
        high.scatter_reduce_(0, segment, positions.reshape(-1), "amax", include_self=False)
        low.scatter_reduce_(0, segment, positions.reshape(-1), "amin", include_self=False)
        return high - low + 1

    rows, columns = extent(row), extent(column)
    lengths = (offsets[1:] - offsets[:-1]).to(torch.int64)
    frames = lengths // (rows * columns)
    # The ranges alone would also fit tokens in another order, or two images side by side.
    first = offsets[:-1].clamp(max=tokens - 1).long()[segment]
    place = torch.arange(tokens, device=frame.device) - first
    row, column = row.reshape(-1), column.reshape(-1)
    raster = (row - row[first] == place // columns[segment] % rows[segment]) & (
        column - column[first] == place % columns[segment]
    )
    ordered = torch.ones_like(is_vision).scatter_reduce_(0, segment, raster.to(is_vision.dtype), "amin")
    known = (is_vision > 0) & (frames * rows * columns == lengths) & (ordered > 0)
    grid = torch.where(known[:, None], torch.stack([frames, rows, columns], dim=1), 0)
    return grid.to(torch.int32), extent(frame) > 1


def _segments(token_modality: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets and modality of the segments that begin at `start`.

    token_modality: integer [T], start: bool [T], the first of them True. Returns offsets int32 [T + 1] and modality
    int32 [T]; the segments past the real ones are empty, because how many there are is known to the device alone.
    """
    tokens = start.numel()
    positions = torch.arange(tokens, device=start.device, dtype=torch.int32)
    index = start.cumsum(0) - 1
    offsets = torch.full((tokens + 1,), tokens, dtype=torch.int32, device=start.device)
    # Tokens that start no segment write past the end, into a slot that is cut off.
    target = torch.where(start, index, tokens)
    offsets.scatter_(0, target, torch.where(start, positions, tokens))
    modality = torch.zeros(tokens + 1, dtype=torch.int32, device=start.device)
    modality.scatter_(0, target, token_modality.to(torch.int32))
    return offsets, modality[:tokens]
