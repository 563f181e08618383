"""The demo's results as tables that fit a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.table import Table

from mmcompile.demo import NEW_TOKENS, Demo
from mmcompile.passes.decide import SiteRecord
from mmcompile.report import Report


def decisions_table(report: Report) -> Table:
    """What becomes of every attention and why, those that differ in nothing but their layer in one row."""
    table = Table(title="What was rewritten, and why", caption=report.summary())
    for column in ("attentions", "heads", "tokens", "mask", "becomes", "because"):
        table.add_column(column, overflow="fold")
    for row, count in Counter(_rows(report)).items():
        where, *rest = row
        table.add_row(f"{count} x {where}", *rest)
    return table


def runs_table(demo: Demo) -> Table:
    """Agreement, density and time, one row a setting."""
    table = Table(title=f"A prompt of {demo.tokens} tokens ({demo.frames} frames), {demo.device}, inner={demo.inner}")
    table.add_column("run")
    for column in (
        "first\ncall s",
        "prefill\ns",
        "generate\ns",
        "density",
        "max logit\ndifference",
        "same\ntokens",
    ):
        table.add_column(column, justify="right")
    for run in demo.runs:
        dense = run is demo.runs[0]
        table.add_row(
            run.name,
            f"{run.first_call:.2f}",
            f"{run.prefill:.2f}",
            f"{run.generate:.2f}",
            f"{run.density:.3f}",
            "" if dense else f"{run.logit_difference:.1e}",
            "" if dense else f"{run.same_tokens} of {NEW_TOKENS}",
        )
    table.caption = (
        "First call: a prefill with compilation. Prefill: vision tower, decoder, one token. Generate: prefill and "
        f"{NEW_TOKENS} tokens. Density: computed tiles, of those that the causal mask leaves. The weights are random: "
        "the last row shows that sparse runs, not how well."
    )
    return table


def _rows(report: Report) -> Iterator[tuple[str, ...]]:
    for site in report.sites:
        yield (
            _place(site),
            f"{site.heads}/{site.kv_heads} x {site.head_dim}",
            site.query_length if site.query_length == site.key_length else f"{site.query_length} of {site.key_length}",
            site.mask,
            f"sparse, {', '.join(site.patterns)}" if site.sparse else "dense",
            f"{site.reason}: {site.detail}" if site.detail else str(site.reason),
        )


def _place(site: SiteRecord) -> str:
    if not site.module_path:
        return "(graph without names)"
    return site.module_path if site.layer is None else site.module_path.replace(f".{site.layer}.", ".*.")
