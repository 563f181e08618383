"""Head patterns: which keys one attention head looks at, as plain values that travel inside a graph.

A pattern is a string constant in the rewritten graph (`encode`), so that the graph stays free of Python
objects and two graphs with the same patterns are the same graph.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal

TILE = 128  # queries and keys of one tile

KINDS = ("dense", "a_shape", "tri_shape")
BOUNDARIES = ("none", "k", "q", "2d")
MAX_TOKENS = 2**30  # a position minus such a length still fits int32

Order = Literal["raster", "modality"]


@dataclass(frozen=True)
class HeadPattern:
    """What one head computes. Lengths are in tokens.

    kind: "dense" (every allowed key), "a_shape" (the `sink` first and the `local` latest keys),
        "tri_shape" (A-shape, and the `last` queries of a sequence see every allowed key).
    boundary: inter-modality kind (arXiv 2504.16083, section 3.2). "none" and "k" leave the order alone, "q"
        groups the queries by modality, "2d" groups queries and keys, and the pattern then holds within each
        group of keys.

    Raises ValueError naming the field, its value, and what would be right.
    """

    kind: str = "dense"
    sink: int = 128
    local: int = 4096
    last: int = 128
    boundary: str = "none"

    def __post_init__(self) -> None:
        _require_choice("kind", self.kind, KINDS)
        _require_choice("boundary", self.boundary, BOUNDARIES)
        for name in ("sink", "local", "last"):
            _require_tokens(name, getattr(self, name))

    @property
    def query_order(self) -> Order:
        return "modality" if self.boundary in ("q", "2d") else "raster"

    @property
    def key_order(self) -> Order:
        return "modality" if self.boundary == "2d" else "raster"

    def __str__(self) -> str:
        """How reports name the pattern, such as "a_shape(128, 4096) 2d"."""
        lengths = {"dense": "", "a_shape": f"({self.sink}, {self.local})"}
        shape = lengths.get(self.kind, f"({self.sink}, {self.local}, {self.last})")
        return f"{self.kind}{shape}" + ("" if self.boundary == "none" else f" {self.boundary}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

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
        return cls(**values)


def distinct(patterns: Sequence[HeadPattern]) -> tuple[tuple[HeadPattern, ...], tuple[int, ...]]:
    """The different patterns in order of first use, and for each input its row among them."""
    rows: dict[HeadPattern, int] = {}
    index = tuple(rows.setdefault(pattern, len(rows)) for pattern in patterns)
    return tuple(rows), index


def encode(patterns: Sequence[HeadPattern]) -> str:
    """Patterns as compact JSON with a fixed field order. Equal patterns give equal text."""
    return json.dumps([pattern.to_dict() for pattern in patterns], sort_keys=True, separators=(",", ":"))


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
    for row, value in enumerate(values):
        try:
            decoded.append(HeadPattern.from_dict(value))
        except ValueError as error:
            raise ValueError(f"patterns[{row}]: {error}") from error
    return tuple(decoded)


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name}={value!r} is not a head pattern {name}{_nearest(value, choices)}; one of {list(choices)}"
        )


def _require_tokens(name: str, value: object) -> None:
    # bool is an int in Python, and sink=True is a mistake.
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TOKENS:
        raise ValueError(f"{name}={value!r} is not a number of tokens; an int from 1 to {MAX_TOKENS}")


def _nearest(value: object, choices: Sequence[str]) -> str:
    matches = difflib.get_close_matches(value.lower(), choices, n=1, cutoff=0.5) if isinstance(value, str) else []
    return f", did you mean {matches[0]!r}" if matches else ""
