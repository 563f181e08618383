"""The search of one layer: every candidate alone, then each modality its own, then each pair of modalities."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmcompile.kernels.patterns import HeadPattern
from mmcompile.pattern_search.equal_time import LEVELS, WANTED, Costs, Sized, copies_class
from mmcompile.pattern_search.score import LayerAttention, Score

Heads = tuple[HeadPattern, ...]
_RACE = 1.25  # times the least error of a head: candidates beyond it are not refined
_NOT_IN_PAIRS = ("columns", "vertical_slash", "sf_fixed")  # they pick single keys


@dataclass(frozen=True)
class Evaluation:
    """A pattern for each head of a layer, and what came of it: each a figure a head."""

    patterns: Heads
    ms: tuple[float, ...]
    density: tuple[float, ...]
    error: tuple[float, ...]
    recall: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, one pattern where all heads have the same."""
        patterns = [pattern.to_dict() for pattern in self.patterns]
        return vars(self) | {"patterns": patterns[:1] if len(set(self.patterns)) == 1 else patterns}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evaluation":
        figures = {name: tuple(values[name]) for name in ("ms", "density", "error", "recall")}
        patterns = tuple(HeadPattern.from_dict(pattern) for pattern in values["patterns"])
        heads = len(figures["error"])
        return cls(patterns * heads if len(patterns) == 1 else patterns, **figures)


def search_layer(attention: LayerAttention, costs: Costs) -> list[Evaluation]:
    """Everything that was tried and is the best of its cost for some head.

    In the paper's order (section 3.3): within each modality, then each pair, then the kinds of boundary against each
    other, which is for the fronts to say. Errors of patterns with a boundary are known for the queries of each modality
    after one run, so that the best of each modality need no run of their own.
    """
    search = _LayerSearch(attention, costs)
    search.whole()
    if len(attention.modalities) > 1:
        grouped = costs.at(WANTED)
        for_queries = search.best_of_modalities([one for one in grouped if one.pattern.boundary == "q"])
        for_pairs = search.best_of_pairs([one for one in grouped if one.pattern.boundary == "2d"])
        search.other_levels([*for_queries, *for_pairs])
    return on_fronts(search.found)


def replay(attention: LayerAttention, evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """The same patterns on another sample. Costs stay those of the first."""
    pending = [(one, attention.score(one.patterns)) for one in evaluations]
    scores = [(one, score.read()) for one, score in pending]
    return [replace(one, density=s.density, error=s.error, recall=s.recall) for one, s in scores]


def mean(of_samples: Sequence[list[Evaluation]]) -> list[Evaluation]:
    """Evaluations of the same patterns, with the means of their figures over the samples; costs are the first's."""
    means = []
    for same in zip(*of_samples, strict=True):
        figures = {
            name: tuple(
                math.fsum(values) / len(values) for values in zip(*(getattr(one, name) for one in same), strict=True)
            )
            for name in ("density", "error", "recall")
        }
        means.append(replace(same[0], **figures))
    return means


def on_fronts(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those that some head has on its Pareto front."""
    kept = set()
    for head in range(len(evaluations[0].error)):
        cost_and_error = [(one.ms[head], one.error[head]) for one in evaluations]
        least = float("inf")
        for index in sorted(range(len(evaluations)), key=cost_and_error.__getitem__):
            if evaluations[index].error[head] < least:
                least = evaluations[index].error[head]
                kept.add(index)
    return [evaluations[index] for index in sorted(kept)]


class _LayerSearch:
    def __init__(self, attention: LayerAttention, costs: Costs) -> None:
        self.attention, self.costs = attention, costs
        self.found: list[Evaluation] = []
        self.scores: dict[Sized, Score] = {}

    def whole(self) -> None:
        """Every candidate at every level, in all heads."""
        pending = [(one, self.attention.score(one.pattern)) for one in self.costs.sized]
        for one, score in pending:
            self.scores[one] = score.read()
            density = self.scores[one].density
            self._keep((one.pattern,) * self.attention.heads, self.scores[one], self.costs.of_sized(one, density))

    def best_of_modalities(self, candidates: Sequence[Sized]) -> list[Heads]:
        """Of patterns that group the queries: each modality with its best, for each order."""
        made = []
        for group in _by_orders(candidates):
            main = max(self.attention.modalities, key=lambda kind: self.attention.tokens_of[kind])
            heads = []
            for head in range(self.attention.heads):
                best = {
                    kind: min(group, key=lambda one: self.scores[one].by_modality[head][kind]).pattern
                    for kind in self.attention.modalities
                }
                pairs = {(kind, -1): pattern for kind, pattern in best.items()}
                heads.append(self._joined(best[main], pairs))
            made.append(tuple(heads))
        self._try(made)
        return made

    def best_of_pairs(self, candidates: Sequence[Sized]) -> list[Heads]:
        """Of patterns that group queries and keys: each pair of modalities with its best, one pair after the other.

        Heads for which other candidates are far better are left out.
        """
        made = []
        for group in _by_orders(candidates):
            best = [min(group, key=lambda one: self.scores[one].error[head]) for head in range(self.attention.heads)]
            racing = [self.scores[one].error[head] <= _RACE * self.least(head) for head, one in enumerate(best)]
            if any(racing):
                start = [
                    one.pattern if runs else best[racing.index(True)].pattern
                    for one, runs in zip(best, racing, strict=True)
                ]
                made.append(self._descend(start, racing, [one.pattern for one in group]))
        return made

    def least(self, head: int) -> float:
        """The least error of a head with any candidate of the wanted time."""
        return min(self.scores[one].error[head] for one in self.costs.at(WANTED))

    def _descend(self, start: Sequence[HeadPattern], racing: Sequence[bool], group: Sequence[HeadPattern]) -> Heads:
        """Replace one pair after the other by whatever of the group lowers a head's error."""
        pairs: list[dict[tuple[int, int], HeadPattern]] = [{} for _ in start]
        now = tuple(self._joined(pattern, {}) for pattern in start)
        errors = list(self._try([now])[0].error)
        for pair in itertools.product(self.attention.modalities, self.attention.modalities):
            trials = [
                tuple(
                    self._joined(pattern, own | {pair: one} if runs else {})
                    for pattern, own, runs in zip(start, pairs, racing, strict=True)
                )
                for one in group
            ]
            for trial in self._try([trial for trial in trials if trial != now]):
                for head, error in enumerate(trial.error):
                    if racing[head] and error < errors[head]:
                        errors[head], pairs[head] = error, _pairs_of(trial.patterns[head])
            now = tuple(self._joined(pattern, own) for pattern, own in zip(start, pairs, strict=True))
        return now

    def other_levels(self, made: Sequence[Heads]) -> None:
        """What was put together, at the other levels, for heads that gained by it."""
        tried = {one.patterns: one for one in self.found}
        for heads in made:
            # Heads that took different trials were not run together yet.
            one = tried.get(heads) or self._try([heads])[0]
            gained = [error < self.least(head) for head, error in enumerate(one.error)]
            if not any(gained):
                continue
            # The other heads join one that did: each pattern is planned by itself.
            other = heads[gained.index(True)]
            joined = [pattern if gains else other for pattern, gains in zip(heads, gained, strict=True)]
            levels = [level for level in range(len(LEVELS)) if level != WANTED]
            self._try([tuple(replace(p, density=self.costs.cap(p, level)) for p in joined) for level in levels])

    def _joined(self, pattern: HeadPattern, pairs: Mapping[tuple[int, int], HeadPattern]) -> HeadPattern:
        """A pattern with some of its pairs replaced, at the wanted time."""
        own = _within(pattern)
        others = tuple((*pair, _within(one)) for pair, one in sorted(pairs.items()) if _within(one) != own)
        joined = replace(pattern, density=None, pairs=others)
        return replace(joined, density=self.costs.cap(joined, WANTED))

    def _try(self, made: Sequence[Heads]) -> list[Evaluation]:
        pending = [(heads, self.attention.score(heads)) for heads in made]
        tried = []
        for heads, waiting in pending:
            score = waiting.read()
            tried.append(self._keep(heads, score, self.costs.of_heads(heads, score.density)))
        return tried

    def _keep(self, heads: Heads, score: Score, ms: tuple[float, ...]) -> Evaluation:
        self.found.append(Evaluation(heads, ms, score.density, score.error, score.recall))
        return self.found[-1]


def _by_orders(candidates: Iterable[Sized]) -> list[list[Sized]]:
    """Candidates that may be pairs of one pattern: of whole tiles, and in the same orders."""
    groups = defaultdict(list)
    for one in candidates:
        pattern = one.pattern
        if pattern.kind not in _NOT_IN_PAIRS and not pattern.columns and pattern.order != "auto":
            groups[pattern.orders, copies_class(pattern)].append(one)
    return [group for group in groups.values() if len(group) > 1]


def _within(pattern: HeadPattern) -> HeadPattern:
    """A pattern as one of a pair."""
    return replace(pattern, boundary="none", density=None, pairs=())


def _pairs_of(pattern: HeadPattern) -> dict[tuple[int, int], HeadPattern]:
    return {(query, key): replace(one, boundary=pattern.boundary) for query, key, one in pattern.pairs}
