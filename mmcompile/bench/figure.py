"""The JSON that a measurement leaves behind: its rows, and everything needed to make them again."""

import importlib
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from mmcompile.errors import MMCompileError

Row = dict[str, Any]


class FigureError(MMCompileError):
    """A figure's file that cannot be written, or is none."""


@dataclass
class Figure:
    """One figure: a title, its rows (column name to value), and how they were made.

    Rows with a column "table" go to the table of that name. A column "X spread" belongs to column "X".
    """

    title: str
    command: str
    commit: str
    versions: dict[str, str]
    device: str
    notes: str
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def begin(cls, title: str, notes: str, device: str = "cuda") -> "Figure":
        """A figure with no rows yet, of this command at this commit, measured on "cuda" or on "cpu"."""
        return cls(title, _command(), commit(), versions(device), _device(device), notes)

    @classmethod
    def load(cls, path: str | Path) -> "Figure":
        """A saved figure. Raises FigureError, naming the file."""
        try:
            content = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise FigureError(f"{path}: not a figure ({error})") from error
        missing = [one.name for one in fields(cls) if not isinstance(content, dict) or one.name not in content]
        if missing:
            raise FigureError(f"{path}: not a figure: lacks {', '.join(missing)}")
        return cls(**{one.name: content[one.name] for one in fields(cls)})

    def save(self, path: str | Path) -> None:
        """Write the JSON. Raises FigureError, naming the file."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")
        except OSError as error:
            raise FigureError(f"{path}: cannot be written ({error.strerror})") from error

    @property
    def tables(self) -> dict[str, list[Row]]:
        """The rows of each table by its name, without the column "table"; rows that name none go by the title."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            rest = {column: value for column, value in row.items() if column != "table"}
            found.setdefault(row.get("table", self.title), []).append(rest)
        return found


def _command() -> str:
    script, *arguments = sys.argv
    # Both ways in, the module and the installed script, are the module's.
    ours = Path(script).name == "__main__.py" or Path(script).stem == "mmcompile"
    return shlex.join(["python", *(["-m", "mmcompile"] if ours else [script]), *arguments])


def commit() -> str:
    """The source's commit, marked where the working tree differs from it."""
    # Where the sources were copied without their history, whoever copied them can say.
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    if _git("ls-files", "--error-unmatch", __file__) is None:  # installed, maybe inside another project's checkout
        return "unknown: not run from a git checkout"
    return _git("describe", "--always", "--dirty", "--abbrev=12") or "unknown: git describe failed"


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def versions(device: str) -> dict[str, str]:
    """What a result depends on besides the source, on "cuda" or on "cpu"."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.import_module(name).__version__
    if device == "cuda" and torch.backends.cudnn.is_available():
        found["cuDNN"] = str(torch.backends.cudnn.version())
    return found


def _device(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
