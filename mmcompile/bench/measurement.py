"""What every `bench` command measures through, and the values its options take."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch

from mmcompile.bench.figure import Row
from mmcompile.console import Step
from mmcompile.errors import OptionError

Number = TypeVar("Number", int, float)


class Measurement(Protocol):
    """One `bench` command with its options."""

    @property
    def title(self) -> str:
        """Of the figure."""

    @property
    def device(self) -> str:
        """What is measured, "cuda" or "cpu"."""

    @property
    def notes(self) -> str:
        """What stands under the tables: geometry, data, and what a spread is."""

    @property
    def steps(self) -> int:
        """How often `measure` will call its `step`."""

    def measure(self, step: Step) -> Iterator[list[Row]]:
        """The figure's rows, as they come."""

    def summary(self, rows: list[Row]) -> str:
        """What the rows say, in a sentence or two."""

    def draw(self, rows: list[Row], pyplot: Any) -> Any:
        """The rows as a matplotlib figure; pyplot is the module."""


def token_count(word: str) -> int:
    """A length such as "4096", "32K" (32768) or "1M" (1048576). Raises ValueError."""
    for suffix, size in (("K", 2**10), ("M", 2**20)):
        if word.endswith(suffix):
            return int(word.removesuffix(suffix)) * size
    return int(word)


def numbers(option: str, text: str, kind: Callable[[str], Number], low: Number, high: Number) -> tuple[Number, ...]:
    """The numbers of a list such as "32768,131072". Raises OptionError naming the option."""
    found = []
    for word in text.split(","):
        try:
            number = kind(word)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise OptionError(f"{option} {text}: {word!r} is not a number from {low} to {high}; separate with commas")
        found.append(number)
    return tuple(dict.fromkeys(found))


def choices(option: str, text: str, known: Any) -> tuple[str, ...]:
    """The names of a list such as "auto,grid". Raises OptionError naming the option."""
    words = tuple(dict.fromkeys(text.split(",")))
    for word in words:
        if word not in known:
            raise OptionError(f"{option} {text}: no {word!r}; any of {', '.join(known)}, separated by commas")
    return words


def require_device(device: str) -> None:
    """Raises OptionError where there is no such device here."""
    if device not in ("cuda", "cpu"):
        raise OptionError(f"--device {device}: must be cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("this measures a CUDA device, and torch finds none here")
