"""Video files to frames, and frames to the patches that transformers' own processor makes of them."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference

from mmcompile.video import VideoError, even_indices, read_frames
from mmcompile.video_patches import fit_size, video_patches

EXAMPLE = Path(__file__).parents[2] / "examples" / "moving_shapes.mp4"


def test_keeps_the_asked_frames_in_order():
    everything = read_frames(EXAMPLE)
    assert everything.shape == (64, 480, 640, 3)
    assert everything.dtype == torch.uint8
    some = read_frames(EXAMPLE, 5)
    assert torch.equal(some, everything[[0, 12, 25, 38, 51]])


def test_more_frames_than_there_are_keeps_all():
    assert len(read_frames(EXAMPLE, 1000)) == 64


@given(st.integers(1, 5000), st.data())
def test_even_indices_rise_from_zero(total, data):
    count = data.draw(st.integers(1, total))
    indices = even_indices(total, count)
    assert indices[0] == 0
    assert indices[-1] < total
    assert len(set(indices)) == count
    assert indices == sorted(indices)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "none.mp4", "no such file"),
        (lambda folder: folder, "is not a file"),
        (lambda folder: _written(folder / "notes.mp4", b"these are notes"), "not a video"),
        (lambda folder: _written(folder / "empty.mp4", b""), "not a video"),
        (lambda folder: _written(folder / "cut.mp4", EXAMPLE.read_bytes()[:30000]), "not a video"),
        (lambda folder: _sound(folder / "sound.wav"), "no video stream"),
    ],
)
def test_what_is_no_video_gets_one_line(tmp_path, make, says):
    path = make(tmp_path)
    with pytest.raises(VideoError, match=says) as caught:
        read_frames(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_frame_asked_for():
    with pytest.raises(ValueError, match="count=0"):
        read_frames(EXAMPLE, 0)


def test_without_pyav_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VideoError, match="pip install"):
        read_frames(EXAMPLE)


@given(
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.sampled_from([28, 32]),
    st.integers(56 * 56, 500_000),
    st.integers(1, 20),
)
def test_frame_size_is_the_processors(height, width, multiple, min_pixels, ratio):
    if max(height, width) > 200 * min(height, width):
        return
    max_pixels = min_pixels * ratio
    expected = reference.smart_resize(height, width, multiple, min_pixels, max_pixels)
    assert fit_size(height, width, multiple, min_pixels, max_pixels) == expected


def test_long_and_thin_frames_are_refused():
    with pytest.raises(ValueError, match="2010 x 10"):
        fit_size(10, 2010, 28, 56 * 56, 10**6)


def _processor(**bounds):
    return reference.Qwen2VLImageProcessorPil(**bounds)


@pytest.mark.parametrize("size", [(56, 84), (140, 112)])
def test_patches_are_the_processors_where_nothing_is_resized(size):
    frame = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    ours, grid = video_patches(frame.expand(2, -1, -1, -1), min_pixels=28 * 28)
    theirs = _processor(min_pixels=28 * 28)(frame.numpy(), return_tensors="pt", input_data_format="channels_last")
    assert torch.equal(grid, theirs["image_grid_thw"])
    torch.testing.assert_close(ours, theirs["pixel_values"], rtol=0, atol=2e-6)


def test_a_lone_frame_is_repeated_like_an_image():
    frame = read_frames(EXAMPLE, 1)[:, :448, :616]  # sides that divide by 28: nothing is resized
    ours, grid = video_patches(frame, min_pixels=28 * 28)
    theirs = _processor(min_pixels=28 * 28)(frame[0].numpy(), return_tensors="pt")
    assert torch.equal(grid, theirs["image_grid_thw"])
    torch.testing.assert_close(ours, theirs["pixel_values"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("bounds", [(336 * 336, 340 * 340), (28 * 28, 120 * 120)])
def test_resized_patches_are_within_a_grey_level_or_so_of_the_processors(bounds):
    frame = read_frames(EXAMPLE, 3)[2:]
    low, high = bounds
    ours, grid = video_patches(frame, min_pixels=low, max_pixels=high)
    theirs = _processor(min_pixels=low, max_pixels=high)(frame[0].numpy(), return_tensors="pt")
    assert torch.equal(grid, theirs["image_grid_thw"])
    level = 1 / 255 / 0.26
    assert (ours - theirs["pixel_values"]).abs().max() < 2 * level
    assert (ours - theirs["pixel_values"]).abs().mean() < 0.05 * level


def test_time_is_cut_into_pairs_in_order():
    """Frame n of uniform grey n: every patch of temporal step t holds greys 2t and 2t + 1, in that order."""
    frames = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 56, 56, 3) * 40
    patches, grid = video_patches(frames, min_pixels=28 * 28)
    assert grid.tolist() == [[3, 4, 4]]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    values = patches.view(3, 16, 3, 2, 14 * 14)  # [t, patch, channel, frame, pixel]
    greys = (values * std.view(1, 1, 3, 1, 1) + mean.view(1, 1, 3, 1, 1)) * 255 / 40
    expected = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 4.0]]).view(3, 1, 1, 2, 1).expand_as(greys)
    torch.testing.assert_close(greys, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("frames", [torch.zeros(2, 56, 56, 3), torch.zeros(56, 56, 3, dtype=torch.uint8)])
def test_frames_of_another_kind_are_refused(frames):
    with pytest.raises(ValueError, match="must be uint8"):
        video_patches(frames)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _sound(path: Path) -> Path:
    import wave

    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    return path
