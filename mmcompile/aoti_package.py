"""Packages of AOTInductor: a program compiled ahead of time, with what it needs written inside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch.export import ExportedProgram
from torch.utils._sympy.numbers import int_oo

from mmcompile.errors import ExportError
from mmcompile.passes.add_boundaries import BOUNDARY_NAMES
from mmcompile.passes.graph import expression, fake_value, placeholders
from mmcompile.program_record import ProgramRecord, record_of

_KEY = "mmcompile"
IMPORT = "import mmcompile"


def package(program: ExportedProgram, path: str | Path, *, configs: dict[str, Any] | None = None) -> Path:
    """Compile a program with AOTInductor into a package that `torch._inductor.aoti_load_package` loads.

    The ops that make attention sparse are Python's, and a package calls them by name: a process that loads it must have
    said `import mmcompile` before, and torch says "Could not find schema for mminference::arrange" where it has not. A
    program in which no attention is sparse loads with torch alone. Nothing is traced or compiled when it is loaded or
    run, for any length, batch and number of segments.

    program: from `export` or `transform`, on the device that the package is for. configs: of Inductor.
    Returns the path. Raises ExportError for a program that takes inputs of any size: AOTInductor indexes those by 32
    bits if its example is small, and a longer prompt would be read wrongly in silence.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ExportError(f"{path}: the name of a package must end in .pt2")
    endless = _endless_inputs(program)
    if endless:
        raise ExportError(
            f"{', '.join(endless)}: no size is too large for the program, and AOTInductor then indexes by 32 bits; "
            "export it with the largest that is needed, as in torch.export.Dim.AUTO(max=2**20)"
        )
    record = record_of(program)
    told = {} if record is None else {_KEY: json.dumps(replace(record, packed=IMPORT).to_dict())}
    settings = {"aot_inductor.metadata": told} | (configs or {})
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    return path


def _endless_inputs(program: ExportedProgram) -> list[str]:
    """The inputs, boundaries left out, with a dimension that has no upper bound. (Of boundaries ops alone read.)"""
    found = []
    for node in placeholders(program.graph):
        shape = getattr(fake_value(node), "shape", ())
        symbols = {symbol for size in shape for symbol in expression(size).free_symbols}
        bounds = [program.range_constraints.get(symbol) for symbol in symbols]
        if node.name not in BOUNDARY_NAMES and any(bound is None or bound.upper >= int_oo for bound in bounds):
            found.append(node.name)
    return found


def is_package(path: str | Path) -> bool:
    """Whether a file is a package of AOTInductor's; a program that `torch.export.save` wrote is none."""
    return any("aotinductor" in name for name in _names(path))


def packed_record(path: str | Path) -> ProgramRecord | None:
    """What was written into a package; None of one that `package` has not made. Nothing is loaded."""
    with ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("metadata.json"):
                told = json.loads(archive.read(name))
                if _KEY in told:
                    return ProgramRecord.from_dict(json.loads(told[_KEY]))
    return None


def _names(path: str | Path) -> list[str]:
    try:
        with ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, BadZipFile) as error:
        raise ExportError(f"{path}: no program and no package ({error})") from error
