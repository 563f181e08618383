import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcompile.kernels.patterns import (
    BOUNDARIES,
    KINDS,
    MAX_STRIDE,
    MAX_TOKENS,
    MODALITIES,
    ORDERS,
    SCORES,
    HeadPattern,
    KeyCopies,
    Order,
    decode,
    decode_orders,
    distinct,
    distinct_orders,
    encode,
    encode_orders,
    plan_rows,
)

tokens = st.integers(1, MAX_TOKENS)
strides = st.integers(0, MAX_STRIDE)
lines = st.sets(st.sampled_from("hvs"), min_size=1).map(sorted).map("".join)


def fields_of(kind: str, **given: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Values of every field but pairs and order, valid for a kind."""
    boundaries = [boundary for boundary in BOUNDARIES if kind != "sf_fixed" or boundary != "2d"]
    every = {
        "kind": st.just(kind),
        "sink": tokens,
        "local": tokens,
        "last": tokens,
        "boundary": st.sampled_from(boundaries),
        "stride": strides,
        "max_stride": st.integers(1, MAX_STRIDE),
        "vertical": tokens,
        "slash": tokens,
        "lines": lines,
        "scores": st.sampled_from(SCORES),
        "mass": st.floats(0.0, 1.0, exclude_min=True),
        "columns": st.integers(1 if kind == "columns" else 0, MAX_TOKENS) | shares(kind),
        "density": st.none() | st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
    }
    return st.fixed_dictionaries(every | given)


def shares(kind: str) -> st.SearchStrategy[float]:
    return st.floats(0.0, 1.0, exclude_min=True, exclude_max=True) if kind == "top_p" else st.nothing()


def orders_of(kind: str, scores: str) -> list[str]:
    if kind in ("sf_fixed", "grid", "sf_strided"):
        return ["raster"]
    return [order for order in ORDERS if order != "auto" or (kind == "top_p" and scores == "sampled")]


@st.composite
def single_patterns(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, **given: st.SearchStrategy[Any]) -> HeadPattern:
    values = draw(st.sampled_from(kinds).flatmap(lambda kind: fields_of(kind, **given)))
    return HeadPattern(order=draw(st.sampled_from(orders_of(values["kind"], values["scores"]))), **values)


@st.composite
def head_patterns(draw: st.DrawFn) -> HeadPattern:
    """Any pattern, with pairs where they go."""
    head = draw(single_patterns())
    if head.boundary not in ("q", "2d") or head.kind == "columns":
        return head
    pairs = []
    keys = st.just(-1) if head.boundary == "q" else st.integers(0, MODALITIES - 1)
    intra = single_patterns(
        ("dense", "a_shape", "tri_shape", "top_p"), boundary=st.just("none"), columns=st.just(0), density=st.none()
    )
    for _ in range(draw(st.integers(0, 3))):
        pattern = draw(intra)
        pattern = replace(pattern, order="raster", stride=head.stride, max_stride=head.max_stride, scores="sampled")
        if head.kind in ("grid", "sf_strided"):
            pattern = replace(pattern, kind=draw(st.sampled_from(["grid", "sf_strided"])))
        elif head.order == "auto":
            pattern = replace(pattern, kind="top_p", order="auto")
        else:
            pattern = replace(pattern, order=head.order)
        pairs.append((draw(st.integers(0, MODALITIES - 1)), draw(keys), pattern))
    return replace(head, pairs=tuple(pairs))


@settings(deadline=None)
@given(st.lists(head_patterns(), min_size=1, max_size=4))
def test_text_form_brings_back_equal_patterns(patterns: list[HeadPattern]) -> None:
    text = encode(patterns)
    assert decode(text) == tuple(patterns)
    assert encode(decode(text)) == text
    assert [HeadPattern.from_dict(pattern.to_dict()) for pattern in patterns] == patterns
    assert len({*decode(text), *patterns}) == len(set(patterns))


@settings(deadline=None)
@given(head_patterns(), head_patterns())
def test_text_form_tells_every_field(one: HeadPattern, other: HeadPattern) -> None:
    assert (encode([one]) == encode([other])) == (one == other)
    for field in fields(HeadPattern):
        changed = {**one.to_dict(), field.name: other.to_dict()[field.name]}
        try:
            pattern = HeadPattern.from_dict(changed)
        except ValueError:
            continue
        assert (encode([pattern]) == encode([one])) == (getattr(pattern, field.name) == getattr(one, field.name))


def test_text_form_is_fixed_because_graphs_are_compared_by_it() -> None:
    assert encode([HeadPattern("a_shape")]) == (
        '[{"boundary":"none","columns":0,"density":null,"kind":"a_shape","last":128,"lines":"vs","local":4096,'
        '"mass":0.95,"max_stride":1024,"order":"raster","pairs":[],"scores":"sampled","sink":128,"slash":1024,"stride":0,'
        '"vertical":1000}]'
    )
    assert encode_orders([Order()], [Order(True, "site", 7)]) == (
        '{"key":[{"base":"site","grouped":true,"max_stride":1024,"stride":7}],'
        '"query":[{"base":"raster","grouped":false,"max_stride":1024,"stride":0}]}'
    )


def test_pairs_may_be_lists_of_mappings_in_json() -> None:
    pattern = HeadPattern("top_p", boundary="2d", pairs=((0, 2, HeadPattern("a_shape")), (2, 2, HeadPattern())))
    assert pattern.to_dict()["pairs"][0][:2] == [0, 2]
    assert decode(encode([pattern])) == (pattern,)
    assert hash(decode(encode([pattern]))[0]) == hash(pattern)


RASTER, GROUPED = Order(), Order(True)


@pytest.mark.parametrize(
    ("pattern", "orders"),
    [
        (HeadPattern("a_shape"), [(RASTER, RASTER)]),
        (HeadPattern("a_shape", boundary="k"), [(RASTER, RASTER)]),
        (HeadPattern("a_shape", boundary="q"), [(GROUPED, RASTER)]),
        (HeadPattern("a_shape", boundary="2d"), [(GROUPED, GROUPED)]),
        # A stride is of no meaning to raster orders, which stay one and the same.
        (HeadPattern("a_shape", boundary="2d", stride=9, max_stride=10), [(GROUPED, GROUPED)]),
        (HeadPattern("sf_fixed", stride=9), [(RASTER, RASTER)]),
        (HeadPattern("a_shape", order="site", stride=9), [(Order(False, "site", 9),) * 2]),
        (HeadPattern("dense", order="column", boundary="q"), [(Order(True, "column"), Order(False, "column"))]),
        (HeadPattern("grid", stride=9, max_stride=12), [(Order(False, "site", 9, 12),) * 2]),
        (HeadPattern("grid", boundary="2d"), [(Order(True, "site"),) * 2]),
        (HeadPattern("sf_strided", boundary="q"), [(Order(True, "site"), Order(False, "site"))]),
        (HeadPattern("top_p", order="auto"), [(RASTER, RASTER), (Order(False, "site"),) * 2]),
        (HeadPattern("top_p", order="auto", boundary="2d"), [(GROUPED, GROUPED), (Order(True, "site"),) * 2]),
    ],
    ids=str,
)
def test_kind_order_and_boundary_decide_the_orders(pattern: HeadPattern, orders: list[tuple[Order, Order]]) -> None:
    assert list(pattern.orders) == orders


def test_only_site_orders_without_a_stride_search_one() -> None:
    assert [order.searches for order in (Order(), Order(base="site"), Order(base="site", stride=4))] == [0, 1, 0]
    assert not Order(base="column").searches


def test_distinct_patterns_keep_the_order_of_first_use() -> None:
    dense, local = HeadPattern(), HeadPattern("a_shape")
    assert distinct([local, dense, HeadPattern("a_shape"), local]) == ((local, dense), (0, 1, 0, 0))


def test_distinct_orders_keep_the_order_of_first_use() -> None:
    patterns = [
        HeadPattern("a_shape", boundary="q"),
        HeadPattern("top_p", order="auto"),
        HeadPattern(),
        HeadPattern("grid", boundary="q"),
    ]
    site = Order(base="site")
    assert distinct_orders(patterns) == ((GROUPED, RASTER, site, Order(True, "site")), (RASTER, site))


some_orders = st.lists(
    st.builds(Order, st.booleans(), st.sampled_from(["raster", "site", "column"]), strides, st.integers(1, MAX_STRIDE)),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(some_orders, some_orders)
def test_text_form_brings_back_equal_orders(queries: list[Order], keys: list[Order]) -> None:
    text = encode_orders(queries, keys)
    assert decode_orders(text) == (tuple(queries), tuple(keys))
    assert encode_orders(*decode_orders(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "raster", "{", "null", "[]", "3", "{}", '{"query":[],"key":[{}]}', '{"query":[{}],"key":[]}',
        '{"query":[{}]}', '{"query":[3],"key":[{}]}', '{"query":[{"bases":"site"}],"key":[{}]}', '{"query":3,"key":3}',
    ],
)  # fmt: skip
def test_text_that_is_no_orders_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^orders: "):
        decode_orders(text)


def test_a_row_for_each_pattern_and_for_each_head_that_needs_data() -> None:
    local, grid, top = HeadPattern("a_shape"), HeadPattern("grid"), HeadPattern("top_p")
    made = plan_rows([grid, local, grid, top, local, grid])
    assert made.patterns == (grid, grid, grid, local, top)
    assert made.heads == (0, 2, 5, -1, 3)
    assert made.of_head == (0, 3, 1, 4, 3, 2)


@settings(deadline=None)
@given(st.lists(st.sampled_from([HeadPattern(kind, columns=1) for kind in KINDS]), min_size=1, max_size=9))
def test_every_head_has_a_row_of_its_pattern(patterns: list[HeadPattern]) -> None:
    made = plan_rows(patterns)
    assert [made.patterns[row] for row in made.of_head] == patterns
    for head, (pattern, row) in enumerate(zip(patterns, made.of_head, strict=True)):
        assert made.heads[row] == (head if pattern.needs_data else -1)
    assert sorted(set(made.of_head)) == list(range(len(made.patterns))) and len(made.heads) == len(made.patterns)
    # Rows of one pattern are neighbours: as many runs as patterns.
    runs = [row for row in range(len(made.patterns)) if row == 0 or made.patterns[row] != made.patterns[row - 1]]
    assert len(runs) == len(set(patterns))


def test_what_needs_data() -> None:
    needs = {kind for kind in KINDS if HeadPattern(kind, columns=1).needs_data}
    assert needs == {"vertical_slash", "grid", "top_p", "columns"}
    assert HeadPattern("a_shape", boundary="2d", pairs=((1, 1, HeadPattern("top_p")),)).needs_data
    assert not HeadPattern("a_shape", boundary="2d", pairs=((1, 1, HeadPattern()),)).needs_data


@pytest.mark.parametrize("orders", [1, 2, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_key_copies_stand_by_head_and_then_by_order(heads: int, kv_heads: int, orders: int) -> None:
    copies = KeyCopies.of(kv_heads, orders)
    assert len(copies.sources) == len(copies.rows) == kv_heads * orders
    for head, first in enumerate(copies.of_head(heads)):
        own = head // (heads // kv_heads)
        assert copies.sources[first : first + orders] == (own,) * orders
        assert copies.rows[first : first + orders] == tuple(range(orders))


def test_columns_are_a_number_or_a_share_of_the_keys() -> None:
    assert HeadPattern("top_p", columns=100).most_columns(1000) == 100
    share = HeadPattern("top_p", columns=1 / 64)
    assert [share.most_columns(keys) for keys in (64, 32768, 2**17, 2**20)] == [2048, 2048, 2048, 2**14]


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (HeadPattern(), "dense"),
        (HeadPattern("a_shape", 128, 4096, boundary="2d"), "a_shape(128, 4096) 2d"),
        (HeadPattern("tri_shape", 1, 2, 3, order="site"), "tri_shape(1, 2, 3) site order"),
        (HeadPattern("sf_fixed"), "sf_fixed(frame)"),
        (HeadPattern("sf_strided", stride=256), "sf_strided(256)"),
        (HeadPattern("grid", lines="h"), "grid(frame, h)"),
        (HeadPattern("vertical_slash", vertical=10, slash=20, boundary="k"), "vertical_slash(10, 20) k"),
        (HeadPattern("top_p", scores="pooled", mass=0.9), "top_p(pooled, 0.9)"),
        (HeadPattern("top_p", columns=64, order="auto"), "top_p(sampled, 0.95, 64 columns) auto order"),
        (HeadPattern("top_p", columns=1 / 64), "top_p(sampled, 0.95, 0.0156 of the keys as columns)"),
        (HeadPattern("columns", columns=64), "columns(64)"),
        (HeadPattern("top_p", density=0.05), "top_p(sampled, 0.95) <= 0.05"),
        (HeadPattern(boundary="q", pairs=((2, -1, HeadPattern("a_shape")),)), "dense q [2:* a_shape(128, 4096)]"),
        (
            HeadPattern(boundary="2d", pairs=((2, 0, HeadPattern()), (0, 1, HeadPattern()))),
            "dense 2d [2:0 dense; 0:1 dense]",
        ),
    ],
)
def test_reports_name_a_pattern(pattern: HeadPattern, name: str) -> None:
    assert str(pattern) == name


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "ashape"}, ["kind='ashape'", "did you mean 'a_shape'", "'tri_shape'"]),
        ({"kind": None}, ["kind=None", "'dense'"]),
        ({"kind": "dense", "boundary": "2D"}, ["boundary='2D'", "did you mean '2d'"]),
        ({"kind": "dense", "boundary": 2}, ["boundary=2", "'2d'"]),
        ({"kind": "dense", "order": "sites"}, ["order='sites'", "did you mean 'site'", "'column'"]),
        ({"kind": "dense", "order": None}, ["order=None", "'raster'"]),
        ({"kind": "top_p", "scores": "pool"}, ["scores='pool'", "did you mean 'pooled'", "'antidiagonal'"]),
        ({"kind": "a_shape", "sink": 0}, ["sink=0", "an int from 1 to"]),
        ({"kind": "a_shape", "sink": True}, ["sink=True", "an int from 1 to"]),
        ({"kind": "a_shape", "local": -4096}, ["local=-4096", "an int from 1 to"]),
        ({"kind": "a_shape", "local": 4096.0}, ["local=4096.0", "an int from 1 to"]),
        ({"kind": "a_shape", "local": "4096"}, ["local='4096'", "an int from 1 to"]),
        ({"kind": "tri_shape", "last": MAX_TOKENS + 1}, [f"last={MAX_TOKENS + 1}", f"to {MAX_TOKENS}"]),
        ({"kind": "vertical_slash", "vertical": 0}, ["vertical=0", "an int from 1 to"]),
        ({"kind": "vertical_slash", "slash": 1.5}, ["slash=1.5", "an int from 1 to"]),
        ({"kind": "grid", "stride": -1}, ["stride=-1", f"an int from 0 to {MAX_STRIDE}"]),
        ({"kind": "grid", "stride": MAX_STRIDE + 1}, [f"stride={MAX_STRIDE + 1}", f"to {MAX_STRIDE}"]),
        ({"kind": "grid", "max_stride": 0}, ["max_stride=0", "an int from 1 to"]),
        ({"kind": "grid", "lines": ""}, ["lines=''", '"h", "v" and "s"']),
        ({"kind": "grid", "lines": "vx"}, ["lines='vx'", 'such as "vs"']),
        ({"kind": "grid", "lines": ["v"]}, ["lines=['v']", 'such as "vs"']),
        ({"kind": "top_p", "mass": 0.0}, ["mass=0.0", "in (0, 1]"]),
        ({"kind": "top_p", "mass": 1.01}, ["mass=1.01", "in (0, 1]"]),
        ({"kind": "top_p", "mass": True}, ["mass=True", "in (0, 1]"]),
        ({"kind": "top_p", "mass": "0.9"}, ["mass='0.9'", "in (0, 1]"]),
        ({"kind": "top_p", "mass": float("nan")}, ["mass=nan", "in (0, 1]"]),
        ({"kind": "top_p", "columns": -1}, ["columns=-1", "an int from 0 to"]),
        ({"kind": "grid", "density": 0.0}, ["density=0.0", "in (0, 1), or None"]),
        ({"kind": "grid", "density": 1}, ["density=1", "in (0, 1), or None"]),
        ({"kind": "grid", "density": True}, ["density=True", "in (0, 1), or None"]),
        ({"kind": "top_p", "columns": 1.0}, ["columns=1.0", "in (0, 1)", "as an int"]),
        ({"kind": "top_p", "columns": float("nan")}, ["columns=nan", "in (0, 1)"]),
        ({"kind": "columns", "columns": 0.5}, ["columns=0.5", "an int from 0 to"]),
        ({"kind": "columns"}, ["columns=0", "'columns'", "at least 1"]),
        ({"kind": "sf_fixed", "boundary": "2d"}, ["'sf_fixed'", "raster order", "'none', 'k' or 'q'"]),
        ({"kind": "sf_fixed", "order": "site"}, ["'sf_fixed'", "order 'raster'"]),
        ({"kind": "grid", "order": "column"}, ["order='column'", "'grid'", "always by site"]),
        ({"kind": "sf_strided", "order": "site"}, ["order='site'", "'sf_strided'", "always by site"]),
        ({"kind": "a_shape", "order": "auto"}, ["order='auto'", "'a_shape'", "only with 'top_p'"]),
        ({"kind": "top_p", "order": "auto", "scores": "pooled"}, ["order='auto'", "scores='pooled'", "'sampled'"]),
        ({"kind": "dense", "sinks": 1}, ["'sinks'", "did you mean 'sink'", "'local'"]),
        ({"sink": 1}, ["'kind' is missing", "'a_shape'"]),
        ([("kind", "dense")], ["a mapping of field to value", "[('kind', 'dense')]"]),
        ({"kind": "dense", "pairs": "q"}, ["pairs='q'", "[query modality, key modality, pattern]"]),
        ({"kind": "dense", "pairs": 3}, ["pairs=3", "[query modality, key modality, pattern]"]),
    ],
)
def test_bad_pattern_is_refused_with_field_value_and_what_is_right(values: object, said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        HeadPattern.from_dict(values)  # type: ignore[arg-type]
    for part in said:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("boundary", "pair", "said"),
    [
        ("2d", [0, 1], ["[0, 1]", "[query modality, key modality, pattern]"]),
        ("2d", "abc", ["'abc'", "[query modality, key modality, pattern]"]),
        ("2d", [0, 1, {}], ["'kind' is missing"]),
        ("2d", [0, 1, {"kind": "a_shape", "sink": 0}], ["sink=0"]),
        ("none", [0, 1, {"kind": "dense"}], ["boundary='none'", "'q' or '2d'"]),
        ("k", [0, 1, {"kind": "dense"}], ["boundary='k'", "'q' or '2d'"]),
        ("2d", [8, 1, {"kind": "dense"}], ["query modality 8", "from 0 to 7"]),
        ("2d", [True, 1, {"kind": "dense"}], ["query modality True", "from 0 to 7"]),
        ("2d", [0, -1, {"kind": "dense"}], ["key modality -1", "from 0 to 7"]),
        ("2d", [0, 1.0, {"kind": "dense"}], ["key modality 1.0", "from 0 to 7"]),
        ("q", [0, 0, {"kind": "dense"}], ["key modality 0", "from -1 to -1"]),
        ("2d", [0, 1, {"kind": "dense", "boundary": "2d"}], ["a boundary of its own"]),
        ("2d", [0, 1, {"kind": "columns", "columns": 4}], ["picks single keys"]),
        ("2d", [0, 1, {"kind": "top_p", "columns": 4}], ["picks single keys"]),
        ("2d", [0, 1, {"kind": "a_shape", "density": 0.1}], ["a cap of its own"]),
        ("2d", [0, 1, {"kind": "vertical_slash"}], ["picks single keys"]),
        ("q", [0, -1, {"kind": "sf_fixed"}], ["picks single keys"]),
        ("2d", [0, 1, {"kind": "grid"}], ["grid", "an order of its own", "'a_shape'"]),
        ("2d", [0, 1, {"kind": "dense", "order": "site"}], ["an order of its own"]),
        ("2d", [0, 1, {"kind": "top_p", "order": "auto"}], ["an order of its own"]),
    ],
)
def test_bad_pairs_are_refused(boundary: str, pair: object, said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        HeadPattern.from_dict({"kind": "a_shape", "boundary": boundary, "pairs": [pair]})
    for part in said:
        assert part in str(error.value)


def test_pairs_of_pairs_are_refused() -> None:
    inner = HeadPattern("a_shape", boundary="2d", pairs=((0, 0, HeadPattern()),))
    with pytest.raises(ValueError, match="only its parent has"):
        HeadPattern("a_shape", boundary="2d", pairs=((0, 0, inner),))
    with pytest.raises(ValueError, match=r"is not \(query modality, key modality, HeadPattern\)"):
        HeadPattern("a_shape", boundary="2d", pairs=([0, 0, HeadPattern()],))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", "a_shape", "{", "null", "[]", "3", '{"kind":"dense"}', "[3]", '["dense"]', "[[]]", "[{}]", "[NaN]"],
)
def test_text_that_is_no_list_of_patterns_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^patterns"):
        decode(text)


def test_a_bad_pattern_in_a_list_is_named_by_its_row() -> None:
    good = HeadPattern().to_dict()
    with pytest.raises(ValueError, match=r"patterns\[1\]: kind='sparse'"):
        decode(json.dumps([good, {**good, "kind": "sparse"}]))
