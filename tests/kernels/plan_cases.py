"""Random inputs of `arrange` and `plan`, and the brute-force definition of both, in numpy, one query at a time."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from mmcompile.kernels.arrange import Arrangement, arrange
from mmcompile.kernels.patterns import (
    BOUNDARIES,
    TILE,
    HeadPattern,
    Order,
    PlanRows,
    distinct_orders,
    encode,
    encode_orders,
    plan_rows,
)
from mmcompile.kernels.plan import PlanStats, TilePlan, plan
from mmcompile.kernels.reference import (
    by_plan_row,
    element_mask,
    in_positions,
    plan_mask,
    selected_tiles,
    times_attended,
)

Array = np.ndarray

LEAST_BLOCK = 64  # tokens of a block of "sf_fixed", however small the frames are


class Made(NamedTuple):
    """What was planned for a case, and what an executor would make of it."""

    rows: PlanRows
    arrangement: Arrangement
    plan: TilePlan
    stats: PlanStats
    window: int | None

    @property
    def listed(self) -> Array:
        """bool [B, P, nQ, nK]."""
        return selected_tiles(self.plan.counts, self.plan.tiles, self.key_tiles).numpy()

    @property
    def full(self) -> Array:
        """The tiles that are listed as full, bool [B, P, nQ, nK]."""
        counts = self.plan.counts.clone()
        counts[..., 2] = 0
        return selected_tiles(counts, self.plan.tiles, self.key_tiles).numpy()

    @property
    def key_tiles(self) -> int:
        return -(-self.arrangement.key_order.shape[2] // TILE)

    def allowed(self) -> Array:
        """The element mask that the tags tell, bool [B, P, Sq, Sk] over positions."""
        return self._in_positions(element_mask(*self._tags(), self.window))

    def computed(self) -> Array:
        """What an executor attends to, bool [B, P, Sq, Sk] over positions."""
        return self._in_positions(plan_mask(*self._walk()))

    def times(self) -> Array:
        """How often it does, int64 [B, P, Sq, Sk] in slot order."""
        return times_attended(*self._walk()).numpy()

    def columns(self, b: int, p: int, tile: int) -> list[int]:
        """The key slots of single keys of a query tile."""
        *_, start, single = self.plan.counts[b, p, tile].tolist()
        return self.plan.columns[b, p, start : start + single].tolist()

    def _walk(self) -> tuple:
        made = self.plan
        lists = (made.query_row, made.key_row, made.counts, made.tiles, made.columns, made.cold)
        return self.arrangement.query_tags, self.arrangement.key_tags, *lists, self.window

    def _tags(self) -> tuple[torch.Tensor, torch.Tensor]:
        query_tags = by_plan_row(self.arrangement.query_tags, self.plan.query_row)
        return query_tags, by_plan_row(self.arrangement.key_tags, self.plan.key_row)

    def _in_positions(self, mask: torch.Tensor) -> Array:
        query_order = by_plan_row(self.arrangement.query_order, self.plan.query_row)
        return in_positions(mask, query_order, by_plan_row(self.arrangement.key_order, self.plan.key_row)).numpy()


@dataclass(frozen=True)
class PlanCase:
    batch: int
    query_length: int
    key_length: int
    query_offset: int
    offsets: Array  # [M + 1]
    modality: Array  # [M]
    grid: Array  # [M, 3], frames, rows, columns
    key_valid: Array | None  # [B, Sk]
    segments: tuple[Array, Array] | None  # [B, Sq], [B, Sk]
    spans: tuple[Array, Array] | None
    window: int | None
    patterns: tuple[HeadPattern, ...]  # of each head
    interleaved: bool  # segments or spans that are not runs of tokens

    def plan(self, density: float | None = None) -> Made:
        rows = plan_rows(self.patterns)
        arrangement = self.arrange()
        made, stats = plan(**self.plan_arguments(arrangement, density))
        return Made(rows, arrangement, made, stats, self.window)

    def arrange(self) -> Arrangement:
        return arrange(**self.arrange_arguments())

    def arrange_arguments(self) -> dict[str, Any]:
        segments, spans = self.segments or (None, None), self.spans or (None, None)
        return {
            "query": None,
            "key": None,
            **self.boundaries(),
            "key_valid": _tensor(self.key_valid),
            "query_segment": _tensor(segments[0]),
            "key_segment": _tensor(segments[1]),
            "query_span": _tensor(spans[0]),
            "key_span": _tensor(spans[1]),
            "batch": self.batch,
            "query_length": self.query_length,
            "key_length": self.key_length,
            "query_offset": self.query_offset,
            "orders": encode_orders(*distinct_orders(plan_rows(self.patterns).patterns)),
        }

    def plan_arguments(self, arrangement: Arrangement, density: float | None) -> dict[str, Any]:
        rows = plan_rows(self.patterns)
        return {
            "query": None,
            "key": None,
            "arrangement": arrangement,
            **self.boundaries(),
            "query_offset": self.query_offset,
            "scale": 0.1,
            "window": self.window,
            "segments": self.segments is not None,
            "spans": self.spans is not None,
            "patterns": encode(rows.patterns),
            "heads": rows.heads,
            "density": density,
            "recall": None,
        }

    def boundaries(self) -> dict[str, torch.Tensor]:
        parts = {"offsets": self.offsets, "modality": self.modality, "grid": self.grid}
        return {name: torch.from_numpy(part).int() for name, part in parts.items()}

    def position(self) -> Array:
        return np.arange(self.query_length) + self.query_offset

    def valid(self, b: int) -> Array:
        return np.ones(self.key_length, bool) if self.key_valid is None else self.key_valid[b]

    def same_segment(self, b: int) -> Array:
        """bool [Sq, Sk]."""
        if self.segments is None:
            return np.ones((self.query_length, self.key_length), bool)
        return self.segments[0][b][:, None] == self.segments[1][b][None]

    def in_window(self) -> Array:
        key, query = np.arange(self.key_length)[None], self.position()[:, None]
        return key > query - (10**9 if self.window is None else self.window)

    def causal(self) -> Array:
        return np.arange(self.key_length)[None] <= self.position()[:, None]

    def allowed(self, b: int) -> Array:
        """The element mask, bool [Sq, Sk] over positions."""
        reached = self.causal()
        if self.spans is not None:
            query, key = self.spans[0][b][:, None], self.spans[1][b][None]
            reached = reached | ((query == key) & (query >= 0))
        return reached & self.valid(b)[None] & self.same_segment(b) & self.in_window()

    @cached_property
    def segment_of(self) -> list[list[tuple[int, int, list[int]]]]:
        """Of each query token of each batch row: its modality, its distance from where its segment starts, and the
        segment's grid."""
        offsets, modalities, grid = (part.tolist() for part in (self.offsets, self.modality, self.grid))
        told: list[list[tuple[int, int, list[int]]]] = [[] for _ in range(self.batch)]
        for token in range(self.batch * self.query_length):
            # A token that no segment holds is text, and otherwise like the last segment's.
            segment, modality = len(modalities) - 1, 0
            for m, (start, end) in enumerate(pairwise(offsets)):
                if start <= token < end:
                    segment, modality = m, modalities[m]
            b = token // self.query_length
            told[b].append((modality, token - max(offsets[segment], b * self.query_length), grid[segment]))
        return told

    def query_modality(self, b: int) -> Array:
        return np.array([modality for modality, _, _ in self.segment_of[b]])

    def key_modality(self, b: int) -> Array:
        return self._of_keys(self.query_modality(b), 0)

    def query_sites(self, b: int, order: Order) -> Array:
        """The place of each query token within its frame or row; -1 for text and where nothing tells the length of
        one. Where nothing tells what is text, nothing is."""
        told = self.segment_of[b]
        all_text = not any(modality for modality, _, _ in told)
        sites = []
        for modality, place, (_, rows, columns) in told:
            length = {"raster": 0, "site": order.stride or rows * columns, "column": order.stride or columns}[
                order.base
            ]
            sites.append(place % length if length and (modality or all_text) else -1)
        return np.array(sites)

    def key_sites(self, b: int, order: Order) -> Array:
        """As those of the queries; the first valid keys have none, and stand in front."""
        sites = self._of_keys(self.query_sites(b, order), -1)
        return np.where(self.valid(b).cumsum() <= TILE, -1, sites)

    def orders(self, b: int, pattern: HeadPattern) -> tuple[Array, Array]:
        """Slot -> position of queries and keys."""
        ((query, key),) = pattern.orders
        return (
            _sorted(query, self.query_modality(b), self.query_sites(b, query)),
            _sorted(key, self.key_modality(b), self.key_sites(b, key)),
        )

    def mandatory(self, b: int, pattern: HeadPattern) -> Array:
        """Keys that no cap takes from a query: sinks and the nearest key. bool [Sq, Sk] over positions."""
        return self._sink_and_local(b, pattern, 0) | self._nearest(b)

    def chosen(self, b: int, pattern: HeadPattern) -> Array:
        """Keys whose tiles the pattern chooses for each query, spans aside. bool [Sq, Sk] over positions."""
        if pattern.kind == "dense":
            return np.ones((self.query_length, self.key_length), bool)
        chosen = self.mandatory(b, pattern)
        if pattern.kind in ("a_shape", "tri_shape"):
            chosen |= self._latest_slots(b, pattern) if by_site(pattern) else self._sink_and_local(b, pattern)
        if pattern.kind == "tri_shape":
            chosen[self._last_queries(b, pattern.last)] = True
        if pattern.kind == "sf_fixed":
            own = self.own()[:, None]
            key, stride = np.arange(self.key_length)[None], self.block(pattern)
            chosen |= (key // stride == own // stride) & (key <= own)
        if pattern.kind == "sf_strided":
            ((query_order, key_order),) = pattern.orders
            query, key = self.query_sites(b, query_order)[:, None], self.key_sites(b, key_order)[None]
            chosen |= (query == key) & (query >= 0)
        return chosen

    def columns(self, b: int, pattern: HeadPattern, last_query: int) -> list[int]:
        """Positions of the single keys that a tile of queries lists, whose last one is at `last_query`."""
        if pattern.kind != "sf_fixed":
            return []
        reached = self.key_length if self.spans is not None else last_query + 1
        stride = self.block(pattern)
        ends = range(stride - 1, self.key_length, stride)
        return [end for end in ends if end < reached and self.valid(b)[end]]

    def block(self, pattern: HeadPattern) -> int:
        """Tokens of a block of "sf_fixed"."""
        frame = max((rows * columns for _, rows, columns in self.grid), default=0)
        return max(LEAST_BLOCK, pattern.stride or frame)

    def own(self) -> Array:
        """The key of each query's own token, or the nearest one there is, [Sq]."""
        return self.position().clip(0, self.key_length - 1)

    def _of_keys(self, of_query: Array, outside: int) -> Array:
        tokens = np.arange(self.key_length) - self.query_offset
        return np.array([of_query[t] if 0 <= t < self.query_length else outside for t in tokens])

    def _sink_and_local(self, b: int, pattern: HeadPattern, local: int | None = None) -> Array:
        local = pattern.local if local is None else local
        sink = pattern.sink
        if by_site(pattern):  # a tile of first keys stands together, but not those of each modality or segment
            sink = 1 if pattern.boundary == "2d" or self.segments is not None else min(sink, TILE)
        chosen = np.zeros((self.query_length, self.key_length), bool)
        modality = self.key_modality(b) if pattern.boundary == "2d" else np.zeros(self.key_length, int)
        causal, usable = self.causal(), self.valid(b) & self.same_segment(b)
        for query in range(self.query_length):
            keys = np.flatnonzero(causal[query] & usable[query])
            for each in np.unique(modality[keys]):
                group = keys[modality[keys] == each]
                chosen[query, group[:sink]] = True
                chosen[query, group[max(0, len(group) - local) :]] = True
        return chosen

    def _latest_slots(self, b: int, pattern: HeadPattern) -> Array:
        """The `local` key slots up to that of each query's own token."""
        key_order = self.orders(b, pattern)[1]
        chosen = np.zeros((self.query_length, self.key_length), bool)
        for query, slot in enumerate(key_order.argsort()[self.own()]):
            chosen[query, key_order[max(0, slot - pattern.local + 1) : slot + 1]] = True
        return chosen

    def _nearest(self, b: int) -> Array:
        chosen = np.zeros((self.query_length, self.key_length), bool)
        usable = self.valid(b) & self.same_segment(b)
        in_window, causal = self.in_window(), self.causal()
        for query in range(self.query_length):
            before = np.flatnonzero(usable[query] & causal[query] & in_window[query])
            after = np.flatnonzero(usable[query] & ~causal[query])
            if len(before):
                chosen[query, before[-1]] = True
            elif len(after):
                chosen[query, after[0]] = True
        return chosen

    def _last_queries(self, b: int, count: int) -> list[int]:
        """The `count` last queries of each segment, counted in valid keys; only those whose own is valid."""
        usable, position = self.valid(b) & self.same_segment(b), self.position()
        last = []
        for query in range(self.query_length):
            own = position[query]
            if 0 <= own < self.key_length and usable[query, own]:
                following = usable[query, own + 1 : position[-1] + 1].sum()
                if following < count:
                    last.append(query)
        return last


def by_site(pattern: HeadPattern) -> bool:
    return pattern.order != "raster" or pattern.kind == "sf_strided"


def _sorted(order: Order, modality: Array, site: Array) -> Array:
    """Tokens by (modality if the order is grouped, site, position)."""
    group = modality if order.grouped else np.zeros_like(modality)
    return np.array(sorted(range(len(site)), key=lambda token: (group[token], site[token], token)))


def by_tile(elements: Array) -> Array:
    """Tiles that hold a true element. bool [Sq, Sk] in slot order -> bool [nQ, nK]."""
    return _tiles(elements, False).any((1, 3))


def wholly(elements: Array) -> Array:
    """Tiles of which every element of a real row is true, and that lie inside the keys."""
    rows = -elements.shape[0] % TILE
    return _tiles(np.concatenate([elements, np.ones((rows, elements.shape[1]), bool)]), False).all((1, 3))


def _tiles(elements: Array, fill: bool) -> Array:
    padded = np.pad(elements, [(0, -size % TILE) for size in elements.shape], constant_values=fill)
    return padded.reshape(padded.shape[0] // TILE, TILE, padded.shape[1] // TILE, TILE)


def _tensor(values: Array | None) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values)


def plan_cases(spans: bool = True, interleaved: bool = True) -> st.SearchStrategy[PlanCase]:
    """Cases by seed: hypothesis tries every seed once, and numpy spreads its choices evenly over a seed."""
    return st.integers(0, 2**32 - 1).map(lambda seed: random_case(seed, spans, interleaved))


def site_cases() -> st.SearchStrategy[PlanCase]:
    """Heads whose tokens stand by site or column, under a mask that whole tiles tell exactly."""
    return st.integers(0, 2**32 - 1).map(random_site_case)


def random_case(seed: int, spans: bool = True, interleaved: bool = True) -> PlanCase:
    rng = np.random.default_rng(seed)
    case = replace(
        _random_tokens(rng),
        window=_one_of(rng, [None, None, None, None, 1, 2, 100, 129, 333, 10_000]),
        patterns=tuple(_random_pattern(rng) for _ in range(_one_of(rng, [1, 1, 2]))),
    )
    if rng.random() < 0.3:
        case = _with_groups(case, "segments", rng, interleaved and rng.random() < 0.3)
    if spans and rng.random() < 0.5:
        case = _with_groups(case, "spans", rng, interleaved and rng.random() < 0.3)
    return case


def random_site_case(seed: int) -> PlanCase:
    rng = np.random.default_rng(seed)
    case = _random_tokens(rng)
    return replace(case, patterns=tuple(_random_site_pattern(rng) for _ in range(_one_of(rng, [1, 2]))))


def _random_tokens(rng: np.random.Generator) -> PlanCase:
    batch = _one_of(rng, [1, 1, 2])
    query_length = _one_of(rng, [1, 127, 128, 129, 257, 640, *rng.integers(1, 700, 12).tolist()])
    key_length = query_length + _one_of(rng, [0, 0, 0, 1, 100, 128, 300])
    past = key_length - query_length
    end = batch * query_length + _one_of(rng, [0, 0, 50])
    modality = rng.integers(0, _one_of(rng, [1, 2, 4, 8]), rng.integers(1, 12))
    cuts = np.sort(rng.integers(0, batch * query_length + 1, max(0, len(modality) - 3)))
    grid = rng.integers(1, _one_of(rng, [4, 12, 20]), (len(modality), 3))
    grid[rng.random(len(modality)) < _one_of(rng, [0.1, 0.5, 1.0])] = 0
    return PlanCase(
        batch,
        query_length,
        key_length,
        query_offset=_one_of(rng, [past, past, past, 0, past // 2, -5, 3]),
        offsets=np.array([0, *cuts, *[end] * (len(modality) - len(cuts))]),
        modality=modality,
        grid=grid,
        key_valid=_random_valid(rng, batch, key_length),
        segments=None,
        spans=None,
        window=None,
        patterns=(),
        interleaved=False,
    )


def _one_of(rng: np.random.Generator, choices: list[Any]) -> Any:
    return choices[rng.integers(len(choices))]


def _random_pattern(rng: np.random.Generator) -> HeadPattern:
    kind = _one_of(rng, ["dense", "a_shape", "a_shape", "tri_shape", "sf_fixed"])
    boundaries = [boundary for boundary in BOUNDARIES if kind != "sf_fixed" or boundary != "2d"]
    return HeadPattern(kind=kind, boundary=_one_of(rng, boundaries), **_random_lengths(rng))


def _random_site_pattern(rng: np.random.Generator) -> HeadPattern:
    kind = _one_of(rng, ["dense", "a_shape", "tri_shape", "sf_strided", "sf_strided"])
    order = "raster" if kind == "sf_strided" else _one_of(rng, ["site", "column"])
    return HeadPattern(kind=kind, order=order, boundary=_one_of(rng, list(BOUNDARIES)), **_random_lengths(rng))


def _random_lengths(rng: np.random.Generator) -> dict[str, int]:
    return {
        "sink": _one_of(rng, [1, 2, 7, 128, 129, 200]),
        "local": _one_of(rng, [1, 2, 64, 129, 257, 300, 4096]),
        "last": _one_of(rng, [1, 2, 5, 128, 150]),
        "stride": _one_of(rng, [0, 0, 1, 7, 64, 100, 256, 5000]),
    }


def _random_valid(rng: np.random.Generator, batch: int, length: int) -> Array | None:
    """No padding, left, right, holes, and rows without one valid key."""
    kind = _one_of(rng, ["none", "none", "none", "left", "right", "holes", "empty"])
    if kind == "none":
        return None
    key, cut = np.arange(length)[None], rng.integers(0, length, (batch, 1))
    valid: Array = {
        "left": key >= cut,
        "right": key <= cut,
        "holes": rng.random((batch, length)) < rng.choice([0.02, 0.5, 0.99]),
        "empty": np.zeros((batch, length), bool),
    }[kind]
    if kind == "empty" and batch > 1:
        valid[-1] = True
    return valid


def _with_groups(case: PlanCase, name: str, rng: np.random.Generator, interleaved: bool) -> PlanCase:
    """Packed segments or bidirectional spans over the positions of queries and keys."""
    size = max(case.key_length, case.query_length + case.query_offset) + 10
    shape = (case.batch, size)
    if interleaved:
        groups = rng.integers(-1 if name == "spans" else 0, 4, shape)
    else:
        groups = np.cumsum(rng.random(shape) < rng.choice([0.002, 0.02, 0.2]), 1)
        if name == "spans":  # every other run is text
            groups = np.where(groups % 2 == 0, -1, groups // 2)
    if name == "segments":
        groups = groups - size % 3  # any number names a segment, one below 0 too
    # A query before every key belongs to what the first key belongs to.
    pair = groups[:, np.maximum(case.position(), 0)], groups[:, : case.key_length]
    return replace(case, **{name: pair, "interleaved": case.interleaved or interleaved})
