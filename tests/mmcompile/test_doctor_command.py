"""`python -m mmcompile doctor` as a user meets it: a folder with a model and its processor, and folders without."""

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
from typer.testing import CliRunner

from mmcompile import cli
from mmcompile.diagnosis import Status
from mmcompile.doctor_prompts import WORDS, make_prompts
from mmcompile.huggingface import ModelError
from mmcompile.tiny_config import load_config, tiny_config, tiny_model
from tests.models.families import END, FAMILIES, IMAGE

CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
)


def processor():
    """LLaVA's, over a vocabulary of few words."""
    words = ("<pad>", "<s>", "</s>", *WORDS)
    vocabulary = {word: index for index, word in enumerate(words)} | {"<image>": IMAGE, "<unk>": END}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return LlavaProcessor(
        pictures,
        fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT,
    )


@pytest.fixture(scope="module")
def with_processor(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    FAMILIES["llava"].model().save_pretrained(path)
    processor().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def without_processor(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen")
    FAMILIES["qwen2_5_vl"].model().save_pretrained(path)
    return str(path)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["doctor", *arguments])


def test_help_has_an_example():
    assert "python -m mmcompile doctor" in run("--help").stdout


def test_every_check_passes_and_is_written_down(with_processor, tmp_path):
    target = tmp_path / "doctor.json"
    said = run("--model", with_processor, "--no-tiny", "--way", "text model", "--json", str(target))
    assert said.exit_code == 0, said.output
    assert "Checks" in said.stdout
    assert "Next:" in said.stdout
    told = json.loads(target.read_text())
    assert told["healthy"]
    assert told["prompts"].startswith("a picture and text")
    assert {result["status"] for result in told["results"]} == {"works"}
    assert all(result["rewritten"] == result["causal"] == 2 for result in told["results"])


def test_a_failed_check_is_exit_code_1(with_processor, monkeypatch):
    monkeypatch.setattr("mmcompile.doctor.FP32_TOLERANCE", -1.0)
    said = run("--model", with_processor, "--way", "text model", "--check", "no cache")
    assert said.exit_code == 1
    assert "do not compile that way" in said.stdout


def test_without_a_processor_the_prompt_is_text_and_says_why(without_processor):
    made = make_prompts(tiny_model(load_config(without_processor)), without_processor)
    assert made.told.startswith("text alone: the processor could not be used")
    assert set(made.prompts.first) == {"input_ids", "attention_mask"}


def test_a_processors_prompt_has_a_picture_and_pads_on_the_left(with_processor):
    made = make_prompts(tiny_model(load_config(with_processor)), with_processor)
    lengths = [inputs["input_ids"].shape[1] for inputs in (made.prompts.first, made.prompts.longer)]
    assert lengths == [170 + 16, 300 + 16]
    assert made.prompts.first["pixel_values"].shape == (1, 3, 56, 56)
    assert made.prompts.padded["attention_mask"].sum(1).tolist() == [160 + 16, 120 + 16]
    assert not made.prompts.padded["attention_mask"][1, 0]


@pytest.mark.parametrize("way", ["by hand", "compile"])
def test_an_unknown_way_is_one_clear_error(with_processor, monkeypatch, capsys, way):
    monkeypatch.setattr(sys, "argv", ["mmcompile", "doctor", "--model", with_processor, "--way", way])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "must be one of" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["gone", "."])
def test_a_folder_without_a_model_is_one_clear_error(tmp_path, where):
    with pytest.raises(ModelError, match=r"no such folder|no config here"):
        load_config(str(tmp_path / where))


def test_a_small_config_keeps_every_kind_of_layer_and_what_placeholders_mean():
    config = AutoConfig.for_model("gemma3")
    tiny = tiny_config(config)
    assert tiny.text_config.layer_types == ["sliding_attention", "full_attention"]
    assert tiny.text_config.num_hidden_layers == tiny.vision_config.num_hidden_layers == 2
    assert tiny.text_config.sliding_window == config.text_config.sliding_window
    assert tiny.text_config.head_dim == config.text_config.head_dim
    assert tiny.text_config.vocab_size == config.text_config.vocab_size
    assert tiny.text_config.num_attention_heads // tiny.text_config.num_key_value_heads == 2
    assert config.text_config.num_hidden_layers == 26


def test_a_small_config_renumbers_the_layers_that_lists_name():
    config = AutoConfig.for_model("qwen2_5_vl", vision_config={"fullatt_block_indexes": [7, 15], "depth": 16})
    vision = tiny_config(config).vision_config
    assert (vision.depth, vision.fullatt_block_indexes) == (2, [1])


def test_widths_that_name_each_other_stay_equal():
    config = AutoConfig.for_model("qwen2_5_vl", vision_config={"out_hidden_size": 8192})
    tiny = tiny_config(config)
    assert tiny.vision_config.out_hidden_size == tiny.text_config.hidden_size == 4 * 128
    assert tiny.vision_config.hidden_size // tiny.vision_config.num_heads == 3584 // 16


@pytest.mark.parametrize("name", ["qwen2_vl", "molmo2", "lfm2_vl"])
def test_a_small_model_of_a_familys_default_config_runs(name):
    model = tiny_model(AutoConfig.for_model(name))
    with torch.no_grad():
        assert model(input_ids=torch.arange(3, 40)[None]).logits.isfinite().all()


def test_a_status_prints_as_its_words():
    assert [str(status) for status in Status] == ["works", "stays dense", "fails"]
