"""`mmcompile.search`: the best pattern of every head of a model, from a sample or a few."""

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmcompile.architecture import Architecture
from mmcompile.bench.figure import versions
from mmcompile.console import steps
from mmcompile.errors import OptionError
from mmcompile.kernels.patterns import HeadPattern, encode
from mmcompile.pattern_search.allocate import allocate, front, to_recall, uniform
from mmcompile.pattern_search.candidates import space
from mmcompile.pattern_search.equal_time import LEVELS, TOLERANCE, WANTED, Costs
from mmcompile.pattern_search.layer_search import Evaluation, mean
from mmcompile.pattern_search.resume import Finished, digest
from mmcompile.pattern_search.runs import Inputs, Runs, samples_of
from mmcompile.tables import FrontPoint, HeadFinding, PatternTable


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
    candidates of equal measured time, planning included, are tried, in all heads at once, and judged by the attention's
    output against dense (arXiv 2504.16083, section 3.3). Takes the memory of a dense prefill, and of one layer's
    attention some ten times over. The model itself is left as it is; Dynamo's caches are reset.

    Args:
        model: with causal attention that the backend makes sparse.
        inputs: keyword arguments of the model's forward, or a list of such: errors are means over the samples. What
            `mmcompile.bind` holds are the boundaries of all of them; else each tells its own.
        density: the budget, as the time of an A-shape that computes this share of the causal tiles. By default
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
    _require_targets(density, recall)
    samples, unseen = samples_of(inputs), samples_of(held_out)
    if not samples:
        raise OptionError("inputs: no sample; give the model's keyword arguments")
    titles = [*names, *(f"sample {index}" for index in range(len(names), len(samples) + len(unseen)))]
    patterns, architecture = space(candidates), Architecture.of(model)
    settings = {
        "density": density,
        "recall": recall,
        "candidates": candidates if isinstance(candidates, str) else [str(pattern) for pattern in patterns],
        "levels": list(LEVELS),
    }
    made_with = _versions_and_device(model)
    identity = {
        "patterns": encode(patterns),
        "architecture": None if architecture is None else architecture.to_dict(),
        "samples": [digest(sample) for sample in (*samples, *unseen)],
    }
    finished = Finished(None if partial is None else Path(partial), settings | made_with | identity, resume=resume)
    layers = None if architecture is None else architecture.layers * (len(samples) + len(unseen))
    with steps(layers, shown=progress) as step:
        runs = Runs(model, patterns, density, finished, step)
        tried = [runs.search(sample, title) for sample, title in zip(samples, titles, strict=False)]
        table, totals = _choose([mean(of_samples) for of_samples in zip(*tried, strict=True)], runs.costs, recall)
        errors = [
            runs.validate(sample, title, table) for sample, title in zip(unseen, titles[len(samples) :], strict=True)
        ]
    table = replace(
        _with_held_out(table, errors),
        architecture=architecture,
        samples=tuple(runs.samples),
        settings=settings | totals,
        **made_with,
    )
    finished.remove()
    return table


def _require_targets(density: float | None, recall: float | None) -> None:
    for name, value in (("density", density), ("recall", recall)):
        if value is not None and (isinstance(value, bool) or not 0 < value <= 1):
            raise OptionError(f"{name}={value!r}: must be a number in (0, 1], or None")
    if density is not None and recall is not None:
        raise OptionError("density and recall together: one is a budget, the other a target; give one")


def _choose(
    layers: Sequence[list[Evaluation]], costs: Sequence[Costs], recall: float | None
) -> tuple[PatternTable, dict[str, Any]]:
    """The patterns that all heads of all layers get, and what they cost together."""
    heads = len(layers[0][0].error)
    fronts = [front(layer, head) for layer in layers for head in range(heads)]
    each = [of_layer.targets[WANTED] / heads for of_layer in costs for _ in range(heads)]
    even = [uniform([own], ms * (1 + TOLERANCE))[0] for own, ms in zip(fronts, each, strict=True)]
    total = math.fsum(each)
    if recall is None:
        shared = allocate(fronts, max(total, math.fsum(point.ms for point in even)))
        chosen = min(shared, even, key=_mean_error)
    else:
        chosen = to_recall(fronts, recall)
    findings = [
        HeadFinding(point.error, point.density, point.ms, point.recall, None, own)
        for point, own in zip(chosen, fronts, strict=True)
    ]
    rows = [slice(first, first + heads) for first in range(0, len(fronts), heads)]
    table = PatternTable(
        tuple(tuple(point.pattern for point in chosen[row]) for row in rows),
        heads=tuple(tuple(findings[row]) for row in rows),
    )
    totals = {
        "dense ms": math.fsum(of_layer.dense_ms for of_layer in costs),
        "budget ms": total,
        "ms": math.fsum(point.ms for point in chosen),
        "mean error": _mean_error(chosen),
        "mean error of a uniform budget": _mean_error(even),
    }
    return table, totals


def _mean_error(points: Sequence[FrontPoint]) -> float:
    return math.fsum(point.error for point in points) / len(points)


def _with_held_out(table: PatternTable, runs: Sequence[list[tuple[float, ...]]]) -> PatternTable:
    """runs: of each held-out sample, the errors of each layer's heads."""
    if not runs:
        return table
    assert table.heads is not None
    heads = tuple(
        tuple(
            replace(finding, held_out=math.fsum(run[layer][head] for run in runs) / len(runs))
            for head, finding in enumerate(of_layer)
        )
        for layer, of_layer in enumerate(table.heads)
    )
    return replace(table, heads=heads)


def _versions_and_device(model: nn.Module) -> dict[str, Any]:
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    try:
        own = version("mmcompile")
    except PackageNotFoundError:
        own = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"versions": versions(device.type) | {"mmcompile": own}, "device": name}
