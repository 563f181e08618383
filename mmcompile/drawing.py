"""matplotlib where it is installed: asked for before minutes are spent, and what it drew brought into a file."""

import io
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

from mmcompile.errors import MMCompileError

DPI = 150
CHARACTERS_PER_INCH = 10  # of a title


class DrawingError(MMCompileError):
    """Nothing can be drawn here, or not into that file."""


def require_matplotlib() -> None:
    """Raises DrawingError where no plot can be drawn."""
    if find_spec("matplotlib") is None:
        raise DrawingError('a plot needs matplotlib, which is not installed: pip install "mmcompile[plot]"')


def set_title(figure: Any, title: str) -> None:
    """A title over all of a matplotlib figure, in as many lines as its width needs."""
    width = int(CHARACTERS_PER_INCH * figure.get_figwidth())
    figure.suptitle("\n".join(fill(line, width) for line in title.splitlines()), fontsize=11)


def save_drawing(figure: Any, path: Path) -> None:
    """Write a matplotlib figure; the file's ending names the format. Raises DrawingError, naming the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".png":
            path.write_bytes(png(figure))
        else:
            figure.savefig(path)
    except (OSError, ValueError) as error:
        raise DrawingError(f"{path}: cannot be written ({error})") from error


def png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG of at most 256 colours, a third as long as one of all."""
    from PIL import Image  # matplotlib writes its own PNGs with it

    drawn, target = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(dither=Image.Dither.NONE).save(target, format="png", optimize=True)
    return target.getvalue()
