"""`mmcompile.search`: the best pattern of every head of a model, from a sample or a few."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcompile.architecture import Architecture
from mmcompile.bench.figure import versions
from mmcompile.console import Step, steps
from mmcompile.errors import OptionError
from mmcompile.kernels.patterns import HeadPattern, encode
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pattern_search.allocate import allocate, front, to_recall, uniform
from mmcompile.pattern_search.candidates import space
from mmcompile.pattern_search.equal_time import LEVELS, TOLERANCE, WANTED, Costs, measure_costs
from mmcompile.pattern_search.layer_search import Evaluation, replay, search_layer
from mmcompile.pattern_search.record import SearchError, record
from mmcompile.pattern_search.resume import Finished, digest
from mmcompile.pattern_search.score import LayerAttention
from mmcompile.tables import FrontPoint, HeadFinding, PatternTable, Sample, Segment

Inputs = Mapping[str, Any]
_MODALITIES = ("text", "image", "video", "audio")


def search(
    model: nn.Module,
    inputs: Inputs | Sequence[Inputs],
    *,
    density: float | None = None,
    recall: float | None = None,
    candidates: str | Sequence[HeadPattern] = "full",
    held_out: Inputs | Sequence[Inputs] = (),
    names: Sequence[str] = (),
    partial: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> PatternTable:
    """Find each head's best pattern for a model, on its device, and share one budget of time among all heads.

    The model's prefill runs through the backend's own capture, layer after layer, with dense attention; in each layer
    candidates of equal measured kernel time are tried, in all heads at once, and judged by the attention's output
    against dense (arXiv 2504.16083, section 3.3). Takes the memory of a dense prefill, and of one layer's attention
    some ten times over. The model itself is left as it is; Dynamo's caches are reset.

    Args:
        model: with causal attention that the backend makes sparse.
        inputs: keyword arguments of the model's forward, or a list of such: errors are means over the samples. What
            `mmcompile.bind` holds are the boundaries of all of them; else each tells its own.
        density: the budget, as the kernel time of an A-shape that computes this share of the causal tiles. By default
            that of an A-shape of 1024 sink and 4096 local tokens, the paper's, which in a short prompt is next to all.
        recall: each head's cheapest pattern that covers this share of its attention, whatever that costs together.
        candidates: "full", "paper" (what the paper searches), or patterns of your own.
        held_out: samples that the search does not see; the table's errors on them are in it.
        names: of the samples, `inputs` first, for the table.
        partial: a folder that keeps finished layers until the search ends. resume: go on with what it holds.
        progress: show a bar with the time that is left.

    Raises:
        OptionError: a value out of range, or candidates that are none.
        SearchError: an attention that stays dense, or a folder of another search.
    """
    for name, value in (("density", density), ("recall", recall)):
        if value is not None and (isinstance(value, bool) or not 0 < value <= 1):
            raise OptionError(f"{name}={value!r}: must be a number in (0, 1], or None")
    if density is not None and recall is not None:
        raise OptionError("density and recall together: one is a budget, the other a target; give one")
    samples, unseen = (_samples(given) for given in (inputs, held_out))
    if not samples:
        raise OptionError("inputs: no sample; give the model's keyword arguments")
    architecture = Architecture.of(model)
    patterns = space(candidates)
    titles = [*names, *(f"sample {index}" for index in range(len(names), len(samples) + len(unseen)))]
    settings = {
        "density": density,
        "recall": recall,
        "candidates": candidates if isinstance(candidates, str) else [str(pattern) for pattern in patterns],
        "levels": list(LEVELS),
    }
    device = _device(model)
    told = versions(device.type) | {"mmcompile": _own_version()}
    identity = {
        **settings,
        "patterns": encode(patterns),
        "architecture": None if architecture is None else architecture.to_dict(),
        "samples": [digest(sample) for sample in (*samples, *unseen)],
        "versions": told,
        "device": _device_name(device),
    }
    finished = Finished(None if partial is None else Path(partial), identity, resume=resume)
    runs = len(samples) + len(unseen)
    with steps(None if architecture is None else architecture.layers * runs, shown=progress) as step:
        job = _Search(model, architecture, patterns, density, finished, step)
        found = [
            job.run(sample, title, index) for index, (sample, title) in enumerate(zip(samples, titles, strict=False))
        ]
        table, totals = job.table(found, recall)
        validated = [job.validate(sample, titles[len(samples) + index], table) for index, sample in enumerate(unseen)]
    table = replace(
        _with_held_out(table, validated),
        architecture=architecture,
        samples=tuple(job.samples),
        versions=told,
        device=_device_name(device),
        settings=settings | totals,
    )
    finished.remove()
    return table


class _Search:
    """The runs of one search over its samples."""

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture | None,
        candidates: tuple[HeadPattern, ...],
        density: float | None,
        finished: Finished,
        step: Step,
    ) -> None:
        self._model, self._architecture, self._candidates = model, architecture, candidates
        self._density, self._finished, self._step = density, finished, step
        self._costs: dict[str, Costs] = {}
        self._of_layer: list[Costs] = []
        self._first: list[list[Evaluation]] = []  # of the first sample
        self.samples: list[Sample] = []

    def run(self, inputs: Inputs, name: str, index: int) -> list[list[Evaluation]]:
        """What was found of each layer in one sample. The first one decides what the others try."""
        found: list[list[Evaluation]] = []

        def visit(layer: int, seen: SeenAttention) -> Tensor:
            kept = self._finished.layer(f"sample-{index}", layer)
            attention = LayerAttention(seen)
            if index == 0:
                self._of_layer.append(self._costs_of(attention))
            if kept is None:
                first = index == 0
                kept = (
                    search_layer(attention, self._of_layer[layer]) if first else replay(attention, self._first[layer])
                )
                self._finished.keep_layer(f"sample-{index}", layer, kept)
            found.append(kept)
            return attention.output

        self._record(inputs, name, visit)
        if index == 0:
            self._first = found
        return found

    def validate(self, inputs: Inputs, name: str, table: PatternTable) -> list[tuple[float, ...]]:
        """The errors of a table's heads on one sample."""
        errors: list[tuple[float, ...]] = []

        def visit(layer: int, seen: SeenAttention) -> Tensor:
            attention = LayerAttention(seen)
            errors.append(attention.score(table.layers[layer]).read().error)
            return attention.output

        self._record(inputs, name, visit, held_out=True)
        return errors

    def table(
        self, found: Sequence[list[list[Evaluation]]], recall: float | None
    ) -> tuple[PatternTable, dict[str, Any]]:
        """The patterns that all heads get, and what they cost together."""
        layers = [_mean(of_samples) for of_samples in zip(*found, strict=True)]
        fronts = [front(layer, head) for layer in layers for head in range(len(layer[0].error))]
        heads = len(layers[0][0].error)
        each = [costs.targets[WANTED] / heads for costs in self._of_layer for _ in range(heads)]
        total = math.fsum(each)
        even = [_within(of_head, ms) for of_head, ms in zip(fronts, each, strict=True)]
        if recall is None:
            shared = allocate(fronts, max(total, math.fsum(point.ms for point in even)))
            chosen = min(shared, even, key=_mean_error)
        else:
            chosen = to_recall(fronts, recall)
        findings = [
            HeadFinding(point.error, point.density, point.ms, point.recall, None, of_head)
            for point, of_head in zip(chosen, fronts, strict=True)
        ]
        rows = [slice(first, first + heads) for first in range(0, len(fronts), heads)]
        table = PatternTable(
            tuple(tuple(point.pattern for point in chosen[row]) for row in rows),
            heads=tuple(tuple(findings[row]) for row in rows),
        )
        totals = {
            "budget ms": total,
            "ms": math.fsum(point.ms for point in chosen),
            "mean error": _mean_error(chosen),
            "mean error of a uniform budget": _mean_error(even),
        }
        return table, totals

    def _record(
        self, inputs: Inputs, name: str, visit: Callable[[int, SeenAttention], Tensor], *, held_out: bool = False
    ) -> None:
        layer = 0

        def next_layer(seen: SeenAttention) -> Tensor:
            nonlocal layer
            if not self._is_decoder(seen):
                return LayerAttention(seen).output
            self._step(f"{name}, layer {layer}")
            if layer == 0:
                self.samples.append(_describe(seen, name, held_out))
            output = visit(layer, seen)
            layer += 1
            return output

        records = record(self._model, inputs, next_layer)
        expected = layer if self._architecture is None else self._architecture.layers
        if layer != expected or layer == 0:
            refused = "; ".join(
                dict.fromkeys(f"{one.reason}: {one.detail}" for one in records if one.reason.is_refusal)
            )
            raise SearchError(
                f"{name}: {layer} attentions could be made sparse, the model has {expected or 'no'} layers"
                + (f" ({refused})" if refused else "")
                + "; `python -m mmcompile explain` lists them"
            )

    def _is_decoder(self, seen: SeenAttention) -> bool:
        """A model may have another causal stack besides, of another geometry."""
        if self._architecture is None:
            return True
        geometry = seen.query.shape[1], seen.key.shape[1], seen.query.shape[3]
        return geometry == (self._architecture.heads, self._architecture.kv_heads, self._architecture.head_dim)

    def _costs_of(self, attention: LayerAttention) -> Costs:
        seen = attention.seen
        key = str(
            (
                *seen.query.shape,
                *seen.key.shape,
                seen.query.dtype,
                seen.window,
                seen.spans is None,
                attention.modalities,
            )
        )
        if key not in self._costs:
            costs = self._finished.costs(key)
            if costs is None:
                costs = measure_costs(attention, self._candidates, self._density)
                self._finished.keep_costs(key, costs)
            self._costs[key] = costs
        return self._costs[key]


def _within(of_head: Sequence[FrontPoint], ms: float) -> FrontPoint:
    return uniform([of_head], ms * (1 + TOLERANCE))[0]


def _mean_error(points: Sequence[FrontPoint]) -> float:
    return math.fsum(point.error for point in points) / len(points)


def _mean(of_samples: Sequence[list[Evaluation]]) -> list[Evaluation]:
    """Evaluations of the same patterns, with the mean of their figures over the samples; costs are the first's."""
    means = []
    for same in zip(*of_samples, strict=True):
        figures = {
            name: tuple(
                math.fsum(values) / len(values) for values in zip(*(getattr(one, name) for one in same), strict=True)
            )
            for name in ("density", "error", "recall")
        }
        means.append(replace(same[0], **figures))
    return means


def _with_held_out(table: PatternTable, validated: Sequence[list[tuple[float, ...]]]) -> PatternTable:
    if not validated or table.heads is None:
        return table
    heads = tuple(
        tuple(
            replace(finding, held_out=math.fsum(run[layer][head] for run in validated) / len(validated))
            for head, finding in enumerate(of_layer)
        )
        for layer, of_layer in enumerate(table.heads)
    )
    return replace(table, heads=heads)


def _describe(seen: SeenAttention, name: str, held_out: bool) -> Sample:
    batch, _, length, _ = seen.query.shape
    offsets, modality, grid = (part.tolist() for part in seen.boundaries)
    tokens = batch * length
    segments = []
    for start, end, kind, (frames, rows, columns) in zip(offsets, offsets[1:], modality, grid, strict=False):
        if min(end, tokens) > start:
            called = _MODALITIES[kind] if kind < len(_MODALITIES) else f"modality {kind}"
            segments.append(Segment(called, min(end, tokens) - start, (frames, rows, columns)))
    return Sample(name, tokens, tuple(segments), held_out)


def _samples(given: Inputs | Sequence[Inputs]) -> list[Inputs]:
    return [given] if isinstance(given, Mapping) else list(given)


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _own_version() -> str:
    try:
        return version("mmcompile")
    except PackageNotFoundError:
        return "not installed"
