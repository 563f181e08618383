import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcompile.kernels.orders import (
    MODALITIES,
    key_modality,
    modality_order,
    raster_order,
    slots,
    token_modality,
)

CPU = torch.device("cpu")


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def segment_lists(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]]]:
    """Batch, length, (tokens, modality) of each segment. Segments may be empty, and end anywhere."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 60))
    segment = st.tuples(st.sampled_from([0, 0, 1, 1, 2, 7, 30]), st.integers(0, MODALITIES - 1))
    return batch, length, draw(st.lists(segment, max_size=12))


@settings(deadline=None)
@given(segment_lists())
def test_token_modality_is_that_of_its_segment(case: tuple[int, int, list[tuple[int, int]]]) -> None:
    batch, length, segments = case
    expected: list[int] = []
    offsets = [0]
    for tokens, modality in segments:
        expected += [modality] * tokens
        offsets.append(offsets[-1] + tokens)
    expected = (expected + [0] * (batch * length))[: batch * length]
    actual = token_modality(int32(offsets), int32([modality for _, modality in segments]), batch, length)
    assert actual.dtype == torch.int32
    assert actual.flatten().tolist() == expected


def test_a_modality_out_of_range_is_clamped_and_stays_a_modality() -> None:
    assert token_modality(int32([0, 1, 2]), int32([-3, 99]), 1, 2).tolist() == [[0, MODALITIES - 1]]


def test_keys_take_the_modality_of_the_query_token_they_belong_to() -> None:
    of_query = int32([1, 2, 3]).unsqueeze(0)
    assert key_modality(of_query, 3, 0).tolist() == [[1, 2, 3]]
    assert key_modality(of_query, 5, 2).tolist() == [[0, 0, 1, 2, 3]]  # two cached keys
    assert key_modality(of_query, 5, 0).tolist() == [[1, 2, 3, 0, 0]]  # room behind, as in a static cache
    assert key_modality(of_query, 2, -1).tolist() == [[2, 3]]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, MODALITIES - 1), min_size=40, max_size=40), min_size=1, max_size=3).flatmap(
        lambda rows: st.integers(1, 40).map(lambda length: [row[:length] for row in rows])
    )
)
def test_modality_order_is_a_stable_grouping(rows: list[list[int]]) -> None:
    order = modality_order(torch.tensor(rows, dtype=torch.int32))
    assert order.dtype == torch.int32
    for actual, row in zip(order.tolist(), rows, strict=True):
        assert actual == sorted(range(len(row)), key=lambda token: (row[token], token))
    slot = slots(order)
    assert torch.equal(slot.gather(-1, order.long()), raster_order(*order.shape, CPU))
    assert torch.equal(order.gather(-1, slot.long()), raster_order(*order.shape, CPU))


def test_one_modality_keeps_the_raster_order() -> None:
    order = modality_order(torch.full((2, 300), 4, dtype=torch.int32))
    assert torch.equal(order, raster_order(2, 300, CPU))
    assert torch.equal(slots(order), order)
