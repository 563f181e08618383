"""Head patterns: which keys one attention head looks at, as plain values that travel inside a graph.

A pattern is a string constant in the rewritten graph (`encode`), so that the graph stays free of Python
objects and two graphs with the same patterns are the same graph.
"""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import SymInt

TILE = 128  # queries and keys of one tile

KINDS = (
    "dense",
    "a_shape",
    "tri_shape",
    "sf_fixed",
    "sf_strided",
    "vertical_slash",
    "grid",
    "top_p",
    "columns",
)
BOUNDARIES = ("none", "k", "q", "2d")
ORDERS = ("raster", "site", "column", "auto")
SCORES = ("sampled", "pooled", "antidiagonal")
MODALITIES = 8  # ids 0..7: text, image, video, audio, and room
MAX_TOKENS = 2**30  # a position minus such a length still fits int32
MAX_STRIDE = 2**20
LEAST_COLUMNS = 2048  # where they are a share of the keys

_SHARE = 2**16  # a share of the keys is counted in these parts, exactly, of sizes that are symbols too
_NEEDS_DATA = ("vertical_slash", "grid", "top_p", "columns")
_ON_SITES = ("grid", "sf_strided")  # kinds whose lines are contiguous only where tokens stand by site


@dataclass(frozen=True)
class Order:
    """Which slot a token stands in. Tokens are sorted by (modality if `grouped`, site, position).

    base: "raster" (no sites); "site" (the token's place within its frame); "column" (its place within its row).
    stride: tokens of a frame or row, where they are known; 0 takes them from the boundaries' grid, and where that says
        nothing, for "site", searches them in the data.
    max_stride: the largest stride that is searched.
    """

    grouped: bool = False
    base: str = "raster"
    stride: int = 0
    max_stride: int = 1024

    @property
    def is_raster(self) -> bool:
        """Whether slots are positions."""
        return self.base == "raster" and not self.grouped

    @property
    def searches(self) -> bool:
        return self.base == "site" and self.stride == 0


@dataclass(frozen=True)
class HeadPattern:
    """What one head computes. Lengths are in tokens; sections are those of arXiv 2504.16083.

    kind:
        "dense": every allowed key.
        "a_shape": the `sink` first and the `local` latest keys.
        "tri_shape": A-shape, and the `last` queries of a sequence see every allowed key.
        "sf_fixed": the query's own block of `stride` tokens, and the last token of each earlier block (the fixed
            pattern of Sparse Transformers, arXiv 1904.10509, with a frame as the block).
        "sf_strided": the keys at a multiple of `stride` tokens before the query (the strided pattern, there).
        "vertical_slash": the `vertical` single keys and the `slash` diagonals with the most attention of the last
            queries (section 3.1, after MInference).
        "grid": lines of keys and queries that are `stride` tokens apart (section 3.1). `lines` holds any of "v" (sites
            that every query sees), "s" (each query's own site), "h" (sites whose queries see everything).
        "top_p": for each query tile, the key tiles with the most attention, until `mass` of it is covered. `scores`
            says how attention is estimated: "sampled" (some queries of each tile against each key), "pooled" (mean
            query against mean key, as FlexPrefill), "antidiagonal" (sums along antidiagonals, as XAttention).
            Besides, up to `columns` single keys that stand out over all queries: a number, or a share of the keys that
            counts where it is more than 2,048.
        "columns": for each query tile its own `columns` single keys, those with the most attention of the tile's mean
            query (as VecAttention).
        All but "dense" keep the `sink` first keys and each query's nearest key; in orders by site, the first tile of
        keys. A cap counts single keys too, but those of "sf_fixed" are listed whatever it is.
    boundary: inter-modality kind (section 3.2). "none" and "k" leave the order alone, "q" groups the queries by
        modality, "2d" groups queries and keys.
    order: how tokens are arranged, so that what a head looks at is contiguous: "raster", "site" (all frames of one
        spatial site together), "column" (all rows of one column together), or "auto": raster or site, whichever
        holds more of the attention in as many tiles. Kinds "grid" and "sf_strided" are always by site.
    stride: tokens per frame for kinds and orders by site; 0 takes it from the boundaries' grid, else searches it in the
        attention of the last queries, up to `max_stride`.
    density: cap on the head's computed tiles, as a fraction of the causal ones, in (0, 1); None for none. Where the
        whole prefill has a cap too, the smaller holds.
    pairs: what each (query modality, key modality) has instead of this pattern, for boundary "q" (key modality -1 for
        all keys) and "2d". The pairs of one query share one softmax.

    Raises ValueError naming the field, its value, and what would be right.
    """

    kind: str = "dense"
    sink: int = 128
    local: int = 4096
    last: int = 128
    boundary: str = "none"
    order: str = "raster"
    stride: int = 0
    max_stride: int = 1024
    vertical: int = 1000
    slash: int = 1024
    lines: str = "vs"
    scores: str = "sampled"
    mass: float = 0.95
    columns: int | float = 0
    density: float | None = None
    pairs: tuple[tuple[int, int, "HeadPattern"], ...] = ()

    def __post_init__(self) -> None:
        _require_choice("kind", self.kind, KINDS)
        _require_choice("boundary", self.boundary, BOUNDARIES)
        _require_choice("order", self.order, ORDERS)
        _require_choice("scores", self.scores, SCORES)
        for name in ("sink", "local", "last", "vertical", "slash"):
            _require_tokens(name, getattr(self, name), 1, MAX_TOKENS)
        _require_tokens("stride", self.stride, 0, MAX_STRIDE)
        _require_tokens("max_stride", self.max_stride, 1, MAX_STRIDE)
        _require_columns(self.kind, self.columns)
        if not isinstance(self.lines, str) or not self.lines or set(self.lines) - set("hvs"):
            raise ValueError(f'lines={self.lines!r} is not a set of grid lines; any of "h", "v" and "s", such as "vs"')
        if isinstance(self.mass, bool) or not isinstance(self.mass, int | float) or not 0.0 < self.mass <= 1.0:
            raise ValueError(f"mass={self.mass!r} is not a share of the attention; in (0, 1]")
        if self.density is not None and not _is_share(self.density):
            raise ValueError(f"density={self.density!r} is not a cap on tiles; in (0, 1), or None for none")
        if self.kind == "columns" and self.columns == 0:
            raise ValueError("columns=0 leaves kind 'columns' without keys; at least 1")
        if self.kind == "sf_fixed" and (self.boundary == "2d" or self.order != "raster"):
            raise ValueError("kind 'sf_fixed' takes keys in raster order; boundary 'none', 'k' or 'q', order 'raster'")
        if self.kind in _ON_SITES and self.order != "raster":
            raise ValueError(f"order={self.order!r} does not go with kind {self.kind!r}, which is always by site")
        if self.order == "auto" and self.kind != "top_p":
            raise ValueError(f"order='auto' does not go with kind {self.kind!r}; only with 'top_p'")
        if self.order == "auto" and self.scores != "sampled":
            raise ValueError(f"order='auto' does not go with scores={self.scores!r}; only with 'sampled'")
        if self.kind == "columns" and self.pairs:
            raise ValueError("pairs do not go with kind 'columns': a tile of a pair could hold one of its single keys")
        object.__setattr__(self, "pairs", tuple(_checked_pair(self, pair) for pair in self.pairs))

    @property
    def needs_data(self) -> bool:
        """Whether the pattern is estimated from queries and keys, for each head by itself."""
        return self.kind in _NEEDS_DATA or any(pattern.needs_data for _, _, pattern in self.pairs)

    @property
    def orders(self) -> tuple[tuple[Order, Order], ...]:
        """The (query order, key order) pairs that the head may take."""
        bases = {"auto": ("raster", "site")}.get(self.order, (self.order,))
        if self.kind in _ON_SITES:
            bases = ("site",)
        return tuple(
            (self._order(base, self.boundary in ("q", "2d")), self._order(base, self.boundary == "2d"))
            for base in bases
        )

    @property
    def by_site(self) -> tuple[bool, ...]:
        """Of each of `orders`, whether tokens stand by site or column."""
        return tuple(key.base != "raster" for _, key in self.orders)

    def most_columns(self, keys: int | SymInt) -> int | SymInt:
        """`columns` of so many keys, as a number."""
        if isinstance(self.columns, int):
            return self.columns
        return torch.sym_max(LEAST_COLUMNS, keys * math.floor(self.columns * _SHARE) // _SHARE)

    def _order(self, base: str, grouped: bool) -> Order:
        if base == "raster":
            return Order(grouped)
        return Order(grouped, base, self.stride, self.max_stride)

    def __str__(self) -> str:
        """How reports name the pattern, such as "a_shape(128, 4096) 2d"."""
        stride = self.stride or "frame"
        columns = f"{self.columns:.3g} of the keys as" if isinstance(self.columns, float) else self.columns
        details = {
            "a_shape": f"({self.sink}, {self.local})",
            "tri_shape": f"({self.sink}, {self.local}, {self.last})",
            "sf_fixed": f"({stride})",
            "sf_strided": f"({stride})",
            "vertical_slash": f"({self.vertical}, {self.slash})",
            "grid": f"({stride}, {self.lines})",
            "top_p": f"({self.scores}, {self.mass:g}" + (f", {columns} columns)" if self.columns else ")"),
            "columns": f"({self.columns})",
        }
        words = [self.kind + details.get(self.kind, "")]
        words += [] if self.order == "raster" else [f"{self.order} order"]
        words += [] if self.boundary == "none" else [self.boundary]
        words += [] if self.density is None else [f"<= {self.density:g}"]
        pairs = [f"{query}:{'*' if key < 0 else key} {pattern}" for query, key, pattern in self.pairs]
        return " ".join(words) + (f" [{'; '.join(pairs)}]" if pairs else "")

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"pairs": [[query, key, pattern.to_dict()] for query, key, pattern in self.pairs]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HeadPattern":
        """The pattern that `to_dict` wrote. Fields may be left out, `kind` may not. Raises ValueError."""
        if not isinstance(values, Mapping):
            raise ValueError(f"a head pattern is a mapping of field to value, got {values!r}")
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown head pattern field {name!r}{_nearest(name, known)}; fields: {known}")
        if "kind" not in values:
            raise ValueError(f"head pattern field 'kind' is missing in {dict(values)!r}; one of {list(KINDS)}")
        pairs = values.get("pairs", ())
        if isinstance(pairs, str) or not isinstance(pairs, Sequence):
            raise ValueError(f"pairs={pairs!r} is not a list of [query modality, key modality, pattern]")
        return cls(**{**values, "pairs": tuple(_read_pair(cls, pair) for pair in pairs)})


def distinct(patterns: Sequence[HeadPattern]) -> tuple[tuple[HeadPattern, ...], tuple[int, ...]]:
    """The different patterns in order of first use, and for each input its row among them."""
    rows: dict[HeadPattern, int] = {}
    index = tuple(rows.setdefault(pattern, len(rows)) for pattern in patterns)
    return tuple(rows), index


def distinct_orders(patterns: Sequence[HeadPattern]) -> tuple[tuple[Order, ...], tuple[Order, ...]]:
    """The different query orders and key orders of some patterns, in order of first use."""
    each = {id(pattern): pattern for pattern in patterns}.values()  # mostly one for many: to compare them takes long
    pairs = [pair for pattern in each for pair in pattern.orders]
    return tuple(dict.fromkeys(query for query, _ in pairs)), tuple(dict.fromkeys(key for _, key in pairs))


def encode(patterns: Sequence[HeadPattern]) -> str:
    """Patterns as compact JSON with a fixed field order. Equal patterns give equal text."""
    return f"[{','.join(map(_encode_one, patterns))}]"


@lru_cache(maxsize=1024)
def _encode_one(pattern: HeadPattern) -> str:
    return json.dumps(pattern.to_dict(), sort_keys=True, separators=(",", ":"))


@lru_cache(maxsize=1024)
def decode(text: str) -> tuple[HeadPattern, ...]:
    """The patterns that `encode` wrote. Raises ValueError when the text is not a list of patterns."""
    try:
        values = json.loads(text)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"patterns: {text!r} is not JSON ({error}); it must come from encode()") from error
    if not isinstance(values, list) or not values:
        raise ValueError(f"patterns: {text!r} is not a non-empty JSON list of head patterns")
    decoded = []
    kept: dict[str, HeadPattern] = {}  # equal rows are one object, see `distinct_orders`
    for row, value in enumerate(values):
        try:
            pattern = HeadPattern.from_dict(value)
            decoded.append(kept.setdefault(_encode_one(pattern), pattern))
        except ValueError as error:
            raise ValueError(f"patterns[{row}]: {error}") from error
    return tuple(decoded)


def encode_orders(queries: Sequence[Order], keys: Sequence[Order]) -> str:
    """Query orders and key orders as compact JSON. Equal orders give equal text."""
    return _encode_orders(tuple(queries), tuple(keys))


@lru_cache(maxsize=1024)
def _encode_orders(queries: tuple[Order, ...], keys: tuple[Order, ...]) -> str:
    values = {"query": [asdict(order) for order in queries], "key": [asdict(order) for order in keys]}
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


@lru_cache(maxsize=1024)
def decode_orders(text: str) -> tuple[tuple[Order, ...], tuple[Order, ...]]:
    """The (query orders, key orders) that `encode_orders` wrote. Raises ValueError for any other text."""
    try:
        values = json.loads(text)
        queries, keys = (tuple(Order(**order) for order in values[name]) for name in ("query", "key"))
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"orders: {text!r} was not written by encode_orders() ({error})") from error
    if not queries or not keys:
        raise ValueError(f"orders: {text!r} lacks a query order or a key order")
    return queries, keys


class KeyCopies(NamedTuple):
    """Each key head in each key order: the arguments of the `permute` that makes them."""

    sources: tuple[int, ...]  # key head of each copy
    rows: tuple[int, ...]  # key order of each copy
    kv_heads: int

    @classmethod
    def of(cls, kv_heads: int, orders: int) -> "KeyCopies":
        pairs = [(head, order) for head in range(kv_heads) for order in range(orders)]
        return cls(tuple(head for head, _ in pairs), tuple(order for _, order in pairs), kv_heads)

    def of_head(self, heads: int) -> tuple[int, ...]:
        """The first copy of each of `heads` query heads; those in the other orders follow it."""
        orders = len(self.rows) // self.kv_heads
        return tuple(head // (heads // self.kv_heads) * orders for head in range(heads))


class PlanRows(NamedTuple):
    """The rows of a site's plan: a row for each pattern, and for patterns estimated from data for each head of it."""

    patterns: tuple[HeadPattern, ...]  # of each row
    heads: tuple[int, ...]  # the head that each row is estimated for, -1 where a row serves all heads of its pattern
    of_head: tuple[int, ...]  # the row of each head


def plan_rows(patterns: Sequence[HeadPattern]) -> PlanRows:
    """patterns: one a head. Rows of one pattern are neighbours."""
    rows: dict[tuple[HeadPattern, int], int] = {}
    for pattern in distinct(patterns)[0]:
        for head, of_head in enumerate(patterns):
            if of_head == pattern:
                rows.setdefault((pattern, head if pattern.needs_data else -1), len(rows))
    of = tuple(rows[pattern, head if pattern.needs_data else -1] for head, pattern in enumerate(patterns))
    return PlanRows(tuple(pattern for pattern, _ in rows), tuple(head for _, head in rows), of)


def _checked_pair(parent: HeadPattern, pair: Any) -> tuple[int, int, HeadPattern]:
    if not isinstance(pair, tuple) or len(pair) != 3 or not isinstance(pair[2], HeadPattern):
        raise ValueError(f"pairs: {pair!r} is not (query modality, key modality, HeadPattern)")
    query, key, pattern = pair
    least = {"q": -1, "2d": 0}.get(parent.boundary)
    if least is None:
        raise ValueError(f"pairs do not go with boundary={parent.boundary!r}; with 'q' or '2d'")
    most = -1 if parent.boundary == "q" else MODALITIES - 1
    for name, value, low, high in (("query", query, 0, MODALITIES - 1), ("key", key, least, most)):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"pairs: {name} modality {value!r}; an int from {low} to {high}")
    if pattern.pairs or pattern.boundary != "none":
        raise ValueError(f"pairs: {pattern} has pairs or a boundary of its own; only its parent has")
    if pattern.density is not None:
        raise ValueError(f"pairs: {pattern} has a cap of its own; that of its parent holds for all pairs together")
    if pattern.columns or pattern.kind in ("columns", "vertical_slash", "sf_fixed"):
        raise ValueError(f"pairs: {pattern} picks single keys; a pair takes a pattern of whole tiles")
    if replace(pattern, boundary=parent.boundary).orders != replace(parent, pairs=()).orders:
        raise ValueError(
            f"pairs: {pattern} needs an order of its own; the pairs of a head share that of {parent.kind!r}"
        )
    return query, key, pattern


def _read_pair(cls: type[HeadPattern], pair: Any) -> tuple[int, int, HeadPattern]:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 3:
        raise ValueError(f"pairs: {pair!r} is not [query modality, key modality, pattern]")
    pattern = pair[2] if isinstance(pair[2], cls) else cls.from_dict(pair[2])
    return pair[0], pair[1], pattern


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name}={value!r} is not a head pattern {name}{_nearest(value, choices)}; one of {list(choices)}"
        )


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 < value < 1.0


def _require_tokens(name: str, value: object, least: int, most: int) -> None:
    # bool is an int in Python, and sink=True is a mistake.
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}={value!r} is not a number of tokens; an int from {least} to {most}")


def _require_columns(kind: str, value: object) -> None:
    if isinstance(value, float) and kind == "top_p":
        if not 0.0 < value < 1.0:
            raise ValueError(f"columns={value!r} is not a share of the keys; in (0, 1), or a number of keys as an int")
        return
    _require_tokens("columns", value, 0, MAX_TOKENS)


def _nearest(value: object, choices: Sequence[str]) -> str:
    matches = difflib.get_close_matches(value.lower(), choices, n=1, cutoff=0.5) if isinstance(value, str) else []
    return f", did you mean {matches[0]!r}" if matches else ""
