import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from mmcompile.kernels import tile_bounds
from mmcompile.kernels.patterns import TILE, HeadPattern, encode
from mmcompile.kernels.plan import TilePlan, density, empty_plan, plan, plan_shapes, tile_counts
from mmcompile.kernels.reference import element_mask, in_positions, plan_mask, selected_tiles
from tests.kernels.plan_cases import PlanCase, by_tile, plan_cases, wholly

few = settings(deadline=None, max_examples=max(10, settings().max_examples * 2 // 5))
some_density = st.sampled_from([0.01, 0.1, 0.29, 0.5, 0.75, 0.95])


def rows(case: PlanCase) -> Iterator[tuple[int, int, HeadPattern]]:
    for b in range(case.batch):
        for p, pattern in enumerate(case.patterns):
            yield b, p, pattern


def in_slots(case: PlanCase, b: int, pattern: HeadPattern, elements: np.ndarray) -> np.ndarray:
    query_order, key_order = case.orders(b, pattern)
    return elements[query_order][:, key_order]


def listed(made: TilePlan) -> np.ndarray:
    return selected_tiles(made.counts, made.tiles).numpy()


@few
@given(plan_cases())
def test_orders_and_tags_say_exactly_what_is_allowed(case: PlanCase) -> None:
    made = case.plan()
    mask = element_mask(made.query_tags, made.key_tags, case.window)
    allowed = in_positions(mask, made.query_order, made.key_order).numpy()
    for b, p, pattern in rows(case):
        query_order, key_order = case.orders(b, pattern)
        assert made.query_order[b, p].tolist() == query_order.tolist()
        assert made.key_order[b, p].tolist() == key_order.tolist()
        assert np.array_equal(allowed[b, p], case.allowed(b))


@few
@given(plan_cases())
def test_tile_lists_have_full_tiles_in_front_partial_ones_behind_and_nothing_twice(case: PlanCase) -> None:
    made = case.plan()
    shapes = plan_shapes(case.batch, case.query_length, case.key_length, encode(case.patterns))
    assert [tuple(part.shape) for part in made] == list(shapes)
    assert {part.dtype for part in made} == {torch.int32}
    assert all(part.is_contiguous() for part in made)
    key_tiles = made.tiles.shape[-1]
    for (full, partial), row in zip(made.counts.flatten(0, 2).tolist(), made.tiles.flatten(0, 2).tolist(), strict=True):
        front, back = row[:full], row[key_tiles - partial :]
        assert front == sorted(front) and back == sorted(back, reverse=True)
        assert row[full : key_tiles - partial] == [-1] * (key_tiles - full - partial)
        assert len(set(front + back)) == full + partial and set(front + back) <= set(range(key_tiles))


@few
@given(plan_cases(), st.sampled_from([None, 0.3, 1.0]))
def test_full_tiles_are_those_with_every_element_allowed(case: PlanCase, cap: float | None) -> None:
    made = case.plan(cap)
    front = torch.stack([made.counts[..., 0], torch.zeros_like(made.counts[..., 0])], -1)
    full, all_tiles = selected_tiles(front, made.tiles).numpy(), listed(made)
    for b, p, pattern in rows(case):
        whole = wholly(in_slots(case, b, pattern, case.allowed(b)))
        assert not (full[b, p] & ~whole).any()
        if case.spans is None:  # a tile may be whole half by its span and half by causality: not decided
            assert np.array_equal(full[b, p], all_tiles[b, p] & whole)


@few
@given(plan_cases())
def test_density_one_covers_every_allowed_element(case: PlanCase) -> None:
    made = case.plan(1.0)
    mask = plan_mask(made.query_tags, made.key_tags, made.counts, made.tiles, case.window)
    computed = in_positions(mask, made.query_order, made.key_order).numpy()
    for b, p, pattern in rows(case):
        assert np.array_equal(computed[b, p], case.allowed(b))
        runs = case.key_valid is None and not case.interleaved and pattern.boundary in ("none", "k")
        if case.window is case.spans is None and (case.segments is None or runs):
            non_empty = by_tile(in_slots(case, b, pattern, case.allowed(b)))
            assert np.array_equal(listed(made)[b, p], non_empty)
    assert torch.equal(tile_counts(made, case.window)[..., 0], tile_counts(made, case.window)[..., 1])


@few
@given(plan_cases(spans=False))
def test_selected_tiles_are_the_union_of_what_their_queries_choose(case: PlanCase) -> None:
    tiles = listed(case.plan())
    for b, p, pattern in rows(case):
        union = by_tile(in_slots(case, b, pattern, case.chosen(b, pattern)))
        non_empty = by_tile(in_slots(case, b, pattern, case.allowed(b)))
        assert not (union & non_empty & ~tiles[b, p]).any()
        if not case.interleaved:
            assert not (tiles[b, p] & ~union).any()
            if case.window is None and (case.segments is None or pattern.boundary == "none"):
                assert np.array_equal(tiles[b, p], union & non_empty)


@few
@given(plan_cases())
def test_spans_choose_the_tiles_within_local_distance(case: PlanCase) -> None:
    tiles = listed(case.plan())
    for b, p, pattern in rows(case):
        distance = np.abs(case.position()[:, None] - np.arange(case.key_length)[None])
        near = case.allowed(b) & ((distance < pattern.local) | (pattern.kind == "dense"))
        near &= ~case.causal()
        assert not (by_tile(in_slots(case, b, pattern, near)) & ~tiles[b, p]).any()


@few
@given(plan_cases(interleaved=False), st.one_of(st.none(), some_density))
def test_a_row_with_an_allowed_key_is_never_without_one(case: PlanCase, cap: float | None) -> None:
    made = case.plan(cap)
    mask = plan_mask(made.query_tags, made.key_tags, made.counts, made.tiles, case.window)
    computed = in_positions(mask, made.query_order, made.key_order).numpy()
    for b, p, _ in rows(case):
        assert np.array_equal(computed[b, p].any(1), case.allowed(b).any(1))


@few
@given(plan_cases(), some_density)
def test_a_cap_takes_only_what_is_not_mandatory_and_holds(case: PlanCase, cap: float) -> None:
    uncapped, made = case.plan(), case.plan(cap)
    tiles, all_tiles, counts = listed(made), listed(uncapped), tile_counts(made, case.window)
    assert not (tiles & ~all_tiles).any()
    for b, p, pattern in rows(case):
        mandatory = by_tile(in_slots(case, b, pattern, case.mandatory(b, pattern)))
        needed = mandatory & by_tile(in_slots(case, b, pattern, case.allowed(b)))
        assert not (needed & ~tiles[b, p]).any()
        count, non_empty = counts[b, p].tolist()
        if not case.interleaved and case.window is None:
            assert count <= max(int(cap * non_empty), mandatory.sum())


@few
@given(plan_cases())
def test_a_higher_cap_never_lists_less(case: PlanCase) -> None:
    before = np.zeros_like(listed(case.plan()))
    for cap in (0.05, 0.2, 0.4, 0.6, 0.8, 0.99, 1.0):
        tiles = listed(case.plan(cap))
        assert not (before & ~tiles).any()
        before = tiles


@few
@given(plan_cases(), st.one_of(st.none(), some_density))
def test_running_a_few_query_tiles_at_a_time_changes_nothing(case: PlanCase, cap: float | None) -> None:
    whole = case.plan(cap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_bounds, "CHUNK", 1)
        pieces = case.plan(cap)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


@few
@given(plan_cases())
def test_under_min_tokens_there_are_raster_orders_and_no_tiles(case: PlanCase) -> None:
    made = case.plan(min_tokens=case.key_length + 1)
    assert (made.query_order == torch.arange(case.query_length)).all()
    assert (made.key_order == torch.arange(case.key_length)).all()
    assert (made.counts == 0).all() and (made.tiles == -1).all()
    mask = element_mask(made.query_tags, made.key_tags, case.window).numpy()
    for b, p, _ in rows(case):
        assert np.array_equal(mask[b, p], case.allowed(b))
    assert (density(made, case.window, case.key_length + 1) == 1).all()
    assert (case.plan(min_tokens=case.key_length).tiles >= 0).any() == (case.plan().tiles >= 0).any()


def one_sequence(length: int, pattern: HeadPattern, **parts: Any) -> PlanCase:
    """One causal sequence of one modality, but for `parts`."""
    given = {"offsets": np.array([0, length]), "modality": np.array([1]), "key_valid": None, "segments": None}
    given |= {"spans": None, "window": None, "interleaved": False, "patterns": (pattern,)}
    sizes = {"batch": 1, "query_length": length, "key_length": length, "query_offset": 0}
    return PlanCase(**{**sizes, **given, **parts})


def test_a_cap_keeps_the_nearest_tiles() -> None:
    tiles = 20
    case = one_sequence(tiles * TILE, HeadPattern())
    made = case.plan(0.5)
    # 210 tiles: a budget of 105 holds 20 + 19 of the diagonal and the sink, and 18, 17, 16, 15 of the rings.
    query, key = np.arange(tiles)[:, None], np.arange(tiles)[None]
    band = (key <= query) & ((query - key <= 4) | (key == 0))
    assert np.array_equal(listed(made)[0, 0], band)
    assert density(made).item() == pytest.approx(band.sum() / 210)
    assert density(case.plan()).item() == 1.0


def test_density_of_a_batch_row_without_keys_is_zero() -> None:
    valid = np.array([[False] * 300, [True] * 300])
    made = one_sequence(300, HeadPattern("a_shape"), batch=2, key_valid=valid).plan()
    assert density(made).tolist() == [[0.0], [1.0]]
    assert (made.counts[0] == 0).all()


def test_the_sink_and_the_local_band_move_with_left_padding() -> None:
    length, padding = 10 * TILE, 3 * TILE
    pattern = HeadPattern("a_shape", sink=TILE, local=TILE)
    case = one_sequence(length, pattern, key_valid=(np.arange(length) >= padding)[None])
    tiles = listed(case.plan())[0, 0]
    assert not tiles[:, :3].any() and not tiles[:3].any()
    assert tiles[3:, 3].all()
    assert np.flatnonzero(tiles[9]).tolist() == [3, 8, 9]


@pytest.mark.parametrize("local", [1, 2, TILE + 1, TILE + 2])
def test_the_local_band_ends_at_the_token(local: int) -> None:
    tiles = listed(one_sequence(6 * TILE, HeadPattern("a_shape", sink=1, local=local)).plan())[0, 0]
    query, key = np.arange(6)[:, None], np.arange(6)[None]
    back = (local - 1 + TILE - 1) // TILE  # key tiles that the first query of a tile reaches back
    assert np.array_equal(tiles, (key <= query) & ((query - key <= back) | (key == 0)))


@pytest.mark.parametrize("padding", [0, TILE, 2 * TILE])
def test_the_last_queries_are_the_last_valid_ones(padding: int) -> None:
    length, last = 8 * TILE, 7 - padding // TILE
    pattern = HeadPattern("tri_shape", sink=1, local=1, last=TILE)
    valid = (np.arange(length) < length - padding)[None]
    per_row = listed(one_sequence(length, pattern, key_valid=valid).plan())[0, 0].sum(1).tolist()
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
    computed = plan_mask(made.query_tags, made.key_tags, made.counts, made.tiles, window)[0, 0].numpy()
    assert case.allowed(0)[200:].any(1).all()
    assert np.array_equal(computed.any(1), case.allowed(0).any(1))


@pytest.mark.parametrize("local", [1, 2, TILE + 1, TILE + 2])
def test_spans_reach_forward_as_far_as_the_local_band_reaches_back(local: int) -> None:
    length = 6 * TILE
    span = np.zeros((1, length), int)
    pattern = HeadPattern("a_shape", sink=1, local=local)
    tiles = listed(one_sequence(length, pattern, spans=(span, span)).plan())[0, 0]
    query, key = np.arange(6)[:, None], np.arange(6)[None]
    reach = (local - 1 + TILE - 1) // TILE
    assert np.array_equal(tiles, (np.abs(query - key) <= reach) | (key == 0))


def test_one_span_makes_full_tiles_but_not_where_keys_are_missing() -> None:
    span = np.zeros((1, 2 * TILE + 5), int)
    made = one_sequence(2 * TILE + 5, HeadPattern(), spans=(span, span)).plan()
    assert made.counts[0, 0].tolist() == [[2, 1]] * 3
    assert made.tiles[0, 0].tolist() == [[0, 1, 2]] * 3


def test_a_negative_span_is_no_span() -> None:
    span = np.array([[-9, -2, -1, 0, 4]])
    valid = np.array([[True, True, True, True, False]])
    made = one_sequence(5, HeadPattern(), spans=(span, span), key_valid=valid).plan()
    assert made.query_tags[0, 0, 2].tolist() == [-1, -1, -1, 0, 4]
    assert made.key_tags[0, 0, 2].tolist() == [-1, -1, -1, 0, -2]


def test_one_long_segment_groups_by_modality_under_a_cached_prefix() -> None:
    # Two cached keys, then text, image, text: the 2D order puts both texts and the prefix before the image.
    segments = {"offsets": np.array([0, 1, 4, 6]), "modality": np.array([0, 1, 0])}
    pattern = HeadPattern("a_shape", boundary="2d")
    made = one_sequence(6, pattern, key_length=8, query_offset=2, **segments).plan()
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


@pytest.mark.parametrize("cap", [None, 0.1])
def test_a_million_tokens_need_no_host_value_and_no_huge_temporary(cap: float | None) -> None:
    length = 2**20
    patterns = encode([HeadPattern("a_shape", boundary="2d"), HeadPattern("tri_shape")])
    # Fake tensors hold no data: a host sync or a shape that depends on data would raise here.
    with FakeTensorMode(), LargestTensor() as largest:
        offsets, modality = torch.zeros(41, dtype=torch.int32), torch.zeros(40, dtype=torch.int32)
        valid = torch.ones(1, length, dtype=torch.bool)
        groups = torch.zeros(1, length, dtype=torch.int64)
        grid = torch.zeros(40, 3, dtype=torch.int32)
        made = plan(None, None, offsets, modality, grid, valid, groups, groups, groups, groups,
                    1, length, length, 0, 4096, patterns, cap, 0)  # fmt: skip
        assert density(made, 4096).shape == (1, 2)
    assert [tuple(part.shape) for part in made] == list(plan_shapes(1, length, length, patterns))
    assert largest.bytes == made.tiles.numel() * 4  # 512 MiB: the result itself


def test_shapes_may_be_symbolic() -> None:
    real = torch.zeros(2, 1000)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        batch, length = mode.from_tensor(real, static_shapes=False).shape
        made = empty_plan(batch, length, length, encode([HeadPattern()]), torch.device("cpu"))
    assert isinstance(made.tiles.shape[2], torch.SymInt)
    assert [int(size) for size in made.tiles.shape] == [2, 1, 8, 8]


def test_arguments_are_those_of_the_op_in_its_order() -> None:
    assert list(inspect.signature(plan).parameters) == [
        "query",
        "key",
        "offsets",
        "modality",
        "grid",
        "key_valid",
        "query_segment",
        "key_segment",
        "query_span",
        "key_span",
        "batch",
        "query_length",
        "key_length",
        "query_offset",
        "window",
        "patterns",
        "density",
        "min_tokens",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"density": 0.0}, r"density=0\.0 .*\(0, 1\]"),
        ({"density": 1.5}, r"density=1\.5 .*\(0, 1\]"),
        ({"density": float("nan")}, r"density=nan .*\(0, 1\]"),
        ({"window": 0}, r"window=0 .*at least 1"),
        ({"query_length": 0}, r"query_length=0 .*at least 1"),
        ({"batch": 0}, r"batch=0 .*at least 1"),
        ({"patterns": "a_shape"}, r"patterns: 'a_shape' is not JSON"),
        ({"key_span": torch.zeros(1, 9)}, r"query_span=None .* or neither"),
        ({"query_segment": torch.zeros(1, 9)}, r"key_segment=None .* or neither"),
    ],
)
def test_bad_arguments_are_refused_by_name(change: dict[str, object], said: str) -> None:
    case = one_sequence(9, HeadPattern())
    with pytest.raises(ValueError, match=said):
        plan(**{**case.arguments(None, 0), **change})


@pytest.mark.gpu
@pytest.mark.parametrize("cap", [None, 0.2, 1.0])
def test_plan_never_waits_for_the_device(cap: float | None) -> None:
    length = 5000
    patterns = encode([HeadPattern("a_shape", boundary="2d"), HeadPattern("tri_shape", local=512)])
    offsets = torch.tensor([0, 100, 4000, 5000], dtype=torch.int32)
    modality, grid = torch.tensor([0, 1, 0], dtype=torch.int32), torch.zeros(3, 3, dtype=torch.int32)
    valid, groups = torch.rand(1, length) < 0.9, torch.arange(length).unsqueeze(0) // 900

    def run(device: str) -> TilePlan:
        parts = [part.to(device) for part in (offsets, modality, grid, valid, groups)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return plan(None, None, *parts[:4], parts[4], parts[4], parts[4], parts[4],
                        1, length, length, 0, 3000, patterns, cap, 0)  # fmt: skip
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for on_cpu, on_gpu in zip(run("cpu"), run("cuda"), strict=True):
        assert torch.equal(on_cpu, on_gpu.cpu())
