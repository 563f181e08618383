"""Modality boundaries: where text, images and videos begin and end in a batch of token sequences."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from mmcompile.errors import BoundaryError
from mmcompile.input_boundaries import BoundaryTensors, boundary_tensors_of

MAX_MODALITIES = 8


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
    _host_offsets: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.grid is None and isinstance(self.modality, torch.Tensor):
            object.__setattr__(self, "grid", self.modality.new_zeros((*self.modality.shape[:1], 3)))
        _check_tensors(self.offsets, self.modality, self.grid)
        # Checked on the host once, here, so that a prefill never has to wait for the device.
        on_host = self.offsets.tolist()
        _check_values(on_host, self.modality.tolist(), self.grid)
        object.__setattr__(self, "_host_offsets", on_host)

    @property
    def tokens(self) -> int:
        """B * S, the number of tokens covered."""
        return self._host_offsets[-1]

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


def bound_tensors(device: torch.device, batch: int | None, length: int | None) -> BoundaryTensors | None:
    """The bound boundaries on a device; None where nothing is bound.

    Raises BoundaryError where they do not fit the batch and length of the queries; None for one that is not known.
    """
    bound = bound_boundaries()
    if not isinstance(bound, ModalityBoundaries):
        return bound
    if batch is not None and length is not None:
        bound.check_fits(batch, length)
    return bound.tensors(device)


def unknown_boundaries(device: torch.device) -> BoundaryTensors:
    """One segment that holds everything and says nothing: positions past the batch's end are cut off."""
    # Filled on the device: a copy from the host would wait for what the device is doing.
    offsets = torch.full((3,), 2**31 - 1, dtype=torch.int32, device=device)
    offsets[:1].zero_()
    modality = torch.zeros(2, dtype=torch.int32, device=device)
    return BoundaryTensors(offsets, modality, torch.zeros((2, 3), dtype=torch.int32, device=device))
