"""One HTML page that holds pictures and tables, and asks nothing of any network."""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
from markupsafe import Markup

Cell = str | int | float | None


@dataclass(frozen=True)
class Picture:
    """A PNG. width, height: in CSS pixels. alt: what it shows, for those who do not see it."""

    png: bytes
    width: int
    height: int
    alt: str
    caption: str

    @property
    def data(self) -> str:
        """The PNG in base64."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Table:
    """Rows that a click on a column's name sorts: numbers as numbers, and what is not known (None, NaN) last."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """Each column's name, and whether it holds numbers."""
        return [(name, any(_is_known_number(row[i]) for row in self.rows)) for i, name in enumerate(self.columns)]


@dataclass(frozen=True)
class Section:
    """One part of the page. text: paragraphs."""

    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    table: Table | None = None


@dataclass(frozen=True)
class Page:
    """facts: name to value, at the top. command, commit, versions: how the page was made."""

    title: str
    facts: Mapping[str, str]
    sections: Sequence[Section]
    command: str
    commit: str
    versions: Mapping[str, str]


def render(page: Page) -> str:
    """The page as HTML; every text in it is escaped.

    Its content security policy allows this very style and script, pictures within the page, and nothing else.
    """
    loader = jinja2.PackageLoader("mmcompile.pictures", "")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["known_number"] = _is_known_number
    environment.filters["shown"] = _shown
    style, script = (loader.get_source(environment, name)[0] for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        page=page,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _hash(source: str) -> str:
    """A source as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _is_known_number(cell: Cell) -> bool:
    return isinstance(cell, int | float) and math.isfinite(cell)


def _shown(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    if not _is_known_number(cell):
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
