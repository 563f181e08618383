"""What a whole tile can be told by the least and greatest tags of its queries and keys.

Conservative by construction: a tile called full has every element allowed, a tile called empty has none.
Where spans, segments, windows or orders interleave within a tile, the bounds may leave an empty tile called
non-empty, or a full one called partial: it costs a tile's work and no correctness.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmcompile.kernels.patterns import MAX_TOKENS, TILE
from mmcompile.kernels.tags import INVALID

LEAST = -(2**31)
CHUNK = 3 * 2**22  # tiles classified at once: a [rows, nK] int64 temporary stays at 96 MiB


def tile_count(length: Any) -> Any:  # an int, or a SymInt while tracing
    return (length + TILE - 1) // TILE


def row_chunks(batch: int, query_tiles: int, key_tiles: int) -> Iterator[slice]:
    """Query tiles in runs short enough that [B, rows, nK] temporaries stay small at a million tokens."""
    rows = max(1, CHUNK // max(1, batch * key_tiles))
    for start in range(0, query_tiles, rows):
        yield slice(start, min(start + rows, query_tiles))


class TagBounds(NamedTuple):
    """Least and greatest tags of each tile, int32 [B, n]; over its usable tokens unless said otherwise."""

    first: Tensor
    last: Tensor
    last_of_all: Tensor  # INVALID where a key is not valid or the tile is ragged
    segment_first: Tensor
    segment_last: Tensor
    span_first: Tensor  # over tokens that have a span
    span_last: Tensor
    span_least: Tensor  # over all tokens
    usable: Tensor  # how many tokens are usable

    @classmethod
    def of_queries(cls, tags: Tensor) -> "TagBounds":
        """tags: int32 [B, 3, Sq] in slot order. The missing rows of a ragged tile count for nothing."""
        position, segment, span = tags.unbind(1)
        last = _greatest(position, LEAST)
        of_segment = _least(segment), _greatest(segment, LEAST)
        return cls(_least(position), last, last, *of_segment, *_span_bounds(span), _usable(position))

    @classmethod
    def of_keys(cls, tags: Tensor) -> "TagBounds":
        """tags: int32 [B, 3, Sk] in slot order. The missing keys of a ragged tile count as not valid."""
        position, segment, span = tags.unbind(1)
        absent = position == INVALID
        return cls(
            _least(position),
            _greatest(position.masked_fill(absent, LEAST), LEAST),
            _greatest(position, INVALID),
            _least(segment.masked_fill(absent, INVALID)),
            _greatest(segment.masked_fill(absent, LEAST), LEAST),
            *_span_bounds(span),
            _usable(position),
        )


def tag_bounds(query_tags: Tensor, key_tags: Tensor) -> tuple[TagBounds, TagBounds]:
    """Of queries [B, 3, Sq] and keys [B, 3, Sk]."""
    if query_tags.device.type == "cuda":
        # Triton is imported for a GPU only.
        from mmcompile.kernels import tile_bounds_kernel

        return tile_bounds_kernel.tag_bounds(query_tags, key_tags)
    return tag_bounds_cpu(query_tags, key_tags)


def tag_bounds_cpu(query_tags: Tensor, key_tags: Tensor) -> tuple[TagBounds, TagBounds]:
    """`tag_bounds` in torch operations."""
    return TagBounds.of_queries(query_tags), TagBounds.of_keys(key_tags)


def _span_bounds(span: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _least(span.masked_fill(span < 0, INVALID)), _greatest(span, LEAST), _least(span)


def _usable(position: Tensor) -> Tensor:
    return (by_tile(position, INVALID) != INVALID).sum(-1, dtype=torch.int32)


def _least(values: Tensor) -> Tensor:
    return by_tile(values, INVALID).amin(-1)


def _greatest(values: Tensor, absent: int) -> Tensor:
    return by_tile(values, absent).amax(-1)


def site_bounds(site: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest site of each tile, int32 [O, n]; least above greatest where a tile has none.

    site: int32 [O, S] in slot order, negative for tokens without one.
    """
    if site.device.type == "cuda":
        from mmcompile.kernels import tile_bounds_kernel

        return tile_bounds_kernel.site_bounds(site)
    return site_bounds_cpu(site)


def site_bounds_cpu(site: Tensor) -> tuple[Tensor, Tensor]:
    """`site_bounds` in torch operations."""
    return _least(site.masked_fill(site < 0, INVALID)), _greatest(site.masked_fill(site < 0, LEAST), LEAST)


def by_tile(values: Tensor, absent: int) -> Tensor:
    missing = tile_count(values.shape[-1]) * TILE - values.shape[-1]
    if missing:  # without any, padding would copy
        values = torch.nn.functional.pad(values, (0, missing), value=absent)
    return values.unflatten(-1, (-1, TILE))  # [B, n, TILE]


@dataclass(frozen=True)
class TileBounds:
    """Classification of the tiles of one batch of (query order, key order) pairs."""

    query: TagBounds
    key: TagBounds
    window: int | None
    segments: bool
    spans: bool

    @classmethod
    def of(
        cls,
        query_tags: Tensor,
        key_tags: Tensor,
        window: int | None,
        segments: bool = True,
        spans: bool = True,
    ) -> "TileBounds":
        """query_tags: int32 [B, 3, Sq], key_tags: int32 [B, 3, Sk], in slot order.

        segments=False, spans=False: promised to hold no segment, no span, which saves their comparisons.
        """
        window = None if window is None else min(window, MAX_TOKENS)
        return cls(*tag_bounds(query_tags, key_tags), window, segments, spans)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, nQ, nK)."""
        return self.query.first.shape[0], self.query.first.shape[1], self.key.first.shape[1]

    def chunks(self) -> Iterator[slice]:
        return row_chunks(*self.shape)

    def non_empty(self, rows: slice) -> Tensor:
        """Tiles that may hold an allowed element, bool [B, rows, nK]."""
        query, key = self._rows(rows), self._columns()
        some = key.first <= query.last
        if self.spans:
            some |= self.span_match(rows)
        if self.window is not None:
            some &= key.last > query.first - self.window
        if self.segments:
            some &= key.segment_first <= query.segment_last
            some &= query.segment_first <= key.segment_last
        return some

    def count_non_empty(self, share: float) -> tuple[Tensor, Tensor]:
        """How many tiles may hold an allowed element, and how many `share` of these are at most: int64 [B] each."""
        if self.query.first.device.type == "cuda":
            from mmcompile.kernels import tile_bounds_kernel

            return tile_bounds_kernel.count_non_empty(self, share)
        return count_non_empty_cpu(self, share)

    def span_match(self, rows: slice) -> Tensor:
        """Tiles in which a query and a key may be of one span, bool [B, rows, nK]."""
        query, key = self._rows(rows), self._columns()
        return (key.span_first <= query.span_last) & (query.span_first <= key.span_last)

    def full(self, rows: slice) -> Tensor:
        """Tiles of which every element is allowed, bool [B, rows, nK]."""
        query, key = self._rows(rows), self._columns()
        every = key.last_of_all <= query.first
        if self.spans:
            one_span = (query.span_least == query.span_last) & (query.span_least >= 0)  # [B, rows, 1]
            one_span = one_span & (key.span_least == query.span_least) & (key.span_last == query.span_least)
            every |= one_span & (key.last_of_all != INVALID)
        if self.window is not None:
            every &= key.first > query.last - self.window
        if self.segments:
            every &= (query.segment_first == query.segment_last) & (key.segment_first == key.segment_last)
            every &= query.segment_first == key.segment_first
        return every

    def distance(self, rows: slice) -> Tensor:
        """Tokens between the nearest query and key of a tile, 0 where ranges meet, int32 [B, rows, nK]."""
        query, key = self._rows(rows), self._columns()
        return torch.maximum(query.first - key.last, key.first - query.last).clamp_(min=0)

    def _rows(self, rows: slice) -> TagBounds:
        return TagBounds(*(bound[:, rows, None] for bound in self.query))

    def _columns(self) -> TagBounds:
        return TagBounds(*(bound[:, None, :] for bound in self.key))


def count_non_empty_cpu(bounds: TileBounds, share: float) -> tuple[Tensor, Tensor]:
    """`TileBounds.count_non_empty` in torch operations."""
    count = torch.stack([bounds.non_empty(rows).sum((1, 2)) for rows in bounds.chunks()]).sum(0)
    return count, (count.double() * share).floor().long()
