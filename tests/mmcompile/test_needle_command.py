"""`python -m mmcompile needle` on an untrained model: what it counts, keeps, goes on with and draws."""

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import Qwen2_5_VLForConditionalGeneration

from mmcompile import HeadPattern, PatternTable
from mmcompile.bench.figure import FigureError
from mmcompile.cli import main
from mmcompile.errors import OptionError
from mmcompile.huggingface import ModelError
from mmcompile.needle import chat_prompts
from mmcompile.needle.chat_prompts import ChatPrompts
from mmcompile.needle.decoder import Decoder
from mmcompile.needle.evaluate import Plan, evaluate
from mmcompile.needle.methods import EVERY, choose_methods
from mmcompile.needle.model import needle_config
from mmcompile.needle.prompts import RealFrames
from mmcompile.needle.results import Results
from mmcompile.needle.run import begin, load
from mmcompile.needle.vocabulary import word_tokenizer
from mmcompile.video import VideoError
from mmcompile.video_patches import video_patches
from tests.models.families import FAMILIES

VIDEOS = Path(__file__).parents[2] / "examples"  # moving_shapes.mp4 is in there
TOKENS = 560


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A folder with a model of two layers that has learned nothing, and its tokenizer."""
    config = needle_config()
    config.text_config.num_hidden_layers, config.vision_config.depth = 2, 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.vision_config.fullatt_block_indexes = [1]
    folder = tmp_path_factory.mktemp("needle")
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def one_repeat(monkeypatch):
    monkeypatch.setattr("mmcompile.needle.evaluate.REPEATS", 1)


def asking(methods, *, tasks=("video",), samples=1, density=None, check=0.0, table=None):
    return Plan(tasks, (TOKENS,), (0.0, 1.0), samples, choose_methods(methods, table, density, None), check)


def asked(path, plan, target, *, questions=1, videos=None, resume=False):
    """The results of a plan, and how many batches it took."""
    decoder, prompts = load(path, videos, questions)
    results = begin(plan, decoder, prompts, target, resume=resume)
    batches = sum(1 for _ in evaluate(plan, decoder, prompts, results, lambda name: None))
    results.save(target)
    return results, batches


def test_with_every_tile_each_answer_is_denses(path, tmp_path):
    found, _ = asked(path, asking("auto-2d", tasks=("mixed",), density=1.0, check=1.0), tmp_path / "a.json")
    assert len(found.records) == 2
    for record in found.records:
        assert record.asked == [1, 1] and record.agreed == 2 and record.divergence < 1e-6
        assert record.density / record.batches >= 0.999
        assert record.ms > 0 and (record.attention_ms is None) == (record.method == "dense")
        assert all(head.error < 1e-4 and head.recall > 0.9999 for head in record.heads)


def test_the_decoder_alone_says_what_the_model_says(path):
    decoder, prompts = load(path, None, 3)
    batch = prompts.batch("mixed", TOKENS, [(0.0, 0), (0.5, 1)])
    assert batch.tokens == TOKENS and len(batch.asked) == 6
    with torch.no_grad():
        logits = decoder.model(**batch.inputs).logits
    decoder.use(None)
    found = decoder.log_probabilities(decoder.run(decoder.encode(batch.inputs)), batch.asked)
    for one, got in zip(batch.asked, found, strict=True):
        torch.testing.assert_close(got, logits[one.row, one.positions[0]].log_softmax(-1), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava", "internvl", "gemma3"])
def test_decoders_of_other_families_run_by_themselves_or_say_why_not(family):
    model = FAMILIES[family].model()
    inputs = FAMILIES[family].prompts(model).first
    expected, decoder = model(**inputs).logits, Decoder(model)
    encoded = decoder.encode(inputs)
    for options in (None, {"density": 1.0}):
        decoder.use(options)
        found = decoder.model.get_output_embeddings()(decoder.run(encoded))
        if options is None or family != "gemma3":
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    if family == "gemma3":
        with pytest.raises(ModelError, match="cannot be sparse here"):
            decoder.stats()
    else:
        assert [site.layer for site in decoder.stats()] == [0, 1]


def test_baselines_take_the_density_of_auto_and_all_is_told_beside_the_estimate(path, tmp_path):
    found, _ = asked(path, asking("columns@auto,vertical-slash@auto", check=1.0), tmp_path / "a.json")
    auto, *others = (one for one in found.records if one.method != "dense")
    assert [one.method for one in (auto, *others)] == ["auto", "columns@auto", "vertical-slash@auto"]
    assert all(one.density <= 1.2 * auto.density for one in others)
    assert len(auto.heads) == 8 and {(one.layer, one.head) for one in auto.heads} == {(i // 4, i % 4) for i in range(8)}
    row = auto.row()
    true, estimated = (sum(getattr(one, name) for one in auto.heads) / 8 for name in ("recall", "estimated"))
    assert row["attention held %"] == pytest.approx(100 * true, abs=0.01)
    assert row["estimate off by %"] == pytest.approx(100 * (estimated - true), abs=0.01)
    worst = found.worst_heads()
    gaps = [abs(one["estimated"] - one["recall"]) for one in worst]
    assert gaps == sorted(gaps, reverse=True) and {"layer", "head", "method", "tokens"} <= worst[0].keys()


def test_a_run_goes_on_where_it_stopped_and_counts_the_same(path, tmp_path, monkeypatch):
    monkeypatch.setattr("mmcompile.needle.evaluate.TOKENS_AT_ONCE", TOKENS)
    whole, batches = asked(path, asking("a-shape", samples=2), tmp_path / "whole.json")
    target = tmp_path / "parts.json"
    assert batches == 4
    assert asked(path, asking("a-shape", samples=1), target)[1] == 2
    parts, more = asked(path, asking("a-shape", samples=2), target, resume=True)
    assert more == 2
    for one, other in zip(whole.records, parts.records, strict=True):
        assert (one.asked, one.right, one.agreed) == (other.asked, other.right, other.agreed)
        assert one.divergence == pytest.approx(other.divergence, rel=1e-6)
    with pytest.raises(FigureError, match="was made with questions 1, not 2"):
        asked(path, asking("a-shape"), target, questions=2, resume=True)


def test_several_questions_of_one_prompt_count_at_their_own_depths(path, tmp_path):
    found, _ = asked(path, asking("dense"), tmp_path / "a.json", questions=4)
    (dense,) = found.records
    assert sum(dense.asked) == 8 and min(dense.asked) >= 1


def test_cards_stand_in_real_frames(path):
    (_, drawn), (_, real) = (load(path, videos, 1) for videos in (None, VIDEOS))
    batches = [one.batch("video", TOKENS, [(0.5, 0)]) for one in (drawn, real)]
    assert batches[0].asked == batches[1].asked
    pixels = [one.inputs["pixel_values_videos"].unflatten(0, (-1, 144)) for one in batches]
    same = [bool((one == other).all()) for one, other in zip(*pixels, strict=True)]  # of each temporal patch
    assert 1 <= sum(same) <= 6 < len(same)
    with pytest.raises(VideoError, match="holds no video"):
        RealFrames(Path(__file__).parent)


class Processor:
    """As transformers' processors of video chats: a template with a mark, the mark filled with the video's tokens."""

    chat_template, video_processor = "a template", None

    def __init__(self, config):
        self.tokenizer, self._config = word_tokenizer(), config

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        (message,) = messages
        assert [part["type"] for part in message["content"]] == ["video", "text"]
        return f"<video> {message['content'][1]['text']} answer :"

    def __call__(self, *, text, videos, return_tensors):
        pixels, grid = video_patches(videos[0].permute(0, 2, 3, 1), patch_size=8, min_pixels=1, max_pixels=96 * 96)
        count = int(grid.prod()) // 4
        config = self._config
        video = [config.vision_start_token_id, *[config.video_token_id] * count, config.vision_end_token_id]
        ids = torch.tensor([video + self.tokenizer.encode(text[0].removeprefix("<video>").lower())])
        types = torch.where(ids == config.video_token_id, 2, 0)
        mask = torch.ones_like(ids)
        return {
            "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types,
            "pixel_values_videos": pixels, "video_grid_thw": grid,
        }  # fmt: skip


def test_a_chat_model_is_asked_by_its_own_processor(path, tmp_path, monkeypatch):
    monkeypatch.setattr("mmcompile.needle.run.chat_processor", lambda _: Processor(needle_config()))
    _, prompts = load(path, VIDEOS, 1)
    assert isinstance(prompts, ChatPrompts)
    batch = prompts.batch("video", TOKENS, [(1.0, 0)])
    assert 0.9 * TOKENS < batch.tokens <= TOKENS
    (one,) = batch.asked
    assert one.depth == 1.0 and one.positions == (batch.tokens - 1,)
    found, _ = asked(path, asking("a-shape"), tmp_path / "a.json", videos=VIDEOS)
    assert all(record.asked == [1, 1] for record in found.records)
    with pytest.raises(ModelError, match="task mixed: these prompts have video"):
        asked(path, asking("auto", tasks=("mixed",)), tmp_path / "b.json", videos=VIDEOS)


def test_every_token_of_an_answer_is_asked_for():
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3), "other": torch.ones(1)}
    one = chat_prompts._append(inputs, [40, 41, 42], 0.5)
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 40, 41]] and inputs["attention_mask"].shape == (1, 5)
    assert one.positions == (2, 3, 4) and one.ids == (40, 41, 42)


def test_methods_are_named_with_what_they_need():
    assert [one.name for one in choose_methods("all", None, None, None)] == [x for x in EVERY if x[:5] != "table"]
    assert [one.name for one in choose_methods("sf-fixed@auto", None, None, None)] == ["dense", "auto", "sf-fixed@auto"]
    grouped = PatternTable.of([[HeadPattern("a_shape", boundary="2d")]])
    *_, table, without = choose_methods("table,table-none", grouped, None, None)
    assert (table.patterns.layers[0][0].boundary, without.patterns.layers[0][0].boundary) == ("2d", "none")
    with pytest.raises(OptionError, match="no 'nope'; any of dense, auto"):
        choose_methods("nope", None, None, None)
    with pytest.raises(OptionError, match="'table' needs --table"):
        choose_methods("table", None, None, None)


def test_the_command_writes_shows_and_draws(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mmcompile.needle.command.out", Console(width=200, force_terminal=False))
    target, picture = tmp_path / "needle.json", tmp_path / "needle.png"
    options = [
        "--tokens",
        str(TOKENS),
        "--depths",
        "2",
        "--samples",
        "1",
        "--task",
        "video",
        "--methods",
        "block-top-p",
    ]
    run = ["mmcompile", "needle", "--model", path, *options, "--out", str(target)]
    monkeypatch.setattr(sys, "argv", run)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "recall %" in said and "Next:" in said and "estimated" in said
    content = json.loads(target.read_text())
    assert [row["method"] for row in content["all rows"]] == ["dense", "block-top-p"]
    tables = [f"video, {name}" for name in ("recall %", "density %", f"{TOKENS} tokens") for _ in range(2)]
    assert [row["table"] for row in content["rows"]] == tables
    assert content["rows"][2] == {"table": "video, density %", "method": "dense", str(TOKENS): 100.0}
    assert content["command"].startswith("python -m mmcompile needle --model")
    monkeypatch.setattr(sys, "argv", ["mmcompile", "needle", "--out", str(target), "--redraw", "--plot", str(picture)])
    with pytest.raises(SystemExit):
        main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "recall %" in capsys.readouterr().out
    assert Results.load(target).records[1].method == "block-top-p"
