"""`python -m mmcompile bench` as a user meets it: what it measures, writes and draws, and how it fails."""

import json
import sys
from argparse import Namespace
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

from mmcompile import cli
from mmcompile.bench.compile_times import in_second_process
from mmcompile.bench.figure import Figure, FigureError
from mmcompile.bench.head_patterns import patterns_of
from mmcompile.bench.measurement import token_count
from mmcompile.bench.prefill import FLOOR, OURS_DENSE, PrefillBench
from mmcompile.bench.show import save_plot

COMMANDS = ("kernels", "plan", "prefill")
SMALL = ("--device", "cpu", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--dtype", "fp32", "--repeats", "1")
TINY = {
    "model_type": "qwen2_5_vl_text",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config")
    (path / "config.json").write_text(json.dumps(TINY))
    return str(path)


def run(*arguments):
    result = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def fail(monkeypatch, capsys):
    """Runs a command that must fail, and gives the one line that it leaves on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mmcompile", "bench", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention as it is: its code takes long to compile, and is not what is tested."""
    monkeypatch.setattr(torch, "compile", lambda function, **_options: function)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    assert f"python -m mmcompile bench {command}" in run(command, "--help")
    assert command in run("--help")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_kernels_writes_shows_and_draws(tmp_path, uncompiled):
    target, picture = tmp_path / "deep" / "kernels.json", tmp_path / "kernels.png"
    options = ("--tokens", "512,1024", "--density", "1,0.3", "--out", str(target), "--plot", str(picture))
    said = run("kernels", *SMALL, *options)
    assert "Next:" in said and "growth" in said
    assert picture.stat().st_size
    figure = Figure.load(target)
    assert figure.device.startswith("CPU")
    assert {"python", "torch", "transformers"} <= figure.versions.keys()
    attention = figure.tables["attention"]
    assert [row["attention"] for row in attention[:3]] == ["torch SDPA", "FlexAttention, same plan", "ours"]
    assert len(attention) == 2 * (1 + 2 * 2)
    for row in attention:
        assert row["ms"] > 0 and row["ms spread"] == 0 and row["runs"] == 1
        assert row["TFLOP/s"] > 0 and row["of the dense rate"] > 0
        assert row.get("difference", 0) < 1e-5
    assert all(row["faster than FlexAttention"] > 0 for row in attention if row["attention"] == "ours")
    assert [row["tokens"] for row in figure.tables["growth"]] == [512, 1024]
    assert all(row["time grows"] > 0 and row["tiles grow"] > 1 for row in figure.tables["growth"])


def test_redraw_measures_nothing(tmp_path, uncompiled, monkeypatch):
    target, picture = tmp_path / "kernels.json", tmp_path / "again.svg"
    run("kernels", *SMALL, "--tokens", "256", "--density", "1", "--table", "attention", "--out", str(target))
    before = target.read_text()
    monkeypatch.setattr("mmcompile.bench.kernels.race", None)
    run("kernels", "--redraw", "--out", str(target), "--plot", str(picture))
    assert picture.stat().st_size
    assert target.read_text() == before


def test_a_contender_that_cannot_run_is_a_row_that_says_why(tmp_path, monkeypatch):
    def broken(*_arguments, **_options):
        raise RuntimeError("not on this machine")

    monkeypatch.setattr("mmcompile.bench.kernels.block_mask", broken)
    target = tmp_path / "kernels.json"
    run("kernels", *SMALL, "--tokens", "256", "--density", "1", "--table", "attention", "--out", str(target))
    dense, flex, ours = Figure.load(target).rows
    assert flex["failure"] == "RuntimeError: not on this machine"
    assert "ms" not in flex
    assert dense["ms"] > 0 and ours["ms"] > 0
    assert "faster than FlexAttention" not in ours


def test_copies_are_compared_with_a_copy(tmp_path):
    target = tmp_path / "kernels.json"
    run("kernels", *SMALL, "--tokens", "256", "--table", "copies", "--out", str(target))
    rows = Figure.load(target).tables["copies"]
    assert [row["op"] for row in rows][:3] == ["copy", "permute, random", "unpermute, random"]
    assert rows[0]["of a copy's rate"] == 1.0
    assert all(row["TB/s"] > 0 for row in rows)


def test_plan_writes_the_parts_and_their_share(tmp_path):
    target, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    options = ("--tokens", "640", "--patterns", "a_shape,auto", "--density", "0.5", "--out", str(target))
    assert "auto at 640 tokens" in run("plan", *SMALL, *options, "--plot", str(picture))
    assert picture.stat().st_size
    a_shape, auto, dense = Figure.load(target).rows
    assert (a_shape["pattern"], auto["pattern"], dense["pattern"]) == ("a_shape", "auto", "torch SDPA")
    for row in (a_shape, auto):
        parts = row["plan ms"] + row["permutations ms"]
        assert row["share"] == pytest.approx(parts / row["attention ms"], rel=0.01)
        assert row["share with arrange"] > row["share"]
        assert 0 < row["density"] <= 1
        assert row["host ms"] > 0 and row["whole ms"] > 0 and row["faster than dense"] > 0
    assert a_shape["permutations ms"] == 0 < auto["permutations ms"]


def measured(measurement):
    """The figure of a measurement, whose steps are counted."""
    steps = []
    figure = Figure.begin(measurement.title, measurement.notes, "cpu")
    for rows in measurement.measure(steps.append):
        figure.rows += rows
    assert len(steps) == measurement.steps, steps
    return figure


def test_prefill_measures_a_decoder_and_suggests_min_tokens(tmp_path, config):
    measurement = PrefillBench(
        (512,), (0.5,), config=config, layers=1, against=("flash",), device="cpu", repeats=1, inner="eager"
    )
    figure = measured(measurement)
    prefill = {row["attention"]: row for row in figure.tables["prefill"]}
    assert list(prefill) == ["Inductor, flash", OURS_DENSE, "ours, auto, at most 0.5"]
    assert all(row["ms"] > 0 for row in prefill.values()), prefill
    assert prefill[OURS_DENSE]["density"] == 1.0
    assert prefill["ours, auto, at most 0.5"]["density"] < 1.0
    assert prefill["ours, auto, at most 0.5"]["plan ms"] > 0 == prefill[OURS_DENSE]["plan ms"]
    assert all(row["attention ms"] > 0 and row["projections and MLP ms"] > 0 for row in prefill.values())
    compiling = {row["attention"]: row for row in figure.tables["compiling"]}
    assert list(compiling) == list(prefill)
    assert 0 < compiling[OURS_DENSE]["our passes s"] < compiling[OURS_DENSE]["compiling s"]
    (suggested,) = figure.tables["shortest sparse prefill"]
    assert suggested["min_tokens"] in (None, 512)
    assert "ours, auto, at most 0.5: " in measurement.summary(figure.rows)
    save_plot(measurement, figure, tmp_path / "prefill.png")
    assert (tmp_path / "prefill.png").stat().st_size


def test_long_dense_prefills_run_few_layers_and_say_so(tmp_path, config, monkeypatch):
    monkeypatch.setattr("mmcompile.bench.prefill.FEW_LAYERS_FROM", 1024)
    monkeypatch.setattr("mmcompile.bench.prefill.ONCE", 0.0)
    measurement = PrefillBench(
        (512, 1024), patterns="paper", config=config, against=("flash",), floor=True, device="cpu", repeats=1,
        inner="eager",
    )  # fmt: skip
    figure = measured(measurement)
    prefill = {(row["tokens"], row["attention"]): row for row in figure.tables["prefill"]}
    assert prefill[1024, "Inductor, flash"]["layers run"] == prefill[1024, FLOOR]["layers run"] == "1 of 2, scaled"
    assert all("layers run" not in row for (tokens, _), row in prefill.items() if tokens == 512)
    assert (1024, OURS_DENSE) not in prefill and (512, OURS_DENSE) in prefill
    assert all(row["runs"] == 1 for row in prefill.values())
    assert prefill[1024, "ours, paper"]["predicted GB"] >= 0
    assert "outside attention, over none" in prefill[1024, "ours, paper"]
    assert "density" not in prefill[1024, FLOOR]
    assert "From 1024 tokens on dense contenders run 1" in measurement.notes
    save_plot(measurement, figure, tmp_path / "prefill.png")


def test_a_prefill_that_cannot_run_is_a_row_that_says_why(config, monkeypatch):
    def broken(*_arguments, **_options):
        raise torch.OutOfMemoryError("64 GiB are too many")

    monkeypatch.setattr("mmcompile.bench.repeated_heads.scaled_dot_product_attention", broken)
    measurement = PrefillBench(
        (512,), (None,), "a_shape", config=config, layers=1, against=("flash",), dense_form=False, predict=False,
        device="cpu", repeats=1, inner="eager",
    )  # fmt: skip
    rows = [row for some in measurement.measure(lambda name: None) for row in some]
    dense, ours = (row for row in rows if row["table"] == "prefill")
    assert "64 GiB are too many" in dense["failure"] and "ms" not in dense
    assert ours["ms"] > 0 and "faster than cuDNN" not in ours


def test_the_papers_patterns_have_a_third_of_the_heads_each():
    table = patterns_of("paper", Namespace(num_attention_heads=28, num_hidden_layers=2))
    assert table.shape == (2, 28)
    counts = Counter(pattern.kind for pattern in table.layers[0])
    assert counts == {"grid": 10, "vertical_slash": 9, "a_shape": 9}


def test_a_second_process_compiles_the_same_prefill(config):
    options = {"density": None, "min_tokens": 0, "inner": "eager"}
    arguments = {"config": config, "layers": 1, "patterns": "a_shape", "options": options, "tokens": 512}
    times = in_second_process(arguments | {"device": "cpu"})
    assert 0 < times.passes < times.compiling <= times.call


@pytest.mark.parametrize(("word", "tokens"), [("4096", 4096), ("32K", 32768), ("1M", 1048576)])
def test_lengths_have_suffixes(word, tokens):
    assert token_count(word) == tokens


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_gpu_is_one_clear_error(fail, command):
    assert "torch finds none here" in fail(command)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("kernels", "--tokens", "1000"), "--tokens 1000: must be a multiple of 128"),
        (("kernels", "--tokens", "32k"), "--tokens 32k: '32k' is not a number"),
        (("kernels", "--density", "1.5"), "'1.5' is not a number from"),
        (("kernels", "--density", "nan"), "'nan' is not a number from"),
        (("kernels", "--dtype", "bf16,int8"), "no 'int8'; any of bf16, fp16, fp32"),
        (("kernels", "--table", "speed"), "no 'speed'"),
        (("kernels", "--kv-heads", "3"), "--kv-heads 3"),
        (("kernels", "--device", "tpu"), "must be cuda or cpu"),
        (("kernels", "--redraw"), "--redraw needs --out"),
        (("plan", "--patterns", "auto,best"), "no 'best'"),
        (("plan", "--dtype", "int8"), "--dtype int8"),
        (("plan", "--tokens", "200"), "must be at least 384"),
        (("prefill", "--patterns", "best"), "--patterns best"),
        (("prefill", "--config", "./nowhere"), "no such folder"),
        (("prefill", "--against", "cudnn"), "any of cuDNN, flash"),
        (("prefill", "--tokens", "200"), "must be at least 384"),
    ],
)
def test_a_bad_option_is_one_clear_error(fail, arguments, says):
    assert says in fail(*arguments)


def test_without_matplotlib_is_one_clear_error(fail, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "mmcompile[plot]"' in fail("kernels", *SMALL, "--plot", "kernels.png")


@pytest.mark.parametrize(
    ("content", "says"), [("{", "not a figure"), ("[]", "lacks title"), ('{"title": "x"}', "lacks command")]
)
def test_a_file_that_is_no_figure_is_named(tmp_path, content, says):
    path = tmp_path / "kernels.json"
    path.write_text(content)
    with pytest.raises(FigureError, match=says):
        Figure.load(path)


def test_the_figure_of_another_command_is_refused(fail, tmp_path):
    path = tmp_path / "plan.json"
    Figure.begin("Planning", "", "cpu").save(path)
    assert "'Planning'" in fail("kernels", "--redraw", "--out", str(path))


def test_a_figure_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FigureError, match="cannot be written"):
        Figure.begin("Planning", "", "cpu").save(tmp_path / "file" / "plan.json")


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/x/mmcompile/__main__.py", "bench", "plan"], "python -m mmcompile bench plan"),
        (["/usr/bin/mmcompile", "bench", "plan"], "python -m mmcompile bench plan"),
        (["benchmarks/first_token.py", "--models", "a b"], "python benchmarks/first_token.py --models 'a b'"),
    ],
)
def test_a_figure_has_the_command_that_makes_it(monkeypatch, tmp_path, argv, command):
    monkeypatch.setattr(sys, "argv", argv)
    figure = Figure.begin("Times", "", "cpu")
    figure.save(tmp_path / "times.json")
    assert json.loads((tmp_path / "times.json").read_text())["command"] == command
    assert figure.commit
