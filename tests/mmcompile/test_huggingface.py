"""Loading models, and prompts laid out as a processor would lay them out."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mmcompile.huggingface import ModelError, Text, example_inputs, load_model, prompts, video_of
from mmcompile.tiny_qwen import tiny_qwen2_5_vl
from tests.models.tiny import image, video

START, END, IMAGE, VIDEO = 502, 503, 500, 501


@pytest.fixture(scope="module")
def model():
    return tiny_qwen2_5_vl()


@pytest.fixture(scope="module")
def text_model():
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def test_tiny_model_is_the_same_every_time_and_leaves_the_seed_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = tiny_qwen2_5_vl(), tiny_qwen2_5_vl()
    assert torch.equal(torch.rand(3), expected)
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)


def test_tiny_model_refuses_a_head_dim_that_rotary_cannot_split():
    with pytest.raises(ValueError, match="head dim"):
        tiny_qwen2_5_vl(hidden_size=60, heads=4)


def test_saved_and_loaded_model_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    assert type(loaded) is type(model)
    assert not loaded.training
    inputs = prompts(model, [[Text(5), video(2, 4, 4), Text(3)]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_text_model_is_loaded_too(text_model, tmp_path):
    text_model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="bfloat16", device="cpu")
    assert isinstance(loaded, Qwen2ForCausalLM)
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "says"),
    [({}, "cannot load"), ({"dtype": "int4"}, "dtype='int4'"), ({"device": "abacus"}, "device='abacus'")],
)
def test_what_cannot_be_loaded_gets_one_line(tmp_path, options, says):
    with pytest.raises(ModelError, match=says) as caught:
        load_model(tmp_path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_gpu_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="no CUDA device"):
        load_model(tmp_path, device="cuda")


def test_layout_of_one_prompt(model):
    inputs = prompts(model, [[Text(3), image(4, 6), Text(2), video(2, 4, 4), Text(1)]])
    ids = inputs["input_ids"][0].tolist()
    assert ids[3] == START
    assert ids[4:10] == [IMAGE] * 6
    assert ids[10] == END
    assert ids[13] == START
    assert ids[14:22] == [VIDEO] * 8
    assert ids[22] == END
    assert len(ids) == 24
    types = inputs["mm_token_type_ids"][0].tolist()
    assert types == [0] * 4 + [1] * 6 + [0] * 4 + [2] * 8 + [0] * 2
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert inputs["pixel_values"].shape == (24, 1176)
    assert inputs["pixel_values_videos"].shape == (32, 1176)


def test_batch_is_padded_on_the_left_and_runs(model):
    rows = [[Text(3), video(2, 4, 4), Text(4)], [image(4, 4), Text(2), image(6, 4), Text(2)]]
    inputs = prompts(model, rows)
    lengths = [3 + 10 + 4, 6 + 2 + 8 + 2]
    assert inputs["attention_mask"].sum(1).tolist() == lengths
    assert inputs["attention_mask"][0].tolist() == [0] + [1] * 17
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 6, 4]]
    with torch.no_grad():
        batched = model(**inputs).logits[:, -1]
        alone = [model(**prompts_of_row(inputs, row)).logits[0, -1] for row in range(2)]
    torch.testing.assert_close(batched, torch.stack(alone), rtol=1e-4, atol=1e-4)


def prompts_of_row(inputs, row):
    """One row of the batch above without its padding."""
    real = inputs["attention_mask"][row].bool()
    only = {name: inputs[name][row, real][None] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    names = ("pixel_values_videos", "video_grid_thw") if row == 0 else ("pixel_values", "image_grid_thw")
    return only | {name: inputs[name] for name in names}


def test_words_are_never_special_and_repeat_with_the_seed(model):
    first = prompts(model, [[Text(4000)]], seed=3)["input_ids"]
    assert torch.equal(first, prompts(model, [[Text(4000)]], seed=3)["input_ids"])
    assert not torch.equal(first, prompts(model, [[Text(4000)]], seed=4)["input_ids"])
    assert not set(first.flatten().tolist()) & {0, 1, 2, IMAGE, VIDEO, START, END}
    assert first.max() < 512


@pytest.mark.parametrize(("count", "tokens"), [(8, 4096), (8, 200), (7, 200), (96, 150), (2, 70)])
def test_a_video_prompt_keeps_to_its_tokens(model, count, tokens):
    frames = torch.randint(0, 256, (count, 60, 90, 3), dtype=torch.uint8)
    inputs = example_inputs(model, frames=frames, tokens=tokens)
    length = inputs["input_ids"].shape[1]
    assert length <= tokens
    t, h, w = inputs["video_grid_thw"][0].tolist()
    assert t == (count + 1) // 2
    assert length == t * h * w // 4 + 66
    assert inputs["pixel_values_videos"].shape[0] == t * h * w


def test_a_video_that_cannot_fit_says_what_would(model):
    frames = torch.zeros(96, 56, 56, 3, dtype=torch.uint8)
    with pytest.raises(ModelError, match="96 frames need at least 48 tokens"):
        video_of(model.config, frames, 47)


def test_text_only_prompt(text_model):
    inputs = example_inputs(text_model, tokens=50)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].shape == (1, 50)
    assert not set(inputs["input_ids"].flatten().tolist()) & {1, 2}


def test_video_for_a_model_of_another_family(text_model):
    with pytest.raises(ModelError, match="qwen2: no video layout"):
        example_inputs(text_model, frames=torch.zeros(2, 56, 56, 3, dtype=torch.uint8))
