"""What an exported program keeps of how it was rewritten: decisions, patterns and versions, in its own metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from mmcompile.passes.decide import Reason, SiteRecord

_KEY = "mmcompile"


@dataclass(frozen=True)
class ProgramRecord:
    """sites: every attention, decided. settings: the options that the passes ran with. versions: of what ran them.

    packed: None of a program; of a package of AOTInductor's, what must be said before it is loaded, "" for nothing.
    """

    sites: tuple[SiteRecord, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    packed: str | None = None

    @classmethod
    def of(cls, sites: Sequence[SiteRecord], settings: Mapping[str, Any]) -> ProgramRecord:
        """A record made now, with this process' versions."""
        return cls(tuple(sites), settings, _versions())

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self) | {"sites": [site.to_dict() for site in self.sites]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ProgramRecord:
        """The inverse of `to_dict`."""
        sites = [
            SiteRecord(**site | {"reason": Reason(site["reason"]), "patterns": tuple(site["patterns"])})
            for site in content["sites"]
        ]
        return cls(tuple(sites), content["settings"], content["versions"], content["packed"])

    def describe(self) -> str:
        """Settings and versions in one line."""
        settings = [f"{name} {value}" for name, value in self.settings.items() if value is not None]
        return ", ".join([*settings, *(f"{name} {number}" for name, number in self.versions.items())])

    def next_step(self, path: Path) -> str:
        """How to go on from the file that this is the record of, in one line of console markup."""
        if self.packed is None:
            return f"Next: [bold]mmcompile.package(torch.export.load({str(path)!r}), 'package.pt2')[/bold]."
        before = f"{self.packed}; " if self.packed else ""
        return f"Next: [bold]{before}torch._inductor.aoti_load_package({str(path)!r})[/bold]."


def keep_record(module: torch.fx.GraphModule, record: ProgramRecord) -> None:
    """Write it into a program's graph, where `torch.export.save` saves it."""
    module.meta["custom"] = module.meta.get("custom", {}) | {_KEY: record.to_dict()}


def record_of(program: ExportedProgram) -> ProgramRecord | None:
    """What `transform` kept of a program; None of one that it has not seen."""
    content = program.graph_module.meta.get("custom", {}).get(_KEY)
    return None if content is None else ProgramRecord.from_dict(content)


def _versions() -> dict[str, str]:
    names = ("mmcompile", "triton", "transformers")
    installed = {name: number for name in names if (number := _version(name)) is not None}
    return installed | {"torch": str(torch.__version__)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout, or without Triton
        return None
