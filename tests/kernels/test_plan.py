import inspect
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from mmcompile.kernels import plan as planning
from mmcompile.kernels import tile_bounds
from mmcompile.kernels.arrange import arrange
from mmcompile.kernels.head_indices import batch_rows, head_indices
from mmcompile.kernels.patterns import TILE, HeadPattern, distinct_orders, encode, encode_orders
from mmcompile.kernels.plan import empty_plan, plan, plan_shapes
from tests.kernels.plan_cases import Made, PlanCase, by_site, by_tile, plan_cases, site_cases, wholly

few = settings(deadline=None, max_examples=max(10, settings().max_examples * 2 // 5))
some_density = st.sampled_from([0.01, 0.1, 0.29, 0.5, 0.75, 0.95])
every_kind = st.one_of(plan_cases(), site_cases())


def rows(case: PlanCase, made: Made) -> Iterator[tuple[int, int, HeadPattern]]:
    for b in range(case.batch):
        for p, pattern in enumerate(made.rows.patterns):
            yield b, p, pattern


def in_slots(case: PlanCase, b: int, pattern: HeadPattern, elements: np.ndarray) -> np.ndarray:
    query_order, key_order = case.orders(b, pattern)
    return elements[query_order][:, key_order]


def single_keys(made: Made, b: int, p: int) -> np.ndarray:
    """Keys of a plan row that some query tile has as columns, bool [Sk] in slots."""
    single = np.zeros(made.arrangement.key_order.shape[2], bool)
    for tile in range(made.plan.counts.shape[2]):
        single[made.columns(b, p, tile)] = True
    return single


@few
@given(every_kind)
def test_each_row_names_its_orders_and_their_tags_say_exactly_what_is_allowed(case: PlanCase) -> None:
    made = case.plan()
    allowed, (query_row, key_row) = made.allowed(), made.plan[:2]
    for b, p, pattern in rows(case, made):
        query_order, key_order = case.orders(b, pattern)
        assert made.arrangement.query_order[b, query_row[b, p]].tolist() == query_order.tolist()
        assert made.arrangement.key_order[b, key_row[b, p]].tolist() == key_order.tolist()
        assert np.array_equal(allowed[b, p], case.allowed(b))


@few
@given(every_kind, st.one_of(st.none(), some_density))
def test_tile_lists_follow_each_other_full_tiles_in_front_and_nothing_twice(case: PlanCase, cap: float | None) -> None:
    made = case.plan(cap)
    sizes = case.batch, case.query_length, case.key_length, case.query_offset
    masks = case.segments is not None, case.spans is not None
    shapes = plan_shapes(*sizes, *masks, encode(made.rows.patterns), cap)
    assert [tuple(part.shape) for part in made.plan] == list(shapes)
    assert [part.dtype for part in made.plan] == [torch.int32] * 5 + [torch.bool]
    assert all(part.is_contiguous() for part in made.plan)
    for b, p, _ in rows(case, made):
        entries, end = made.plan.tiles[b, p].tolist(), 0
        for first, full, partial, *_ in made.plan.counts[b, p].tolist():
            assert first == end
            end = first + full + partial
            front, back = entries[first : first + full], entries[first + full : end]
            assert front == sorted(front) and back == sorted(back)
            assert len({*front, *back}) == full + partial and {*front, *back} <= set(range(made.key_tiles))
        assert entries[end:] == [-1] * (len(entries) - end)


@few
@given(every_kind, st.sampled_from([None, 0.3, 1.0]))
def test_full_tiles_are_those_with_every_element_allowed(case: PlanCase, cap: float | None) -> None:
    made = case.plan(cap)
    full, listed = made.full, made.listed
    for b, p, pattern in rows(case, made):
        in_tiles = in_slots(case, b, pattern, case.allowed(b)) & ~single_keys(made, b, p)
        whole = wholly(in_tiles)
        assert not (full[b, p] & ~whole).any()
        if case.spans is None:  # a tile may be whole half by its span and half by causality: not decided
            assert np.array_equal(full[b, p], listed[b, p] & whole)


@few
@given(every_kind, st.one_of(st.none(), some_density))
def test_no_key_is_attended_twice_and_none_that_is_not_allowed(case: PlanCase, cap: float | None) -> None:
    made = case.plan(cap)
    assert made.times().max() <= 1
    computed = made.computed()
    for b, p, _ in rows(case, made):
        assert not (computed[b, p] & ~case.allowed(b)).any()


@few
@given(every_kind)
def test_density_one_covers_every_allowed_element(case: PlanCase) -> None:
    made = case.plan(1.0)
    computed, listed = made.computed(), made.listed
    assert made.plan.columns.shape[2] == made.plan.cold.shape[2] == 0
    for b, p, pattern in rows(case, made):
        assert np.array_equal(computed[b, p], case.allowed(b))
        runs = case.key_valid is None and not case.interleaved and pattern.boundary in ("none", "k")
        runs = runs and not by_site(pattern)
        if case.window is case.spans is None and (case.segments is None or runs):
            non_empty = by_tile(in_slots(case, b, pattern, case.allowed(b)))
            assert np.array_equal(listed[b, p], non_empty)


@few
@given(plan_cases(spans=False))
def test_selected_tiles_are_the_union_of_what_their_queries_choose(case: PlanCase) -> None:
    made = case.plan()
    listed = made.listed
    for b, p, pattern in rows(case, made):
        union = by_tile(in_slots(case, b, pattern, case.chosen(b, pattern)))
        non_empty = by_tile(in_slots(case, b, pattern, case.allowed(b)))
        assert not (union & non_empty & ~listed[b, p]).any()
        if not case.interleaved:
            assert not (listed[b, p] & ~union).any()
            if case.window is None and (case.segments is None or pattern.boundary == "none"):
                assert np.array_equal(listed[b, p], union & non_empty)


@few
@given(site_cases())
def test_by_site_the_band_is_of_slots_and_lines_are_shared_sites(case: PlanCase) -> None:
    made = case.plan()
    listed = made.listed
    for b, p, pattern in rows(case, made):
        union = by_tile(in_slots(case, b, pattern, case.chosen(b, pattern)))
        non_empty = by_tile(in_slots(case, b, pattern, case.allowed(b)))
        if pattern.kind != "sf_strided":
            assert np.array_equal(listed[b, p], union & non_empty)
            continue
        assert not (union & non_empty & ~listed[b, p]).any()
        mandatory = by_tile(in_slots(case, b, pattern, case.mandatory(b, pattern)))
        assert not (listed[b, p] & ~((mandatory | tiles_in_reach_of_sites(case, b, pattern)) & non_empty)).any()


def tiles_in_reach_of_sites(case: PlanCase, b: int, pattern: HeadPattern) -> np.ndarray:
    """Tiles whose queries and keys have ranges of sites that meet, bool [nQ, nK]: all that bounds can tell."""
    ((query_order, key_order),) = pattern.orders
    slot_sites = [
        sites[order]
        for sites, order in zip(
            (case.query_sites(b, query_order), case.key_sites(b, key_order)), case.orders(b, pattern), strict=True
        )
    ]
    bounds = []
    for sites in slot_sites:
        tiles = np.pad(sites, (0, -len(sites) % TILE), constant_values=-1).reshape(-1, TILE)
        bounds.append((np.where(tiles < 0, 10**9, tiles).min(1), tiles.max(1)))
    (query_least, query_most), (key_least, key_most) = bounds
    return (query_least[:, None] <= key_most[None]) & (key_least[None] <= query_most[:, None])


@st.composite
def pair_cases(draw: st.DrawFn) -> PlanCase:
    """A head with patterns of their own for some pairs of modalities."""
    case = draw(plan_cases(spans=False, interleaved=False))
    shapes = st.builds(
        HeadPattern,
        kind=st.sampled_from(["dense", "a_shape", "tri_shape"]),
        sink=st.sampled_from([1, 128, 200]),
        local=st.sampled_from([1, 64, 300]),
        last=st.sampled_from([1, 150]),
    )
    boundary, modality = draw(st.sampled_from(["q", "2d"])), st.integers(0, 3)
    keys = st.just(-1) if boundary == "q" else modality
    pairs = draw(st.dictionaries(st.tuples(modality, keys), shapes, min_size=1, max_size=4))
    named = tuple((*pair, pattern) for pair, pattern in pairs.items())
    return replace(case, patterns=(replace(draw(shapes), boundary=boundary, pairs=named),))


@few
@given(pair_cases())
def test_a_pair_of_modalities_has_the_tiles_of_its_own_pattern(case: PlanCase) -> None:
    made = case.plan()
    listed = made.listed
    for b, p, pattern in rows(case, made):
        wanted = by_tile(in_slots(case, b, pattern, case.mandatory(b, pattern)))
        named = {(query, key): of_pair for query, key, of_pair in pattern.pairs}
        tiles_of = {}
        for one in {pattern, *named.values()}:
            as_head = replace(one, sink=pattern.sink, boundary=pattern.boundary, pairs=())  # sinks are the head's
            tiles_of[one] = by_tile(in_slots(case, b, pattern, case.chosen(b, as_head)))
        query_modality, key_modality = case.query_modality(b), case.key_modality(b)
        for query, key in product(set(query_modality), set(key_modality)):
            one = named.get((query, key), named.get((query, -1), pattern))
            both = (query_modality == query)[:, None] & (key_modality == key)[None]
            wanted |= by_tile(in_slots(case, b, pattern, both)) & tiles_of[one]
        non_empty = by_tile(in_slots(case, b, pattern, case.allowed(b)))
        assert not (wanted & non_empty & ~listed[b, p]).any()
        assert not (listed[b, p] & ~wanted).any()
        if case.window is case.segments is None:
            assert np.array_equal(listed[b, p], wanted & non_empty)


@few
@given(every_kind, st.one_of(st.none(), some_density))
def test_single_keys_are_the_ends_of_blocks_that_a_tile_can_reach(case: PlanCase, cap: float | None) -> None:
    made = case.plan(cap)
    for b, p, pattern in rows(case, made):
        query_order, key_order = case.orders(b, pattern)
        for tile in range(made.plan.counts.shape[2]):
            last = case.position()[query_order[tile * TILE : (tile + 1) * TILE]].max()
            assert key_order[made.columns(b, p, tile)].tolist() == case.columns(b, pattern, last)
        if made.plan.cold.shape[2]:
            reached = case.key_length if case.spans is not None else case.position()[-1] + 1
            usable = (case.valid(b) & (np.arange(case.key_length) < reached))[key_order]
            assert np.array_equal(~made.plan.cold[b, p].numpy() & usable, single_keys(made, b, p))


@few
@given(every_kind)
def test_every_chosen_key_that_is_allowed_is_attended(case: PlanCase) -> None:
    made = case.plan()
    computed = made.computed()
    for b, p, pattern in rows(case, made):
        assert not (case.chosen(b, pattern) & case.allowed(b) & ~computed[b, p]).any()
        ends = case.columns(b, pattern, case.key_length)
        assert np.array_equal(computed[b, p][:, ends], case.allowed(b)[:, ends])


@few
@given(plan_cases())
def test_spans_choose_the_tiles_within_local_distance(case: PlanCase) -> None:
    made = case.plan()
    listed = made.listed
    for b, p, pattern in rows(case, made):
        if pattern.kind == "sf_fixed":
            continue  # a block is what it is, whatever spans it
        distance = np.abs(case.position()[:, None] - np.arange(case.key_length)[None])
        near = case.allowed(b) & ((distance < pattern.local) | (pattern.kind == "dense"))
        near &= ~case.causal()
        assert not (by_tile(in_slots(case, b, pattern, near)) & ~listed[b, p]).any()


@few
@given(st.one_of(plan_cases(interleaved=False), site_cases()), st.one_of(st.none(), some_density))
def test_a_row_with_an_allowed_key_is_never_without_one(case: PlanCase, cap: float | None) -> None:
    made = case.plan(cap)
    computed = made.computed()
    for b, p, _ in rows(case, made):
        assert np.array_equal(computed[b, p].any(1), case.allowed(b).any(1))


@few
@given(every_kind, some_density)
def test_a_cap_takes_only_what_is_not_mandatory_and_holds(case: PlanCase, cap: float) -> None:
    made = case.plan(cap)
    listed, all_tiles, counts = made.listed, case.plan().listed, made.plan.counts.long()
    for b, p, pattern in rows(case, made):
        assert not (listed[b, p] & ~all_tiles[b, p]).any()
        mandatory = by_tile(in_slots(case, b, pattern, case.mandatory(b, pattern)))
        needed = mandatory & by_tile(in_slots(case, b, pattern, case.allowed(b)))
        assert not (needed & ~listed[b, p]).any()
        if not case.interleaved and case.window is None:
            columns = -(-int(counts[b, p, :, 4].sum()) // TILE)
            assert listed[b, p].sum() <= max(int(cap * raster_tiles(case)[b]) - columns, mandatory.sum())


@few
@given(every_kind, st.one_of(st.none(), some_density, st.just(1.0)))
def test_density_is_what_is_computed_over_the_tiles_of_raster_order(case: PlanCase, cap: float | None) -> None:
    made = case.plan(cap)
    listed = made.listed
    causal = raster_tiles(case)
    assert [stat.dtype for stat in made.stats] == [torch.float32] * 2
    assert made.stats.recall.shape == made.stats.density.shape and made.stats.recall.isnan().all()
    for b, p, _ in rows(case, made):
        computed = listed[b, p].sum() + made.plan.counts[b, p, :, 4].sum().item() / TILE
        assert made.stats.density[b, p].item() == pytest.approx(computed / max(1, causal[b]))


@few
@given(every_kind, some_density, st.one_of(st.none(), some_density, st.just(1.0)))
def test_the_cap_of_a_pattern_is_that_of_the_plan_where_it_is_smaller(
    case: PlanCase, cap: float, whole: float | None
) -> None:
    own = replace(case, patterns=tuple(replace(pattern, density=cap) for pattern in case.patterns)).plan(whole)
    together = case.plan(whole if whole == 1.0 else min(cap, whole or 1.0))
    for b, p, _ in rows(case, own):
        assert np.array_equal(own.listed[b, p], together.listed[b, p])
        assert torch.equal(own.plan.counts[b, p], together.plan.counts[b, p])
    assert torch.equal(own.stats.density, together.stats.density)


def raster_tiles(case: PlanCase) -> list[int]:
    """Tiles that dense attention computes in raster order, of each batch row."""
    dense = replace(case, patterns=(HeadPattern(),)).plan(1.0).listed[:, 0]
    for b in range(case.batch):
        non_empty = by_tile(case.allowed(b))
        assert not (non_empty & ~dense[b]).any()
        if case.window is case.spans is case.segments is None:
            assert np.array_equal(dense[b], non_empty)
    return dense.sum((1, 2)).tolist()


@few
@given(every_kind)
def test_a_higher_cap_never_lists_less(case: PlanCase) -> None:
    before = np.zeros_like(case.plan().listed)
    for cap in (0.05, 0.2, 0.4, 0.6, 0.8, 0.99, 1.0):
        listed = case.plan(cap).listed
        assert not (before & ~listed).any()
        before = listed


@few
@given(every_kind, st.one_of(st.none(), some_density))
def test_running_a_few_query_tiles_at_a_time_changes_nothing(case: PlanCase, cap: float | None) -> None:
    whole = case.plan(cap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_bounds, "CHUNK", 1)
        pieces = case.plan(cap)
    assert_same(whole, pieces)


@few
@given(every_kind, st.one_of(st.none(), some_density))
def test_each_row_is_planned_as_if_it_were_alone(case: PlanCase, cap: float | None) -> None:
    made = case.plan(cap)
    listed = made.listed
    for p, pattern in enumerate(made.rows.patterns):
        alone = replace(case, patterns=(pattern,)).plan(cap)
        assert np.array_equal(alone.listed[:, 0], listed[:, p])
        assert torch.equal(alone.stats.density[:, 0], made.stats.density[:, p])


@few
@given(plan_cases(), st.integers(0, 12))
def test_nothing_is_written_outside_the_room_and_what_is_listed_is_right(case: PlanCase, room: int) -> None:
    whole, cap = case.plan(0.5), 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_tile_room", lambda *_: room)
        made = case.plan(cap)
    assert made.plan.tiles.shape[2] == room
    both = min(room, whole.plan.tiles.shape[2])  # short prompts have less room than that
    assert torch.equal(made.plan.tiles[..., :both], whole.plan.tiles[..., :both])
    first, full, partial, *_ = made.plan.counts.unbind(-1)
    assert (first + full + partial).max() <= room and made.plan.counts.min() >= 0
    assert not (made.listed & ~whole.listed).any() and not (made.full & ~whole.full).any()


def assert_same(one: Made, other: Made) -> None:
    for parts in zip(one[1:4], other[1:4], strict=True):
        for name, a, b in zip(parts[0]._fields, *parts, strict=True):
            assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) if a.is_floating_point() else torch.equal(a, b), (
                name
            )


def one_sequence(length: int, pattern: HeadPattern, **parts: Any) -> PlanCase:
    """One causal sequence of one modality, but for `parts`."""
    given = {"offsets": np.array([0, length]), "modality": np.array([1]), "grid": np.zeros((1, 3), int)}
    given |= {"key_valid": None, "segments": None, "spans": None, "window": None}
    given |= {"interleaved": False, "patterns": (pattern,)}
    sizes = {"batch": 1, "query_length": length, "key_length": length, "query_offset": 0}
    return PlanCase(**{**sizes, **given, **parts})


def test_a_cap_keeps_the_nearest_tiles() -> None:
    tiles = 20
    case = one_sequence(tiles * TILE, HeadPattern())
    made = case.plan(0.5)
    # 210 tiles: a budget of 105 holds 20 + 19 of the diagonal and the sink, and 18, 17, 16, 15 of the rings.
    query, key = np.arange(tiles)[:, None], np.arange(tiles)[None]
    band = (key <= query) & ((query - key <= 4) | (key == 0))
    assert np.array_equal(made.listed[0, 0], band)
    assert made.stats.density.item() == pytest.approx(band.sum() / 210)
    assert case.plan().stats.density.item() == 1.0


def test_density_of_a_batch_row_without_keys_is_zero() -> None:
    valid = np.array([[False] * 300, [True] * 300])
    made = one_sequence(300, HeadPattern("a_shape"), batch=2, key_valid=valid).plan()
    assert made.stats.density.tolist() == [[0.0], [1.0]]
    assert (made.plan.counts[0] == 0).all()


def test_the_sink_and_the_local_band_move_with_left_padding() -> None:
    length, padding = 10 * TILE, 3 * TILE
    pattern = HeadPattern("a_shape", sink=TILE, local=TILE)
    case = one_sequence(length, pattern, key_valid=(np.arange(length) >= padding)[None])
    tiles = case.plan().listed[0, 0]
    assert not tiles[:, :3].any() and not tiles[:3].any()
    assert tiles[3:, 3].all()
    assert np.flatnonzero(tiles[9]).tolist() == [3, 8, 9]


@pytest.mark.parametrize("local", [1, 2, TILE + 1, TILE + 2])
def test_the_local_band_ends_at_the_token(local: int) -> None:
    tiles = one_sequence(6 * TILE, HeadPattern("a_shape", sink=1, local=local)).plan().listed[0, 0]
    query, key = np.arange(6)[:, None], np.arange(6)[None]
    back = (local - 1 + TILE - 1) // TILE  # key tiles that the first query of a tile reaches back
    assert np.array_equal(tiles, (key <= query) & ((query - key <= back) | (key == 0)))


@pytest.mark.parametrize("padding", [0, TILE, 2 * TILE])
def test_the_last_queries_are_the_last_valid_ones(padding: int) -> None:
    length, last = 8 * TILE, 7 - padding // TILE
    pattern = HeadPattern("tri_shape", sink=1, local=1, last=TILE)
    valid = (np.arange(length) < length - padding)[None]
    per_row = one_sequence(length, pattern, key_valid=valid).plan().listed[0, 0].sum(1).tolist()
    # A row of padding looks at the sink and at the last valid key.
    assert per_row == [1, *[2] * (last - 1), last + 1, *[2] * (7 - last)]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("cap", [None, 0.01])
def test_a_query_that_only_its_span_lets_see_keeps_its_nearest_key(window: int | None, cap: float | None) -> None:
    # Keys 10..699 are not valid, queries from 200 on are of one span: query 200 may see key 700 and, without
    # the window, key 9. Its tile is too far from key 700 for the local distance.
    key = np.arange(800)
    valid = ((key < (10 if window else 0)) | (key >= 700))[None]
    span = np.where(key >= 200, 3, -1)[None]
    pattern = HeadPattern("a_shape", sink=1, local=1)
    case = one_sequence(800, pattern, key_valid=valid, spans=(span, span), window=window)
    made = case.plan(cap)
    computed = made.computed()[0, 0]
    assert case.allowed(0)[200:].any(1).all()
    assert np.array_equal(computed.any(1), case.allowed(0).any(1))


@pytest.mark.parametrize("local", [1, 2, TILE + 1, TILE + 2])
def test_spans_reach_forward_as_far_as_the_local_band_reaches_back(local: int) -> None:
    length = 6 * TILE
    span = np.zeros((1, length), int)
    pattern = HeadPattern("a_shape", sink=1, local=local)
    tiles = one_sequence(length, pattern, spans=(span, span)).plan().listed[0, 0]
    query, key = np.arange(6)[:, None], np.arange(6)[None]
    reach = (local - 1 + TILE - 1) // TILE
    assert np.array_equal(tiles, (np.abs(query - key) <= reach) | (key == 0))


def test_one_span_makes_full_tiles_but_not_where_keys_are_missing() -> None:
    span = np.zeros((1, 2 * TILE + 5), int)
    made = one_sequence(2 * TILE + 5, HeadPattern(), spans=(span, span)).plan()
    assert made.plan.counts[0, 0].tolist() == [[3 * tile, 2, 1, 0, 0] for tile in range(3)]
    assert made.plan.tiles[0, 0].tolist() == [0, 1, 2] * 3


def test_a_negative_span_is_no_span() -> None:
    span = np.array([[-9, -2, -1, 0, 4]])
    valid = np.array([[True, True, True, True, False]])
    made = one_sequence(5, HeadPattern(), spans=(span, span), key_valid=valid).arrange()
    assert made.query_tags[0, 0, 2].tolist() == [-1, -1, -1, 0, 4]
    assert made.key_tags[0, 0, 2].tolist() == [-1, -1, -1, 0, -2]


def test_one_long_segment_groups_by_modality_under_a_cached_prefix() -> None:
    # Two cached keys, then text, image, text: the 2D order puts both texts and the prefix before the image.
    segments = {"offsets": np.array([0, 1, 4, 6]), "modality": np.array([0, 1, 0])}
    pattern = HeadPattern("a_shape", boundary="2d")
    segments["grid"] = np.zeros((3, 3), int)
    made = one_sequence(6, pattern, key_length=8, query_offset=2, **segments).arrange()
    assert made.query_order[0, 0].tolist() == [0, 4, 5, 1, 2, 3]
    assert made.key_order[0, 0].tolist() == [0, 1, 2, 6, 7, 3, 4, 5]
    assert made.query_tags[0, 0, 0].tolist() == [2, 6, 7, 3, 4, 5]


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.fixture
def no_kept_tables() -> Iterator[None]:
    """Tables that are kept from call to call hold data, and fake ones must not outlive their mode."""
    head_indices.cache_clear()
    batch_rows.cache_clear()
    yield
    head_indices.cache_clear()
    batch_rows.cache_clear()


@pytest.mark.usefixtures("no_kept_tables")
@pytest.mark.parametrize("cap", [None, 0.1])
def test_a_million_tokens_need_no_host_value_and_no_huge_temporary(cap: float | None) -> None:
    length = 2**20
    patterns = [
        HeadPattern("a_shape", boundary="2d"),
        HeadPattern("sf_fixed"),
        HeadPattern("sf_strided", boundary="2d"),
    ]
    # Fake tensors hold no data: a host sync or a shape that depends on data would raise here.
    with FakeTensorMode(), LargestTensor() as largest:
        boundaries = [torch.zeros(41, dtype=torch.int32), torch.zeros(40, dtype=torch.int32)]
        boundaries.append(torch.zeros(40, 3, dtype=torch.int32))
        valid = torch.ones(1, length, dtype=torch.bool)
        groups = torch.zeros(1, length, dtype=torch.int64)
        orders = encode_orders(*distinct_orders(patterns))
        arrangement = arrange(None, None, *boundaries, valid, groups, groups, groups, groups,
                              1, length, length, 0, orders)  # fmt: skip
        made, stats = plan(None, None, arrangement, *boundaries, 0, 1.0, 4096, True, True, encode(patterns),
                           [-1] * 3, cap, None)  # fmt: skip
        assert stats.density.shape == (1, 3)
    assert [tuple(part.shape) for part in made] == list(
        plan_shapes(1, length, length, 0, True, True, encode(patterns), cap)
    )
    assert made.columns.shape == (1, 3, length // 64 + 1) and made.cold.shape == (1, 3, length)
    # The result itself, or int64 values of the tiles classified at once, and little more for the ends of lists.
    assert largest.bytes <= max(made.tiles.numel() * 4, tile_bounds.CHUNK * 8 * 17 // 16)


def test_a_capped_list_has_no_room_for_every_tile() -> None:
    patterns = encode([HeadPattern()])
    every, capped, _ = (plan_shapes(1, 2**20, 2**20, 0, False, False, patterns, cap)[3] for cap in (None, 0.05, 1.0))
    assert every == (1, 1, 2**26)
    assert capped[2] < 0.05 / 2 * every[2] + 3 * TILE * 2**13
    own = [HeadPattern("top_p", density=0.05), HeadPattern("grid", density=0.02)]
    assert plan_shapes(1, 2**20, 2**20, 0, False, False, encode(own), None)[3] == (1, 2, capped[2])
    assert plan_shapes(1, 2**20, 2**20, 0, False, False, encode([*own, HeadPattern()]), None)[3][2] == 2**26
    assert (
        plan_shapes(1, 2**20, 2**20, 0, False, True, patterns, 0.05)[3][2] > 0.05 * every[2]
    )  # a span may hold everything


@given(st.integers(1, 2000), st.integers(0, 2000), st.integers(-300, 2000))
def test_a_capped_list_has_room_for_all_causal_tiles(queries: int, before: int, after: int) -> None:
    keys = max(1, before + queries + after)
    room = plan_shapes(1, queries, keys, before, False, False, encode([HeadPattern()]), 1 - 2**-16)[3][2]
    last = np.minimum(np.arange(0, queries, TILE) + TILE - 1, queries - 1) + before
    assert room >= (np.minimum(last, keys - 1) // TILE + 1).sum()


@pytest.mark.parametrize("scattered", ["valid keys", "segments"])
def test_a_capped_list_has_room_for_a_sink_whose_keys_stand_far_apart(scattered: str) -> None:
    queries, keys = 4 * TILE, 2**15
    offset, place = keys - queries, torch.arange(keys)[None]
    valid = (place % TILE == 0) | (place >= offset) if scattered == "valid keys" else None
    ids = place % 1000 if scattered == "segments" else None
    patterns = (HeadPattern("a_shape", sink=512, local=128),)
    no_boundaries = [torch.tensor(part, dtype=torch.int32) for part in ([0, queries], [0], [[0, 0, 0]])]
    of_queries = None if ids is None else ids[:, offset:]
    orders = encode_orders(*distinct_orders(patterns))
    sizes = 1, queries, keys, offset
    arrangement = arrange(None, None, *no_boundaries, valid, of_queries, ids, None, None, *sizes, orders)
    made, _ = plan(None, None, arrangement, *no_boundaries, offset, 1.0, None, ids is not None, False,
                   encode(patterns), [-1], 0.01, None)  # fmt: skip
    first, full, partial, *_ = made.counts[0, 0].unbind(-1)
    # Each query tile has its sink and its own keys, the last one too, and all of it is in the list.
    assert ((full + partial) > 512 * TILE // keys).all() and int((first + full + partial)[-1]) < made.tiles.shape[2]
    assert (made.tiles[0, 0, first.long() + full + partial - 1] >= offset // TILE).all()


@pytest.mark.parametrize("length", [1000, 50])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_shapes_may_be_symbolic(length: int, cap: float | None) -> None:
    real, patterns = torch.zeros(2, length), encode([HeadPattern("sf_fixed"), HeadPattern("vertical_slash")])
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        batch, tokens = mode.from_tensor(real, static_shapes=False).shape
        made = empty_plan(batch, tokens, tokens, 0, False, False, patterns, cap, torch.device("cpu"))
    assert isinstance(made.tiles.shape[2], torch.SymInt) and isinstance(made.columns.shape[2], torch.SymInt)
    expected = plan_shapes(2, length, length, 0, False, False, patterns, cap)
    assert [tuple(map(int, part.shape)) for part in made] == list(expected)


@pytest.mark.parametrize("length", [1, 50, 63, 64])
def test_blocks_longer_than_the_keys_leave_no_single_keys_but_their_room(length: int) -> None:
    made = one_sequence(length, HeadPattern("sf_fixed")).plan()
    assert made.plan.columns.shape[2] == length // 64 + 1 and made.plan.cold.shape[2] == length
    assert made.columns(0, 0, 0) == ([63] if length == 64 else [])
    assert made.computed().sum() == length * (length + 1) // 2


def test_arguments_are_those_of_the_op_in_its_order() -> None:
    assert list(inspect.signature(plan).parameters) == [
        "query",
        "key",
        "arrangement",
        "offsets",
        "modality",
        "grid",
        "query_offset",
        "scale",
        "window",
        "segments",
        "spans",
        "patterns",
        "heads",
        "density",
        "recall",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"density": 0.0}, r"density=0\.0 .*\(0, 1\]"),
        ({"density": 1.5}, r"density=1\.5 .*\(0, 1\]"),
        ({"density": float("nan")}, r"density=nan .*\(0, 1\]"),
        ({"recall": 0.0}, r"recall=0\.0 .*\(0, 1\]"),
        ({"recall": -0.5}, r"recall=-0\.5 .*\(0, 1\]"),
        ({"window": 0}, r"window=0 .*at least 1"),
        ({"patterns": "a_shape"}, r"patterns: 'a_shape' is not JSON"),
        ({"heads": []}, r"heads has 0 entries; 1, one for each of the patterns"),
        ({"patterns": encode([HeadPattern("top_p")])}, r"patterns\[0\]: top_p.* from query and key; pass both"),
        (
            {
                "patterns": encode([HeadPattern("grid")]),
                "query": torch.zeros(1, 2, 9, 4),
                "key": torch.zeros(1, 1, 9, 4),
            },
            r"heads\[0\]=-1 is not a head of query; from 0 to 1",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(change: dict[str, object], said: str) -> None:
    case = one_sequence(9, HeadPattern())
    with pytest.raises(ValueError, match=said):
        plan(**{**case.plan_arguments(case.arrange(), None), **change})


def test_density_one_needs_no_data() -> None:
    case = one_sequence(300, HeadPattern("grid", stride=16))
    assert np.array_equal(case.plan(1.0).computed()[0, 0], case.allowed(0))


@pytest.mark.gpu
@pytest.mark.parametrize("cap", [None, 0.2, 1.0])
def test_plan_never_waits_for_the_device(cap: float | None) -> None:
    length = 5000
    patterns = [
        HeadPattern("a_shape", boundary="2d"),
        HeadPattern("tri_shape", local=512),
        HeadPattern("sf_fixed"),
        HeadPattern("sf_strided", boundary="q"),
        HeadPattern("a_shape", order="column"),
    ]
    offsets = torch.tensor([0, 100, 4000, 5000], dtype=torch.int32)
    modality = torch.tensor([0, 1, 0], dtype=torch.int32)
    grid = torch.tensor([[0, 0, 0], [39, 10, 10], [0, 0, 0]], dtype=torch.int32)
    valid, groups = torch.rand(1, length) < 0.9, torch.arange(length).unsqueeze(0) // 900
    orders = encode_orders(*distinct_orders(patterns))

    def run(device: str) -> list[torch.Tensor]:
        parts = [part.to(device) for part in (offsets, modality, grid, valid, groups)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            arrangement = arrange(None, None, *parts[:4], parts[4], parts[4], parts[4], parts[4],
                                  1, length, length, 0, orders)  # fmt: skip
            made, stats = plan(None, None, arrangement, *parts[:3], 0, 1.0, 3000, True, True, encode(patterns),
                               [-1] * 5, cap, None)  # fmt: skip
            return [*arrangement, *made, stats.density]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for on_cpu, on_gpu in zip(run("cpu"), run("cuda"), strict=True):
        assert torch.equal(on_cpu, on_gpu.cpu())
