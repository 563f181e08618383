"""The backend's options, checked before anything runs."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch._dynamo import list_backends

from mmcompile.errors import OptionError
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.passes.decide import Patterns
from mmcompile.passes.pipeline import PASS_NAMES
from mmcompile.tables import PatternTable

# What "auto" stands for: each head takes the order that holds the most of its attention in as many tiles, and in that
# order the tiles and the single keys with the most attention.
AUTO_PATTERN = HeadPattern("top_p", order="auto", columns=1 / 64)
AUTO_DENSITY = 0.2  # the cap under which "auto" plans where `density` names none


@dataclass(frozen=True)
class Options:
    """Options of the backend, by the names `torch.compile(options={...})` takes.

    patterns: "auto" (each head's order, tiles and single keys, estimated online from its queries and keys), a
        `HeadPattern` for every head, a `PatternTable`, or the path of a saved table.
    density: cap on the computed tiles, as a fraction of the causal ones, in (0, 1]. 1.0 computes every
        tile, which is dense attention; None leaves it to the patterns, and to "auto" a fifth.
    recall: share of the attention of each tile of queries that "auto" and "top_p" cover, within the cap, in (0, 1];
        None leaves it to the patterns: 0.95 where they do not say.
    min_tokens: prefills with fewer keys run dense. None for the number from which "auto" was measured to be faster on
        the kernel that runs, even where it spends its whole cap (`kernels/which_kernel.py`).
    strict: raise `UnsupportedSitesError` where an attention had to stay dense.
    inner: the backend that compiles the rewritten graph: "inductor", "aot_eager", "eager", or any other
        registered name.
    disable: names of passes to leave out.
    chunk_tokens: in prefills of more tokens than this, what lies between two attentions runs on so many tokens at a
        time, which saves memory. None for what suits the device (`kernels/in_chunks.py`); 0 runs all tokens at once.
    check: share of the query tiles, over all heads, that each sparse prefill compares with dense attention, in (0, 1];
        other tiles each time. `mmcompile.stats` then has the true error and recall of the heads that were drawn. None
        compares nothing and costs nothing.
    check_bound: with `check`, warn (`mmcompile.CheckWarning`) of heads whose checked output is further from dense,
        ||output - dense|| / ||dense||. The prefill waits for nothing: the warning comes with the call after it (a
        decode step of `mmcompile.compile`, another prefill, `stats`).
    """

    patterns: str | HeadPattern | PatternTable = "auto"
    density: float | None = None
    recall: float | None = None
    min_tokens: int | None = None
    strict: bool = False
    inner: str = "inductor"
    disable: tuple[str, ...] = ()
    chunk_tokens: int | None = None
    check: float | None = None
    check_bound: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", _load_patterns(self.patterns))
        object.__setattr__(self, "disable", _checked_disable(self.disable))
        for name in ("density", "recall", "check"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or not 0 < value <= 1):
                raise OptionError(f"{name}={value!r}: must be a number in (0, 1], or None")
        for name in ("min_tokens", "chunk_tokens"):
            tokens = getattr(self, name)
            if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0):
                raise OptionError(f"{name}={tokens!r}: must be an integer of at least 0, or None")
        bound = self.check_bound
        if bound is not None and (not _is_number(bound) or not bound > 0):
            raise OptionError(f"check_bound={bound!r}: must be a number above 0, or None")
        if bound is not None and self.check is None:
            raise OptionError(f"check_bound={bound!r}: nothing is checked without check, such as check=0.01")
        if not isinstance(self.strict, bool):
            raise OptionError(f"strict={self.strict!r}: must be True or False")
        others = set(list_backends(exclude_tags=())) - {"mminference"}
        if self.inner not in others:
            raise OptionError(f"inner={self.inner!r}: must name another backend: {', '.join(sorted(others))}")

    @classmethod
    def parse(cls, options: "Mapping[str, Any] | Options | None") -> "Options":
        """Options from the mapping that `torch.compile` hands over.

        Raises OptionError for an unknown name (naming the nearest known one) or a value out of range.
        """
        if isinstance(options, Options):
            return options
        given = dict(options or {})
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
                raise OptionError(f"unknown option {name!r}; did you mean {nearest!r}? Options are: {', '.join(known)}")
        return cls(**given)

    @property
    def for_passes(self) -> dict[str, Any]:
        """The arguments that `run_passes` takes besides the graph."""
        return {
            "patterns": self.head_patterns,
            "density": AUTO_DENSITY if self.density is None and self.patterns == "auto" else self.density,
            "recall": self.recall,
            "min_tokens": self.min_tokens,
            "disable": self.disable,
            "chunk": self.chunk_tokens,
            "check": self.check,
        }

    @property
    def head_patterns(self) -> Patterns:
        """The patterns in the form the passes take: one for every head, or [layer][head]."""
        if isinstance(self.patterns, PatternTable):
            return self.patterns.layers
        return AUTO_PATTERN if isinstance(self.patterns, str) else self.patterns


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _load_patterns(patterns: Any) -> str | HeadPattern | PatternTable:
    if isinstance(patterns, HeadPattern | PatternTable) or patterns == "auto":
        return patterns
    if isinstance(patterns, str | Path):
        try:
            return PatternTable.load(patterns)
        except (OSError, ValueError) as error:
            raise OptionError(
                f'patterns={str(patterns)!r}: neither "auto" nor a readable pattern table: {error}'
            ) from error
    raise OptionError(f'patterns={patterns!r}: must be "auto", a HeadPattern, a PatternTable or the path of one')


def _checked_disable(names: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise OptionError(f"disable={names!r}: must be a list of pass names, such as {list(PASS_NAMES)}")
    for name in names:
        if name not in PASS_NAMES:
            raise OptionError(f"disable={list(names)!r}: no pass {name!r}; choose from {list(PASS_NAMES)}")
    return tuple(names)
