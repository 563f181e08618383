"""What the commands print with: tables on stdout, a progress bar and errors on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mmcompile.errors import MMCompileError

Step = Callable[[str], None]

out = Console()
progress_console = Console(stderr=True)


@contextmanager
def steps(total: int | None, *, shown: bool = True) -> Iterator[Step]:
    """A progress bar of named steps on stderr, with the time that is left; the yielded function begins the next step.

    total: None where it is not known. shown: without a bar, nothing is printed.
    """
    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=progress_console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=total)
        begun = False

        def step(name: str) -> None:
            nonlocal begun
            progress.update(task, description=name, advance=1 if begun else 0)
            begun = True

        yield step
        progress.update(task, completed=total)


def write(path: Path, text: str) -> None:
    """Write a file and say so. Raises MMCompileError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    except OSError as error:
        raise MMCompileError(f"{path}: cannot be written ({error.strerror})") from error
    out.print(f"wrote {path}", highlight=False)
