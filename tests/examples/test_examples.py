"""Every example runs tiny, explains itself, ends its errors in one line, and loads what it says it loads."""

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmcompile.tiny_qwen import tiny_qwen2_5_vl

FOLDER = Path(__file__).parents[2] / "examples"
NAMES = ("qwen2_5_vl", "llava_video", "longvila", "videochat_flash")
REMOTE = ("longvila", "videochat_flash")


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def _main(name, *arguments):
    return import_module(name).EXAMPLE.main(arguments)


def _error(capsys):
    """The one line that an example ended in."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def _check(output):
    """Both times, what was computed in both layers, and where to go on."""
    for words in ("first token, dense:", "first token, compiled:", "layer 0: density", "layer 1: density", "Next"):
        assert words in output, output
    assert "2 attentions of the prefill ran sparse" in output, output


@pytest.mark.parametrize("name", [name for name in NAMES if name != "longvila"])
def test_tiny(name, capsys):
    assert _main(name, "--tiny", "--frames", "8") == 0
    _check(capsys.readouterr().out)


def test_tiny_as_a_command_from_any_folder(tmp_path):
    """The tiny models of tests/ are found from there too."""
    command = [sys.executable, str(FOLDER / "longvila.py"), "--tiny", "--frames", "4"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    _check(ran.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_help_names_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        _main(name, "--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"example: python examples/{name}.py --video" in shown
    assert ("--trust-remote-code" in shown) == (name in REMOTE)


@pytest.mark.parametrize("name", REMOTE)
def test_remote_code_is_refused_unless_trusted(name, monkeypatch, capsys):
    monkeypatch.setattr(import_module(name), "AutoModel", None)  # using it would raise
    assert _main(name) == 1
    assert "pass --trust-remote-code" in _error(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tiny", "--video", "nowhere.mp4"], "nowhere.mp4: no such file"),
        (["--tiny", "--density", "2"], "density=2.0"),
        (["--tiny", "--frames", "5000", "--density", "0"], "density=0.0"),
        (["--model", "./nowhere"], "torchvision" if find_spec("torchvision") is None else "./nowhere: "),
    ],
)
def test_errors_are_one_line(arguments, words, capsys):
    assert _main("qwen2_5_vl", *arguments) == 1
    assert words in _error(capsys)


@pytest.mark.parametrize(("name", "video_token"), [("qwen2_5_vl", "<|video_pad|>"), ("llava_video", "<video>")])
def test_loads_a_checkpoint_with_its_processor(name, video_token, tmp_path, capsys):
    pytest.importorskip("torchvision", reason="transformers' video processors need torchvision")
    _save_checkpoint(name, video_token, tmp_path)
    example = import_module(name)
    asked = example.load(example.EXAMPLE._parse(["--model", str(tmp_path), "--frames", "8"]))
    # Inductor would take minutes here to compile what runs for a moment.
    import_module("video_question").compare(asked, {"min_tokens": 0, "inner": "eager"})
    output = capsys.readouterr().out
    assert "2 attentions of the prefill ran sparse" in output
    assert "answer, compiled: w" in output, "the answer is in words"


def test_frames_of_qwen_are_as_far_apart_as_in_the_video():
    """moving_shapes.mp4 has 64 frames in 8 seconds."""
    example = import_module("qwen2_5_vl")
    metadata = example._metadata(SimpleNamespace(video=FOLDER / "moving_shapes.mp4"), 16)
    assert metadata.sampled_fps == pytest.approx(2)


@pytest.mark.parametrize("name", REMOTE)
def test_calls_remote_code_as_its_model_card_does(name, monkeypatch):
    """A stand-in with the methods that the cards name; the real checkpoints' code is not in it."""
    example = import_module(name)
    calls = []
    stand_in = _stand_in(name, example, calls)

    def from_pretrained(checkpoint, *, trust_remote_code, **_):
        assert trust_remote_code
        return stand_in

    loader = SimpleNamespace(from_pretrained=from_pretrained)
    for auto in ("AutoModel", "AutoTokenizer"):
        monkeypatch.setattr(example, auto, loader, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = example.load(example.EXAMPLE._parse(["--trust-remote-code", "--frames", "7"]))
    assert asked.answer(3) == "words"
    assert isinstance(asked.module, torch.nn.Module)
    assert calls == [(7, 3)]


@pytest.mark.parametrize("name", REMOTE)
def test_remote_code_that_fails_is_named_in_one_line(name, monkeypatch, capsys):
    def from_pretrained(*_, **__):
        raise AttributeError("no such thing\nin this version")

    example = import_module(name)
    for auto in ("AutoModel", "AutoTokenizer"):
        monkeypatch.setattr(example, auto, SimpleNamespace(from_pretrained=from_pretrained), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _main(name, "--trust-remote-code") == 1
    assert "the checkpoint's own code failed" in _error(capsys)


def _stand_in(name, example, calls):
    """What `from_pretrained` gives: notes the frames and new tokens of each answer."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(mm_llm_compress=True, fps=1)
            self.llm = torch.nn.Identity()

        def cuda(self):
            return self

        @property
        def default_generation_config(self):
            return _Settings()

        def generate_content(self, prompt, generation_config=None):
            assert prompt == [example.QUESTION, {"path": str(FOLDER / "moving_shapes.mp4")}]
            assert self.config.fps == 0
            calls.append((self.config.num_video_frames, generation_config["max_new_tokens"]))
            return "words"

        def chat(self, *, video_path, user_prompt, tokenizer, return_history, max_num_frames, generation_config):
            assert not self.config.mm_llm_compress and not return_history
            calls.append((max_num_frames, generation_config["max_new_tokens"]))
            return "words"

    return Model()


class _Settings(dict):
    """`GenerationConfig.update` takes keywords, and so does a dictionary's."""


def _save_checkpoint(name, video_token, folder):
    """A tiny model and its processor, saved as the public checkpoint is."""
    words = {f"w{index}": index for index in range(512)}
    image_token = video_token.replace("video", "image")
    special = {video_token: 501, image_token: 500, "<|vision_start|>": 502, "<|vision_end|>": 503, "<unk>": 3}
    vocabulary = {word: index for word, index in words.items() if index not in special.values()} | special
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=list(special)
    )
    template = (
        "{% for part in messages[0]['content'] %}{% if part['type'] == 'video' %}"
        f"<|vision_start|>{video_token}<|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    )
    if name == "qwen2_5_vl":
        from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

        size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
        model = tiny_qwen2_5_vl(window_size=112)
        processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), fast, Qwen2VLVideoProcessor(size=size), template)
    else:
        from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

        model = import_module(name).tiny(import_module(name).EXAMPLE._parse(["--tiny"])).module
        pictures = LlavaOnevisionVideoProcessor(size={"height": 224, "width": 224})
        processor = LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(), fast, pictures, num_image_tokens=256, chat_template=template
        )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
