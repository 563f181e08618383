"""Pattern tables: one head pattern for every layer and head of a model, and what the search for them found."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmcompile import table_file
from mmcompile.architecture import Architecture
from mmcompile.errors import TableError
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.passes.decide import Reason, SiteRecord


@dataclass(frozen=True)
class FrontPoint:
    """One pattern on a head's Pareto front: none that costs less has a smaller error.

    ms: measured time of the kernel for this head (its share of a layer run with the pattern in every head). density:
    computed tiles over the causal ones. error: ||output - dense|| / ||dense|| of the attention's output. recall: mean
    share of a query's attention that the computed keys hold, None where it is not known.
    """

    pattern: HeadPattern
    ms: float
    density: float
    error: float
    recall: float | None = None


@dataclass(frozen=True)
class HeadFinding:
    """What the search found of one head, with the pattern that the table gives it.

    error, density, ms, recall: as of `FrontPoint`. held_out: error on samples that the search did not see, None without
    any. front: by rising ms.
    """

    error: float
    density: float
    ms: float
    recall: float | None = None
    held_out: float | None = None
    front: tuple[FrontPoint, ...] = ()


@dataclass(frozen=True)
class Segment:
    """One run of tokens of a sample. grid: frames, rows, columns; zeros where nothing tells them."""

    modality: str
    tokens: int
    grid: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Sample:
    """What a table was searched on, or validated on (`held_out`)."""

    name: str
    tokens: int
    segments: tuple[Segment, ...] = ()
    held_out: bool = False


@dataclass(frozen=True)
class Shard:
    """The part of a table that one rank of a tensor-parallel model has."""

    rank: int
    world_size: int


@dataclass(frozen=True)
class PatternTable:
    """`layers[layer][head]` is that head's pattern. Every layer has the same number of heads.

    The rest is what the search knows: None or empty in tables made by hand.
    architecture: of the whole model that the table is for. heads: `heads[layer][head]` is what was found of that head.
    samples: what it was found on. versions, device, settings: what it was found with. shard: where these are the heads
    of one rank alone.
    """

    layers: tuple[tuple[HeadPattern, ...], ...]
    architecture: Architecture | None = None
    heads: tuple[tuple[HeadFinding, ...], ...] | None = None
    samples: tuple[Sample, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    device: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    shard: Shard | None = None

    def __post_init__(self) -> None:
        if not self.layers or not self.layers[0]:
            raise TableError("a pattern table needs at least one layer and one head")
        for index, heads in enumerate(self.layers):
            for pattern in heads:
                if not isinstance(pattern, HeadPattern):
                    raise TableError(f"layer {index} holds {pattern!r}; must be a HeadPattern for every head")
            if len(heads) != len(self.layers[0]):
                raise TableError(
                    f"layer {index} has {len(heads)} heads, layer 0 has {len(self.layers[0])}; all must agree"
                )
        if self.heads is not None:
            shapes = [[len(heads) for heads in rows] for rows in (self.layers, self.heads)]
            if shapes[0] != shapes[1]:
                raise TableError(f"heads: findings of {shapes[1]} heads a layer, patterns of {shapes[0]}")
        if self.architecture is not None:
            ranks = 1 if self.shard is None else self.shard.world_size
            told = (self.architecture.layers, self.architecture.heads // ranks)
            if told != self.shape:
                raise TableError(f"architecture: {told} layers and heads, patterns of {self.shape}")

    @classmethod
    def of(cls, layers: Sequence[Sequence[HeadPattern]]) -> "PatternTable":
        """A table from any nesting of sequences."""
        return cls(tuple(tuple(heads) for heads in layers))

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return len(self.layers), len(self.layers[0])

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, whole or not at all; `docs/pattern_table.schema.json` describes it.

        Raises TableError where the file cannot be written.
        """
        table_file.write(path, _to_content(self))

    @classmethod
    def load(cls, path: str | Path) -> "PatternTable":
        """Read a saved table. Raises TableError (a ValueError) saying what is wrong with the file and where in it;
        OSError if it cannot be read."""
        content = table_file.read(path)
        try:
            return _of_content(content)
        except ValueError as error:
            raise TableError(f"{path}: {error}") from error

    def require(self, architecture: Architecture | None) -> None:
        """Raise TableError, saying what differs, unless the table is for this architecture.

        Nothing is raised where one of the two is not known.
        """
        if self.architecture is None or architecture is None:
            return
        differences = self.architecture.differences(architecture)
        if differences:
            raise TableError(f"the pattern table is for another architecture: {'; '.join(differences)}")

    def require_geometry(self, heads: int, kv_heads: int, head_dim: int) -> None:
        """The same for one attention, of which no more is known."""
        wanted = self._geometry()
        if wanted is not None and wanted != (heads, kv_heads, head_dim):
            raise TableError(
                f"the pattern table is for another architecture: {heads} heads on {kv_heads} KV heads of dim "
                f"{head_dim} here, and {wanted[0]} on {wanted[1]} of dim {wanted[2]} in the table"
            )

    def require_sites(self, records: Sequence[SiteRecord]) -> None:
        """The same for the attentions of one graph, of which only causal prefills are looked at.

        One that fits is enough: a model may have another decoder besides, which stays dense.
        """
        found = [
            (record.heads, record.kv_heads, record.head_dim)
            for record in records
            if record.reason in (Reason.SPARSE, Reason.UNKNOWN_LAYER)
        ]
        if found and self._geometry() not in found:
            self.require_geometry(*found[0])

    def _geometry(self) -> tuple[int, int, int] | None:
        """Heads, KV heads and head dim of an attention that the table fits."""
        if self.architecture is None:
            return None
        ranks = 1 if self.shard is None else self.shard.world_size
        made_for = self.architecture
        return made_for.heads // ranks, max(1, made_for.kv_heads // ranks), made_for.head_dim

    def slice_heads(self, rank: int, world_size: int) -> "PatternTable":
        """The heads that one rank of a tensor-parallel model has: `heads / world_size` neighbours.

        Query heads that share a KV head stay on one rank; where there are more ranks than KV heads, a KV head is on
        several of them, each with a part of its query heads.
        Raises TableError where the heads cannot be divided so.
        """
        if self.shard is not None:
            raise TableError(f"these are the heads of rank {self.shard.rank} already; slice the whole table")
        if world_size < 1 or not 0 <= rank < world_size:
            raise TableError(f"rank={rank}: must be from 0 to {world_size - 1}, world_size={world_size}")
        heads = self.shape[1]
        kv_heads = heads if self.architecture is None else self.architecture.kv_heads
        if heads % world_size or (kv_heads % world_size and world_size % kv_heads):
            raise TableError(f"{heads} heads on {kv_heads} KV heads cannot be divided over {world_size} ranks")
        own = slice(rank * (heads // world_size), (rank + 1) * (heads // world_size))
        return replace(
            self,
            layers=tuple(row[own] for row in self.layers),
            heads=None if self.heads is None else tuple(row[own] for row in self.heads),
            shard=Shard(rank, world_size),
        )


def _to_content(table: PatternTable) -> dict[str, Any]:
    """The table as JSON values. A pattern is written once, and named where it is used."""
    names = _Names()
    return {
        "architecture": None if table.architecture is None else table.architecture.to_dict(),
        "shard": None if table.shard is None else vars(table.shard),
        "layers": [[names.of(pattern) for pattern in heads] for heads in table.layers],
        "heads": None
        if table.heads is None
        else [[_finding_to_dict(finding, names) for finding in heads] for heads in table.heads],
        "patterns": {name: pattern.to_dict() for name, pattern in names.known()},
        "samples": [_sample_to_dict(sample) for sample in table.samples],
        "versions": dict(table.versions),
        "device": table.device,
        "settings": dict(table.settings),
    }


class _Names:
    """A readable name for each pattern; those that read alike are numbered."""

    def __init__(self) -> None:
        self._names: dict[HeadPattern, str] = {}
        self._taken: dict[str, int] = {}

    def of(self, pattern: HeadPattern) -> str:
        if pattern not in self._names:
            text = str(pattern)
            count = self._taken[text] = self._taken.get(text, 0) + 1
            self._names[pattern] = text if count == 1 else f"{text} #{count}"
        return self._names[pattern]

    def known(self) -> list[tuple[str, HeadPattern]]:
        return [(name, pattern) for pattern, name in self._names.items()]


def _finding_to_dict(finding: HeadFinding, names: _Names) -> dict[str, Any]:
    values = {name: getattr(finding, name) for name in ("error", "density", "ms", "recall", "held_out")}
    front = [vars(point) | {"pattern": names.of(point.pattern)} for point in finding.front]
    return values | {"front": front}


def _sample_to_dict(sample: Sample) -> dict[str, Any]:
    segments = [vars(segment) | {"grid": list(segment.grid)} for segment in sample.segments]
    return vars(sample) | {"segments": segments}


def _of_content(content: Mapping[str, Any]) -> PatternTable:
    """The table of JSON values that follow the schema."""
    patterns = {}
    for name, values in content["patterns"].items():
        try:
            patterns[name] = HeadPattern.from_dict(values)
        except (TypeError, ValueError) as error:
            raise TableError(f"patterns[{name!r}]: {error}") from error

    def named(name: str, place: str) -> HeadPattern:
        if name not in patterns:
            raise TableError(f"{place}: no pattern {name!r} in patterns")
        return patterns[name]

    layers = tuple(
        tuple(named(name, f"layers[{layer}][{head}]") for head, name in enumerate(names))
        for layer, names in enumerate(content["layers"])
    )
    heads = content["heads"]
    if heads is not None:
        heads = tuple(
            tuple(_finding_of(values, f"heads[{layer}][{head}].front", named) for head, values in enumerate(of_layer))
            for layer, of_layer in enumerate(heads)
        )
    return PatternTable(
        layers,
        None if content["architecture"] is None else Architecture(**content["architecture"]),
        heads,
        tuple(_sample_of(sample) for sample in content["samples"]),
        content["versions"],
        content["device"],
        content["settings"],
        None if content["shard"] is None else Shard(**content["shard"]),
    )


def _finding_of(values: Mapping[str, Any], place: str, named: Any) -> HeadFinding:
    front = tuple(
        FrontPoint(**{**point, "pattern": named(point["pattern"], f"{place}[{index}]")})
        for index, point in enumerate(values["front"])
    )
    return HeadFinding(**{**values, "front": front})


def _sample_of(values: Mapping[str, Any]) -> Sample:
    segments = tuple(Segment(**{**segment, "grid": tuple(segment["grid"])}) for segment in values["segments"])
    return Sample(**{**values, "segments": segments})


def mean_error(table: PatternTable, held_out: bool = False) -> float:
    """The mean over all heads of the error, or of the error on samples that the search did not see; NaN unknown."""
    found = [finding.held_out if held_out else finding.error for row in table.heads or () for finding in row]
    known = [error for error in found if error is not None]
    return math.fsum(known) / len(known) if known else math.nan
