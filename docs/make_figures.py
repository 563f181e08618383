"""Put the tables of docs/figures into README.md: `python docs/make_figures.py README.md` (or `make figures`).

Between `<!-- figure: NAME -->` and `<!-- end figure -->` stands a table made from docs/figures/NAME.json, so
that no number in the README is typed by hand. `--check` changes nothing and fails where one is out of date.

The JSON holds `title`, `command`, `commit`, `versions` (name to version), `device`, `rows` (a list of column
to value) and `notes`. A column `X spread` is folded into column `X` as a value with its spread. Rows with a column
`table` make a table of that name each.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

FIELDS = ("title", "command", "commit", "versions", "device", "rows", "notes")
BLOCK = re.compile(r"(<!-- figure: (?P<name>[\w.-]+) -->\n)(?P<body>.*?)(<!-- end figure -->)", re.DOTALL)
OPENING = re.compile(r"<!-- figure: [\w.-]+ -->")


class FigureError(Exception):
    """A figure or a marker is not as it should be; the message says which and how."""


def load(path: Path) -> dict[str, Any]:
    """A figure from its JSON, every field there."""
    try:
        figure = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FigureError(f"{path}: no such figure; run the benchmark that makes it, or drop its marker") from error
    except json.JSONDecodeError as error:
        raise FigureError(f"{path}: not JSON ({error})") from error
    missing = [field for field in FIELDS if not isinstance(figure, dict) or field not in figure]
    if missing:
        raise FigureError(f"{path}: lacks {', '.join(missing)}")
    if not figure["rows"]:
        raise FigureError(f"{path}: has no rows")
    return figure


def markdown(figure: dict[str, Any]) -> str:
    """Title, tables, and how they were made."""
    tables: dict[str, list[dict[str, str]]] = {}
    for row in figure["rows"]:
        rest = {column: value for column, value in row.items() if column != "table"}
        title = f"{figure['title']}: {row['table']}" if "table" in row else figure["title"]
        tables.setdefault(title, []).append(_fold_spread(rest))
    lines: list[str] = []
    for title, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines += [*([""] if lines else []), f"**{title}**", "", _line(columns), _line(["---"] * len(columns))]
        lines += [_line([row.get(column, "") for column in columns]) for row in rows]
    versions = ", ".join(f"{name} {version}" for name, version in figure["versions"].items())
    lines += [
        "",
        f"{figure['device']}; {versions}; commit {figure['commit']}. Made by `{figure['command']}`.",
    ]
    if figure["notes"]:
        lines += ["", figure["notes"]]
    return "\n".join(lines) + "\n"


def replace(text: str, figures: Path) -> str:
    """`text` with the table of every marked figure made anew."""
    blocks = list(BLOCK.finditer(text))
    if len(OPENING.findall(text)) != len(blocks) or any(OPENING.search(block["body"]) for block in blocks):
        raise FigureError("a `<!-- figure: NAME -->` has no `<!-- end figure -->` before the next one")

    def table(block: re.Match[str]) -> str:
        source = figures / f"{block['name']}.json"
        if not block["body"].strip() and not source.exists():
            print(f"{source}: not measured yet, its place stays empty")
            return block[0]
        return block[1] + markdown(load(source)) + block[4]

    return BLOCK.sub(table, text)


def _fold_spread(row: dict[str, Any]) -> dict[str, str]:
    spreads = {column for column in row if column.endswith(" spread") and column.removesuffix(" spread") in row}
    folded = {}
    for column, value in row.items():
        if column not in spreads:
            spread = row.get(f"{column} spread")
            folded[column] = _text(value) + (f" ± {_text(spread)}" if spread is not None else "")
    return folded


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "\\|")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Rewrite the files named on the command line; 1 where `--check` finds one out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="Markdown files with figure markers")
    parser.add_argument("--figures", type=Path, default=Path(__file__).with_name("figures"))
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a table is out of date")
    arguments = parser.parse_args()
    stale = False
    for file in arguments.files:
        before = file.read_text()
        try:
            after = replace(before, arguments.figures)
        except FigureError as error:
            print(f"{file}: {error}", file=sys.stderr)
            return 1
        count = len(OPENING.findall(before))
        if before == after:
            print(f"{file}: {count} figures, up to date")
        elif arguments.check:
            print(f"{file}: out of date; run `make figures`", file=sys.stderr)
            stale = True
        else:
            file.write_text(after)
            print(f"{file}: {count} figures, written anew")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
