"""Reading is exact for every position, or it is opaque: held against random mask programs.

MMCOMPILE_MASK_PROGRAMS=N checks N of them instead of the 300 of the test suite.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from mmcompile.passes.confirm_mask import confirm_mask
from mmcompile.passes.mask_spec import OpaqueMask
from tests.passes.captured_masks import (
    Captured,
    combine,
    emit_rows,
    real_mask,
    record,
    run_rows,
    trace_aten,
    trace_dynamo,
)
from tests.passes.mask_grammar import MaskProgram, choose_sizes, make_inputs, write_program

PROGRAMS = int(os.environ.get("MMCOMPILE_MASK_PROGRAMS", "300"))
BATCHES = 10
PADDING = (torch.bool, torch.int64, torch.int32, torch.uint8)


def runs(program: MaskProgram, inputs: dict) -> bool:
    """Whether the program is one: some random ones do not broadcast, or compute in dtypes without the operation."""
    try:
        with torch.no_grad():
            mask = program.compiled()(**inputs)
    except (RuntimeError, TypeError, IndexError, NotImplementedError):
        return False
    return mask.dtype == torch.bool or mask.is_floating_point()


def check(seed: int, capture: Callable[..., Captured] | None = None) -> tuple[str, str] | None:
    """Read program number `seed` and hold it against its own output; (kind, outcome), None where it does not run."""
    choose = random.Random(seed)
    program = write_program(choose)
    padding, dynamic, sizes = choose.choice(PADDING), choose.random() < 0.25, choose_sizes(choose)
    inputs = [make_inputs(size, seed + offset, padding) for offset, size in enumerate(sizes)]
    if not dynamic:
        inputs[1:] = [make_inputs(sizes[0], seed + offset, padding) for offset in (1, 2)]
    if not all(runs(program, values) for values in inputs):
        return None
    function = program.compiled()
    capture = capture or (trace_aten if choose.random() < 0.15 else record)
    captured = capture(function, inputs[0], dynamic=dynamic)
    spec = captured.read()
    if isinstance(spec, OpaqueMask):
        return program.kind, f"opaque: {spec.reason}"
    where = f"program {seed}, {capture.__name__}, dynamic={dynamic}, {padding}\n{program.source}\n{spec}"
    disagreement = confirm_mask(captured.mask, spec)
    module = emit_rows(captured, spec)
    for values in inputs:
        real = real_mask(function, values)
        read = combine(run_rows(module, captured, values), spec, values)[:, None]
        assert torch.equal(real, read.expand_as(real)), where
    assert disagreement is None, f"{disagreement}\n{where}"
    return program.kind, "read"


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_programs_are_read_exactly_or_not_at_all(batch):
    outcomes: Counter[tuple[str, str]] = Counter()
    seed = batch
    while sum(outcomes.values()) < PROGRAMS // BATCHES:
        outcome = check(seed)
        if outcome is not None:
            outcomes[outcome] += 1
        seed += BATCHES
    known = {outcome: count for (kind, outcome), count in outcomes.items() if kind == "known"}
    unread = {outcome: count for outcome, count in known.items() if outcome != "read"}
    assert known["read"] >= 0.85 * sum(known.values()), unread


@pytest.mark.parametrize(
    "seed", [number for number in range(1, 400) if write_program(random.Random(number)).kind == "known"][:8]
)
def test_random_programs_through_dynamo(seed):
    assert check(seed, trace_dynamo) in (("known", "read"), None)
