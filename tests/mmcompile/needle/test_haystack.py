"""Plans of prompts: exact lengths, needles where they were asked for, positions as the model's own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLForConditionalGeneration

from mmcompile.huggingface import ModelError
from mmcompile.needle.haystack import CARD, TASKS, TEXT, plan
from mmcompile.needle.layout import Layout
from mmcompile.needle.model import needle_config
from mmcompile.needle.passages import fact, question
from mmcompile.needle.vocabulary import COLOURS, word_tokenizer

LAYOUT = Layout.of(needle_config(), word_tokenizer())
prompts = st.tuples(
    st.sampled_from(TASKS),
    st.integers(512, 9000),
    st.floats(0, 1),
    st.integers(0, 2**32),
    st.integers(1, 4),
)


@given(prompts)
@settings(deadline=None, max_examples=60)
def test_a_prompt_is_what_was_ordered(prompt):
    task, tokens, depth, seed, questions = prompt
    made = plan(task, tokens, depth, np.random.default_rng(seed), LAYOUT, questions=questions)
    words = LAYOUT.words
    assert len(made.ids) == len(made.types) == tokens
    assert ((made.ids == LAYOUT.video) == (made.types == 2)).all()
    assert (made.types == 2).sum() == sum(made.clips) * LAYOUT.frame_tokens
    text = (made.types == 0).mean()
    if task == "mixed":
        assert abs(text - 0.25) <= LAYOUT.frame_tokens / tokens
    else:
        assert len(made.clips) == 1
        assert (made.types == 0).sum() < LAYOUT.frame_tokens + 11 * questions + 10

    assert len({needle.colour for needle in made.needles}) == len(made.needles)
    assert len({needle.number for needle in made.needles}) == len(made.needles)
    frames = [needle.frame for needle in made.needles if needle.modality == CARD]
    assert len(set(frames)) == len(frames)
    for needle in made.needles:
        span = made.ids[needle.token : needle.token + needle.tokens]
        if needle.modality == CARD:
            assert (span == LAYOUT.video).all()
            assert np.flatnonzero(made.types == 2)[needle.frame * LAYOUT.frame_tokens] == needle.token
        else:
            assert (span == words.encode(fact(needle.colour, needle.number))).all()

    assert made.questions[-1, 0] == tokens - 1
    for (position, answer), needle in zip(made.questions, made.needles, strict=False):
        asked = words.encode(question(needle.colour))
        assert (made.ids[position + 1 - len(asked) : position + 1] == asked).all()
        assert answer == words.answers[needle.number]
        assert position == tokens - 1 or made.ids[position + 1] == answer


@pytest.mark.parametrize("asked", [CARD, TEXT])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_the_needle_stands_at_its_depth(asked, depth):
    made = plan("mixed", 16384, depth, np.random.default_rng(3), LAYOUT, asked=asked)
    assert made.needles[0].modality == asked
    alike = made.types == (2 if asked == CARD else 0)
    assert alike[: made.needles[0].token].sum() / alike.sum() == pytest.approx(depth, abs=0.02)
    assert made.needles[0].token / 16384 == pytest.approx(depth, abs=0.1)
    both = [needle.modality for needle in made.needles]
    assert both.count(CARD) == both.count(TEXT) == 3


def test_the_fact_that_is_asked_for_is_stated_once():
    made = plan("mixed", 8192, 0.4, np.random.default_rng(1), LAYOUT, asked=TEXT)
    colour, card = LAYOUT.words.encode(question(made.needles[0].colour))[5:7]
    stated = (made.ids[1:] == card) & (made.ids[:-1] == colour)
    assert stated.sum() == 2  # the fact and the question


@pytest.mark.parametrize("task", TASKS)
def test_positions_are_the_models_own(task):
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(needle_config())
    made = plan(task, 3000, 0.5, np.random.default_rng(0), LAYOUT)
    theirs, _ = model.model.get_rope_index(
        torch.as_tensor(made.ids)[None],
        video_grid_thw=torch.as_tensor(LAYOUT.grid(made.clips)),
        mm_token_type_ids=torch.as_tensor(made.types)[None],
    )
    assert (theirs[:, 0].numpy() == LAYOUT.positions(made.types, made.clips)).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("film", 1000, 0.5), "task='film'"),
        (("video", 1000, 1.5), "depth=1.5"),
        (("video", 60, 0.5), "tokens=60"),
        (("mixed", 130, 0.5), "tokens=130"),
    ],
)
def test_what_cannot_be_made(arguments, says):
    with pytest.raises(ModelError, match=says):
        plan(*arguments, np.random.default_rng(0), LAYOUT)


def test_a_video_has_no_text_to_ask_about():
    with pytest.raises(ModelError, match="asked='text'"):
        plan("video", 1000, 0.5, np.random.default_rng(0), LAYOUT, asked=TEXT)


def test_other_families_are_named():
    config = needle_config()
    config.model_type = "qwen9_vl"
    with pytest.raises(ModelError, match="qwen9_vl"):
        Layout.of(config, word_tokenizer())


def test_every_colour_is_asked_for():
    rng = np.random.default_rng(0)
    asked = {plan("video", 300, 0.5, rng, LAYOUT).needles[0].colour for _ in range(200)}
    assert asked == set(range(len(COLOURS)))
