"""How long compiling takes: all of it, what our passes take of it, and a second process that finds the first one's code
on disk."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import compilation_time_metrics

from mmcompile.backend import PASSES_PHASE
from mmcompile.bench.figure import Row
from mmcompile.bench.timing import Failure, significant

_COMPILING = "_compile.compile_inner"  # torch's name of the phase


@dataclass
class CompileTimes:
    """Of one first call, in seconds. compiling: all that Dynamo waits for. passes: ours among it."""

    call: float = 0.0
    compiling: float = 0.0
    passes: float = 0.0

    @classmethod
    @contextmanager
    def watching(cls, device: str) -> "Iterator[CompileTimes]":
        """The times of what runs inside the `with` block, filled in at its end."""
        times = cls()
        before, begin = (_spent(_COMPILING), _spent(PASSES_PHASE)), time.perf_counter()
        yield times
        if device == "cuda":
            torch.cuda.synchronize()
        times.call = time.perf_counter() - begin
        times.compiling, times.passes = _spent(_COMPILING) - before[0], _spent(PASSES_PHASE) - before[1]

    def row(self) -> Row:
        """Columns of a figure's row."""
        row: Row = {"first call s": significant(self.call, 3), "compiling s": significant(self.compiling, 3)}
        if self.passes:
            row |= {"our passes s": significant(self.passes, 3), "their share": f"{self.passes / self.compiling:.1%}"}
        return row


def _spent(phase: str) -> float:
    return sum(compilation_time_metrics.get(phase, ()))


def in_second_process(arguments: dict[str, Any]) -> CompileTimes | Failure:
    """What `python -m mmcompile.bench.second_process` sees, with the caches on disk of this process."""
    command = [sys.executable, "-P", "-m", "mmcompile.bench.second_process", json.dumps(arguments)]
    # The same package as here, wherever this process was started.
    path = os.pathsep.join(part or os.getcwd() for part in sys.path)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return Failure(" ".join((done.stderr.strip().splitlines() or ["no output"])[-1].split())[:200])
    return CompileTimes(**json.loads(lines[-1]))
