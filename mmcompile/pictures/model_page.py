"""The page about one model on one sample: what each head computes, how far off that is, and pictures of some heads."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmcompile.bench.figure import Figure as Provenance
from mmcompile.drawing import png
from mmcompile.errors import OptionError, TableError
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.passes.decide import Patterns
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pattern_search.record import record
from mmcompile.pattern_search.score import LayerAttention, Score
from mmcompile.pictures.attention_map import attention_map, draw_attention_map
from mmcompile.pictures.head_map import draw_head_map
from mmcompile.pictures.page import Cell, Page, Picture, Section, Table
from mmcompile.pictures.palette import modality_name
from mmcompile.pictures.recall_curve import draw_recall_curves, recall_curves, swept_patterns
from mmcompile.report import SITE_COLUMNS, Report, site_rows
from mmcompile.tables import PatternTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Place = tuple[int, int]  # layer, head
CSS_DPI = 100
MOST_DRAWN = 4  # heads, where nobody says which
MOST_SEGMENTS = 8  # that are named one by one

MEANING = (
    "Measured on this sample. Density: computed tiles over those of dense attention. Recall: share of the attention "
    "that the computed keys hold. Error: of the attention's output, ||output - dense|| / ||dense||."
)
MAP_MEANING = (
    "Attention that is computed is blue, what is missed is orange; the ground is tinted where keys are computed. "
    "Dashed lines are modality boundaries. The head's own order puts keys that it looks at side by side."
)


@dataclass
class Measured:
    """What a prefill showed of its layers, filled as it runs.

    patterns: of each head. scores: of each layer. pictures: an attention map and recall curves of each chosen head.
    sample: what the sample held, in words.
    """

    patterns: list[tuple[HeadPattern, ...]] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    sample: str = ""

    def worst(self) -> tuple[float, int, int]:
        """The largest error, with its layer and head."""
        errors = [(score.error, layer) for layer, score in enumerate(self.scores)]
        return max((error, layer, head) for of_layer, layer in errors for head, error in enumerate(of_layer))


def measure(
    model: nn.Module,
    inputs: Mapping[str, Any],
    patterns: Patterns,
    density: float | None,
    chosen: Sequence[Place],
    step: Callable[[str], None],
) -> Measured:
    """Run a prefill and measure each of its causal attentions as it comes, one at a time.

    patterns, density: as the passes take them. chosen: heads to draw. step: called with the name of each layer.
    """
    found = Measured()

    def visit(seen: SeenAttention) -> Tensor:
        layer = len(found.scores)
        step(f"layer {layer}")
        attention = LayerAttention(seen)
        of_head = of_layer(patterns, density, layer, seen.query.shape[1])
        found.patterns.append(of_head)
        found.scores.append(attention.score(of_head).read())
        found.sample = found.sample or describe_sample(seen)
        for head in (head for where, head in chosen if where == layer):
            step(f"pictures of layer {layer}, head {head}")
            found.pictures += _pictures(seen, attention, of_head, layer, head)
        return attention.output

    record(model, inputs, visit)
    return found


def of_layer(patterns: Patterns, density: float | None, layer: int, heads: int) -> tuple[HeadPattern, ...]:
    """The pattern of each head of a layer, under the cap of the whole prefill.

    Raises TableError where a table has no such layer, or another number of heads.
    """
    if density == 1.0:
        return (HeadPattern(),) * heads
    if isinstance(patterns, HeadPattern):
        own: Sequence[HeadPattern] = (patterns,) * heads
    elif layer >= len(patterns) or len(patterns[layer]) != heads:
        raise TableError(f"the pattern table has nothing for layer {layer} with {heads} heads")
    else:
        own = patterns[layer]
    if density is None:
        return tuple(own)
    return tuple(replace(pattern, density=min(density, pattern.density or density)) for pattern in own)


def describe_sample(seen: SeenAttention) -> str:
    """The tokens of an attention's first sequence and its segments, in words."""
    tokens = seen.query.shape[2]
    offsets, modality, grid = (tensor.tolist() for tensor in seen.boundaries)
    told = []
    for (start, end), kind, sizes in zip(pairwise(offsets), modality, grid, strict=True):
        length = min(end, tokens) - start
        if length > 0:
            shape = f" ({' x '.join(map(str, sizes))})" if all(sizes) else ""
            told.append(f"{modality_name(kind)} {length}{shape}")
    rest = f", and {len(told) - MOST_SEGMENTS} segments more" if len(told) > MOST_SEGMENTS else ""
    return f"{tokens} tokens: {', '.join(told[:MOST_SEGMENTS])}{rest}"


def choose_heads(wanted: str | None, report: Report, patterns: Patterns) -> list[Place]:
    """The heads to draw: those that `wanted` names as "LAYER:HEAD,..."; where it is None, the first of each pattern of
    a table, or some from the first layer to the last.

    Raises OptionError for what names no head of the model.
    """
    heads = [site.heads for site in report.sites if site.sparse]
    if wanted is None:
        if not isinstance(patterns, HeadPattern):
            return _first_of_each(patterns)
        every = [(layer, head) for layer, count in enumerate(heads) for head in range(count)]
        return every[:: max(1, -(-len(every) // MOST_DRAWN))]
    places = []
    for word in wanted.split(",") if wanted != "none" else ():
        layer, _, head = word.partition(":")
        known = layer.isdecimal() and head.isdecimal() and int(layer) < len(heads) and int(head) < heads[int(layer)]
        if not known:
            raise OptionError(f"--draw {wanted}: {word!r} is no head; LAYER:HEAD from 0:0, or none")
        places.append((int(layer), int(head)))
    return sorted(set(places))


def _first_of_each(layers: Sequence[Sequence[HeadPattern]]) -> list[Place]:
    first: dict[HeadPattern, Place] = {}
    for layer, heads in enumerate(layers):
        for head, pattern in enumerate(heads):
            first.setdefault(pattern, (layer, head))
    return sorted(list(first.values())[:MOST_DRAWN])


def make_page(
    model: str, patterns: str, report: Report, found: Measured, table: PatternTable | None, device: str
) -> Page:
    """model, patterns: as the user named them. report: of the same call. table: that the patterns are from, or None."""
    made = Provenance.begin(f"Head patterns of {model}", "", device)
    means = {
        name: statistics.mean(value for score in found.scores for value in getattr(score, name))
        for name in ("density", "recall", "error")
    }
    facts = {
        "model": model,
        "patterns": patterns,
        "sample": found.sample,
        "attentions": f"{report.sparse_count} sparse, {len(report.sites) - report.sparse_count} dense",
        "mean density, recall, error": ", ".join(f"{value:.3g}" for value in means.values()),
        "device": made.device,
    }
    sections = [
        Section("Patterns of all heads", [MEANING], [_head_map(found, model)]),
        Section("Some heads", [MAP_MEANING], found.pictures),
        Section("Every head", [MEANING], table=_heads_table(found, table)),
        Section(
            "Every attention of the model",
            ["What becomes of each attention of this call, with min_tokens=0, and why."],
            table=Table(report.summary(), SITE_COLUMNS, tuple(site_rows(report.sites))),
        ),
    ]
    return Page(made.title, facts, sections, made.command, made.commit, made.versions)


def _heads_table(found: Measured, table: PatternTable | None) -> Table:
    columns = ["layer", "head", "pattern", "density", "recall", "error"]
    searched = None if table is None else table.heads
    if searched is not None:
        columns += ["error in the search", "on held-out samples", "ms in the search"]
    rows: list[tuple[Cell, ...]] = []
    for layer, (patterns, score) in enumerate(zip(found.patterns, found.scores, strict=True)):
        for head, pattern in enumerate(patterns):
            row: list[Cell] = [layer, head, str(pattern), score.density[head], score.recall[head], score.error[head]]
            if searched is not None:
                one = searched[layer][head]
                row += [one.error, one.held_out, one.ms]
            rows.append(tuple(row))
    return Table("A click on a column's name sorts the rows by it.", tuple(columns), tuple(rows))


def _head_map(found: Measured, model: str) -> Picture:
    figures = {
        "density": [score.density for score in found.scores],
        "error of the output": [score.error for score in found.scores],
    }
    alt = "A cell for each head, layers downwards: its pattern, its density, and the error of its output."
    return _picture(draw_head_map(found.patterns, figures, f"Head patterns of {model}"), alt, alt)


def _pictures(
    seen: SeenAttention, attention: LayerAttention, of_head: Sequence[HeadPattern], layer: int, head: int
) -> list[Picture]:
    name = f"Layer {layer}, head {head}: {of_head[head]}"
    drawn = attention_map(seen, attention.plan(of_head), head)
    orders = "in token order and in the head's own order" if drawn.reordered else "in token order"
    held = f"{drawn.density:.1%} of the causal tiles are computed and hold {drawn.recall:.1%} of the attention"
    curves = recall_curves(seen, [head], swept_patterns(seen.key.shape[2]))
    own = (drawn.density, drawn.recall)
    best = {name: f"{points[-1].recall:.0%} at {points[-1].density:.0%}" for name, points in curves.items()}
    reached = ", ".join(f"{name} {figures}" for name, figures in best.items())
    return [
        _picture(draw_attention_map(drawn, name), f"Attention of {name}, {orders}: {held}.", f"{name}, {orders}."),
        _picture(
            draw_recall_curves(curves, name, own),
            f"Recall against density of {name}. At the largest cap: {reached}.",
            f"{name}: what other patterns would hold of its attention.",
        ),
    ]


def _picture(figure: Figure, alt: str, caption: str) -> Picture:
    width, height = (round(inches * CSS_DPI) for inches in figure.get_size_inches())
    return Picture(png(figure), width, height, alt, caption)
