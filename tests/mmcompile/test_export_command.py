"""`export`, `run` and `explain` on a file: what they print, write, and refuse."""

import json

import pytest
import torch
from typer.testing import CliRunner

from mmcompile.cli import app
from mmcompile.errors import ExportError, OptionError
from mmcompile.export_command import explain_file, parse_tokens
from mmcompile.tiny_qwen import tiny_qwen2_5_vl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, and a program of it."""
    folder = tmp_path_factory.mktemp("export")
    tiny_qwen2_5_vl(layers=1).save_pretrained(folder / "model")
    arguments = ["--out", str(folder / "model.pt2"), "--program", "--density", "0.5", "--tokens-max", "1K"]
    result = CliRunner().invoke(app, ["export", "--model", str(folder / "model"), *arguments])
    assert result.exit_code == 0, result.output
    assert "1 of 1 attentions are sparse" in " ".join(result.output.split()) and "Next:" in result.output
    return folder


def test_explain_shows_what_is_in_a_file(folder):
    result = CliRunner().invoke(app, ["explain", str(folder / "model.pt2")])
    shown = " ".join(result.output.split())
    assert result.exit_code == 0 and "1 sparse, 0 dense" in shown and f"torch {torch.__version__}" in shown
    told = json.loads(CliRunner().invoke(app, ["explain", str(folder / "model.pt2"), "--json"]).output)
    assert told["settings"]["density"] == 0.5 and told["sites"][0]["sparse"]


def test_run_puts_a_prompt_through_and_compares(folder):
    arguments = ["run", str(folder / "model.pt2"), "--model", str(folder / "model"), "--tokens", "300"]
    result = CliRunner().invoke(app, arguments)
    shown = " ".join(result.output.split())
    assert result.exit_code == 0, result.output
    assert "300 tokens in 1 segments" in shown and "differ by" in shown and "Next:" in shown


def test_files_that_are_none_and_programs_of_others(tmp_path):
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(ExportError, match=r"text\.pt2: no program and no package"):
        explain_file(tmp_path / "text.pt2")
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "linear.pt2")
    with pytest.raises(ExportError, match=r"mmcompile\.transform makes a program sparse"):
        explain_file(tmp_path / "linear.pt2")


def test_tokens_are_read_with_their_units():
    assert [parse_tokens(text) for text in ("32768", "256K", "1M")] == [32768, 2**18, 2**20]
    for text in ("1Q", "", "K", "1", "-4"):
        with pytest.raises(OptionError, match="32768, 256K or 1M"):
            parse_tokens(text)


def test_explain_wants_a_model_or_a_file():
    result = CliRunner().invoke(app, ["explain"])
    assert isinstance(result.exception, OptionError)
