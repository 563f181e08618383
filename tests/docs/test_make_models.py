"""The page of model families: what a cell says, and that every reason stands below its table."""

import importlib.util
from pathlib import Path

import pytest

from mmcompile.doctor import CHECKS, WAYS

SCRIPT = Path(__file__).parents[2] / "docs" / "make_models.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_models", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(check, status="works", rewritten=2, detail="", dense=()):
    found = {"family": "llava", "way": "text model", "check": check, "status": status, "rewritten": rewritten}
    return found | {"causal": 2, "detail": detail, "dense": list(dense), "versions": {"torch": "2.13"}, "commit": "abc"}


def test_every_way_has_a_table(script):
    assert set(script.HOW) == set(WAYS)


def test_a_page_has_a_row_a_family_a_column_a_check_and_its_versions(script):
    page = script.page([result("no cache"), result("generate")], ["llava", "gemma3"])
    assert "with torch 2.13, commit abc." in page
    assert f"| family | {' | '.join(CHECKS)} |" in page
    assert "| llava | works 2/2 | not run | not run | not run | works 2/2 | not run |" in page
    assert page.count("| gemma3 |") == len(WAYS)


def test_reasons_are_notes_told_once(script):
    dense = {"status": "stays dense", "rewritten": 0, "detail": "opaque | mask"}
    results = [
        result("no cache", **dense),
        result("generate", **dense),
        result("sparse", "fails", 1, "NaN"),
        result("padded batch", rewritten=1, dense=["unread form"]),
    ]
    page = script.page(results, ["llava"])
    assert "| llava | dense 0/2 [1] | not run | works 1/2 [2] | not run | dense 0/2 [1] | **fails** 1/2 [3] |" in page
    assert "1. opaque \\| mask\n2. unread form\n3. NaN\n" in page
