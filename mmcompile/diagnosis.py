"""What the doctor found, as data: a status and the figures of each check, a table, and what to do next."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from rich.markup import escape
from rich.table import Table


class Status(StrEnum):
    """What a check found; the values are what the tables print."""

    WORKS = "works"
    DENSE = "stays dense"  # right, and nothing became sparse
    FAILS = "fails"


_COUNTED = ((Status.WORKS, "work"), (Status.DENSE, "stay dense"), (Status.FAILS, "fail"))
_NEXT = {
    "torch.compile": 'model.compile(backend="mminference")',
    "mmcompile.compile": "mmcompile.compile(model)",
    "text model": 'model.get_decoder().compile(backend="mminference")',
}


@dataclass(frozen=True)
class CheckResult:
    """One check of one way of compiling.

    detail: why, where it is not simply right. error and allowed: largest difference of logits, and what was allowed;
    None where no logits were compared. rewritten, causal: attentions of the decoder's prefill that ran on our kernels
    (at the length that had fewest), and all of them. graphs: how many were compiled. dense: why the others were left as
    they are.
    """

    way: str
    check: str
    status: Status
    detail: str
    error: float | None
    allowed: float | None
    rewritten: int
    causal: int
    graphs: int
    dense: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self) | {"status": str(self.status), "dense": list(self.dense)}

    def cell(self) -> str:
        """The result in a few words, for a table."""
        return str(self.status) if not self.detail else f"{self.status}: {self.detail}"


@dataclass(frozen=True)
class Diagnosis:
    """All checks that were run on one model."""

    results: tuple[CheckResult, ...]

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(result.status is not Status.FAILS for result in self.results)

    def of(self, way: str, check: str) -> CheckResult:
        """The result of one check; KeyError where it was not run."""
        for result in self.results:
            if (result.way, result.check) == (way, check):
                return result
        raise KeyError((way, check))

    def advice(self) -> str:
        """What was found in one line, and what to do next."""
        found = [result.status for result in self.results]
        counts = ", ".join(f"{found.count(status)} {label}" for status, label in _COUNTED if status in found)
        ways = dict.fromkeys(result.way for result in self.results)
        served = [way for way in ways if all(one.status is Status.WORKS for one in self.results if one.way == way)]
        if served:
            following = f"Next: {_NEXT[served[0]]}."
        elif self.healthy:
            following = "No way of compiling makes this model sparse: the reasons are in the table."
        else:
            following = "Where a check fails, do not compile that way; please report it, with --json."
        return f"{len(found)} checks: {counts}. {following}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {"healthy": self.healthy, "results": [result.to_dict() for result in self.results]}

    def __rich__(self) -> Table:
        table = Table("check", "result", "error", "rewritten", "graphs", "seconds", title="Checks")
        for way in dict.fromkeys(result.way for result in self.results):
            table.add_section()
            table.add_row(f"[bold]{way}[/bold]")
            for result in (one for one in self.results if one.way == way):
                table.add_row(
                    result.check,
                    escape(result.cell()),
                    "-" if result.error is None else f"{result.error:.1e}",
                    f"{result.rewritten} of {result.causal}",
                    str(result.graphs),
                    f"{result.seconds:.1f}",
                )
        return table
