"""Modality boundaries: where text, images and videos begin and end in a batch of token sequences."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from mmcompile.errors import BoundaryError

TEXT, IMAGE, VIDEO, AUDIO = 0, 1, 2, 3
MAX_MODALITIES = 8


class BoundaryTensors(NamedTuple):
    """The graph's three boundary inputs: int32 offsets [M + 1], modality [M], grid [M, 3], on one device.

    Unlike `ModalityBoundaries` they may end in empty segments (offsets that repeat the last value), so that
    they can be made on the device, where the number of segments is not known to the host.
    """

    offsets: torch.Tensor
    modality: torch.Tensor
    grid: torch.Tensor


@dataclass(frozen=True, eq=False)
class ModalityBoundaries:
    """Segments of one modality each, flattened over the batch: positions run over B * S tokens.

    offsets: int32 [M + 1], strictly increasing from 0 to B * S, with a boundary at every sequence start.
    modality: int32 [M], one of 0 (text), 1 (image), 2 (video), 3 (audio), up to 7.
    grid: int32 [M, 3], frames, rows and columns of a segment's tokens; zeros where unknown. None: all zeros.

    They steer which tiles are computed, never what is causal: a wrong boundary can cost quality, and never
    lets a token see the future. Raises BoundaryError (a ValueError).
    """

    offsets: torch.Tensor
    modality: torch.Tensor
    grid: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.grid is None and isinstance(self.modality, torch.Tensor):
            object.__setattr__(self, "grid", self.modality.new_zeros((*self.modality.shape[:1], 3)))
        _check_tensors(self.offsets, self.modality, self.grid)
        # Checked on the host once, here, so that a prefill never has to wait for the device.
        _check_values(self.offsets.tolist(), self.modality.tolist(), self.grid)

    @property
    def tokens(self) -> int:
        """B * S, the number of tokens covered."""
        return int(self._host_offsets[-1])

    @property
    def _host_offsets(self) -> list[int]:
        return self.offsets.tolist()

    def check_fits(self, batch: int, length: int) -> None:
        """Raise BoundaryError unless these boundaries cover `batch` sequences of `length` tokens."""
        offsets = self._host_offsets
        if offsets[-1] != batch * length:
            raise BoundaryError(
                f"offsets: the last is {offsets[-1]}; must be batch * length = {batch} * {length} = {batch * length}"
            )
        missing = sorted(set(range(0, batch * length, length)) - set(offsets))
        if missing:
            raise BoundaryError(
                f"offsets: no boundary at {missing[0]}, where a sequence of {length} tokens starts; "
                "segments must not run over two sequences of the batch"
            )

    def tensors(self, device: torch.device | str) -> BoundaryTensors:
        """The graph inputs on `device`."""
        assert self.grid is not None
        # One segment more, empty: the compiled graph takes any number of segments from 2 up.
        offsets = torch.cat([self.offsets, self.offsets[-1:]])
        modality = torch.cat([self.modality, self.modality.new_zeros(1)])
        grid = torch.cat([self.grid, self.grid.new_zeros((1, 3))])
        return BoundaryTensors(
            *(tensor.to(device, torch.int32, non_blocking=True) for tensor in (offsets, modality, grid))
        )

    @classmethod
    def from_inputs(
        cls,
        config: Any,
        *,
        input_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
    ) -> "ModalityBoundaries":
        """Boundaries of a prompt, from whichever of a model's inputs tells them.

        config: the model's config (`image_token_id`, `video_token_id`, `vision_config.spatial_merge_size`).
        input_ids, mm_token_type_ids: integer [B, S]. position_ids: multimodal rotary positions [3, B, S].
        image_grid_thw, video_grid_thw: integer [N, 3], patches of each image or video in order of appearance.

        Waits for the device once, to learn the number of segments.
        """
        found = boundary_tensors_of(
            config,
            {
                "input_ids": input_ids,
                "mm_token_type_ids": mm_token_type_ids,
                "position_ids": position_ids,
                "image_grid_thw": image_grid_thw,
                "video_grid_thw": video_grid_thw,
            },
        )
        if found is None:
            raise BoundaryError(
                "input_ids: nothing tells the modalities; pass mm_token_type_ids, 3-D position_ids, or input_ids "
                "with a config that has image_token_id or video_token_id"
            )
        offsets = found.offsets.cpu()
        segments = int((offsets < offsets[-1]).sum())
        return cls(offsets[: segments + 1], found.modality.cpu()[:segments], found.grid.cpu()[:segments])


def _check_tensors(offsets: Any, modality: Any, grid: Any) -> None:
    for name, tensor, dim in (("offsets", offsets, 1), ("modality", modality, 1), ("grid", grid, 2)):
        if not isinstance(tensor, torch.Tensor):
            raise BoundaryError(f"{name}={tensor!r}: must be an int32 tensor")
        if tensor.dtype != torch.int32:
            raise BoundaryError(f"{name}: dtype is {tensor.dtype}; must be torch.int32")
        if tensor.dim() != dim:
            raise BoundaryError(f"{name}: shape is {list(tensor.shape)}; must have {dim} dimension(s)")
        if tensor.device != offsets.device:
            raise BoundaryError(f"{name}: device is {tensor.device}; must be {offsets.device}, as offsets")
    segments = offsets.numel() - 1
    if segments < 1:
        raise BoundaryError(f"offsets: {offsets.numel()} value(s); must be at least 2, first 0, last B * S")
    if modality.numel() != segments:
        raise BoundaryError(f"modality: {modality.numel()} values; must be {segments}, one a segment")
    if list(grid.shape) != [segments, 3]:
        raise BoundaryError(f"grid: shape is {list(grid.shape)}; must be [{segments}, 3]")


def _check_values(offsets: list[int], modality: list[int], grid: torch.Tensor | None) -> None:
    if offsets[0] != 0:
        raise BoundaryError(f"offsets: the first is {offsets[0]}; must be 0")
    for index, (left, right) in enumerate(pairwise(offsets)):
        if right <= left:
            raise BoundaryError(f"offsets: {right} at index {index + 1} follows {left}; must be strictly increasing")
    for index, value in enumerate(modality):
        if not 0 <= value < MAX_MODALITIES:
            raise BoundaryError(f"modality: {value} at index {index}; must be from 0 (text) to {MAX_MODALITIES - 1}")
    if grid is not None and bool((grid < 0).any()):
        raise BoundaryError(f"grid: smallest value is {int(grid.min())}; must be at least 0")


_bound: ContextVar[ModalityBoundaries | BoundaryTensors | None] = ContextVar("boundaries", default=None)


@contextmanager
def bind(boundaries: ModalityBoundaries | BoundaryTensors) -> Iterator[None]:
    """Give the prefills inside the `with` block these boundaries. They end with the block, and are each
    thread's own, so no later call can see them."""
    if not isinstance(boundaries, ModalityBoundaries | BoundaryTensors):
        raise BoundaryError(f"boundaries={boundaries!r}: must be a ModalityBoundaries")
    token = _bound.set(boundaries)
    try:
        yield
    finally:
        _bound.reset(token)


def bound_boundaries() -> ModalityBoundaries | BoundaryTensors | None:
    """What the innermost `bind` of this thread holds."""
    return _bound.get()


def unknown_boundaries(device: torch.device) -> BoundaryTensors:
    """One segment that holds everything and says nothing: positions past the batch's end are cut off."""
    # Filled on the device: a copy from the host would wait for what the device is doing.
    offsets = torch.full((3,), 2**31 - 1, dtype=torch.int32, device=device)
    offsets[:1].zero_()
    modality = torch.zeros(2, dtype=torch.int32, device=device)
    return BoundaryTensors(offsets, modality, torch.zeros((2, 3), dtype=torch.int32, device=device))


def boundary_tensors_of(config: Any, inputs: dict[str, Any]) -> BoundaryTensors | None:
    """Boundaries from a model's keyword inputs, made on their device without waiting for it; None when
    nothing among them tells modalities."""
    types, ids, positions = (inputs.get(name) for name in ("mm_token_type_ids", "input_ids", "position_ids"))
    if isinstance(types, torch.Tensor) and types.dim() == 2:
        token_modality = types.to(torch.int32)
    elif isinstance(ids, torch.Tensor) and ids.dim() == 2 and _placeholder_ids(config):
        token_modality = torch.zeros_like(ids, dtype=torch.int32)
        for kind, token_id in _placeholder_ids(config).items():
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


def _placeholder_ids(config: Any) -> dict[int, int]:
    names = {
        IMAGE: ("image_token_id", "image_token_index"),
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
