import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from benchmarks.planted_heads import plant_heads, random_plant
from mmcompile.kernels.arrange import Arrangement, arrange, arrangement_shapes
from mmcompile.kernels.patterns import TILE, HeadPattern, Order, decode_orders, distinct_orders, encode_orders
from mmcompile.kernels.tags import INVALID, INVALID_SPAN, NO_SPAN
from tests.kernels.plan_cases import PlanCase, plan_cases, site_cases

few = settings(deadline=None, max_examples=max(10, settings().max_examples * 2 // 5))


@few
@given(st.one_of(plan_cases(), site_cases()))
def test_orders_are_by_modality_site_and_position_and_tags_and_sites_stand_in_them(case: PlanCase) -> None:
    arguments = case.arrange_arguments()
    made = arrange(**arguments)
    shapes = arrangement_shapes(case.batch, case.query_length, case.key_length, arguments["orders"])
    assert [tuple(part.shape) for part in made] == list(shapes)
    assert all(part.dtype == torch.int32 and part.is_contiguous() for part in made)
    query_orders, key_orders = decode_orders(arguments["orders"])
    patterns = case.patterns
    for b in range(case.batch):
        for pattern in patterns:
            ((query, key),) = pattern.orders
            of_query, of_key = query_orders.index(query), key_orders.index(key)
            query_order, key_order = case.orders(b, pattern)
            assert made.query_order[b, of_query].tolist() == query_order.tolist()
            assert made.key_order[b, of_key].tolist() == key_order.tolist()
            assert made.query_site[b, of_query].tolist() == case.query_sites(b, query)[query_order].tolist()
            assert made.key_site[b, of_key].tolist() == case.key_sites(b, key)[key_order].tolist()
            query_tags, key_tags = token_tags(case, b)
            assert np.array_equal(made.query_tags[b, of_query], query_tags[:, query_order])
            assert np.array_equal(made.key_tags[b, of_key], key_tags[:, key_order])


def token_tags(case: PlanCase, b: int) -> tuple[np.ndarray, np.ndarray]:
    """Position, segment and span of queries and keys in token order."""
    segments = case.segments or (np.zeros((case.batch, case.query_length)), np.zeros((case.batch, case.key_length)))
    none = np.full((case.batch, max(case.query_length, case.key_length)), NO_SPAN)
    spans = case.spans or (none[:, : case.query_length], none[:, : case.key_length])
    query = [case.position(), segments[0][b], spans[0][b].clip(NO_SPAN)]
    valid = case.valid(b)
    key_span = np.where(valid, spans[1][b].clip(NO_SPAN), INVALID_SPAN)
    return np.stack(query), np.stack([np.where(valid, np.arange(case.key_length), INVALID), segments[1][b], key_span])


def made_of(*orders: Order, **changes: Any) -> Arrangement:
    """Two frames of two rows and 80 columns with text in front and behind, 8 tokens each, unless changed."""
    length = 2 * 160 + 16
    given = {
        "query": None,
        "key": None,
        "offsets": torch.tensor([0, 8, 328, length], dtype=torch.int32),
        "modality": torch.tensor([0, 2, 0], dtype=torch.int32),
        "grid": torch.tensor([[0, 0, 0], [2, 2, 80], [0, 0, 0]], dtype=torch.int32),
        **dict.fromkeys(("key_valid", "query_segment", "key_segment", "query_span", "key_span")),
        "batch": 1,
        "query_length": length,
        "key_length": length,
        "query_offset": 0,
        "orders": encode_orders(orders, orders),
    }
    return arrange(**given | changes)


VIDEO = list(range(8, 328))


def test_by_site_text_stands_first_and_then_both_frames_of_each_site() -> None:
    made = made_of(Order(base="site"))
    pairs = [token for site in range(160) for token in (8 + site, 168 + site)]
    assert made.query_order[0, 0].tolist() == [*range(8), *range(328, 336), *pairs]
    assert made.query_site[0, 0].tolist() == [-1] * 16 + [site for site in range(160) for _ in range(2)]
    # The first 128 keys, 120 of them of the first frame, stand in front with the text.
    later = [token for token in pairs if token >= TILE]
    assert made.key_order[0, 0].tolist() == [*range(TILE), *range(328, 336), *later]
    assert made.key_site[0, 0].tolist() == [-1] * 136 + [(token - 8) % 160 for token in later]


def test_by_column_all_rows_of_a_column_stand_together() -> None:
    made = made_of(Order(base="column"))
    columns = [8 + 80 * row + column for column in range(80) for row in range(4)]
    assert made.query_order[0, 0].tolist() == [*range(8), *range(328, 336), *columns]
    assert made.query_site[0, 0].tolist() == [-1] * 16 + [column for column in range(80) for _ in range(4)]


def test_a_grouped_order_goes_by_modality_and_then_by_site() -> None:
    modality = torch.tensor([3, 2, 0], dtype=torch.int32)
    made = made_of(Order(True, "site"), modality=modality, grid=torch.tensor([[0, 0, 0], [2, 2, 80], [0, 0, 0]]).int())
    pairs = [token for site in range(160) for token in (8 + site, 168 + site)]
    assert made.query_order[0, 0].tolist() == [*range(328, 336), *pairs, *range(8)]


def test_a_stride_that_is_given_counts_and_not_the_grid() -> None:
    made = made_of(Order(base="site", stride=64))
    by_site = sorted(VIDEO, key=lambda token: ((token - 8) % 64, token))
    assert made.query_order[0, 0].tolist() == [*range(8), *range(328, 336), *by_site]


def test_every_order_has_a_row_in_the_order_of_their_names() -> None:
    orders = (Order(), Order(base="column"), Order(True), Order(base="site"), Order(base="site", stride=7))
    made = made_of(*orders)
    assert made.query_order.shape == (1, 5, 336) and made.key_tags.shape == (1, 5, 3, 336)
    for row, order in enumerate(orders):
        for together, alone in zip(made, made_of(order), strict=True):
            assert torch.equal(together[:, row], alone[:, 0])


def test_sequences_of_a_batch_have_segments_of_their_own() -> None:
    # The first sequence ends within the second segment: its next token starts the second sequence's frames.
    offsets = torch.tensor([0, 100, 800], dtype=torch.int32)
    modality, grid = torch.tensor([0, 1]).int(), torch.tensor([[0, 0, 0], [9, 5, 10]]).int()
    made = made_of(
        Order(base="site"), offsets=offsets, modality=modality, grid=grid, batch=2, query_length=400, key_length=400
    )
    first = [*range(100), *sorted(range(100, 400), key=lambda token: ((token - 100) % 50, token))]
    assert made.query_order[0, 0].tolist() == first
    assert made.query_order[1, 0].tolist() == sorted(range(400), key=lambda token: (token % 50, token))


def test_keys_of_a_prefix_and_room_behind_are_text_and_stand_in_front() -> None:
    made = made_of(Order(base="site"), key_length=600, query_offset=200)
    pairs = [token for site in range(160) for token in (208 + site, 368 + site)]
    assert made.key_order[0, 0].tolist() == [*range(208), *range(528, 600), *pairs]
    assert made.query_tags[0, 0, 0].tolist() == (made.query_order[0, 0] + 200).tolist()
    grouped = made_of(Order(True), key_length=600, query_offset=200)
    assert grouped.key_order[0, 0].tolist() == [*range(208), *range(528, 600), *range(208, 528)]


def test_the_first_valid_keys_stand_in_front() -> None:
    valid = (torch.arange(336) >= 50).unsqueeze(0)
    made = made_of(Order(base="site"), key_valid=valid)
    assert made.key_order[0, 0, : 50 + TILE].tolist() == list(range(50 + TILE))
    assert (made.key_tags[0, 0, 0, :50] == INVALID).all()
    assert (made.key_tags[0, 0, 0, 50 : 50 + TILE] < INVALID).all()


@pytest.mark.parametrize("told", [True, False])
def test_a_stride_that_is_not_told_is_searched(told: bool) -> None:
    plants = (random_plant("grid s", 2048, seed) for seed in range(20))
    plant = next(plant for plant in plants if plant.segments[1].grid.count(0) == (0 if told else 3))
    planted = plant_heads(plant)
    parts = planted.boundaries._asdict() | {"query_length": 2048, "key_length": 2048}
    order = Order(base="site")
    searched, blind = (made_of(order, query=q, key=k, **parts) for q, k in ((planted.query, planted.key), (None, None)))
    raster = torch.arange(2048).tolist()
    site = torch.where(planted.truth.modality > 0, planted.truth.site, -1)
    by_site = sorted(range(2048), key=lambda token: (site[token].item(), token))
    assert searched.query_order[0, 0].tolist() == by_site
    assert blind.query_order[0, 0].tolist() == (by_site if told else raster)
    assert torch.equal(searched.query_site[0, 0], site[by_site].int())
    # A smaller limit than the stride finds another one.
    limited = made_of(Order(base="site", max_stride=10), query=planted.query, key=planted.key, **parts)
    assert (limited.query_order[0, 0].tolist() == by_site) == told


def test_orders_with_several_limits_have_a_stride_each() -> None:
    planted = plant_heads(
        next(p for p in (random_plant("grid s", 2048, s) for s in range(20)) if p.segments[1].grid[0] == 0)
    )
    parts = planted.boundaries._asdict() | {"query_length": 2048, "key_length": 2048}
    parts |= {"query": planted.query, "key": planted.key}
    orders = (Order(base="site", max_stride=10), Order(base="site"), Order(base="column"))
    together = made_of(*orders, **parts)
    for row, order in enumerate(orders):
        assert torch.equal(together.query_order[:, row], made_of(order, **parts).query_order[:, 0])
    assert not torch.equal(together.query_order[:, 0], together.query_order[:, 1])


def test_no_segments_at_all_is_one_text() -> None:
    nothing = torch.zeros(0).int()
    parts = {"offsets": torch.zeros(1).int(), "modality": nothing, "grid": nothing.view(0, 3)}
    made = made_of(Order(base="site"), Order(True), Order(base="column", stride=100), **parts)
    assert (made.query_order[0, :2] == torch.arange(336)).all()
    assert made.query_order[0, 2].tolist() == sorted(range(336), key=lambda token: (token % 100, token))


def test_shapes_may_be_symbolic() -> None:
    patterns = [HeadPattern("a_shape"), HeadPattern("grid", boundary="q")]
    real = torch.zeros(2, 1000)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        batch, length = mode.from_tensor(real, static_shapes=False).shape
        shapes = arrangement_shapes(batch, length, length, encode_orders(*distinct_orders(patterns)))
    assert isinstance(shapes[0][2], torch.SymInt)
    assert [tuple(map(int, shape)) for shape in shapes] == [
        (2, 2, 1000),
        (2, 2, 1000),
        (2, 2, 3, 1000),
        (2, 2, 3, 1000),
        (2, 2, 1000),
        (2, 2, 1000),
    ]


def test_arguments_are_those_of_the_op_in_its_order() -> None:
    assert list(inspect.signature(arrange).parameters) == [
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
        "orders",
        "scale",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"query_length": 0}, r"query_length=0 .*at least 1"),
        ({"key_length": 0}, r"key_length=0 .*at least 1"),
        ({"batch": 0}, r"batch=0 .*at least 1"),
        ({"orders": "raster"}, r"orders: 'raster' was not written by encode_orders\(\)"),
        ({"orders": '{"query":[],"key":[{}]}'}, r"orders: .* lacks a query order or a key order"),
        ({"key_span": torch.zeros(1, 336)}, r"query_span=None .*pass query_span and key_span, or neither"),
        ({"query_segment": torch.zeros(1, 336)}, r"key_segment=None .*pass query_segment and key_segment, or neither"),
    ],
)
def test_bad_arguments_are_refused_by_name(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made_of(Order(), **change)


@pytest.mark.gpu
def test_arrange_never_waits_for_the_device() -> None:
    planted = plant_heads(random_plant("grid s", 2048, 0))
    orders = encode_orders([Order(True, "site"), Order(base="column")], [Order(base="site"), Order()])
    valid, groups = torch.rand(1, 2048) < 0.9, torch.arange(2048).unsqueeze(0) // 900

    def run(device: str) -> Arrangement:
        parts = [part.to(device) for part in (planted.query, planted.key, *planted.boundaries, valid, *[groups] * 4)]
        arrange(*parts, 1, 2048, 2048, 0, orders)  # what is kept from call to call is made once
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            return arrange(*parts, 1, 2048, 2048, 0, orders)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    for on_cpu, on_gpu in zip(run("cpu"), run("cuda"), strict=True):
        assert torch.equal(on_cpu, on_gpu.cpu())
