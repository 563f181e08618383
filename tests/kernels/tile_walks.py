"""Random tile walks that no planner made, random heads to attend with, and the error of torch's attention."""

from dataclasses import dataclass, replace
from itertools import product

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmcompile.kernels import reference
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tags import INVALID, INVALID_SPAN
from mmcompile.kernels.tile_walk import TileWalk


@dataclass(frozen=True)
class WalkCase:
    """Shapes and mask of one attention; `seed` draws the rest."""

    batch: int = 1
    query_length: int = 200
    key_length: int = 200
    query_offset: int = 0
    plans: int = 1
    query_orders: int = 1
    key_orders: int = 1
    heads: int = 2
    copies: int = 2  # of the keys, in each key order
    width: int = 32
    density: float = 0.5
    columns: str = "none"  # or "shared" by the query tiles of a plan row, or "each"
    window: int | None = None
    segments: bool = False
    spans: bool = False
    padding: str = "none"
    permuted: bool = False
    seed: int = 0

    def walk(self) -> TileWalk:
        """Tags in random or raster orders, and a random choice of the tiles and columns with an allowed element."""
        torch.manual_seed(self.seed)
        query_tags, key_tags = self._query_tags(), self._key_tags()
        query_row, key_row = (
            torch.randint(orders, (self.batch, self.plans), dtype=torch.int32)
            for orders in (self.query_orders, self.key_orders)
        )
        tags = (reference.by_plan_row(query_tags, query_row), reference.by_plan_row(key_tags, key_row))
        allowed = reference.element_mask(*tags, self.window)
        cold = self._cold()
        counts, tiles = tile_lists(allowed, cold, self.density)
        columns = torch.empty(self.batch, self.plans, 0, dtype=torch.int32)
        if self.columns != "none":
            listed = reference.selected_tiles(counts, tiles, -(-self.key_length // TILE))
            columns = fill_columns(counts, cold, listed, self.columns == "shared")
        head_plan = torch.randint(self.plans, (self.heads,)).tolist()
        key_head = (torch.randint(self.copies, (self.heads,)).sort().values * self.key_orders).tolist()
        return TileWalk(
            query_tags,
            key_tags,
            query_row,
            key_row,
            counts,
            tiles,
            columns,
            cold,
            tuple(head_plan),
            tuple(key_head),
            self.window,
            self.segments,
            self.spans,
        )

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
        """Query [B, H, Sq, D] in [B, Sq, H, D] memory, as models have it; key and value [B, C, Sk, D].

        Copies of one head in several key orders hold unlike numbers, so that reading another's shows.
        """
        torch.manual_seed(self.seed + 1)
        query = torch.randn(self.batch, self.query_length, self.heads, self.width).transpose(1, 2)
        key, value = torch.randn(2, self.batch, self.copies * self.key_orders, self.key_length, self.width)
        return [tensor.to(device, dtype) for tensor in (query, key, value)]

    def _query_tags(self) -> Tensor:
        position = torch.arange(self.query_length) + self.query_offset
        return self._in_order(self._tags(position, torch.full_like(position, -1)), self.query_orders)

    def _key_tags(self) -> Tensor:
        position = torch.arange(self.key_length)
        tags = self._tags(position, torch.full_like(position, -1))
        valid = self._valid(position)
        tags[:, 0].masked_fill_(~valid, INVALID)
        tags[:, 2].masked_fill_(~valid, INVALID_SPAN)
        return self._in_order(tags, self.key_orders)

    def _tags(self, position: Tensor, no_span: Tensor) -> Tensor:
        """[B, 3, S] in token order: equal positions of queries and keys have equal segments and spans."""
        third = max(1, self.key_length // 3)
        span = torch.where(position // 40 % 2 == 1, position // 40, no_span)
        rows = [position, position // third * self.segments, span if self.spans else no_span]
        return torch.stack(rows).int().expand(self.batch, 3, -1).clone()

    def _valid(self, position: Tensor) -> Tensor:
        cut = torch.randint(self.key_length, (self.batch, 1))
        return {
            "none": torch.ones(self.batch, self.key_length, dtype=torch.bool),
            "left": position >= cut,
            "right": position <= cut,
            "holes": torch.rand(self.batch, self.key_length) < 0.7,
            "empty": torch.arange(self.batch).view(-1, 1).expand(-1, self.key_length) > 0,
        }[self.padding]

    def _cold(self) -> Tensor:
        """[B, P, Sk]: some whole tiles, so that they can be full, and most other keys. [B, P, 0] without columns."""
        length = self.key_length if self.columns != "none" else 0
        whole = (torch.rand(self.batch, self.plans, -(-length // TILE)) < 0.5).repeat_interleave(TILE, 2)
        return (torch.rand(self.batch, self.plans, length) < 0.8) | whole[..., :length]

    def _in_order(self, tags: Tensor, orders: int) -> Tensor:
        """[B, O, 3, S]."""
        rows = tags.unsqueeze(1).repeat(1, orders, 1, 1)
        if self.permuted:
            slots = torch.rand(self.batch, orders, tags.shape[2]).argsort(-1)
            rows = rows.gather(-1, slots.unsqueeze(2).expand_as(rows))
        return rows.contiguous()


# One case for each part of an element mask and each way to list keys, with rows of two plans and tails in queries and
# keys.
_BASE = WalkCase(batch=2, query_length=140, key_length=260, query_offset=120, plans=2, heads=2, copies=2, density=0.8)
_ORDERS = replace(_BASE, permuted=True, plans=4, query_orders=2, key_orders=2, heads=6)
MASKS = {
    "causal": _BASE,
    "permuted": replace(_BASE, permuted=True),
    "orders": _ORDERS,
    "window": replace(_BASE, window=90),
    "segments": replace(_BASE, segments=True, permuted=True),
    "spans": replace(_BASE, spans=True, query_offset=-3),
    "left padding": replace(_BASE, padding="left"),
    "holes": replace(_BASE, padding="holes", permuted=True),
    "no key": replace(_BASE, padding="empty"),
    "everything": replace(_BASE, window=150, segments=True, spans=True, padding="right", permuted=True, density=1.0),
    "columns": replace(_BASE, columns="shared"),
    "columns alone": replace(_BASE, columns="each", density=0.0),
    "everything with columns": replace(
        _ORDERS, columns="each", window=150, segments=True, spans=True, padding="right", density=0.5
    ),
}


def tile_lists(allowed: Tensor, cold: Tensor, density: float) -> tuple[Tensor, Tensor]:
    """Counts (of columns none) and tiles of a random part of the tiles with an allowed element, in random order.

    allowed: bool [B, P, Sq, Sk]. cold: bool [B, P, Sk] or [B, P, 0]. Returns int32 [B, P, nQ, 5] and [B, P, T].
    """
    batch, plans, queries, keys = allowed.shape
    query_tiles, key_tiles = -(-queries // TILE), -(-keys // TILE)
    through_tiles = allowed & cold.unsqueeze(2) if cold.shape[2] else allowed
    counts = torch.zeros(batch, plans, query_tiles, 5, dtype=torch.int32)
    flat = []
    for b, p in product(range(batch), range(plans)):
        entries: list[int] = []
        for q in torch.randperm(query_tiles).tolist():
            full, partial = [], []
            for k in torch.randperm(key_tiles).tolist():
                tile = (b, p, slice(q * TILE, (q + 1) * TILE), slice(k * TILE, (k + 1) * TILE))
                if allowed[tile].any() and torch.rand(()) < density:
                    whole = bool(through_tiles[tile].all()) and (k + 1) * TILE <= keys
                    # Now and then a full tile in the other list: the element mask says the same of it.
                    (full if whole and torch.rand(()) < 0.9 else partial).append(k)
            counts[b, p, q, :3] = torch.tensor([_append(entries, full + partial), len(full), len(partial)])
        flat.append(entries)
    return counts, _of_plan_rows(flat, batch)


def fill_columns(counts: Tensor, cold: Tensor, listed: Tensor, shared: bool) -> Tensor:
    """Random columns, in random order, that no listed tile attends to; writes their part of the counts.

    cold: bool [B, P, Sk]. listed: bool [B, P, nQ, nK]. shared: the query tiles of a plan row take the same list or
    overlapping parts of it; each has its own otherwise. Returns int32 [B, P, C].
    """
    batch, plans, query_tiles, _ = counts.shape
    in_tiles = cold.unsqueeze(2) & listed.repeat_interleave(TILE, 3)[..., : cold.shape[2]]  # [B, P, nQ, Sk]
    flat = []
    for b, p in product(range(batch), range(plans)):
        entries: list[int] = []
        of_all = _shuffled(~in_tiles[b, p].any(0))
        begin = _append(entries, of_all) if shared else 0
        for q in torch.randperm(query_tiles).tolist():
            if shared:
                part = torch.randint(len(of_all) + 1, (2,)).sort().values.tolist()
                first, last = part if torch.rand(()) < 0.5 else (0, len(of_all))
                counts[b, p, q, 3:] = torch.tensor([begin + first, last - first])
            else:
                own = _shuffled(~in_tiles[b, p, q])
                own = own[: int(torch.randint(len(own) + 1, ()))]
                counts[b, p, q, 3:] = torch.tensor([_append(entries, own), len(own)])
        flat.append(entries)
    return _of_plan_rows(flat, batch)


def _shuffled(chosen: Tensor) -> list[int]:
    slots = chosen.nonzero().flatten()
    return slots[torch.randperm(len(slots))].tolist()


def _append(entries: list[int], values: list[int]) -> int:
    """Puts the values after what is there and a gap of some -1, which nobody may read. Returns where they begin."""
    entries += [-1] * int(torch.randint(3, ())) + values
    return len(entries) - len(values)


def _of_plan_rows(flat: list[list[int]], batch: int) -> Tensor:
    """The entries of every plan row as int32 [B, P, longest + 1], filled up with -1."""
    longest = max(map(len, flat)) + 1
    return torch.tensor([entries + [-1] * (longest - len(entries)) for entries in flat]).int().view(batch, -1, longest)


def key_copies(walk: TileWalk) -> Tensor:
    """The key copy that each head reads, int64 [B, H]."""
    return torch.tensor(walk.key_head) + walk.key_row.cpu().long()[:, list(walk.head_plan)]


def of_heads(tensor: Tensor, walk: TileWalk) -> Tensor:
    """Keys or values [B, C, Sk, D] as each head reads them, [B, H, Sk, D]."""
    return torch.stack([copies[chosen] for copies, chosen in zip(tensor, key_copies(walk).tolist(), strict=True)])


def mask_of(walk: TileWalk) -> Tensor:
    """What attention over the walk may see, bool [B, H, Sq, Sk]."""
    return reference.plan_mask(*walk[:8], walk.window)[:, list(walk.head_plan)]


def unread(walk: TileWalk) -> Tensor:
    """Keys that no list of plan row 0 in batch row 0 names, in no tile and in no column, as slots; at least one."""
    key_length = walk.key_tags.shape[3]
    tiles = reference.selected_tiles(walk.counts, walk.tiles, -(-key_length // TILE))
    named = tiles[0, 0].any(0).repeat_interleave(TILE)[:key_length]
    for *_, start, single in walk.counts[0, 0].tolist():
        named[walk.columns[0, 0, start : start + single].long()] = True
    slots = (~named).nonzero().flatten()
    assert len(slots)
    return slots


def assert_as_exact_as_torch(output: Tensor, inputs: list[Tensor], mask: Tensor, walk: TileWalk) -> None:
    """Error against float64 at most 1.5 times that of torch's attention with the same mask and dtype.

    Both errors are relative to the whole output. In a small output each is a few lucky or unlucky roundings, so
    the bound has a floor: a quarter of an ulp in half precision, and in float32, where torch's exponentials on the
    CPU are good to some ulps only, four. Tests of large outputs compare without it.
    """
    query, key, value = inputs[0], *(of_heads(x, walk) for x in inputs[1:])
    exact = reference.attention(query, key, value, mask)
    torch_output = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch_output = torch_output.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    assert output.dtype == query.dtype and output.shape == query.shape
    size = exact.norm().clamp(min=1e-30)
    ours, theirs = ((x.double() - exact).norm() / size for x in (output, torch_output))
    floor = torch.finfo(query.dtype).eps * (4 if query.dtype == torch.float32 else 0.25)
    assert ours <= 1.5 * theirs + floor, f"ours {ours:.3g}, torch's {theirs:.3g}"


lengths = st.one_of(st.integers(1, 400), st.sampled_from([1, 127, 128, 129, 255, 256, 257, 384]))


@st.composite
def walk_cases(draw: st.DrawFn, max_length: int = 400, columns: bool = True) -> WalkCase:
    query_length = min(draw(lengths), max_length)
    key_length = query_length + draw(st.sampled_from([0, 0, 1, 100, 128]))
    copies = draw(st.sampled_from([1, 2, 3]))
    return WalkCase(
        batch=draw(st.integers(1, 2)),
        query_length=query_length,
        key_length=key_length,
        query_offset=draw(st.sampled_from([key_length - query_length, 0, -3])),
        plans=draw(st.integers(1, 3)),
        query_orders=draw(st.integers(1, 2)),
        key_orders=draw(st.integers(1, 2)),
        heads=copies * draw(st.sampled_from([1, 2, 3])),
        copies=copies,
        width=draw(st.sampled_from([32, 64, 80, 96, 128, 256])),
        density=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        columns=draw(st.sampled_from(["none", "shared", "each"] if columns else ["none"])),
        window=draw(st.sampled_from([None, None, 1, 100, 10_000])),
        segments=draw(st.booleans()),
        spans=draw(st.booleans()),
        padding=draw(st.sampled_from(["none", "none", "left", "right", "holes", "empty"])),
        permuted=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )
