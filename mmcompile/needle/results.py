"""What was counted, as it goes: a JSON file that a later run goes on with, and that README's tables are made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from mmcompile.bench.figure import Figure, FigureError, Row
from mmcompile.bench.timing import significant

WORST = 10  # heads that are listed

TITLE = "Needle in a haystack"


@dataclass
class HeadFigures:
    """One head in a prompt that was compared with dense attention; None where nothing is known."""

    layer: int
    head: int
    estimated: float | None
    recall: float | None
    error: float | None

    @property
    def off(self) -> float | None:
        """How far above the true recall the estimate is."""
        return None if self.estimated is None or self.recall is None else self.estimated - self.recall


@dataclass
class Record:
    """Of one task, length and method: sums over what was asked.

    asked, right: questions of each depth. agreed: answers that are dense's. divergence: KL to dense, in nats. density:
    of each batch. ms: of the decoder, a prompt; plan_ms, attention_ms: of our ops in it. first_density: what "auto"
    used in the first batch.
    """

    task: str
    tokens: int
    method: str
    asked: list[int]
    right: list[int]
    agreed: int = 0
    divergence: float = 0.0
    density: float = 0.0
    batches: int = 0
    by_modality: dict[str, list[int]] = field(default_factory=dict)
    ms: float | None = None
    plan_ms: float | None = None
    attention_ms: float | None = None
    first_density: float | None = None
    heads: list[HeadFigures] = field(default_factory=list)

    def row(self) -> Row:
        """A line of a table: shares in percent."""
        asked = sum(self.asked)
        held = [one.recall for one in self.heads if one.recall is not None]
        off = [one.off for one in self.heads if one.off is not None]
        row: Row = {
            "table": self.task,
            "tokens": self.tokens,
            "method": self.method,
            "asked": asked,
            "recall %": _percent(sum(self.right) / asked),
        }
        if len(self.by_modality) > 1:
            shares = {name: _percent(right / count) for name, (count, right) in sorted(self.by_modality.items())}
            row |= {f"recall of {name} %": share for name, share in shares.items()}
        return row | {
            "as dense %": _percent(self.agreed / asked),
            "KL to dense": significant(self.divergence / asked, 3),
            "density %": _percent(self.density / self.batches),
            "attention held %": _percent(fmean(held)) if held else None,
            "estimate off by %": _percent(fmean(off)) if off else None,
            "decoder ms": None if self.ms is None else significant(self.ms, 3),
            "plan ms": None if self.plan_ms is None else significant(self.plan_ms, 3),
            "attention ms": None if self.attention_ms is None else significant(self.attention_ms, 3),
        }


def _percent(share: float) -> float:
    return round(100 * share, 2)


def nearest(depths: Sequence[float], depth: float) -> int:
    """The place of the depth that comes nearest."""
    return min(range(len(depths)), key=lambda place: abs(depths[place] - depth))


def thousands(tokens: int) -> str:
    """A length as tables and pictures name it."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


class Results:
    """Everything counted so far. settings: what the counts depend on; a file of others is not gone on with."""

    def __init__(self, figure: Figure, settings: dict[str, Any]) -> None:
        self.figure, self.settings = figure, settings
        self._records: dict[tuple[str, int, str], Record] = {}
        self._done: dict[str, int] = {}  # prompts of "task tokens"

    @property
    def records(self) -> list[Record]:
        """In the order in which they were begun, those with an answer."""
        return [one for one in self._records.values() if one.batches]

    def record(self, task: str, tokens: int, method: str) -> Record:
        """The record of that name, begun where there is none."""
        depths = len(self.settings["depths"])
        key = (task, tokens, method)
        return self._records.setdefault(key, Record(*key, asked=[0] * depths, right=[0] * depths))

    def done(self, task: str, tokens: int) -> int:
        """Prompts that were counted."""
        return self._done.get(f"{task} {tokens}", 0)

    def count_prompts(self, task: str, tokens: int, count: int) -> None:
        """So many more are counted, under every method."""
        self._done[f"{task} {tokens}"] = self.done(task, tokens) + count

    def rows(self) -> list[Row]:
        """The tables, one for each task."""
        order = sorted(self.records, key=lambda one: (self.settings["tasks"].index(one.task), one.tokens))
        return [one.row() for one in order]

    def summary(self) -> list[Row]:
        """What fits a page: recall and density by length, and everything of the longest prompts."""
        rows = self.rows()
        summed: list[Row] = []
        for task in dict.fromkeys(row["table"] for row in rows):
            of_task = [row for row in rows if row["table"] == task]
            methods = dict.fromkeys(row["method"] for row in of_task)
            for column in ("recall %", "density %"):
                for method in methods:
                    lengths = {thousands(row["tokens"]): row[column] for row in of_task if row["method"] == method}
                    summed.append({"table": f"{task}, {column}", "method": method} | lengths)
            longest = max(row["tokens"] for row in of_task)
            title = f"{task}, {thousands(longest)} tokens"
            for row in of_task:
                if row["tokens"] == longest:
                    summed.append({name: value for name, value in row.items() if name != "tokens"} | {"table": title})
        return summed

    def worst_heads(self) -> list[dict[str, Any]]:
        """The heads whose estimated recall is farthest from the true one."""
        found = [
            (abs(head.off), {"task": one.task, "tokens": one.tokens, "method": one.method} | asdict(head))
            for one in self.records
            for head in one.heads
            if head.off is not None
        ]
        found.sort(key=lambda one: -one[0])
        return [head for _, head in found[:WORST]]

    def save(self, path: Path) -> None:
        """Write the JSON. Raises FigureError, naming the file."""
        self.figure.rows = self.summary()
        content = asdict(self.figure) | {
            "all rows": self.rows(),
            "settings": self.settings,
            "done": self._done,
            "worst heads": self.worst_heads(),
            "records": [asdict(one) for one in self.records],
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text(json.dumps(content, indent=1) + "\n")
            partial.replace(path)  # whole or not at all: an interrupted run goes on with it
        except OSError as error:
            raise FigureError(f"{path}: cannot be written ({error.strerror})") from error

    @classmethod
    def load(cls, path: Path) -> Results:
        """What `save` wrote. Raises FigureError, naming the file."""
        figure = Figure.load(path)
        content = json.loads(path.read_text())
        if "records" not in content:
            raise FigureError(f"{path}: holds {figure.title!r}, which another command measured")
        results = cls(figure, content["settings"])
        results._done = content["done"]
        for values in content["records"]:
            heads = [HeadFigures(**head) for head in values.pop("heads")]
            record = Record(**values, heads=heads)
            results._records[record.task, record.tokens, record.method] = record
        return results

    def go_on(self, path: Path) -> Results:
        """What a file has of these very settings; FigureError where it was made with others."""
        found = Results.load(path)
        for name, value in self.settings.items():
            if found.settings.get(name) != value:
                raise FigureError(
                    f"{path}: was made with {name} {found.settings.get(name)}, not {value}; another --out begins anew"
                )
        return found
