"""The page about one model on one sample: what each head computes, how far off that is, and pictures of some heads."""

import statistics
from collections.abc import Sequence

from mmcompile.bench.figure import Figure as Provenance
from mmcompile.pictures.front_curve import draw_front
from mmcompile.pictures.head_map import draw_head_map
from mmcompile.pictures.head_pictures import picture
from mmcompile.pictures.measure import Measured, Place
from mmcompile.pictures.page import Cell, Page, Picture, Section, Table
from mmcompile.report import SITE_COLUMNS, Report, site_rows
from mmcompile.tables import PatternTable, mean_error

MEANING = (
    "Measured on this sample. Density: computed tiles over those of dense attention. Recall: share of the attention "
    "that the computed keys hold. Error: of the attention's output, ||output - dense|| / ||dense||."
)
MAP_MEANING = (
    "Attention that is computed is blue, what is missed is orange; the ground is tinted where keys are computed. "
    "Dashed lines are modality boundaries. The head's own order puts keys that it looks at side by side."
)
FRONT_MEANING = (
    "Patterns that the search tried on a head, without those that another one beats in both time and error. The star "
    "is what the head was given, as one budget is shared by all heads."
)


def make_page(
    model: str,
    patterns: str,
    report: Report,
    found: Measured,
    chosen: Sequence[Place],
    table: PatternTable | None,
    device: str,
) -> Page:
    """model, patterns: as the user named them. report, found: of the same call. table: that the patterns are from."""
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
        **_search_facts(table),
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
    fronts = _fronts(table, chosen)
    if fronts:
        sections.insert(2, Section("What the search chose from", [FRONT_MEANING], fronts))
    return Page(made.title, facts, sections, made.command, made.commit, made.versions)


def _search_facts(table: PatternTable | None) -> dict[str, str]:
    """What a searched table says of the search."""
    if table is None or table.heads is None:
        return {}
    facts = {
        "searched on": ", ".join(sample.name for sample in table.samples if not sample.held_out) + f"; {table.device}",
        "mean error in the search": f"{mean_error(table):.3g}",
    }
    held_out = [sample.name for sample in table.samples if sample.held_out]
    if held_out:
        error = mean_error(table, held_out=True)
        loss = error / mean_error(table) - 1 if mean_error(table) else 0.0
        facts["mean error on held-out samples"] = f"{error:.3g} on {', '.join(held_out)}; transfer loss {loss:+.1%}"
    return facts


def _fronts(table: PatternTable | None, chosen: Sequence[Place]) -> list[Picture]:
    if table is None or table.heads is None:
        return []
    pictures = []
    for layer, head in chosen:
        finding, pattern = table.heads[layer][head], table.layers[layer][head]
        if finding.front:
            name = f"Layer {layer}, head {head}: {pattern}"
            points = ", ".join(f"{point.pattern} {point.error:.2g} in {point.ms:.3g} ms" for point in finding.front)
            pictures.append(picture(draw_front(finding, pattern, name), f"Front of {name}. {points}.", f"{name}."))
    return pictures


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
    return picture(draw_head_map(found.patterns, figures, f"Head patterns of {model}"), alt, alt)
