"""Where tokens stand in the orders of a pattern, and the tiles that it takes from that and the mask alone."""

import torch
from torch import Tensor

from mmcompile.kernels import a_shape
from mmcompile.kernels.a_shape import Intervals, KeyGroups, own_blocks
from mmcompile.kernels.patterns import TILE, HeadPattern
from mmcompile.kernels.scene import Pair, Scene, each_pair
from mmcompile.kernels.single_keys import LEAST_BLOCK
from mmcompile.kernels.tile_bounds import site_bounds
from mmcompile.kernels.tile_classes import Chosen
from mmcompile.kernels.tile_list import Places

_BANDED = ("a_shape", "tri_shape")


def place(scene: Scene, pattern: HeadPattern, pairs: tuple[Pair, ...], grid: Tensor, dense: bool) -> Places:
    """The places of a pattern's tokens in each pair of orders. dense: every tile, whatever the pattern."""
    tags = scene.pair_tags(pairs)
    grouped = pattern.boundary == "2d"
    sink = pattern.sink
    if any(pattern.by_site):
        # The first valid keys stand together there, a tile of them, but not those of each modality or segment.
        sink = 1 if grouped or scene.segments else min(sink, TILE)
    pattern = HeadPattern("dense") if dense else pattern
    must, may = _runs(scene, pattern, pairs, tags, grouped, sink)
    return Places.of(scene.bounds(pairs), must, _chosen(scene, pattern, pairs, tags, may, grid))


def chosen(scene: Scene, pattern: HeadPattern, pairs: tuple[Pair, ...], grouped: bool, grid: Tensor) -> Chosen:
    """The tiles of a pattern, for a pair of modalities of another one. grouped: keys are, by modality."""
    tags = scene.pair_tags(pairs)
    return _chosen(scene, pattern, pairs, tags, _runs(scene, pattern, pairs, tags, grouped, 1).may, grid)


def block_length(pattern: HeadPattern, grid: Tensor) -> Tensor:
    """Tokens of a block of "sf_fixed", int64 without dimensions: of a frame, where the pattern tells no stride."""
    if pattern.stride:
        return torch.full((), max(pattern.stride, LEAST_BLOCK), dtype=torch.int64, device=grid.device)
    if grid.shape[0] == 0:
        return torch.full((), LEAST_BLOCK, dtype=torch.int64, device=grid.device)
    return (grid[:, 1].long() * grid[:, 2]).amax().clamp(min=LEAST_BLOCK)


def pair_sites(scene: Scene, pairs: tuple[Pair, ...]) -> tuple[Tensor, Tensor]:
    """Sites of queries and keys in the slots of each pair of orders, int32 [O, Sq] and [O, Sk]."""
    of_query = each_pair([scene.arrangement.query_site[:, query] for query, _ in pairs])
    return of_query, each_pair([scene.arrangement.key_site[:, key] for _, key in pairs])


def _runs(
    scene: Scene, pattern: HeadPattern, pairs: tuple[Pair, ...], tags: tuple[Tensor, Tensor], grouped: bool, sink: int
) -> a_shape.AShapeRuns:
    keys = scene.once("keys", pairs, lambda: _keys(scene, pairs, tags[1]))
    groups = scene.once("groups", pairs, lambda: _groups(scene, pairs, tags[1])) if grouped else keys
    local = pattern.local if pattern.kind in _BANDED and not any(pattern.by_site) else None
    last = pattern.last if pattern.kind == "tri_shape" else None
    return a_shape.runs(tags[0], keys, groups, sink, scene.window, local, last)


def _keys(scene: Scene, pairs: tuple[Pair, ...], key_tags: Tensor) -> KeyGroups:
    if scene.segments:
        return KeyGroups.of(key_tags, None)
    slots = [scene.key_slot(key) for _, key in pairs]
    usable = scene.raster_bounds().key.usable
    return KeyGroups.of_one_segment(scene.key_tags[:, 0], usable, slots[0] if len(pairs) == 1 else each_pair(slots))


def _groups(scene: Scene, pairs: tuple[Pair, ...], key_tags: Tensor) -> KeyGroups:
    """Within each modality."""
    order = scene.arrangement.key_order
    return KeyGroups.of(key_tags, each_pair([scene.key_modality.gather(-1, order[:, key].long()) for _, key in pairs]))


def _chosen(
    scene: Scene,
    pattern: HeadPattern,
    pairs: tuple[Pair, ...],
    tags: tuple[Tensor, Tensor],
    may: Intervals | None,
    grid: Tensor,
) -> Chosen:
    """may: the pattern's runs, where it has some."""
    match pattern.kind:
        case "dense":
            return Chosen(every=True)
        case "a_shape" | "tri_shape":
            runs = [] if may is None else [may]
            if any(pattern.by_site):
                runs.append(_latest_slots(scene, pairs, pattern.local))
            return Chosen(runs=Intervals.stack(runs), reach=pattern.local if scene.spans else None)
        case "sf_fixed":
            keys = scene.arrangement.key_order.shape[2]
            return Chosen(runs=own_blocks(tags[0], keys, block_length(pattern, grid)))
        case "sf_strided":
            return Chosen(sites=_site_bounds(scene, pairs))
        case "grid" if "s" in pattern.lines:
            return Chosen(sites=_site_bounds(scene, pairs))
        case _:
            return Chosen()


def _site_bounds(scene: Scene, pairs: tuple[Pair, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Least and greatest site of each query tile, and of each key tile."""
    of_query, of_key = pair_sites(scene, pairs)
    return *site_bounds(of_query), *site_bounds(of_key)


def _latest_slots(scene: Scene, pairs: tuple[Pair, ...], length: int) -> Intervals:
    """The `length` slots up to each query's own, in orders where neighbours in position are not neighbours in slot."""
    own = each_pair([scene.own_slot(pair) for pair in pairs]).unsqueeze(1)  # [O, 1, Sq]
    return Intervals((own - (length - 1)).clamp(min=0) // TILE, own // TILE)
