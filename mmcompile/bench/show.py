"""A figure for people: its tables on the terminal, and a plot."""

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmcompile.bench.figure import Figure, Row
from mmcompile.bench.measurement import Measurement
from mmcompile.bench.timing import FAILURE
from mmcompile.drawing import save_drawing

WIDEST = 200  # characters of a line


def print_tables(figure: Figure, console: Console) -> None:
    """Each of the figure's tables: every spread beside its median, and what is the same in all rows in the title."""
    # A file has room for whole lines; a terminal has not, and folds them.
    console = console if console.is_terminal else Console(file=console.file, width=WIDEST)
    for name, rows in figure.tables.items():
        console.print(_table(name, rows))


def _table(name: str, rows: list[Row]) -> Table:
    columns = dict.fromkeys(column for row in rows for column in row)
    shown = [column for column in columns if column.removesuffix(" spread") not in columns.keys() - {column}]
    shown.sort(key=lambda column: column == FAILURE)  # last
    cells = {column: [_cell(row, column) for row in rows] for column in shown}
    same = [column for column in shown if len(rows) > 1 and len(set(cells[column])) == 1 and cells[column][0]]
    title = ", ".join([name, *(f"{column} {cells[column][0]}" for column in same)])
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = [column for column in shown if column not in same]
    for column in shown:
        words = any(isinstance(row.get(column), str) for row in rows)
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    for row in zip(*(cells[column] for column in shown), strict=True):
        table.add_row(*map(escape, row))
    return table


def _cell(row: Row, column: str) -> str:
    text, spread = _text(row.get(column)), row.get(f"{column} spread")
    return text if spread is None else f"{text} ± {spread:.2g}"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else str(value)


def save_plot(measurement: Measurement, figure: Figure, path: Path) -> None:
    """Draw the figure's rows into a file whose ending names the format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = measurement.draw(figure.rows, plt)
    drawn.suptitle(f"{figure.title}, {figure.device}")
    drawn.set_layout_engine("constrained")
    try:
        save_drawing(drawn, path)
    finally:
        plt.close(drawn)
