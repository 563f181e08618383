"""Random tile walks that no planner made, random heads to attend with, and the error of torch's attention."""

from dataclasses import dataclass, replace

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
    heads: int = 2
    copies: int = 2
    width: int = 32
    density: float = 0.5
    window: int | None = None
    segments: bool = False
    spans: bool = False
    padding: str = "none"
    permuted: bool = False
    seed: int = 0

    def walk(self) -> TileWalk:
        """Tags in random or raster order, and a random choice of the tiles with an allowed element."""
        torch.manual_seed(self.seed)
        query_tags, key_tags = self._query_tags(), self._key_tags()
        counts, tiles = tile_lists(query_tags, key_tags, self.window, self.density)
        head_plan = torch.randint(self.plans, (self.heads,)).tolist()
        key_head = torch.randint(self.copies, (self.heads,)).sort().values.tolist()
        return TileWalk(
            query_tags,
            key_tags,
            counts,
            tiles,
            tuple(head_plan),
            tuple(key_head),
            self.window,
            self.segments,
            self.spans,
        )

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
        """Query [B, H, Sq, D] in [B, Sq, H, D] memory, as models have it; key and value [B, C, Sk, D]."""
        torch.manual_seed(self.seed + 1)
        query = torch.randn(self.batch, self.query_length, self.heads, self.width).transpose(1, 2)
        key, value = torch.randn(2, self.batch, self.copies, self.key_length, self.width)
        return [tensor.to(device, dtype) for tensor in (query, key, value)]

    def _query_tags(self) -> Tensor:
        position = torch.arange(self.query_length) + self.query_offset
        return self._in_order(self._tags(position, torch.full_like(position, -1)))

    def _key_tags(self) -> Tensor:
        position = torch.arange(self.key_length)
        tags = self._tags(position, torch.full_like(position, -1))
        valid = self._valid(position)
        tags[:, 0].masked_fill_(~valid, INVALID)
        tags[:, 2].masked_fill_(~valid, INVALID_SPAN)
        return self._in_order(tags)

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

    def _in_order(self, tags: Tensor) -> Tensor:
        """[B, P, 3, S]."""
        rows = tags.unsqueeze(1).repeat(1, self.plans, 1, 1)
        if self.permuted:
            slots = torch.rand(self.batch, self.plans, tags.shape[2]).argsort(-1)
            rows = rows.gather(-1, slots.unsqueeze(2).expand_as(rows))
        return rows.contiguous()


# One case for each part of an element mask, with rows of two plans and tails in queries and keys.
_BASE = WalkCase(batch=2, query_length=140, key_length=260, query_offset=120, plans=2, heads=2, copies=2, density=0.8)
MASKS = {
    "causal": _BASE,
    "permuted": replace(_BASE, permuted=True),
    "window": replace(_BASE, window=90),
    "segments": replace(_BASE, segments=True, permuted=True),
    "spans": replace(_BASE, spans=True, query_offset=-3),
    "left padding": replace(_BASE, padding="left"),
    "holes": replace(_BASE, padding="holes", permuted=True),
    "no key": replace(_BASE, padding="empty"),
    "everything": replace(_BASE, window=150, segments=True, spans=True, padding="right", permuted=True, density=1.0),
}


def tile_lists(query_tags: Tensor, key_tags: Tensor, window: int | None, density: float) -> tuple[Tensor, Tensor]:
    """Counts and tiles of a random part of the tiles with an allowed element, in random order."""
    allowed = reference.element_mask(query_tags, key_tags, window)
    batch, plans, queries, keys = allowed.shape
    query_tiles, key_tiles = -(-queries // TILE), -(-keys // TILE)
    counts = torch.zeros(batch, plans, query_tiles, 2, dtype=torch.int32)
    tiles = torch.full((batch, plans, query_tiles, key_tiles), -1, dtype=torch.int32)
    for b, p, q in torch.cartesian_prod(*map(torch.arange, (batch, plans, query_tiles))).tolist():
        full, partial = [], []
        for k in torch.randperm(key_tiles).tolist():
            tile = allowed[b, p, q * TILE : (q + 1) * TILE, k * TILE : (k + 1) * TILE]
            if tile.any() and torch.rand(()) < density:
                whole = bool(tile.all()) and tile.shape[1] == TILE
                # Now and then a full tile in the other list: the element mask says the same of it.
                (full if whole and torch.rand(()) < 0.9 else partial).append(k)
        counts[b, p, q] = torch.tensor([len(full), len(partial)])
        tiles[b, p, q, : len(full)] = torch.tensor(full, dtype=torch.int32)
        tiles[b, p, q, key_tiles - len(partial) :] = torch.tensor(partial, dtype=torch.int32)
    return counts, tiles


def mask_of(walk: TileWalk) -> Tensor:
    """What attention over the walk may see, bool [B, H, Sq, Sk]."""
    mask = reference.plan_mask(walk.query_tags, walk.key_tags, walk.counts, walk.tiles, walk.window)
    return mask[:, list(walk.head_plan)]


def assert_as_exact_as_torch(output: Tensor, inputs: list[Tensor], mask: Tensor, walk: TileWalk) -> None:
    """Error against float64 at most 1.5 times that of torch's attention with the same mask and dtype.

    Both errors are relative to the whole output. In a small output each is a few lucky or unlucky roundings, so
    the bound has a floor: a quarter of an ulp in half precision, and in float32, where torch's exponentials on the
    CPU are good to some ulps only, four. Tests of large outputs compare without it.
    """
    query, key, value = inputs
    copies = list(walk.key_head)
    exact = reference.attention(query, key, value, mask, key_head=copies)
    torch_output = scaled_dot_product_attention(query, key[:, copies], value[:, copies], attn_mask=mask)
    torch_output = torch_output.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    assert output.dtype == query.dtype and output.shape == query.shape
    size = exact.norm().clamp(min=1e-30)
    ours, theirs = ((x.double() - exact).norm() / size for x in (output, torch_output))
    floor = torch.finfo(query.dtype).eps * (4 if query.dtype == torch.float32 else 0.25)
    assert ours <= 1.5 * theirs + floor, f"ours {ours:.3g}, torch's {theirs:.3g}"


lengths = st.one_of(st.integers(1, 400), st.sampled_from([1, 127, 128, 129, 255, 256, 257, 384]))


@st.composite
def walk_cases(draw: st.DrawFn, max_length: int = 400) -> WalkCase:
    query_length = min(draw(lengths), max_length)
    key_length = query_length + draw(st.sampled_from([0, 0, 1, 100, 128]))
    copies = draw(st.sampled_from([1, 2, 3]))
    return WalkCase(
        batch=draw(st.integers(1, 2)),
        query_length=query_length,
        key_length=key_length,
        query_offset=draw(st.sampled_from([key_length - query_length, 0, -3])),
        plans=draw(st.integers(1, 2)),
        heads=copies * draw(st.sampled_from([1, 2, 3])),
        copies=copies,
        width=draw(st.sampled_from([32, 64, 80, 96, 128, 256])),
        density=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        window=draw(st.sampled_from([None, None, 1, 100, 10_000])),
        segments=draw(st.booleans()),
        spans=draw(st.booleans()),
        padding=draw(st.sampled_from(["none", "none", "left", "right", "holes", "empty"])),
        permuted=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )
