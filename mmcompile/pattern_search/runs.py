"""A model run over its samples, with the search inside each of its layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmcompile.architecture import Architecture
from mmcompile.console import Step
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pattern_search.equal_time import Costs, measure_costs
from mmcompile.pattern_search.layer_search import Evaluation, replay, search_layer
from mmcompile.pattern_search.record import SearchError, record
from mmcompile.pattern_search.resume import Finished
from mmcompile.pattern_search.score import LayerAttention
from mmcompile.tables import PatternTable, Sample, Segment

Inputs = Mapping[str, Any]
_MODALITIES = ("text", "image", "video", "audio")


class Runs:
    """The runs of one search. The first sample decides what the others try.

    costs: of each layer. samples: described in the order in which they were run.
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: tuple[HeadPattern, ...],
        density: float | None,
        finished: Finished,
        step: Step,
    ) -> None:
        self._model, self._architecture = model, Architecture.of(model)
        self._candidates, self._density = candidates, density
        self._finished, self._step = finished, step
        self._measured: dict[str, Costs] = {}
        self._first: list[list[Evaluation]] = []
        self.costs: list[Costs] = []
        self.samples: list[Sample] = []

    def search(self, inputs: Inputs, name: str) -> list[list[Evaluation]]:
        """What was tried in each layer with one sample."""
        index = len(self.samples)
        found: list[list[Evaluation]] = []

        def visit(layer: int, seen: SeenAttention) -> Tensor:
            attention = LayerAttention(seen)
            if index == 0:
                self.costs.append(self._costs_of(attention))
            tried = self._finished.layer(f"sample-{index}", layer)
            if tried is None:
                first = index == 0
                tried = search_layer(attention, self.costs[layer]) if first else replay(attention, self._first[layer])
                self._finished.keep_layer(f"sample-{index}", layer, tried)
            found.append(tried)
            return attention.output

        self._run(inputs, name, visit)
        self._first = self._first or found
        return found

    def validate(self, inputs: Inputs, name: str, table: PatternTable) -> list[tuple[float, ...]]:
        """The errors of a table's heads with a sample that the search did not see, layer by layer."""
        errors: list[tuple[float, ...]] = []

        def visit(layer: int, seen: SeenAttention) -> Tensor:
            attention = LayerAttention(seen)
            errors.append(attention.score(table.layers[layer]).read().error)
            return attention.output

        self._run(inputs, name, visit, held_out=True)
        return errors

    def _run(
        self, inputs: Inputs, name: str, visit: Callable[[int, SeenAttention], Tensor], *, held_out: bool = False
    ) -> None:
        layer = 0

        def visit_next(seen: SeenAttention) -> Tensor:
            nonlocal layer
            if not self._is_of_decoder(seen):
                return LayerAttention(seen).output
            self._step(f"{name}, layer {layer}")
            if layer == 0:
                described = describe(seen, name, held_out)
            output = visit(layer, seen)
            if layer == 0:
                self.samples.append(described)
            layer += 1
            return output

        records = record(self._model, inputs, visit_next)
        expected = layer if self._architecture is None else self._architecture.layers
        if layer != expected or layer == 0:
            refused = dict.fromkeys(f"{one.reason}: {one.detail}" for one in records if one.reason.is_refusal)
            raise SearchError(
                f"{name}: {layer} attentions could be made sparse, the model has {expected or 'no'} layers"
                + (f" ({'; '.join(refused)})" if refused else "")
                + "; `python -m mmcompile explain` lists them"
            )

    def _is_of_decoder(self, seen: SeenAttention) -> bool:
        """A model may have another causal stack besides, of another geometry."""
        if self._architecture is None:
            return True
        geometry = seen.query.shape[1], seen.key.shape[1], seen.query.shape[3]
        return geometry == (self._architecture.heads, self._architecture.kv_heads, self._architecture.head_dim)

    def _costs_of(self, attention: LayerAttention) -> Costs:
        """Measured once for layers that are alike."""
        seen = attention.seen
        shapes = (*seen.query.shape, *seen.key.shape)
        key = str((*shapes, seen.query.dtype, seen.window, seen.spans is None, attention.modalities))
        if key not in self._measured:
            costs = self._finished.costs(key)
            if costs is None:
                costs = measure_costs(attention, self._candidates, self._density)
                self._finished.keep_costs(key, costs)
            self._measured[key] = costs
        return self._measured[key]


def describe(seen: SeenAttention, name: str, held_out: bool) -> Sample:
    """A sample as its first layer shows it. Waits for the device."""
    tokens = seen.query.shape[0] * seen.query.shape[2]
    offsets, modality, grid = (part.tolist() for part in seen.boundaries)
    segments = []
    for start, end, kind, (frames, rows, columns) in zip(offsets[:-1], offsets[1:], modality, grid, strict=True):
        if min(end, tokens) > start:
            called = _MODALITIES[kind] if kind < len(_MODALITIES) else f"modality {kind}"
            segments.append(Segment(called, min(end, tokens) - start, (frames, rows, columns)))
    return Sample(name, tokens, tuple(segments), held_out)


def samples_of(given: Inputs | Sequence[Inputs]) -> list[Inputs]:
    """One sample or several, as a list."""
    return [given] if isinstance(given, Mapping) else list(given)
