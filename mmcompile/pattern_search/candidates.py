"""What is searched: the patterns that a head may get, and how each is made larger or smaller."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmcompile.errors import OptionError
from mmcompile.kernels.patterns import HeadPattern

REFERENCE = HeadPattern("a_shape", sink=1024, local=4096)  # whose kernel time the paper brings all others to

# (vertical, slash), section "pattern search" of arXiv 2504.16083.
_VERTICAL_SLASH = (
    (1000, 1024), (1000, 2048), (2000, 2048), (1000, 3096), (2000, 3096), (1000, 4096), (2000, 4096), (3500, 200),
    (1000, 2500),
)  # fmt: skip
_LINES = ("h", "v", "s", "hv", "vs", "hvs")

_PAPER = (
    *(HeadPattern("a_shape", sink=128, local=local) for local in (1024, 2048, 4096)),
    *(HeadPattern("vertical_slash", vertical=vertical, slash=slash) for vertical, slash in _VERTICAL_SLASH),
    *(HeadPattern("grid", lines=lines) for lines in _LINES),
)
# Patterns of whole tiles, which the pairs of modalities can be made of.
_PAPER_WITHIN = (HeadPattern("a_shape", local=1024), *(HeadPattern("grid", lines=lines) for lines in ("v", "s", "vs")))

# A cap says how much is computed, so that a share of the attention would only hide it.
_OURS = (
    HeadPattern("top_p", mass=1.0),
    HeadPattern("top_p", mass=1.0, order="site"),
    HeadPattern("top_p", mass=1.0, order="column"),
    HeadPattern("top_p", mass=1.0, columns=1 / 16),
    HeadPattern("top_p", mass=1.0, columns=1 / 16, order="site"),
    HeadPattern("columns", columns=1024),
    HeadPattern("vertical_slash", vertical=1000, slash=2048, order="site"),
    HeadPattern("vertical_slash", vertical=1000, slash=2048, order="column"),
    HeadPattern("a_shape", local=1024, order="column"),
)
_OURS_WITHIN = (HeadPattern("top_p", mass=1.0), HeadPattern("top_p", mass=1.0, order="site"))


def _grouped(patterns: Sequence[HeadPattern]) -> tuple[HeadPattern, ...]:
    return tuple(replace(pattern, boundary=boundary) for boundary in ("q", "2d") for pattern in patterns)


SPACES: dict[str, tuple[HeadPattern, ...]] = {
    "paper": (*_PAPER, *_grouped(_PAPER_WITHIN)),
    "full": (*_PAPER, *_OURS, *_grouped((*_PAPER_WITHIN, *_OURS_WITHIN))),
}


def space(candidates: str | Sequence[HeadPattern]) -> tuple[HeadPattern, ...]:
    """The patterns of a named space, or those given. Raises OptionError."""
    if isinstance(candidates, str):
        if candidates not in SPACES:
            raise OptionError(f"candidates={candidates!r}: must be {' or '.join(map(repr, SPACES))}, or head patterns")
        return SPACES[candidates]
    patterns = tuple(candidates)
    if not patterns or not all(isinstance(pattern, HeadPattern) for pattern in patterns):
        raise OptionError(f"candidates={candidates!r}: must hold one HeadPattern or more")
    for pattern in patterns:
        if pattern.pairs or pattern.kind == "dense":
            raise OptionError(f"candidates: {pattern}: the search makes pairs itself, and dense is always one")
    return patterns


# Kinds whose size is a number of keys; every other kind is held back by a cap on its tiles.
_LENGTHS = {
    "a_shape": ("local",),
    "tri_shape": ("local",),
    "vertical_slash": ("vertical", "slash"),
    "columns": ("columns",),
}
_LEAST_KEYS = 16


@dataclass(frozen=True)
class Sizing:
    """The sizes of one pattern: a factor on its numbers of keys, or the cap on its tiles."""

    pattern: HeadPattern
    tokens: int

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest size."""
        names = _LENGTHS.get(self.pattern.kind)
        if names is None:
            return 1 / self.tokens, 1.0
        lengths = [getattr(self.pattern, name) for name in names]
        return _LEAST_KEYS / max(lengths), self.tokens / min(lengths)

    def first(self, density: float) -> float:
        """A size to begin with for a wanted density."""
        low, high = self.bounds
        names = _LENGTHS.get(self.pattern.kind)
        size = density if names is None else density * self.tokens / 2 / sum(getattr(self.pattern, n) for n in names)
        return min(max(size, low), high)

    def at(self, size: float) -> HeadPattern:
        """The pattern of that size."""
        names = _LENGTHS.get(self.pattern.kind)
        if names is None:
            return replace(self.pattern, density=capped(size))
        lengths = {name: round(getattr(self.pattern, name) * size) for name in names}
        return replace(self.pattern, **{name: min(max(1, n), self.tokens) for name, n in lengths.items()})


def capped(density: float) -> float | None:
    """A cap as tables hold it: four digits, or none."""
    return float(f"{density:.4g}") if density < 0.9995 else None
