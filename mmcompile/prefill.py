"""Running a compiled prefill: supply the boundaries of this very call, keep what the plans report."""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mmcompile.input_boundaries import BoundaryTensors, boundaries_from_positions, is_multimodal_positions
from mmcompile.modality import ModalityBoundaries, bound_boundaries, unknown_boundaries
from mmcompile.passes.decide import SiteRecord
from mmcompile.passes.graph import Size, fake_value, placeholders, same_size
from mmcompile.passes.pipeline import Rewritten


@dataclass(frozen=True)
class SiteStats:
    """What one attention site did in the last prefill of its model.

    density: computed tiles as a fraction of the tiles with an allowed element, the mean over the batch and the
    site's distinct patterns; 1.0 where the prefill was shorter than `min_tokens` and ran dense.
    """

    module_path: str
    layer: int | None
    density: float
    patterns: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "module_path": self.module_path,
            "layer": self.layer,
            "density": self.density,
            "patterns": list(self.patterns),
        }


class CompiledPrefill:
    """A compiled graph whose last inputs are the boundaries and whose last outputs are densities.

    Boundaries come, first found first used, from `bind`, from multimodal rotary positions among this call's own
    inputs, or are unknown. Nothing is kept from one call to the next, so none can be stale.
    """

    def __init__(self, compiled: Callable[..., Any], rewritten: Rewritten) -> None:
        site = rewritten.sparse[0].site
        own = placeholders(rewritten.module.graph)[: -len(rewritten.boundaries.nodes)]  # type: ignore[union-attr]
        self._compiled = compiled
        self._records = tuple(decision.record for decision in rewritten.sparse)
        self._device = fake_value(site.query).device
        self._positions = _find_positions(own, site.batch, site.query_length)
        self._batch = _find_size(own, site.batch)
        self._length = _find_size(own, site.query_length)
        self._parameter = _find_parameter(own)

    def __call__(self, *inputs: Any) -> Any:
        outputs = self._compiled(*inputs, *self._boundaries(inputs))
        densities = outputs[-len(self._records) :]
        if self._parameter is not None:
            _last_prefills.keep(inputs[self._parameter], self._records, densities)
        return outputs[: -len(self._records)]

    def _boundaries(self, inputs: Sequence[Any]) -> BoundaryTensors:
        bound = bound_boundaries()
        if isinstance(bound, BoundaryTensors):
            return bound
        if isinstance(bound, ModalityBoundaries):
            if self._batch is not None and self._length is not None:
                bound.check_fits(self._batch(inputs), self._length(inputs))
            return bound.tensors(self._device)
        if self._positions is not None:
            return boundaries_from_positions(inputs[self._positions])
        return unknown_boundaries(self._device)


def _find_positions(inputs: Sequence[fx.Node], batch: Size, length: Size) -> int | None:
    """The input that holds multimodal rotary positions, known by its type and shape."""
    for index, node in enumerate(inputs):
        value = fake_value(node)
        if isinstance(value, torch.Tensor) and is_multimodal_positions(value) and same_size(value.shape[1], batch):
            # Dynamo may give each input its own symbol for one and the same length.
            static = isinstance(value.shape[2], int) and isinstance(length, int)
            if not static or value.shape[2] == length:
                return index
    return None


def _find_size(inputs: Sequence[fx.Node], size: Size) -> Callable[[Sequence[Any]], int] | None:
    """How to read a size from the graph's inputs at run time; None when no input has it."""
    if isinstance(size, int):
        return lambda _: size
    for index, node in enumerate(inputs):
        value = fake_value(node)
        if isinstance(value, torch.SymInt) and same_size(value, size):
            return lambda inputs, index=index: int(inputs[index])  # type: ignore[misc]
        if isinstance(value, torch.Tensor):
            for dim, extent in enumerate(value.shape):
                if same_size(extent, size):
                    return lambda inputs, index=index, dim=dim: int(inputs[index].shape[dim])  # type: ignore[misc]
    return None


def _find_parameter(inputs: Sequence[fx.Node]) -> int | None:
    """An input that is a parameter: it tells at run time which model the graph is serving."""
    for index, node in enumerate(inputs):
        if isinstance(fake_value(node), nn.Parameter):
            return index
    return None


class _LastPrefills:
    """The densities of each model's last prefill, kept by one of the parameters that the graph was given."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[int, tuple[weakref.ref[Any], tuple[SiteRecord, ...], tuple[torch.Tensor, ...]]] = {}

    def keep(self, parameter: torch.Tensor, records: tuple[SiteRecord, ...], densities: Sequence[torch.Tensor]) -> None:
        key = id(parameter)

        def forget(_: object) -> None:
            self._kept.pop(key, None)

        with self._lock:
            self._kept[key] = (weakref.ref(parameter, forget), records, tuple(densities))

    def of(self, model: nn.Module) -> list[SiteStats]:
        stats = []
        for parameter in model.parameters():
            kept = self._kept.get(id(parameter))
            if kept is not None and kept[0]() is parameter:
                _, records, densities = kept
                stats += [_site_stats(*pair) for pair in zip(records, densities, strict=True)]
        return stats


def _site_stats(record: SiteRecord, density: torch.Tensor) -> SiteStats:
    return SiteStats(record.module_path, record.layer, float(density.mean()), record.patterns)


_last_prefills = _LastPrefills()


def stats(model: nn.Module) -> list[SiteStats]:
    """What each rewritten attention of `model` did in its last prefill, in execution order.

    Empty before the first prefill, and where nothing was rewritten. Waits for the device.
    """
    return _last_prefills.of(model)
