"""The JSON that a benchmark leaves behind: its rows, and everything needed to make them again."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import triton


@dataclass
class Figure:
    """One committed figure. `rows` are the table's rows, column name to value."""

    title: str
    command: str
    commit: str
    versions: dict[str, str]
    device: str
    notes: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(cls, title: str, notes: str, device: str = "cuda") -> "Figure":
        """A figure with no rows yet, of this command at this commit, measured on "cuda" or on "cpu"."""
        return cls(title, " ".join(["python", *sys.argv]), commit(), versions(), _device(device), notes)

    def save(self, path: str | Path) -> None:
        """Write the JSON and say where it went."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")
        print(f"wrote {path}; `make figures` puts its table into README.md")


def commit() -> str:
    """The source's commit, marked where the working tree differs from it."""
    # Where the sources were copied without their history, whoever copied them can say.
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown: not run from a git checkout"


def versions() -> dict[str, str]:
    """What a result depends on besides the source."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }


def _device(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
