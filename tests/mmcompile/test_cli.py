"""The command line as a user meets it: what it prints, what it writes, and how it fails."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmcompile import cli
from mmcompile import demo as demo_module
from mmcompile.tiny_qwen import tiny_qwen2_5_vl

EXAMPLE = Path(__file__).parents[2] / "examples" / "moving_shapes.mp4"
COMMANDS = ("demo", "explain", "search")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_qwen2_5_vl().save_pretrained(path)
    return str(path)


@pytest.fixture
def fail(monkeypatch, capsys):
    """Runs a command that must fail, and gives the one line that it leaves on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mmcompile", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


def invoke(*arguments):
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    said = invoke(command, "--help")
    assert f"python -m mmcompile {command}" in said


def test_help_names_every_command():
    said = invoke("--help")
    assert all(command in said for command in COMMANDS)


def test_explain_prints_every_site_and_what_to_do_next(model_path):
    said = invoke("explain", "--model", model_path, "--tokens", "64", "--device", "cpu")
    assert "Attention sites" in said
    assert "Next:" in said


def test_explain_predicts_the_memory_of_a_million_tokens(model_path):
    said = invoke("explain", "--model", model_path, "--tokens", "1M", "--device", "cpu")
    assert "1048576 tokens:" in said and "Largest tensors" in said
    assert "pass logits_to_keep=1" in " ".join(said.split())


def test_explain_of_a_length_that_is_none(fail, model_path):
    assert "'1G' is not a number" in fail("explain", "--model", model_path, "--tokens", "1G")


def test_explain_json_is_json_and_nothing_else(model_path):
    report = json.loads(invoke("explain", "--model", model_path, "--tokens", "64", "--device", "cpu", "--json"))
    assert len(report["sites"]) == 2
    assert report["graph_count"] >= 1


def test_explain_with_a_video_reads_it(model_path):
    said = invoke(
        "explain", "--model", model_path, "--video", str(EXAMPLE), "--frames", "2", "--tokens", "128",
        "--device", "cpu", "--json",
    )  # fmt: skip
    decoder = [site for site in json.loads(said)["sites"] if "language_model" in site["module_path"]]
    assert [site["reason"] for site in decoder] == ["too short"] * 2
    assert int(decoder[0]["query_length"]) > 64  # more than the question


def test_explain_of_nothing(fail, tmp_path):
    assert "cannot load a model" in fail("explain", "--model", str(tmp_path))


def test_explain_of_a_folder_that_is_not_there(fail, tmp_path):
    assert "no such folder" in fail("explain", "--model", str(tmp_path / "gone"))


def test_demo_with_an_unknown_inner_backend(fail):
    assert "inner='inducktor'" in fail("demo", "--inner", "inducktor")


def test_without_a_compiler_the_graphs_run_as_they_are(monkeypatch):
    assert demo_module.default_inner() in ("inductor", "eager")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert demo_module.default_inner() == "eager"


def test_demo_of_a_video_that_is_not_there(fail):
    assert "nowhere.mp4: no such file" in fail("demo", "--video", "nowhere.mp4")


def test_demo_of_what_is_no_video(fail):
    assert "not a video" in fail("demo", "--video", __file__)


def test_demo_without_pyav(fail, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install" in fail("demo")


def test_demo_without_its_example(fail, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_module, "EXAMPLE_VIDEO", tmp_path / "gone.mp4")
    assert "--video PATH" in fail("demo")


def test_demo_of_too_many_frames_for_its_tokens(fail):
    said = fail("demo", "--tokens-max", "16")
    assert "frames" in said


def test_demo_shows_rewritten_sites_and_exact_agreement(tmp_path):
    target = tmp_path / "demo.json"
    said = invoke("demo", "--frames", "6", "--tokens-max", "700", "--inner", "eager", "--json", str(target))
    assert "What was rewritten" in said
    assert "Next:" in said
    demo = json.loads(target.read_text())
    assert demo["exact"]
    assert demo["tokens"] <= 700
    decoder = [site for site in demo["report"]["sites"] if "language_model" in site["module_path"]]
    assert len(decoder) == 4
    assert all(site["sparse"] for site in decoder)
    dense, every_tile, sparse = demo["runs"]
    assert every_tile["logit_difference"] <= 1e-4
    assert every_tile["same_tokens"] == 8
    assert dense["density"] == every_tile["density"] == 1.0
    assert sparse["density"] <= 1.0
