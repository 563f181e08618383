"""Samples: frames that are never the same twice, cards that can be told apart, inputs as the processor makes them."""

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference

from mmcompile.needle.cards import PAINTS, cards
from mmcompile.needle.layout import Layout
from mmcompile.needle.model import needle_config, preprocessing
from mmcompile.needle.scenes import scenes
from mmcompile.needle.task import pixel_values, sample
from mmcompile.needle.vocabulary import COLOURS, NUMBERS, SHAPES, word_tokenizer

LAYOUT = Layout.of(needle_config(), word_tokenizer())


@pytest.mark.parametrize("task", ["video", "mixed"])
def test_a_sample_is_what_it_says(task):
    made = sample(task, 1100, 0.5, 7, LAYOUT)
    assert made.tokens == 1100
    clips = made.video_grid_thw[:, 0].sum()
    assert made.frames.shape == (clips * 2, 96, 96, 3)
    assert made.frames.dtype == torch.uint8
    assert made.answer_id == LAYOUT.words.answers[NUMBERS.index(made.answer)]
    inputs = made.inputs()
    assert inputs["pixel_values_videos"].shape == (clips * 144, 384)
    assert (made.mm_token_type_ids == 2).sum() * 4 == len(inputs["pixel_values_videos"])


def test_the_card_is_where_it_should_be():
    made = sample("video", 2000, 0.5, 0, LAYOUT)
    needle = made.needles[0]
    shown = made.frames[2 * needle.frame : 2 * needle.frame + 2]
    assert torch.equal(shown[0], shown[1])
    middle = shown[0, 30:66, 30:66].reshape(-1, 3).float().median(0).values
    distance = (middle - torch.as_tensor(PAINTS).float()).square().sum(-1)
    assert COLOURS[int(distance.argmin())] == made.colour


def test_seeds_and_repeats():
    first, again, other = (sample("mixed", 700, 0.2, seed, LAYOUT) for seed in (5, 5, 6))
    assert torch.equal(first.frames, again.frames)
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.frames, other.frames)
    assert not torch.equal(first.input_ids, other.input_ids)


def test_no_two_frames_are_alike():
    frames = scenes(300, 48, 64, np.random.default_rng(0), "cpu")
    assert frames.shape == (300, 48, 64, 3)
    assert len(frames.flatten(1).unique(dim=0)) == 300
    assert frames.float().flatten(1).std(1).min() > 5
    assert frames.float().std(0).min() > 5  # nowhere does the picture stand still
    # Within a shot frames move on smoothly; a cut changes everything.
    change = frames.float().diff(dim=0).abs().flatten(1).mean(1)
    assert change.median() < 30
    assert 5 < (change > 2 * change.median()).sum() < 40


def test_cards_differ_in_colour_shape_and_number():
    count = len(COLOURS)
    colours = np.arange(count)
    drawn = cards(colours, colours % len(SHAPES), colours + 10, 96, 96, np.random.default_rng(0), "cpu").int()
    for one in range(count):
        for other in range(one):
            assert (drawn[one] - drawn[other]).abs().float().mean() > 10


def test_every_number_is_written_in_its_own_way():
    count = len(NUMBERS)
    zeros = np.zeros(count, dtype=np.int64)
    drawn = torch.cat(
        [cards(zeros[:1], zeros[:1], np.array([n]), 96, 96, np.random.default_rng(0), "cpu") for n in range(count)]
    )
    ink = (drawn < 40).all(-1).flatten(1)
    assert len(ink.unique(dim=0)) == count
    assert ink.sum(1).min() > 200


def test_preprocessing_is_the_documented_one():
    settings = preprocessing()
    processor = reference.Qwen2VLImageProcessorPil(
        **{name: value for name, value in settings.items() if not name.endswith(("_type", "_class"))}
    )
    frame = sample("video", 300, 0.5, 0, LAYOUT).frames[:1]
    theirs = processor(images=[frame[0].numpy()], return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == LAYOUT.grid([1]).tolist()
    torch.testing.assert_close(pixel_values(frame, LAYOUT), theirs["pixel_values"])
