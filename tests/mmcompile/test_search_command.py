"""`python -m mmcompile search` as a user meets it."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmcompile import HeadPattern, PatternTable, cli
from mmcompile.pattern_search import candidates, equal_time, runs
from mmcompile.tiny_qwen import tiny_qwen2_5_vl
from tests.mmcompile.test_pattern_search import by_tiles

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "moving_shapes.mp4")
SMALL = ("--frames", "8", "--tokens", "600", "--density", "0.7", "--candidates", "paper")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_qwen2_5_vl().save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    monkeypatch.setattr(equal_time, "attention_ms", by_tiles)
    monkeypatch.setitem(candidates.SPACES, "paper", (HeadPattern("a_shape"), HeadPattern("grid", lines="s")))


def test_it_says_what_it_made_and_what_to_do_next(model_path, tmp_path):
    target = tmp_path / "table.json"
    arguments = ["search", "--model", model_path, "--device", "cpu", "--out", str(target)]
    videos = ["--video", EXAMPLE, "--held-out", EXAMPLE]
    result = CliRunner().invoke(cli.app, [*arguments, *videos, *SMALL])
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert f"wrote {target}: patterns of 2 layers x 4 heads" in said
    assert "on held-out samples" in said and 'mmcompile.compile(model, patterns="' in said
    table = PatternTable.load(target)
    assert [(sample.name, sample.held_out) for sample in table.samples] == [
        ("moving_shapes.mp4", False),
        ("moving_shapes.mp4", True),
    ]
    assert any(segment.modality == "video" and segment.grid[0] > 1 for segment in table.samples[0].segments)
    assert [head.held_out for head in table.heads[0]] == [head.error for head in table.heads[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json"]


def test_a_tiny_model_needs_a_config_alone(model_path, tmp_path):
    target = tmp_path / "table.json"
    arguments = ["search", "--model", model_path, "--tiny", "--out", str(target), *SMALL, "--tokens", "300"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert PatternTable.load(target).samples[0].name == "random words"


def test_an_interrupted_search_says_how_to_go_on(model_path, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    target = tmp_path / "table.json"
    arguments = ["search", "--model", model_path, "--device", "cpu", "--out", str(target), *SMALL, "--tokens", "300"]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "search_layer", interrupted)
        result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 130
    assert "the same command with --resume goes on" in result.stdout
    assert (tmp_path / "table.json.partial").is_dir()
    monkeypatch.setattr(sys, "argv", ["mmcompile", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    assert "table.json.partial holds a search that did not end: resume it" in capsys.readouterr().err
    result = CliRunner().invoke(cli.app, [*arguments, "--resume"])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "table.json.partial").exists()
