"""Candidates brought to equal measured time, planning in it, and what a head costs at the density that it got."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmcompile.bench.timing import time_on_device
from mmcompile.kernels.attend import Arranged
from mmcompile.kernels.patterns import TILE, HeadPattern
from mmcompile.pattern_search.candidates import REFERENCE, Sizing, capped
from mmcompile.pattern_search.score import LayerAttention

LEVELS = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the wanted time, so that heads can give and take
WANTED = LEVELS.index(1.0)
TOLERANCE = 0.03  # of a time
_MOST_SIZES = 4  # that are measured for one candidate and level
_REPEATS = 3
_PLAN_RANK = ("dense", "a_shape", "tri_shape", "sf_fixed", "sf_strided", "vertical_slash", "grid", "columns", "top_p")


def attention_ms(attention: LayerAttention, arranged: Arranged) -> tuple[float, float]:
    """The measured time of planning and computing an attention, copies into its orders and back among it, and the mean
    density of its heads. Orders are not in it: a prefill makes them once for all layers."""
    seen = attention.seen
    planned = arranged.plan()
    measured = time_on_device(lambda: arranged.plan().attend(seen.query, seen.value), seen.query.device.type, _REPEATS)
    return measured.ms, float(planned.of_heads(planned.density).mean())


@dataclass(frozen=True)
class Sized:
    """A candidate of a size. candidate: its place among the candidates, -1 for dense. level: of LEVELS. ms: measured
    with the pattern in every head; density: their mean."""

    candidate: int
    pattern: HeadPattern
    level: int
    ms: float
    density: float


@dataclass(frozen=True)
class Costs:
    """What attention costs on this device at one length and geometry.

    targets: ms of each of LEVELS. fits: of each `cost_class`, ms at no tile and ms a unit of density, of all heads.
    """

    targets: tuple[float, ...]
    sized: tuple[Sized, ...]
    fits: Mapping[str, tuple[float, float]]

    @property
    def dense_ms(self) -> float:
        """Of a whole layer."""
        return next(one.ms for one in self.sized if one.candidate < 0)

    def at(self, level: int) -> list[Sized]:
        """Each candidate at a level, or at the nearest below that it reaches."""
        latest = {one.candidate: one for one in self.sized if one.level <= level}
        return [one for candidate, one in latest.items() if candidate >= 0]

    def of_heads(self, patterns: Sequence[HeadPattern], density: Sequence[float]) -> tuple[float, ...]:
        """The share of each head in the time of its layer, in ms."""
        fits = [self.fits[cost_class(pattern)] for pattern in patterns]
        return tuple((fixed + slope * d) / len(fits) for (fixed, slope), d in zip(fits, density, strict=True))

    def of_sized(self, sized: Sized, density: Sequence[float]) -> tuple[float, ...]:
        """The same for a candidate in every head: together what was measured, if as many tiles are computed."""
        fitted = self.of_heads((sized.pattern,) * len(density), (sized.density,) * len(density))
        scale = sized.ms / math.fsum(fitted)
        return tuple(scale * ms for ms in self.of_heads((sized.pattern,) * len(density), density))

    def cap(self, pattern: HeadPattern, level: int) -> float | None:
        """The cap with which a pattern that was not measured itself takes the time of a level."""
        fixed, slope = self.fits[cost_class(pattern)]
        return capped(max((self.targets[level] - fixed) / slope, 1e-4) if slope > 0 else 1.0)

    def to_dict(self) -> dict[str, Any]:
        sized = [vars(one) | {"pattern": one.pattern.to_dict()} for one in self.sized]
        return {"targets": list(self.targets), "sized": sized, "fits": {k: list(v) for k, v in self.fits.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Costs":
        sized = tuple(Sized(**{**one, "pattern": HeadPattern.from_dict(one["pattern"])}) for one in values["sized"])
        return cls(tuple(values["targets"]), sized, {name: (fit[0], fit[1]) for name, fit in values["fits"].items()})


def copies_class(pattern: HeadPattern) -> str:
    """Patterns of one class copy the same rows and gather the same keys at the same density."""
    orders = ["raster" if query.base == key.base == "raster" else "by site" for query, key in pattern.orders]
    single = bool(pattern.columns) or pattern.kind in ("vertical_slash", "sf_fixed")
    return f"{'/'.join(orders)}, {pattern.boundary if pattern.boundary != 'k' else 'none'}, {single}"


def cost_class(pattern: HeadPattern) -> str:
    """Patterns of one class cost the same at the same density: they are also planned alike. Of pairs, the dearest to
    plan stands for all."""
    kinds = (pattern.kind, *(one.kind for _, _, one in pattern.pairs))
    return f"{max(kinds, key=_PLAN_RANK.index)}, {copies_class(pattern)}"


def measure_costs(attention: LayerAttention, candidates: Sequence[HeadPattern], density: float | None) -> Costs:
    """Bring the candidates to the time of the reference, and to its `LEVELS`.

    density: the wanted time is instead that of an A-shape of this density.
    """
    tokens = attention.seen.key.shape[2]
    measured = _Measured(attention)
    reference = REFERENCE if density is None else _of_density(attention, density)
    wanted, dense = measured.of(reference), measured.of(HeadPattern())
    # Whatever takes longer than dense serves nobody.
    targets = tuple(min(level * wanted.ms, dense.ms) for level in LEVELS)
    sized = [Sized(-1, HeadPattern(), 0, dense.ms, dense.density)]
    for index, candidate in enumerate(candidates):
        if candidate.boundary in ("q", "2d") and len(attention.modalities) < 2:
            continue
        density_below = -1.0
        sizes = _Sizes(measured, Sizing(candidate, tokens))
        for target in dict.fromkeys(targets):
            level = targets.index(target)
            found = sizes.bring_to(target, wanted.density * LEVELS[level])
            # Patterns of the paper may be one and the same at equal time, and a grid ends where its lines do.
            if found is None or found.density == density_below or any(found.pattern == one.pattern for one in sized):
                continue
            density_below = found.density
            sized.append(Sized(index, found.pattern, level, found.ms, found.density))
    return Costs(targets, tuple(sized), _fits(list(measured.points.values())))


@dataclass(frozen=True)
class _Point:
    pattern: HeadPattern
    ms: float
    density: float


class _Measured:
    """Measured patterns; each is measured once."""

    def __init__(self, attention: LayerAttention) -> None:
        self._attention = attention
        self.points: dict[HeadPattern, _Point] = {}

    def of(self, pattern: HeadPattern) -> _Point:
        if pattern not in self.points:
            self.points[pattern] = _Point(pattern, *attention_ms(self._attention, self._attention.arrange(pattern)))
        return self.points[pattern]


class _Sizes:
    """The measured sizes of one candidate, which tell where to look for the next time."""

    def __init__(self, measured: _Measured, sizing: Sizing) -> None:
        self._measured, self._sizing = measured, sizing
        self._points: list[tuple[float, _Point]] = []  # by rising size

    def bring_to(self, target: float, density: float) -> _Point | None:
        """The size whose time is the target's, found by false position between measured sizes; the largest size where
        all of it takes less, None where the smallest takes more. density: where to begin."""
        for _ in range(_MOST_SIZES):
            near = self._nearest(target)
            if near is not None and abs(near.ms / target - 1) <= TOLERANCE:
                return near
            size = self._next(target, density)
            if any(size == known for known, _ in self._points):
                break  # at the end of all sizes
            self._points.append((size, self._measured.of(self._sizing.at(size))))
            self._points.sort(key=lambda one: one[0])
        near = self._nearest(target)
        if near is not None and near.ms <= target * (1 + TOLERANCE):
            return near
        below = [point for _, point in self._points if point.ms <= target]
        return max(below, key=lambda point: point.ms, default=None)

    def _nearest(self, target: float) -> _Point | None:
        return min((point for _, point in self._points), key=lambda point: abs(point.ms - target), default=None)

    def _next(self, target: float, density: float) -> float:
        """On the line through the two measured sizes that are nearest in time, one on each side where there are."""
        low, high = self._sizing.bounds
        if not self._points:
            return self._sizing.first(density)
        if len(self._points) == 1:
            ((size, point),) = self._points
            return min(max(size * target / point.ms, low), high)
        below = [one for one in self._points if one[1].ms <= target]
        above = [one for one in self._points if one[1].ms > target]
        if below and above and below[-1][0] < above[0][0]:
            (left, first), (right, last) = below[-1], above[0]
            share = (target - first.ms) / (last.ms - first.ms)
            return left + (right - left) * min(max(share, 0.1), 0.9)
        (left, first), (right, last) = self._points[-2:] if below else self._points[:2]
        slope = (last.ms - first.ms) / (right - left)
        size, point = (right, last) if below else (left, first)
        outside = size + (target - point.ms) / slope if slope > 0 else high
        return min(max(outside, low), high)


def _of_density(attention: LayerAttention, density: float) -> HeadPattern:
    """The A-shape that computes this share of the tiles."""
    sizing = Sizing(replace(REFERENCE, sink=TILE), attention.seen.key.shape[2])
    low, high = sizing.bounds
    for _ in range(12):
        middle = math.sqrt(low * high)
        planned = attention.arrange(sizing.at(middle)).plan()
        if float(planned.density.mean()) < density:
            low = middle
        else:
            high = middle
    return sizing.at(high)


def _fits(points: Sequence[_Point]) -> dict[str, tuple[float, float]]:
    """A line of ms over density for each cost class; through the origin where it was measured at one density alone."""
    fits = {}
    for name in dict.fromkeys(cost_class(point.pattern) for point in points):
        own = [point for point in points if cost_class(point.pattern) == name]
        # Relative errors count, so that small sizes fit as well as large ones.
        weights = [1 / max(point.ms, 1e-9) ** 2 for point in own]
        total = math.fsum(weights)
        density = math.fsum(w * p.density for w, p in zip(weights, own, strict=True)) / total
        ms = math.fsum(w * p.ms for w, p in zip(weights, own, strict=True)) / total
        spread = math.fsum(w * (p.density - density) ** 2 for w, p in zip(weights, own, strict=True))
        both = math.fsum(w * (p.density - density) * (p.ms - ms) for w, p in zip(weights, own, strict=True))
        slope = both / spread if spread > 1e-12 * total else 0.0
        fixed = ms - slope * density
        fits[name] = (fixed, slope) if slope > 0 and fixed >= 0 else (0.0, ms / max(density, 1e-9))
    return fits
