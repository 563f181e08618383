"""The example pictures of the README: the command that it names makes them."""

import re
import sys
from pathlib import Path

from PIL import Image

from docs import make_pictures

ROOT = Path(__file__).parents[2]
NAMES = ("attention_map.png", "recall_curve.png")


def test_the_command_makes_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_pictures", "--out", str(tmp_path)])
    make_pictures.main()
    held = re.search(r"(\d+\.\d)% hold (\d+\.\d)%", capsys.readouterr().out)
    assert 19.9 < float(held[1]) <= 20.0 and float(held[2]) > 90
    for name in NAMES:
        made, kept = tmp_path / name, ROOT / "docs" / "figures" / name
        assert Image.open(made).size == Image.open(kept).size
        assert kept.stat().st_size < 150_000 and made.stat().st_size < 150_000


def test_the_readme_shows_and_names_them():
    readme = (ROOT / "README.md").read_text()
    assert all(f"(docs/figures/{name})" in readme for name in NAMES)
    assert "`python -m docs.make_pictures`" in readme
