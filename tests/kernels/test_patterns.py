import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcompile.kernels.patterns import BOUNDARIES, KINDS, MAX_TOKENS, HeadPattern, decode, distinct, encode

tokens = st.integers(1, MAX_TOKENS)
head_patterns = st.builds(
    HeadPattern,
    kind=st.sampled_from(KINDS),
    sink=tokens,
    local=tokens,
    last=tokens,
    boundary=st.sampled_from(BOUNDARIES),
)


@settings(deadline=None)
@given(st.lists(head_patterns, min_size=1, max_size=5))
def test_text_form_brings_back_equal_patterns(patterns: list[HeadPattern]) -> None:
    text = encode(patterns)
    assert decode(text) == tuple(patterns)
    assert encode(decode(text)) == text


def test_text_form_is_fixed_because_graphs_are_compared_by_it() -> None:
    assert (
        encode([HeadPattern("a_shape")]) == '[{"boundary":"none","kind":"a_shape","last":128,"local":4096,"sink":128}]'
    )


@pytest.mark.parametrize(
    ("boundary", "query_order", "key_order"),
    [
        ("none", "raster", "raster"),
        ("k", "raster", "raster"),
        ("q", "modality", "raster"),
        ("2d", "modality", "modality"),
    ],
)
def test_boundary_decides_the_orders(boundary: str, query_order: str, key_order: str) -> None:
    pattern = HeadPattern("a_shape", boundary=boundary)
    assert (pattern.query_order, pattern.key_order) == (query_order, key_order)


def test_distinct_patterns_keep_the_order_of_first_use() -> None:
    dense, local = HeadPattern(), HeadPattern("a_shape")
    assert distinct([local, dense, HeadPattern("a_shape"), local]) == ((local, dense), (0, 1, 0, 0))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "ashape"}, ["kind='ashape'", "did you mean 'a_shape'", "'tri_shape'"]),
        ({"kind": None}, ["kind=None", "'dense'"]),
        ({"kind": "dense", "boundary": "2D"}, ["boundary='2D'", "did you mean '2d'"]),
        ({"kind": "dense", "boundary": 2}, ["boundary=2", "'2d'"]),
        ({"kind": "a_shape", "sink": 0}, ["sink=0", "an int from 1 to"]),
        ({"kind": "a_shape", "sink": True}, ["sink=True", "an int from 1 to"]),
        ({"kind": "a_shape", "local": -4096}, ["local=-4096", "an int from 1 to"]),
        ({"kind": "a_shape", "local": 4096.0}, ["local=4096.0", "an int from 1 to"]),
        ({"kind": "a_shape", "local": "4096"}, ["local='4096'", "an int from 1 to"]),
        ({"kind": "tri_shape", "last": MAX_TOKENS + 1}, [f"last={MAX_TOKENS + 1}", f"to {MAX_TOKENS}"]),
        ({"kind": "dense", "sinks": 1}, ["'sinks'", "did you mean 'sink'", "'local'"]),
        ({"sink": 1}, ["'kind' is missing", "'a_shape'"]),
        ([("kind", "dense")], ["a mapping of field to value", "[('kind', 'dense')]"]),
    ],
)
def test_bad_pattern_is_refused_with_field_value_and_what_is_right(values: object, said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        HeadPattern.from_dict(values)  # type: ignore[arg-type]
    for part in said:
        assert part in str(error.value)


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
