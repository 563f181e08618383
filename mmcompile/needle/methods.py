"""The methods that are compared: dense, ours, a searched table, and the patterns of others by themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mmcompile.errors import OptionError
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.options import AUTO_DENSITY, AUTO_PATTERN
from mmcompile.tables import PatternTable

DENSE, AUTO = "dense", "auto"
AT_AUTO = "@auto"  # a baseline with the density that "auto" used
TABLE, TABLE_WITHOUT = "table", "table-none"

# "auto" by itself has no inter-modality kind; its queries, or queries and keys, grouped by modality have one.
OURS = {
    AUTO: AUTO_PATTERN,
    "auto-q": replace(AUTO_PATTERN, boundary="q"),
    "auto-2d": replace(AUTO_PATTERN, boundary="2d"),
}
# With the settings of arXiv 2504.16083, section 4, and of the papers that they are from.
BASELINES = {
    "a-shape": HeadPattern("a_shape", sink=128, local=4096),
    "tri-shape": HeadPattern("tri_shape", sink=128, local=4096, last=128),
    "sf-fixed": HeadPattern("sf_fixed"),
    "sf-strided": HeadPattern("sf_strided"),
    "vertical-slash": HeadPattern("vertical_slash", vertical=1000, slash=4096),
    "block-top-p": HeadPattern("top_p", scores="pooled"),
    "columns": HeadPattern("columns", columns=1024),
}
EVERY = (DENSE, *OURS, TABLE, TABLE_WITHOUT, *BASELINES, *(name + AT_AUTO for name in BASELINES))
VERTICAL_SHARE = 0.2  # of a Vertical-Slash head's density, as of 1000 lines and a diagonal band of 4096


@dataclass(frozen=True)
class Method:
    """One way to attend. patterns: None for dense. density: cap; None for none. at_auto: takes auto's density."""

    name: str
    patterns: HeadPattern | PatternTable | None
    density: float | None = None
    recall: float | None = None
    at_auto: bool = False

    def options(self, tokens: int, auto_density: float | None) -> dict[str, Any]:
        """Options of the attention at a length. auto_density: what "auto" used there."""
        if not self.at_auto:
            return {"patterns": self.patterns, "density": self.density, "recall": self.recall}
        assert isinstance(self.patterns, HeadPattern) and auto_density is not None
        cap = min(1.0, auto_density)
        return {"patterns": _hungry(self.patterns, tokens, cap), "density": cap, "recall": None}


def _hungry(pattern: HeadPattern, tokens: int, density: float) -> HeadPattern:
    """The pattern with settings that want more than a cap allows, so that the cap decides; SF has none to change."""
    match pattern.kind:
        case "a_shape" | "tri_shape":
            return replace(pattern, local=tokens)
        case "vertical_slash":
            return replace(pattern, vertical=max(1, int(VERTICAL_SHARE * density * tokens / 2)), slash=tokens)
        case "top_p":
            return replace(pattern, mass=1.0)
        case "columns":
            return replace(pattern, columns=max(1, int(density * tokens / 2)))
        case _:
            return pattern


def choose_methods(
    names: str, table: PatternTable | None, density: float | None, recall: float | None
) -> tuple[Method, ...]:
    """The methods of a list such as "dense,auto,a-shape@auto"; "all": every one, those of a table if there is one.

    Dense always runs, and first: the others are compared with it. So does "auto" before what takes its density.
    density, recall: of "auto", as in `Options`. Raises OptionError naming what is wrong.
    """
    words = [name for name in EVERY if table is not None or not name.startswith(TABLE)]
    if names != "all":
        words = names.split(",")
        for word in words:
            if word not in EVERY:
                raise OptionError(f"--methods {names}: no {word!r}; any of {', '.join(EVERY)}, or all")
            if table is None and word.startswith(TABLE):
                raise OptionError(f"--methods {names}: {word!r} needs --table")
    needed = [DENSE, *([AUTO] if any(word.endswith(AT_AUTO) for word in words) else [])]
    cap = AUTO_DENSITY if density is None else density
    return tuple(_method(name, table, cap, recall) for name in dict.fromkeys([*needed, *words]))


def _method(name: str, table: PatternTable | None, cap: float, recall: float | None) -> Method:
    if name == DENSE:
        return Method(name, None)
    if name in OURS:
        return Method(name, OURS[name], cap, recall)
    if name.startswith(TABLE):
        assert table is not None
        return Method(name, table if name == TABLE else _without_boundaries(table))
    return Method(name, BASELINES[name.removesuffix(AT_AUTO)], at_auto=name.endswith(AT_AUTO))


def _without_boundaries(table: PatternTable) -> PatternTable:
    """The table's patterns without their inter-modality kinds."""
    layers = tuple(tuple(replace(one, boundary="none", pairs=()) for one in heads) for heads in table.layers)
    return replace(table, layers=layers, heads=None)
