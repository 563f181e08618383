"""Fronts of single heads, and one budget for all of them: heads that need little give to those that need much."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmcompile.pattern_search.layer_search import Evaluation
from mmcompile.tables import FrontPoint

_ALMOST = 1 + 1e-9  # sums of the same times in another order are the same time
# What an error has to fall by to be worth any time: dense attention in bfloat16 is itself 0.002 from the exact one.
ROUNDING = 0.004


def front(evaluations: Sequence[Evaluation], head: int) -> tuple[FrontPoint, ...]:
    """What no cheaper pattern of a head does as well but for rounding, by rising ms and falling error."""
    points = sorted(
        (
            FrontPoint(one.patterns[head], one.ms[head], one.density[head], one.error[head], _known(one.recall[head]))
            for one in evaluations
            if not math.isnan(one.error[head])
        ),
        key=lambda point: (point.ms, point.error, str(point.pattern)),
    )
    kept: list[FrontPoint] = []
    for point in points:
        if not kept or point.error < kept[-1].error - ROUNDING:
            kept.append(point)
    return tuple(kept)


def uniform(fronts: Sequence[Sequence[FrontPoint]], ms: float) -> list[FrontPoint]:
    """Each head's best within the same time; its cheapest where none is."""
    return [max((point for point in of_head if point.ms <= ms), key=_dear, default=of_head[0]) for of_head in fronts]


def allocate(fronts: Sequence[Sequence[FrontPoint]], total: float) -> list[FrontPoint]:
    """One point of each front with the least sum of errors that takes `total` ms together.

    Greedy on the fronts' lower convex hulls, which is optimal but for the last steps; what is left of the total then
    goes to whichever head gains most from it, hull or not. A head's cheapest point is always had.
    """
    hulls = [_hull(of_head) for of_head in fronts]
    chosen = [hull[0] for hull in hulls]
    spent = math.fsum(point.ms for point in chosen)
    steps = [_Step.of(head, hull, 1) for head, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        step = heapq.heappop(steps)
        hull = hulls[step.head]
        cost = hull[step.to].ms - chosen[step.head].ms
        if spent + cost > total * _ALMOST:
            continue  # smaller steps of other heads may still fit
        chosen[step.head] = hull[step.to]
        spent += cost
        if step.to + 1 < len(hull):
            heapq.heappush(steps, _Step.of(step.head, hull, step.to + 1))
    return _spend_rest(fronts, chosen, total - spent)


def to_recall(fronts: Sequence[Sequence[FrontPoint]], recall: float) -> list[FrontPoint]:
    """Each head's cheapest point that covers so much of its attention; the one that covers most where none does."""
    chosen = []
    for of_head in fronts:
        enough = [point for point in of_head if point.recall is not None and point.recall >= recall]
        chosen.append(enough[0] if enough else max(of_head, key=lambda point: (point.recall or 0.0, -point.ms)))
    return chosen


@dataclass(frozen=True, order=True)
class _Step:
    """From one point of a hull to the next; the heap yields the one that lowers the error most for its time."""

    slope: float
    head: int
    to: int

    @classmethod
    def of(cls, head: int, hull: Sequence[FrontPoint], to: int) -> "_Step":
        before, after = hull[to - 1], hull[to]
        return cls((after.error - before.error) / (after.ms - before.ms), head, to)


def _hull(points: Sequence[FrontPoint]) -> list[FrontPoint]:
    """The lower convex hull of a front."""
    hull: list[FrontPoint] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(left: FrontPoint, right: FrontPoint) -> float:
    return (right.error - left.error) / (right.ms - left.ms)


def _spend_rest(fronts: Sequence[Sequence[FrontPoint]], chosen: list[FrontPoint], rest: float) -> list[FrontPoint]:
    while True:
        gains = [
            (chosen[head].error - point.error, -head, point)
            for head, of_head in enumerate(fronts)
            for point in of_head
            if point.error < chosen[head].error and point.ms - chosen[head].ms <= rest
        ]
        if not gains:
            return chosen
        _, head, point = max(gains, key=lambda gain: gain[:2])
        rest -= point.ms - chosen[-head].ms
        chosen[-head] = point


def _dear(point: FrontPoint) -> float:
    return point.ms


def _known(recall: float) -> float | None:
    return None if math.isnan(recall) else recall
