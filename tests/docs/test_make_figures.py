"""The README's tables come from the committed figures, and are up to date."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "make_figures.py"
FIGURE = {
    "title": "Times",
    "command": "python benchmarks/times.py --out x.json",
    "commit": "abc",
    "versions": {"torch": "2.13.0"},
    "device": "a card",
    "rows": [
        {"tokens": 1024, "ms": 1.23456, "ms spread": 0.1, "what": "a|b"},
        {"tokens": 2048, "ms": 12345.6},
    ],
    "notes": "Medians.",
}
TABLE = """**Times**

| tokens | ms | what |
| --- | --- | --- |
| 1024 | 1.235 ± 0.1 | a\\|b |
| 2048 | 12346 |  |

a card; torch 2.13.0; commit abc. Made by `python benchmarks/times.py --out x.json`.

Medians.
"""
MARKED = "before\n<!-- figure: times -->\n{}<!-- end figure -->\nafter\n"


def run(folder, *arguments):
    command = [sys.executable, str(SCRIPT), "--figures", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def page(tmp_path):
    (tmp_path / "times.json").write_text(json.dumps(FIGURE))
    path = tmp_path / "page.md"
    path.write_text(MARKED.format("anything\n"))
    return path


def test_table_replaces_what_stood_there_and_again_changes_nothing(page):
    assert run(page.parent, str(page)).returncode == 0
    assert page.read_text() == MARKED.format(TABLE)
    assert "up to date" in run(page.parent, str(page)).stdout
    assert run(page.parent, "--check", str(page)).returncode == 0


def test_rows_that_name_a_table_make_one_each(page):
    rows = [{"table": "long", "ms": 2}, {"table": "short", "runs": 3}, {"table": "long", "ms": 4}]
    (page.parent / "times.json").write_text(json.dumps(FIGURE | {"rows": rows}))
    assert run(page.parent, str(page)).returncode == 0
    long, short = "| ms |\n| --- |\n| 2 |\n| 4 |\n", "| runs |\n| --- |\n| 3 |\n"
    assert f"**Times: long**\n\n{long}\n**Times: short**\n\n{short}\na card;" in page.read_text()


def test_check_fails_where_out_of_date_and_changes_nothing(page):
    before = page.read_text()
    assert run(page.parent, "--check", str(page)).returncode == 1
    assert page.read_text() == before


def test_a_figure_not_measured_yet_leaves_its_place_empty(page):
    (page.parent / "times.json").unlink()
    page.write_text(MARKED.format(""))
    answer = run(page.parent, "--check", str(page))
    assert answer.returncode == 0
    assert "not measured yet" in answer.stdout
    assert page.read_text() == MARKED.format("")


@pytest.mark.parametrize(
    ("figure", "text", "says"),
    [
        (None, MARKED.format("a table"), "no such figure"),
        ("{", MARKED.format(""), "not JSON"),
        ("{}", MARKED.format(""), "lacks title, command"),
        (json.dumps(FIGURE | {"rows": []}), MARKED.format(""), "no rows"),
        (json.dumps(FIGURE), "<!-- figure: times -->\n", "no `<!-- end figure -->`"),
        (json.dumps(FIGURE), "<!-- figure: times -->\n" + MARKED.format(""), "no `<!-- end figure -->`"),
    ],
)
def test_what_is_wrong_is_named(page, figure, text, says):
    source = page.parent / "times.json"
    source.unlink()
    if figure is not None:
        source.write_text(figure)
    page.write_text(text)
    answer = run(page.parent, str(page))
    assert answer.returncode == 1
    assert says in answer.stderr
    assert page.read_text() == text


def test_readme_is_up_to_date():
    answer = run(ROOT / "docs" / "figures", "--check", str(ROOT / "README.md"), str(ROOT / "docs" / "figures.md"))
    assert answer.returncode == 0, answer.stderr
