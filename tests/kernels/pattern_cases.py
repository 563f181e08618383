"""Random attentions over random head patterns, and the checks that each must pass, on any device.

A case is drawn from a number: `PatternCase.of(seed)` is the same everywhere. Consecutive numbers go through every
combination of pattern kind, boundary kind and order.
"""

import random
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mmcompile.kernels import reference
from mmcompile.kernels.attend import Planned, plan_attention
from mmcompile.kernels.patterns import BOUNDARIES, KINDS, ORDERS, SCORES, TILE, HeadPattern
from mmcompile.kernels.tile_walk import TileWalk

NO_CAP = 1e-9  # a density at which only mandatory tiles are listed

_ON_SITES = ("grid", "sf_strided")
_PAIR_KINDS = ("dense", "a_shape", "tri_shape", "top_p", *_ON_SITES)


@lru_cache
def combinations() -> tuple[dict[str, Any], ...]:
    """Every kind, boundary kind, order and way to score that go together, as fields of a pattern."""
    found = []
    for kind, boundary, order, scores in product(KINDS, BOUNDARIES, ORDERS, SCORES):
        fields = {"kind": kind, "boundary": boundary, "order": order, "scores": scores}
        if (kind == "top_p" or scores == SCORES[0]) and _accepted(columns=1, **fields):
            found.append(fields)
    return tuple(found)


def _accepted(**fields: Any) -> bool:
    try:
        HeadPattern(**fields)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class PatternCase:
    """One causal attention: shapes, segments, mask, patterns and budget; `seed` draws the numbers."""

    seed: int
    patterns: tuple[HeadPattern, ...]  # of each head
    kv_heads: int
    width: int
    batch: int
    query_length: int
    key_length: int
    query_offset: int
    segments: tuple[tuple[int, int, tuple[int, int, int]], ...]  # tokens, modality, (frames, rows, columns)
    padding: str
    window: int | None
    density: float | None
    recall: float | None

    @classmethod
    def of(cls, seed: int) -> "PatternCase":
        draw = random.Random(f"pattern case {seed}")
        query_length = draw.choice([draw.randint(1, 900)] * 3 + [draw.choice([1, 127, 128, 129, 384, 513])])
        prefix = draw.choice([0, 0, 0, 1, 128, draw.randint(1, 400)])
        batch, kv_heads = draw.choice([1, 1, 2]), draw.choice([1, 2])
        heads = kv_heads * draw.choice([1, 2, 3])
        own = _pattern(draw, combinations()[seed % len(combinations())])
        other = _pattern(draw, draw.choice(combinations()))
        patterns = (own, *(draw.choice([own, own, other]) for _ in range(heads - 1)))
        return cls(
            seed,
            patterns,
            kv_heads,
            draw.choice([16, 32]),
            batch,
            query_length,
            query_length + prefix,
            draw.choice([prefix] * 6 + [0, prefix // 2]),
            _segments(draw, batch * query_length),
            draw.choice(["none", "none", "none", "left", "right", "holes", "empty"]),
            draw.choice([None, None, None, None, 1, 100, 300]),
            draw.choice([None, None, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0]),
            draw.choice([None, None, 0.5, 0.9, 1.0]),
        )

    def __str__(self) -> str:
        patterns = dict.fromkeys(map(str, self.patterns))
        return f"PatternCase.of({self.seed}): {' | '.join(patterns)}; {self!r}"

    def shortened(self, tokens: int, prefix: int) -> "PatternCase":
        """The case with at most so many queries, and so many keys before them."""
        tokens, prefix = min(self.query_length, tokens), min(self.key_length - self.query_length, prefix)
        segments, left = [], self.batch * tokens
        for size, modality, grid in self.segments:
            if left:
                segments.append((min(size, left), modality, grid if size <= left else (0, 0, 0)))
                left -= segments[-1][0]
        offset = min(self.query_offset, prefix)
        return replace(
            self, query_length=tokens, key_length=tokens + prefix, query_offset=offset, segments=tuple(segments)
        )

    def inputs(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Query [B, H, Sq, D], key and value [B, KV, Sk, D]: noise, some keys that all queries look at, and a grid."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = {"generator": generator}
        query = torch.randn(self.batch, len(self.patterns), self.query_length, self.width, **noise)
        key, value = torch.randn(2, self.batch, self.kv_heads, self.key_length, self.width, **noise)
        stride = int(torch.randint(2, 60, (), **noise))
        code = torch.randn(stride, self.width, **noise)
        key += code[torch.arange(self.key_length) % stride]
        query += code[(torch.arange(self.query_length) + self.query_offset) % stride]
        hot = torch.randint(self.key_length, (1 + self.key_length // 100,), **noise)
        key[:, :, hot] += 8 * torch.nn.functional.normalize(query.mean((0, 1, 2)), dim=0)
        return [tensor.to(device, dtype) for tensor in (query, key, value)]

    def boundaries(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        tokens = torch.tensor([0, *(segment[0] for segment in self.segments)]).cumsum(0)
        modality = torch.tensor([segment[1] for segment in self.segments])
        grid = torch.tensor([segment[2] for segment in self.segments])
        return tuple(part.to(device, torch.int32) for part in (tokens, modality, grid))  # type: ignore[return-value]

    def key_valid(self) -> Tensor | None:
        """bool [B, Sk]."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        key, cut = torch.arange(self.key_length), torch.randint(self.key_length, (self.batch, 1), generator=generator)
        return {
            "none": None,
            "left": key >= cut,
            "right": key <= cut,
            "holes": torch.rand(self.batch, self.key_length, generator=generator) < 0.7,
            "empty": torch.arange(self.batch).view(-1, 1).expand(-1, self.key_length) > 0,
        }[self.padding]

    def allowed(self) -> Tensor:
        """The element mask, bool [B, Sq, Sk] in token order."""
        position = torch.arange(self.query_length).unsqueeze(1) + self.query_offset
        key = torch.arange(self.key_length)
        allowed = key <= position
        if self.window is not None:
            allowed = allowed & (key > position - self.window)
        valid = self.key_valid()
        return allowed & (torch.ones(self.batch, 1, 1, dtype=torch.bool) if valid is None else valid.unsqueeze(1))

    def plan(self, query: Tensor, key: Tensor, density: float | None = None) -> Planned:
        """The plan of the case, or the same one at another density."""
        valid = self.key_valid()
        return plan_attention(
            query,
            key,
            self.patterns,
            self.boundaries(str(query.device)),
            density=self.density if density is None else density,
            recall=self.recall,
            key_valid=None if valid is None else valid.to(query.device),
            window=self.window,
            query_offset=self.query_offset,
        )


def _segments(draw: random.Random, tokens: int) -> tuple[tuple[int, int, tuple[int, int, int]], ...]:
    """Text and grids, told or not, up to the tokens; sometimes short of them or past them."""
    segments: list[tuple[int, int, tuple[int, int, int]]] = []
    left = tokens + draw.choice([0, 0, 0, -20, 50])
    told = draw.random() < 0.7
    while left > 0 and len(segments) < 8:
        if draw.random() < 0.4:
            size = min(left, draw.choice([0, 1, draw.randint(1, 200)]))
            segments.append((size, draw.choice([0, 0, 3]), (0, 0, 0)))
        else:
            rows, columns = draw.randint(1, 9), draw.randint(1, 9)
            frames = min(left // (rows * columns), draw.randint(1, 60))
            size = frames * rows * columns
            segments.append((size, draw.choice([1, 2]), (frames, rows, columns) if told else (0, 0, 0)))
        left -= size
    if draw.random() < 0.5 and left > 0:
        segments.append((left, draw.choice([0, 2]), (0, 0, 0)))
    return tuple(segments) or ((0, 0, (0, 0, 0)),)


def _pattern(draw: random.Random, fields: dict[str, Any]) -> HeadPattern:
    """Those fields, and random ones for the rest."""
    fields = fields | {
        "sink": draw.choice([1, 2, 128, 129, 200]),
        "local": draw.choice([1, 2, 64, 129, 300]),
        "last": draw.choice([1, 5, 128, 150]),
        "stride": draw.choice([0, 0, draw.randint(1, 80)]),
        "max_stride": draw.choice([1, 7, 64, 1024]),
        "vertical": draw.choice([1, 10, 100, 1000]),
        "slash": draw.choice([1, 100, 128, 300, 1024]),
        "lines": "".join(draw.sample("hvs", draw.randint(1, 3))),
        "mass": draw.choice([0.3, 0.9, 0.95, 1.0]),
    }
    if fields["kind"] in ("top_p", "columns"):
        least = 1 if fields["kind"] == "columns" else 0
        fields["columns"] = draw.choice([least, 3, 40, 1000] + ([1 / 8] if fields["kind"] == "top_p" else []))
    return HeadPattern(**fields, pairs=_pairs(draw, fields))


def _pairs(draw: random.Random, parent: dict[str, Any]) -> tuple[tuple[int, int, HeadPattern], ...]:
    if parent["boundary"] not in ("q", "2d") or parent["kind"] == "columns" or draw.random() < 0.4:
        return ()
    of_parent = {**parent, "pairs": ()}
    pairs = []
    for _ in range(draw.randint(1, 3)):
        kind = draw.choice(_PAIR_KINDS)
        own = dict(of_parent, boundary="none", kind=kind, columns=0)
        if parent["kind"] in _ON_SITES:
            own["order"] = "raster" if kind in _ON_SITES else "site"
        if kind != "top_p":
            own["scores"] = SCORES[0]
        key = -1 if parent["boundary"] == "q" else draw.randint(0, 3)
        if not _accepted(**{k: v for k, v in own.items() if k != "pairs"}):
            continue
        pair = (draw.randint(0, 3), key, HeadPattern(**own))
        if _accepted(**{**of_parent, "pairs": (pair,)}):
            pairs.append(pair)
    return tuple(pairs)


def walk_of(planned: Planned) -> TileWalk:
    """The plan as executors take it, on the CPU."""
    heads = len(planned.rows.of_head)
    tensors = (planned.arrangement.query_tags, planned.arrangement.key_tags, *planned.lists)
    rows = planned.rows.of_head
    return TileWalk(*(x.cpu() for x in tensors), rows, planned.copies.of_head(heads), planned.window, False, False)


def times_attended(planned: Planned) -> Tensor:
    """How often the plan counts each element, [B, H, Sq, Sk] in token order; uint8."""
    walk, arrangement = walk_of(planned), planned.arrangement
    times = reference.times_attended(*walk[:8], walk.window)
    assert int(times.max()) < 128
    orders = [
        reference.by_plan_row(order.cpu(), row)
        for order, row in ((arrangement.query_order, walk.query_row), (arrangement.key_order, walk.key_row))
    ]
    return reference.in_positions(times.to(torch.uint8), *orders)[:, list(planned.rows.of_head)]


def nearest_key(allowed: Tensor) -> Tensor:
    """Each query's latest allowed key alone. bool [B, Sq, Sk] to the same."""
    key = torch.arange(allowed.shape[2])
    latest = torch.where(allowed, key, -1).amax(-1, keepdim=True)
    return allowed & (key == latest)


def causal_tiles(case: PatternCase) -> Tensor:
    """Tiles of dense attention, int64 [B]: where the ranges of the valid positions meet, in raster order."""
    total = torch.zeros(case.batch, dtype=torch.int64)
    valid = case.key_valid()
    for b in range(case.batch):
        keys = torch.arange(case.key_length)
        of_tiles = [part if valid is None else part[valid[b, part]] for part in keys.split(TILE)]
        for part in (torch.arange(case.query_length) + case.query_offset).split(TILE):
            for tile in of_tiles:
                after = len(tile) and (case.window is None or int(tile[-1]) > int(part[0]) - case.window)
                total[b] += int(bool(after) and int(tile[0]) <= int(part[-1]))
    return total


def check_mask(case: PatternCase, planned: Planned) -> Tensor:
    """What the plan attends to, bool [B, H, Sq, Sk], after the laws that every plan keeps."""
    times, allowed = times_attended(planned), case.allowed().unsqueeze(1)
    assert int(times.max()) <= 1, f"attended twice\n{case}"
    mask = times > 0
    assert not (mask & ~allowed).any(), f"attends to what no query may\n{case}"
    assert not (nearest_key(allowed.squeeze(1)).unsqueeze(1) & ~mask).any(), f"a nearest key is missing\n{case}"
    return mask


def computed_tiles(planned: Planned) -> tuple[Tensor, Tensor]:
    """Listed tiles, and listed columns in tiles, float64 [B, P] each."""
    counts = planned.lists.counts.cpu().double()
    return counts[..., 1:3].sum((2, 3)), counts[..., 4].sum(2) / TILE


def check_density(case: PatternCase, planned: Planned, query: Tensor, key: Tensor) -> None:
    """The reported density is that of the lists, and the cap holds for what is not mandatory."""
    tiles, columns = computed_tiles(planned)
    causal = causal_tiles(case).unsqueeze(1)
    expected = ((tiles + columns) / causal.clamp(min=1)).float()
    torch.testing.assert_close(planned.density.cpu(), expected, msg=lambda text: f"{text}\n{case}")
    if case.density is None or case.density == 1.0:
        return
    least = case.plan(query, key, NO_CAP)
    mandatory = computed_tiles(least)[0]
    lists, others = planned.lists, least.lists
    same = ((lists.query_row == others.query_row) & (lists.key_row == others.key_row)).cpu()
    budget = (causal * case.density).clamp(min=0.0) - columns
    over = same & (tiles > torch.maximum(budget + 1.0, mandatory))
    assert not over.any(), f"{tiles[over]} tiles, budget {budget[over]}, mandatory {mandatory[over]}\n{case}"


def check_output(
    case: PatternCase, output: Tensor, mask: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> None:
    """Error against float64 at most 1.5 times that of torch's attention with the same mask, device and dtype."""
    exact = reference.attention(*(x.cpu() for x in (query, key, value)), mask, scale)
    torch_mask = mask.to(query.device)
    group = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
    # On a GPU the fast kernel that takes a mask: torch's slow path upcasts, and nobody's prefill runs it.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION] if query.is_cuda else [SDPBackend.MATH]):
        theirs = scaled_dot_product_attention(query, keys, values, attn_mask=torch_mask, scale=scale)
    theirs = theirs.masked_fill(~torch_mask.any(-1, keepdim=True), 0.0)
    assert output.dtype == query.dtype and output.shape == query.shape
    assert output.isfinite().all(), f"not finite\n{case}"
    size = exact.norm().clamp(min=1e-30)
    errors = [float((x.cpu().double() - exact).norm() / size) for x in (output, theirs)]
    floor = torch.finfo(query.dtype).eps * (4 if query.dtype == torch.float32 else 0.25)
    assert errors[0] <= 1.5 * errors[1] + floor, f"error {errors[0]:.3g}, torch's {errors[1]:.3g}\n{case}"


def check_case(case: PatternCase, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Plan and output of one case are what they must be."""
    query, key, value = case.inputs(device, dtype)
    planned = case.plan(query, key)
    mask = check_mask(case, planned)
    if case.density == 1.0:
        assert torch.equal(mask, case.allowed().unsqueeze(1).expand_as(mask)), f"not dense\n{case}"
    check_density(case, planned, query, key)
    check_output(case, planned.attend(query, value), mask, query, key, value, planned.scale)


def drop_tile(planned: Planned) -> Planned | None:
    """The plan without the last tile, of one query tile, of which some element counts; None if there is none."""
    counts = planned.lists.counts.clone()
    before = times_attended(planned)
    for place in (counts[..., 2] > 0).nonzero().tolist() + (counts[..., 1] > 0).nonzero().tolist():
        b, p, i = place
        which = 2 if counts[b, p, i, 2] > 0 else 1
        if p not in planned.rows.of_head:
            continue
        changed = counts.clone()
        changed[b, p, i, which] -= 1
        less = planned._replace(lists=planned.lists._replace(counts=changed))
        if not torch.equal(times_attended(less), before):
            return less
    return None
