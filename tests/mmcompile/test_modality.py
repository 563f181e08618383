"""Boundaries: what is accepted, and what is read from a model's inputs."""

import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcompile.errors import BoundaryError
from mmcompile.input_boundaries import IMAGE, TEXT, VIDEO, boundaries_from_positions
from mmcompile.modality import ModalityBoundaries, bind, bound_boundaries

IMAGE_ID, VIDEO_ID = 500, 501
CONFIG = SimpleNamespace(
    image_token_id=IMAGE_ID, video_token_id=VIDEO_ID, vision_config=SimpleNamespace(spatial_merge_size=2)
)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("offsets", "modality", "grid", "message"),
    [
        (int32(1, 4), int32(0), None, r"offsets: the first is 1; must be 0"),
        (int32(0, 4, 4), int32(0, 1), None, r"offsets: 4 at index 2 follows 4; must be strictly increasing"),
        (int32(0, 4).long(), int32(0), None, r"offsets: dtype is torch.int64; must be torch.int32"),
        (int32(0, 4), int32(0).float(), None, r"modality: dtype is torch.float32; must be torch.int32"),
        (int32(0, 4), int32(0, 1), None, r"modality: 2 values; must be 1"),
        (int32(0, 4), int32(8), None, r"modality: 8 at index 0; must be from 0 \(text\) to 7"),
        (
            int32(0, 4),
            int32(1),
            torch.zeros(1, 2, dtype=torch.int32),
            r"grid: shape is \[1, 2\]; must be \[1, 3\]",
        ),
        (int32(0, 4), int32(1), torch.full((1, 3), -1, dtype=torch.int32), r"grid: smallest value is -1"),
        (int32(0), int32(), None, r"offsets: 1 value\(s\); must be at least 2"),
        ([0, 4], int32(0), None, r"offsets=\[0, 4\]: must be an int32 tensor"),
        (int32(0, 4)[None], int32(0), None, r"offsets: shape is \[1, 2\]"),
    ],
)
def test_bad_boundaries_get_one_clear_error(offsets, modality, grid, message):
    with pytest.raises(BoundaryError, match=message):
        ModalityBoundaries(offsets, modality, grid)


def test_boundaries_that_do_not_fit_the_batch():
    boundaries = ModalityBoundaries(int32(0, 3, 8), int32(0, 1))
    boundaries.check_fits(1, 8)
    with pytest.raises(BoundaryError, match=r"the last is 8; must be batch \* length = 2 \* 5 = 10"):
        boundaries.check_fits(2, 5)
    with pytest.raises(BoundaryError, match=r"no boundary at 4, where a sequence of 4 tokens starts"):
        boundaries.check_fits(2, 4)


def test_bind_ends_with_its_block_and_is_each_threads_own():
    boundaries = ModalityBoundaries(int32(0, 8), int32(0))
    seen = []
    with bind(boundaries):
        thread = threading.Thread(target=lambda: seen.append(bound_boundaries()))
        thread.start()
        thread.join()
        assert bound_boundaries() is boundaries
    assert bound_boundaries() is None
    assert seen == [None]
    with pytest.raises(BoundaryError, match="must be a ModalityBoundaries"), bind("0,8"):
        pass


def test_from_input_ids_with_grids():
    # text, an image of 4 x 6 patches (6 tokens after merging), text, a video of 2 frames of 4 x 4 patches
    ids = torch.tensor([[7, 8, *[IMAGE_ID] * 6, 9, *[VIDEO_ID] * 8, 7]])
    boundaries = ModalityBoundaries.from_inputs(
        CONFIG,
        input_ids=ids,
        image_grid_thw=torch.tensor([[1, 4, 6]]),
        video_grid_thw=torch.tensor([[2, 4, 4]]),
    )
    assert boundaries.offsets.tolist() == [0, 2, 8, 9, 17, 18]
    assert boundaries.modality.tolist() == [TEXT, IMAGE, TEXT, VIDEO, TEXT]
    assert boundaries.grid.tolist() == [[0] * 3, [1, 2, 3], [0] * 3, [2, 2, 2], [0] * 3]
    boundaries.check_fits(1, 18)


def test_a_video_cut_by_timestamps_is_one_segment_a_frame():
    ids = torch.tensor([[7, *[VIDEO_ID] * 4, 9, *[VIDEO_ID] * 4, 7]])
    boundaries = ModalityBoundaries.from_inputs(CONFIG, input_ids=ids, video_grid_thw=torch.tensor([[2, 4, 4]]))
    assert boundaries.modality.tolist() == [TEXT, VIDEO, TEXT, VIDEO, TEXT]
    assert boundaries.grid.tolist() == [[0] * 3, [1, 2, 2], [0] * 3, [1, 2, 2], [0] * 3]


def test_a_grid_that_does_not_match_its_tokens_is_left_unknown():
    ids = torch.tensor([[7, *[VIDEO_ID] * 4, 9, *[VIDEO_ID] * 3, 7]])
    boundaries = ModalityBoundaries.from_inputs(CONFIG, input_ids=ids, video_grid_thw=torch.tensor([[2, 4, 4]]))
    assert boundaries.modality.tolist() == [TEXT, VIDEO, TEXT, VIDEO, TEXT]
    assert boundaries.grid.sum() == 0


def test_sequences_of_a_batch_never_share_a_segment():
    types = torch.tensor([[0, 0, 2, 2], [2, 2, 2, 0]])
    boundaries = ModalityBoundaries.from_inputs(CONFIG, mm_token_type_ids=types)
    assert boundaries.offsets.tolist() == [0, 2, 4, 7, 8]
    assert boundaries.modality.tolist() == [TEXT, VIDEO, VIDEO, TEXT]


def test_nothing_that_tells_modalities_is_an_error():
    with pytest.raises(BoundaryError, match="input_ids: nothing tells the modalities"):
        ModalityBoundaries.from_inputs(SimpleNamespace(), input_ids=torch.zeros(1, 4, dtype=torch.long))


def positions_of(segments, by_area=False):
    """Multimodal rotary positions as Qwen's models make them, from (kind, size) with size tokens or a grid.

    by_area: text goes on after the larger side of a grid, as newer versions have it, else after every axis.
    """
    start, columns = 0, []
    for kind, size in segments:
        if kind == TEXT:
            block = torch.arange(size).expand(3, -1) + start
        else:
            frames, rows, cols = size
            stride = 2 if kind == VIDEO else 1  # tokens per second times seconds per frame
            grid = torch.meshgrid(torch.arange(frames) * stride, torch.arange(rows), torch.arange(cols), indexing="ij")
            block = torch.stack([axis.reshape(-1) for axis in grid]) + start
        columns.append(block)
        start = start + max(size[1:]) if by_area and kind != TEXT else int(block.max()) + 1
    return torch.cat(columns, dim=1)


vision = st.one_of(
    st.tuples(st.just(IMAGE), st.tuples(st.just(1), st.integers(1, 5), st.integers(2, 5))),
    st.tuples(st.just(VIDEO), st.tuples(st.integers(2, 5), st.integers(1, 5), st.integers(2, 5))),
)
prompt = st.lists(st.tuples(st.tuples(st.just(TEXT), st.integers(1, 6)), vision), min_size=1, max_size=4).map(
    lambda pairs: [segment for pair in pairs for segment in pair] + [(TEXT, 1)]
)


@settings(deadline=None, max_examples=200)
@given(prompt, st.integers(0, 5), st.sampled_from([0, 1]), st.booleans())
def test_positions_give_the_segments_they_were_made_from(segments, padding, pad_with, by_area):
    positions = positions_of(segments, by_area)
    positions = torch.cat([torch.full((3, padding), pad_with), positions], dim=1)
    boundaries = ModalityBoundaries.from_inputs(CONFIG, position_ids=positions[:, None])
    expected = [(kind, size if kind == TEXT else size[0] * size[1] * size[2]) for kind, size in segments]
    expected[0] = (TEXT, expected[0][1] + padding)
    lengths = boundaries.offsets.diff().tolist()
    assert list(zip(boundaries.modality.tolist(), lengths, strict=True)) == expected
    grids = [[0, 0, 0] if kind == TEXT else list(size) for kind, size in segments]
    assert boundaries.grid.tolist() == grids


def test_positions_of_a_batch_with_different_layouts():
    first = positions_of([(TEXT, 2), (IMAGE, (1, 2, 3)), (TEXT, 2)])
    second = positions_of([(TEXT, 3), (VIDEO, (2, 1, 2)), (TEXT, 3)])
    found = boundaries_from_positions(torch.stack([first, second], dim=1))
    assert found.offsets[:7].tolist() == [0, 2, 8, 10, 13, 17, 20]
    assert found.modality[:6].tolist() == [TEXT, IMAGE, TEXT, TEXT, VIDEO, TEXT]
    assert (found.offsets[6:] == 20).all()


def test_plain_text_positions_are_one_text_segment():
    boundaries = ModalityBoundaries.from_inputs(CONFIG, position_ids=torch.arange(9).expand(3, 1, -1))
    assert boundaries.offsets.tolist() == [0, 9]
    assert boundaries.modality.tolist() == [TEXT]
