"""`python -m mmcompile plot` and `report` as a user meets them: what they draw, write and say, and how they fail."""

import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect
from typer.testing import CliRunner

from mmcompile import HeadPattern, PatternTable, cli
from mmcompile.architecture import Architecture
from mmcompile.tables import FrontPoint, HeadFinding, Sample
from mmcompile.tiny_qwen import tiny_qwen2_5_vl

EXAMPLE = Path(__file__).parents[3] / "examples" / "moving_shapes.mp4"
SMALL = ("--video", str(EXAMPLE), "--frames", "8", "--tokens", "600", "--device", "cpu")
PATTERNS = (
    HeadPattern("grid"),
    HeadPattern("a_shape", local=64),
    HeadPattern("top_p", density=0.9),
    HeadPattern("dense"),
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_qwen2_5_vl(initializer_range=0.2).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def table_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "table.json"
    front = tuple(FrontPoint(pattern, 1.0 + i, 0.2, 0.4 - 0.1 * i) for i, pattern in enumerate(PATTERNS))
    found = tuple(HeadFinding(point.error, 0.2, point.ms, held_out=0.3, front=front) for point in front)
    samples = (Sample("holiday.mp4", 600), Sample("other.mp4", 600, held_out=True))
    PatternTable((PATTERNS, PATTERNS), Architecture.of(tiny_qwen2_5_vl()), (found, found), samples).save(path)
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
    return " ".join(result.stdout.split())


@pytest.mark.parametrize("command", [("plot", "attention"), ("plot", "heads"), ("plot", "recall"), ("report",)])
def test_help_has_an_example(command):
    said = re.sub(r"[\s│]+", " ", invoke(*command, "--help"))
    assert f"python -m mmcompile {' '.join(command)}" in said


def test_plot_attention_draws_and_says_what_it_holds(model_path, tmp_path):
    target = tmp_path / "deep" / "attention.png"
    place = ("--layer", "1", "--head", "2", "--out", str(target))
    said = invoke("plot", "attention", "--model", model_path, *place, "--patterns", "grid", *SMALL)
    assert "text 33, video" in said and "% of the attention" in said and "Next:" in said
    assert min(Image.open(target).size) > 500


def test_plot_attention_with_every_tile_holds_everything(model_path, tmp_path):
    place = ("--layer", "0", "--head", "0", "--out", str(tmp_path / "all.svg"))
    said = invoke("plot", "attention", "--model", model_path, *place, "--density", "1", "--pool", "mean", *SMALL)
    assert "100.0% of the causal tiles hold 100.0% of the attention" in said


def test_plot_recall_draws_every_pattern(model_path, tmp_path):
    target = tmp_path / "recall.svg"
    said = invoke("plot", "recall", "--model", model_path, "--layer", "0", "--out", str(target), *SMALL)
    assert "holds most" in said and "Next:" in said
    assert target.stat().st_size > 1000


def test_plot_heads_of_a_searched_table_and_of_one_made_by_hand(table_path, tmp_path):
    target = tmp_path / "heads.png"
    searched = invoke("plot", "heads", table_path, "--out", str(target))
    assert "2 layers x 4 heads" in searched and "no densities" not in searched and "Next:" in searched
    three_panels = Image.open(target).width
    PatternTable.of([PATTERNS]).save(tmp_path / "hand.json")
    assert "no densities" in invoke("plot", "heads", str(tmp_path / "hand.json"), "--out", str(target))
    assert Image.open(target).width < three_panels


def test_a_report_of_a_table_opens_in_a_browser(model_path, table_path, tmp_path, open_page):
    target = tmp_path / "report.html"
    said = invoke(
        "report", "--model", model_path, "--patterns", table_path, "--draw", "1:0,0:2", "--out", str(target), *SMALL
    )
    assert "2 layers, 4 pictures of heads" in said and "Next:" in said
    page = open_page(target)
    sizes = page.pictures()
    assert len(sizes) == 1 + 2 * 2 + 2 and all(width > 300 and height > 200 for width, height, _ in sizes)
    texts = [text for *_, text in sizes]
    assert all(len(text) > 50 for text in texts) and "Layer 0, head 2: top_p" in texts[1]
    assert "Front of Layer 1, head 0: grid" in texts[-1]
    expect(page.tab.locator("header")).to_contain_text("holiday.mp4")
    expect(page.tab.locator("header")).to_contain_text("0.3 on other.mp4; transfer loss +20.0%")

    assert page.column(0) == ["0"] * 4 + ["1"] * 4 and page.column(1) == [*"0123"] * 2
    assert page.column(2) == [str(pattern) for pattern in PATTERNS] * 2
    assert page.column(6) == ["0.4", "0.3", "0.2", "0.1"] * 2 and page.column(7) == ["0.3"] * 8
    page.head("error").get_by_role("button").click()
    expect(page.head("error")).to_have_attribute("aria-sort", "ascending")
    errors = [float(error) for error in page.column(5)]
    assert errors == sorted(errors)
    assert page.column(2)[:2] == ["dense", "dense"]  # whose output is dense attention's

    decisions = page.column(6, table=1)
    assert decisions == ["sparse"]
    expect(page.tab.locator("footer")).to_contain_text("torch")
    assert page.asked == [page.tab.url] and page.complaints == []


def test_a_report_of_auto_without_pictures_of_heads(model_path, tmp_path):
    target = tmp_path / "report.html"
    invoke(
        "report", "--model", model_path, "--draw", "none", "--tokens", "300", "--device", "cpu", "--out", str(target)
    )
    source = target.read_text()
    assert source.count("<img ") == 1
    assert source.count("auto order") >= 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("plot", "attention", "--layer", "2", "--head", "0"), "--layer 2: the model has layers 0 to 1"),
        (("plot", "attention", "--layer", "0", "--head", "4"), "--head 4: the layer has heads 0 to 3"),
        (("plot", "attention", "--layer", "0", "--head", "0", "--pool", "sum"), "pool='sum': must be one of max, mean"),
        (("plot", "attention", "--layer", "0", "--head", "0", "--density", "2"), "density=2.0: must be"),
        (
            ("plot", "attention", "--layer", "0", "--head", "0", "--patterns", "columns"),
            "--patterns columns: columns=0",
        ),
        (("plot", "recall", "--layer", "0", "--patterns", "gone.json"), "No such option"),
        (("report", "--patterns", "gone.json"), "neither"),
        (("report", "--draw", "0:0,2:0"), "--draw 0:0,2:0: '2:0' is no head"),
        (("report", "--draw", "all"), "'all' is no head"),
    ],
)
def test_a_bad_value_is_one_clear_error(model_path, monkeypatch, capsys, arguments, says):
    monkeypatch.setattr(sys, "argv", ["mmcompile", *arguments, "--model", model_path, "--tokens", "200"])
    with pytest.raises(SystemExit):
        cli.main()
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("command", [("plot", "attention", "--layer", "0", "--head", "0"), ("report",)])
def test_a_table_for_another_model_is_refused(fail, table_path, tmp_path, command):
    tiny_qwen2_5_vl(layers=3).save_pretrained(tmp_path)
    said = fail(*command, "--model", str(tmp_path), "--patterns", table_path, "--tokens", "200")
    assert "another architecture" in said and "layers" in said


def test_a_table_that_is_none(fail, tmp_path):
    assert "cannot be read" in fail("plot", "heads", str(tmp_path / "gone.json"))
    (tmp_path / "table.json").write_text("{")
    assert "table.json" in fail("plot", "heads", str(tmp_path / "table.json"))


@pytest.mark.parametrize(
    "command",
    [
        ("plot", "attention", "--layer", "0", "--head", "0", "--model", "gone"),
        ("plot", "recall", "--layer", "0", "--model", "gone"),
        ("plot", "heads", "gone.json"),
        ("report", "--model", "gone"),
    ],
)
def test_without_matplotlib_is_one_clear_error_before_anything_else(fail, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "mmcompile[plot]"' in fail(*command)
