"""Pattern tables: one head pattern for every layer and head of a model, in a readable file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcompile.kernels.patterns import HeadPattern

_FORMAT = "mmcompile.PatternTable"
_VERSION = 1


@dataclass(frozen=True)
class PatternTable:
    """`layers[layer][head]` is that head's pattern. Every layer has the same number of heads."""

    layers: tuple[tuple[HeadPattern, ...], ...]

    def __post_init__(self) -> None:
        if not self.layers or not self.layers[0]:
            raise ValueError("a pattern table needs at least one layer and one head")
        for index, heads in enumerate(self.layers):
            for pattern in heads:
                if not isinstance(pattern, HeadPattern):
                    raise ValueError(f"layer {index} holds {pattern!r}; must be a HeadPattern for every head")
            if len(heads) != len(self.layers[0]):
                raise ValueError(
                    f"layer {index} has {len(heads)} heads, layer 0 has {len(self.layers[0])}; all must agree"
                )

    @classmethod
    def of(cls, layers: Sequence[Sequence[HeadPattern]]) -> "PatternTable":
        """A table from any nesting of sequences."""
        return cls(tuple(tuple(heads) for heads in layers))

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        layers = [[pattern.to_dict() for pattern in heads] for heads in self.layers]
        content = {"format": _FORMAT, "version": _VERSION, "layers": layers}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "PatternTable":
        """Read a saved table. Raises ValueError saying what is wrong with the file, OSError if unreadable."""
        try:
            content = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a pattern table: not JSON ({error})") from error
        return cls.of(_parse(content, path))


def _parse(content: Any, path: str | Path) -> list[list[HeadPattern]]:
    if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
        raise ValueError(f'{path} is not a pattern table: no "format": "{_FORMAT}" in it')
    if content.get("version") != _VERSION:
        raise ValueError(f"{path} has version {content.get('version')!r}; this release reads {_VERSION}")
    layers = content.get("layers")
    if not isinstance(layers, list) or not all(isinstance(heads, list) for heads in layers):
        raise ValueError(f'{path}: "layers" must be a list of lists of head patterns')
    parsed = []
    for layer, heads in enumerate(layers):
        try:
            parsed.append([HeadPattern.from_dict(head) for head in heads])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: layer {layer}: {error}") from error
    return parsed
