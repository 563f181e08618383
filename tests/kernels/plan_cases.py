"""Random inputs of `plan`, and the brute-force definition of a plan, in numpy, one query at a time."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from mmcompile.kernels.patterns import BOUNDARIES, KINDS, TILE, HeadPattern, encode
from mmcompile.kernels.plan import TilePlan, plan

Array = np.ndarray


@dataclass(frozen=True)
class PlanCase:
    batch: int
    query_length: int
    key_length: int
    query_offset: int
    offsets: Array  # [M + 1]
    modality: Array  # [M]
    key_valid: Array | None  # [B, Sk]
    segments: tuple[Array, Array] | None  # [B, Sq], [B, Sk]
    spans: tuple[Array, Array] | None
    window: int | None
    patterns: tuple[HeadPattern, ...]
    interleaved: bool  # segments or spans that are not runs of tokens

    def plan(self, density: float | None = None, min_tokens: int = 0) -> TilePlan:
        return plan(**self.arguments(density, min_tokens))

    def arguments(self, density: float | None, min_tokens: int) -> dict[str, Any]:
        segments, spans = self.segments or (None, None), self.spans or (None, None)
        return {
            "query": None,
            "key": None,
            "offsets": torch.from_numpy(self.offsets).int(),
            "modality": torch.from_numpy(self.modality).int(),
            "grid": torch.zeros(len(self.modality), 3, dtype=torch.int32),
            "key_valid": _tensor(self.key_valid),
            "query_segment": _tensor(segments[0]),
            "key_segment": _tensor(segments[1]),
            "query_span": _tensor(spans[0]),
            "key_span": _tensor(spans[1]),
            "batch": self.batch,
            "query_length": self.query_length,
            "key_length": self.key_length,
            "query_offset": self.query_offset,
            "window": self.window,
            "patterns": encode(self.patterns),
            "density": density,
            "min_tokens": min_tokens,
        }

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

    def query_modality(self, b: int) -> Array:
        tokens = np.zeros(self.batch * self.query_length, int)
        for start, end, modality in zip(self.offsets, self.offsets[1:], self.modality, strict=False):
            tokens[start:end] = modality
        return tokens.reshape(self.batch, -1)[b]

    def key_modality(self, b: int) -> Array:
        of_query = self.query_modality(b)
        tokens = np.arange(self.key_length) - self.query_offset
        return np.array([of_query[t] if 0 <= t < self.query_length else 0 for t in tokens])

    def orders(self, b: int, pattern: HeadPattern) -> tuple[Array, Array]:
        """Slot -> position of queries and keys."""
        query, key = np.arange(self.query_length), np.arange(self.key_length)
        if pattern.boundary in ("q", "2d"):
            query = np.array(sorted(query, key=lambda i: (self.query_modality(b)[i], i)))
        if pattern.boundary == "2d":
            key = np.array(sorted(key, key=lambda i: (self.key_modality(b)[i], i)))
        return query, key

    def mandatory(self, b: int, pattern: HeadPattern) -> Array:
        """Keys that no cap takes from a query: sinks and the nearest key. bool [Sq, Sk] over positions."""
        return self._sink_and_local(b, pattern, 0) | self._nearest(b)

    def chosen(self, b: int, pattern: HeadPattern) -> Array:
        """Keys that the pattern chooses for each query, spans aside. bool [Sq, Sk] over positions."""
        if pattern.kind == "dense":
            return np.ones((self.query_length, self.key_length), bool)
        chosen = self._sink_and_local(b, pattern, pattern.local) | self._nearest(b)
        if pattern.kind == "tri_shape":
            chosen[self._last_queries(b, pattern.last)] = True
        return chosen

    def _usable(self, b: int, query: int) -> Array:
        """Valid keys of the query's segment at or before it, ascending."""
        return np.flatnonzero(self.causal()[query] & self.valid(b) & self.same_segment(b)[query])

    def _sink_and_local(self, b: int, pattern: HeadPattern, local: int) -> Array:
        chosen = np.zeros((self.query_length, self.key_length), bool)
        modality = self.key_modality(b) if pattern.boundary == "2d" else np.zeros(self.key_length, int)
        causal, usable = self.causal(), self.valid(b) & self.same_segment(b)
        for query in range(self.query_length):
            keys = np.flatnonzero(causal[query] & usable[query])
            for each in np.unique(modality[keys]):
                group = keys[modality[keys] == each]
                chosen[query, group[: pattern.sink]] = True
                chosen[query, group[max(0, len(group) - local) :]] = True
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


def random_case(seed: int, spans: bool = True, interleaved: bool = True) -> PlanCase:
    rng = np.random.default_rng(seed)
    batch = _one_of(rng, [1, 1, 2])
    query_length = _one_of(rng, [1, 127, 128, 129, 257, 640, *rng.integers(1, 700, 12).tolist()])
    key_length = query_length + _one_of(rng, [0, 0, 0, 1, 100, 128, 300])
    past = key_length - query_length
    end = batch * query_length + _one_of(rng, [0, 0, 50])
    modality = rng.integers(0, _one_of(rng, [1, 2, 4, 8]), rng.integers(1, 12))
    cuts = np.sort(rng.integers(0, batch * query_length + 1, max(0, len(modality) - 3)))
    case = PlanCase(
        batch,
        query_length,
        key_length,
        query_offset=_one_of(rng, [past, past, past, 0, past // 2, -5, 3]),
        offsets=np.array([0, *cuts, *[end] * (len(modality) - len(cuts))]),
        modality=modality,
        key_valid=_random_valid(rng, batch, key_length),
        segments=None,
        spans=None,
        window=_one_of(rng, [None, None, None, None, 1, 2, 100, 129, 333, 10_000]),
        patterns=tuple(_random_pattern(rng) for _ in range(_one_of(rng, [1, 1, 2]))),
        interleaved=False,
    )
    if rng.random() < 0.3:
        case = _with_groups(case, "segments", rng, interleaved and rng.random() < 0.3)
    if spans and rng.random() < 0.5:
        case = _with_groups(case, "spans", rng, interleaved and rng.random() < 0.3)
    return case


def _one_of(rng: np.random.Generator, choices: list[Any]) -> Any:
    return choices[rng.integers(len(choices))]


def _random_pattern(rng: np.random.Generator) -> HeadPattern:
    return HeadPattern(
        kind=_one_of(rng, [*KINDS, "a_shape"]),
        sink=_one_of(rng, [1, 2, 7, 128, 129, 200]),
        local=_one_of(rng, [1, 2, 64, 129, 257, 300, 4096]),
        last=_one_of(rng, [1, 2, 5, 128, 150]),
        boundary=_one_of(rng, list(BOUNDARIES)),
    )


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
    # A query before every key belongs to what the first key belongs to.
    pair = groups[:, np.maximum(case.position(), 0)], groups[:, : case.key_length]
    return replace(case, **{name: pair, "interleaved": case.interleaved or interleaved})
