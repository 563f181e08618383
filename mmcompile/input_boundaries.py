"""Modality boundaries read from a model's own inputs, on their device and without waiting for it."""

from typing import Any, NamedTuple

import torch

TEXT, IMAGE, VIDEO, AUDIO = 0, 1, 2, 3


class BoundaryTensors(NamedTuple):
    """The graph's three boundary inputs: int32 offsets [M + 1], modality [M], grid [M, 3], on one device.

    Unlike `ModalityBoundaries` they may end in empty segments (offsets that repeat the last value), so that
    they can be made on the device, where the number of segments is not known to the host.
    """

    offsets: torch.Tensor
    modality: torch.Tensor
    grid: torch.Tensor


def boundary_tensors_of(config: Any, inputs: dict[str, Any]) -> BoundaryTensors | None:
    """Boundaries from a model's keyword inputs, made on their device without waiting for it; None when
    nothing among them tells modalities."""
    types, ids, positions = (inputs.get(name) for name in ("mm_token_type_ids", "input_ids", "position_ids"))
    if isinstance(types, torch.Tensor) and types.dim() == 2:
        token_modality = types.to(torch.int32)
    elif isinstance(ids, torch.Tensor) and ids.dim() == 2 and placeholder_ids(config):
        token_modality = torch.zeros_like(ids, dtype=torch.int32)
        for kind, token_id in placeholder_ids(config).items():
            token_modality = torch.where(ids == token_id, kind, token_modality)
    elif isinstance(positions, torch.Tensor) and is_multimodal_positions(positions):
        return boundaries_from_positions(positions)
    else:
        return None
    offsets, modality = _segments(token_modality, token_modality)
    grid = torch.zeros((modality.numel(), 3), dtype=torch.int32, device=modality.device)
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
    for kind, name in ((IMAGE, "image_grid_thw"), (VIDEO, "video_grid_thw")):
        patches = inputs.get(name)
        if isinstance(patches, torch.Tensor) and patches.numel() > 0:
            grid = _with_grids(grid, offsets, modality, kind, patches, merge)
    return BoundaryTensors(offsets, modality, grid)


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


def _with_grids(
    grid: torch.Tensor,
    offsets: torch.Tensor,
    modality: torch.Tensor,
    kind: int,
    patches: torch.Tensor,
    merge: int,
) -> torch.Tensor:
    """Give the segments of one kind their grids, where the grid's token count is the segment's.

    A video may be cut into one segment a frame (timestamps between frames), or stand as one; only where the
    count agrees is the pairing in order of appearance known to be right.
    """
    tokens = patches.to(torch.int32).to(grid.device)
    tokens = torch.stack([tokens[:, 0], tokens[:, 1] // merge, tokens[:, 2] // merge], dim=1)  # [N, 3]
    lengths = offsets[1:] - offsets[:-1]
    of_kind = (modality == kind) & (lengths > 0)
    rank = of_kind.cumsum(0) - 1
    wanted = tokens[rank.clamp(0, tokens.shape[0] - 1)]  # [M, 3]
    agrees = of_kind & (rank < tokens.shape[0]) & (wanted.prod(dim=1) == lengths)
    return torch.where(agrees[:, None], wanted, grid).to(torch.int32)


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
    start = first_vision | (vision != torch.cat([~vision[:, :1], vision[:, :-1]], dim=1))
    offsets, is_vision = _segments(vision.to(torch.int32), start.cumsum(dim=1))
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
    known = (is_vision > 0) & (frames * rows * columns == lengths)
    grid = torch.where(known[:, None], torch.stack([frames, rows, columns], dim=1), 0)
    return grid.to(torch.int32), extent(frame) > 1


def _segments(token_modality: torch.Tensor, run: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets and modality of the maximal runs of tokens with one modality and one `run` number.

    token_modality, run: integer [B, S]. Returns offsets int32 [B * S + 1] and modality int32 [B * S]; the
    segments past the real ones are empty, because how many there are is known to the device alone.
    """
    start = torch.ones_like(token_modality, dtype=torch.bool)
    start[:, 1:] = (token_modality[:, 1:] != token_modality[:, :-1]) | (run[:, 1:] != run[:, :-1])
    start, flat = start.reshape(-1), token_modality.reshape(-1)
    tokens = start.numel()
    positions = torch.arange(tokens, device=start.device, dtype=torch.int32)
    index = start.cumsum(0) - 1
    offsets = torch.full((tokens + 1,), tokens, dtype=torch.int32, device=start.device)
    # Tokens that start no segment write past the end, into a slot that is cut off.
    target = torch.where(start, index, tokens)
    offsets.scatter_(0, target, torch.where(start, positions, tokens))
    modality = torch.zeros(tokens + 1, dtype=torch.int32, device=start.device)
    modality.scatter_(0, target, flat.to(torch.int32))
    return offsets, modality[:tokens]
