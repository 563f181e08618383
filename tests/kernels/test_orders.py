import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcompile.kernels.orders import (
    MAX_SITES,
    NO_SITE,
    TokenSites,
    in_tokens,
    of_keys,
    slots,
    sort_key,
    token_modality,
    without_sink,
)
from mmcompile.kernels.patterns import MODALITIES, TILE, Order

BASES = ["raster", "site", "column"]


def int32(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


Segment = tuple[int, int, tuple[int, int, int]]  # tokens, modality, grid


@st.composite
def segment_lists(draw: st.DrawFn) -> tuple[int, int, list[Segment]]:
    """Batch, length, segments. Segments may be empty, and end anywhere."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 60))
    side = st.sampled_from([0, 1, 1, 2, 3, 5])
    segment = st.tuples(
        st.sampled_from([0, 0, 1, 1, 2, 7, 30]), st.integers(0, MODALITIES - 1), st.tuples(side, side, side)
    )
    return batch, length, draw(st.lists(segment, max_size=12))


def boundaries(segments: list[Segment]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    offsets = [0]
    for tokens, _, _ in segments:
        offsets.append(offsets[-1] + tokens)
    grid = int32([grid for _, _, grid in segments]).view(-1, 3)
    return int32(offsets), int32([modality for _, modality, _ in segments]), grid


@settings(deadline=None)
@given(segment_lists())
def test_token_modality_is_that_of_its_segment(case: tuple[int, int, list[Segment]]) -> None:
    batch, length, segments = case
    expected: list[int] = []
    for tokens, modality, _ in segments:
        expected += [modality] * tokens
    expected = (expected + [0] * (batch * length))[: batch * length]
    offsets, modality, grid = boundaries(segments)
    actual = token_modality(offsets, modality, batch, length)
    assert actual.dtype == torch.int32
    assert actual.flatten().tolist() == expected
    assert torch.equal(TokenSites.of(offsets, modality, grid, batch, length).modality, actual)


def test_a_modality_out_of_range_is_clamped_and_stays_a_modality() -> None:
    assert token_modality(int32([0, 1, 2]), int32([-3, 99]), 1, 2).tolist() == [[0, MODALITIES - 1]]


@settings(deadline=None)
@given(segment_lists())
def test_a_token_counts_from_its_segment_or_its_sequence(case: tuple[int, int, list[Segment]]) -> None:
    batch, length, segments = case
    tokens = TokenSites.of(*boundaries(segments), batch, length)
    assert {part.dtype for part in tokens} == {torch.int32} and {part.shape for part in tokens} == {(batch, length)}
    place, frame, row = [], [], []
    for count, _, (_, rows, columns) in segments:
        for token in range(count):
            begins = token == 0 or len(place) % length == 0
            place.append(0 if begins else place[-1] + 1)
            frame.append(rows * columns)
            row.append(columns)
    told = min(len(place), batch * length)
    for actual, expected in zip(tokens[1:], (place, frame, row), strict=True):
        assert actual.flatten()[:told].tolist() == expected[:told]
    if not segments:
        assert tokens.place.tolist() == [list(range(length))] * batch and not tokens.frame.any()


def token_order(order: Order, modality: torch.Tensor, site: torch.Tensor) -> torch.Tensor:
    """As `sort_tokens` makes it of what they are sorted by."""
    if order.is_raster:
        return torch.arange(modality.shape[1], dtype=torch.int32).expand_as(modality)
    by = sort_key(order, modality, None if order.base == "raster" else site)
    return by.argsort(dim=-1, stable=True).int()


def two_frames() -> TokenSites:
    """Text, two frames of two rows and three columns, text; then a sequence of an image and a bit of the next."""
    offsets, modality = int32([0, 2, 14, 16, 22, 32]), int32([0, 2, 0, 1, 2])
    grid = int32([[0, 0, 0], [2, 2, 3], [0, 0, 0], [1, 3, 2], [0, 0, 0]])
    return TokenSites.of(offsets, modality, grid, 2, 16)


TEXT = NO_SITE


@pytest.mark.parametrize(
    ("order", "searched", "first", "second"),
    [
        (Order(base="site"), None, [0, 1, 2, 3, 4, 5] * 2, [0, 1, 2, 3, 4, 5, *[TEXT] * 10]),
        # What is told counts, and what is not is searched.
        (Order(base="site"), [5, 4], [0, 1, 2, 3, 4, 5] * 2, [0, 1, 2, 3, 4, 5, *[0, 1, 2, 3] * 2, 0, 1]),
        (Order(base="site", stride=5), [3, 3], [*range(5), *range(5), 0, 1], [*range(5), 0, *[*range(5)] * 2]),
        (Order(base="column"), [5, 4], [0, 1, 2] * 4, [0, 1, 0, 1, 0, 1, *[TEXT] * 10]),
        (Order(base="column", stride=4), None, [0, 1, 2, 3] * 3, [0, 1, 2, 3, 0, 1, *[0, 1, 2, 3] * 2, 0, 1]),
    ],
    ids=str,
)
def test_a_site_is_the_place_within_the_frame_or_the_row(
    order: Order, searched: list[int] | None, first: list[int], second: list[int]
) -> None:
    site = two_frames().sites(order, None if searched is None else int32(searched))
    assert site.dtype == torch.int32
    assert site.tolist() == [[TEXT] * 2 + first + [TEXT] * 2, second]


def test_a_row_of_text_alone_counts_as_vision() -> None:
    offsets, modality, grid = int32([0, 5, 12]), int32([0, 1]), int32([[0, 0, 0], [0, 0, 0]])
    tokens = TokenSites.of(offsets, modality, grid, 2, 6)
    assert tokens.sites(Order(base="site", stride=3), None).tolist() == [[-1] * 5 + [0], [0, 1, 2] * 2]
    tokens = TokenSites.of(offsets, int32([0, 0]), grid, 2, 6)
    assert tokens.sites(Order(base="site", stride=3), None).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2] * 2]
    assert tokens.sites(Order(base="site"), int32([2, 4])).tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 2, 3, 0, 1]]
    assert (tokens.sites(Order(base="site"), None) == NO_SITE).all()


def test_a_stride_past_the_largest_site_leaves_sort_keys_int32() -> None:
    place = int32([[0, MAX_SITES - 3, MAX_SITES + 5, 2**31 - 2]])
    tokens = TokenSites(torch.full_like(place, 7), place, torch.full_like(place, 2**31 - 1), torch.zeros_like(place))
    site = tokens.sites(Order(base="site"), None)
    assert site.tolist() == [[0, MAX_SITES - 3, MAX_SITES - 2, MAX_SITES - 2]]
    assert token_order(Order(True, "site"), tokens.modality, site).tolist() == [[0, 1, 2, 3]]


@st.composite
def modalities_and_sites(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 200))
    modality = rng.integers(0, draw(st.integers(1, MODALITIES)), shape)
    return modality, rng.integers(-1, draw(st.sampled_from([1, 3, 20, MAX_SITES - 1])), shape)


@settings(deadline=None)
@given(modalities_and_sites(), st.builds(Order, st.booleans(), st.sampled_from(BASES), st.integers(0, 9)))
def test_tokens_are_sorted_by_modality_site_and_position(case: tuple[np.ndarray, np.ndarray], order: Order) -> None:
    modality, site = case
    if order.base == "raster":
        site = np.full_like(site, NO_SITE)
    made = token_order(order, torch.from_numpy(modality).int(), torch.from_numpy(site).int())
    assert made.dtype == torch.int32
    for actual, groups, sites in zip(made.tolist(), modality, site, strict=True):
        key = [(groups[token] if order.grouped else 0, sites[token], token) for token in range(len(sites))]
        assert actual == sorted(range(len(sites)), key=key.__getitem__)
    slot = slots(made)
    raster = torch.arange(made.shape[1], dtype=torch.int32).expand_as(made)
    assert slot.dtype == torch.int32
    assert torch.equal(slot.gather(-1, made.long()), raster)
    assert torch.equal(made.gather(-1, slot.long()), raster)


@settings(deadline=None)
@given(modalities_and_sites(), st.booleans())
def test_what_stands_in_slots_comes_back_in_tokens(case: tuple[np.ndarray, np.ndarray], with_rows: bool) -> None:
    modality, site = (torch.from_numpy(part).int() for part in case)
    order = token_order(Order(True, "site"), modality, site)
    values = torch.stack([modality, site], 1) if with_rows else site
    index = order.long().unsqueeze(1).expand_as(values) if with_rows else order.long()
    assert torch.equal(in_tokens(values.gather(-1, index), order), values)


def test_one_modality_keeps_the_raster_order() -> None:
    modality = torch.full((2, 300), 4, dtype=torch.int32)
    order = token_order(Order(True), modality, torch.full_like(modality, NO_SITE))
    assert torch.equal(order, torch.arange(300, dtype=torch.int32).expand(2, -1))
    assert torch.equal(slots(order), order)


def test_keys_take_what_is_known_of_the_query_token_they_belong_to() -> None:
    of_query = int32([[1, 2, 3]])
    assert of_keys(of_query, 3, 0, 0).tolist() == [[1, 2, 3]]
    assert of_keys(of_query, 5, 2, 0).tolist() == [[0, 0, 1, 2, 3]]  # two cached keys
    assert of_keys(of_query, 5, 0, -1).tolist() == [[1, 2, 3, -1, -1]]  # room behind, as in a static cache
    assert of_keys(of_query, 2, -1, 0).tolist() == [[2, 3]]
    assert of_keys(of_query, 2, 7, -1).tolist() == [[-1, -1]]
    assert of_keys(of_query, 2, 0, 0).dtype == torch.int32


@pytest.mark.parametrize("padding", ["none", "left", "holes", "empty"])
def test_the_first_valid_keys_are_of_no_site(padding: str) -> None:
    site = torch.arange(600, dtype=torch.int32).expand(2, -1) % 7
    key = torch.arange(600)
    valid = {"none": None, "left": key >= 150, "holes": key % 3 == 0, "empty": key < 0}[padding]
    made = without_sink(site, None if valid is None else valid.expand(2, -1))
    ends = {"none": TILE, "left": 150 + TILE, "holes": 3 * TILE, "empty": 600}[padding]
    assert made.dtype == torch.int32
    assert (made[:, :ends] == NO_SITE).all()
    assert torch.equal(made[:, ends:], site[:, ends:])
    assert (site >= 0).all()  # not in place


def test_valid_keys_of_one_row_may_serve_a_batch() -> None:
    site = torch.zeros(3, 300, dtype=torch.int32)
    valid = (torch.arange(300) >= 100).unsqueeze(0)
    assert without_sink(site, valid).tolist() == without_sink(site, valid.expand(3, -1)).tolist()
