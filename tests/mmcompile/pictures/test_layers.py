"""The layers of a prefill: numbered as the decoder has them, or not at all."""

import pytest
import torch

import mmcompile
from mmcompile.errors import MMCompileError, OptionError
from mmcompile.huggingface import example_inputs
from mmcompile.pictures.layers import architecture_of, describe_sample, seen_layer, visit_layers
from mmcompile.tiny_qwen import tiny_qwen2_5_vl
from tests.mmcompile.pictures.seen import seen_attention


@pytest.fixture(scope="module")
def model():
    return tiny_qwen2_5_vl()


def test_a_layer_is_seen_and_the_model_left_as_it_was(model):
    inputs = example_inputs(model, tokens=200)
    before = model(**inputs).logits
    seen = seen_layer(model, inputs, 1)
    assert seen.query.shape == (1, 4, 200, 16) and "layers.1" in seen.module_path
    assert bool((model(**inputs).logits == before).all())
    assert mmcompile.stats(model) == []


def test_a_layer_that_is_not_there(model):
    with pytest.raises(OptionError, match="--layer 2: the model has layers 0 to 1"):
        seen_layer(model, example_inputs(model, tokens=200), 2)


def test_layers_that_stay_dense_are_told_with_the_reason(model):
    inputs = example_inputs(model, tokens=40)
    # A mask that is no formula of the positions.
    inputs["attention_mask"] = torch.rand(1, 1, 40, 40) < 0.5
    visited = []
    with pytest.raises(MMCompileError, match="0 of the text decoder's 2 attentions can be made sparse"):
        visit_layers(model, inputs, lambda layer, seen: visited.append(layer))
    assert not visited


def test_a_model_without_a_decoder():
    with pytest.raises(MMCompileError, match="Linear: its config tells no text decoder"):
        architecture_of(torch.nn.Linear(2, 2))


def test_a_sample_in_words():
    seen = seen_attention(batch=1)
    assert describe_sample(seen) == "700 tokens: text 40, video 600 (30 x 4 x 5), text 60"
