"""Times of calls that compete: medians with their spread, measured in turns so that drift hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]

FAILURE = "failure"  # the column of a row that could not be measured
LEAST_RUNS = 3  # of a slow call; fewer have no median
CACHE_BYTES = 2**28  # more than the L2 cache of any GPU
CYCLES = 1_800_000  # of a GPU in a millisecond, about


def significant(value: float, digits: int = 4) -> float:
    """A figure without the digits that nobody reads."""
    return float(f"{value:.{digits}g}")


@dataclass(frozen=True)
class Times:
    """Median and spread (half the range) of some runs, in ms."""

    ms: float
    spread: float
    runs: int

    @classmethod
    def of(cls, times: Sequence[float]) -> "Times":
        """times: of each run, in ms; at least one."""
        return cls(statistics.median(times), (max(times) - min(times)) / 2, len(times))

    def columns(self, name: str = "ms") -> dict[str, float]:
        """The two columns of a figure's row; tables show the spread beside its median."""
        return {name: significant(self.ms), f"{name} spread": significant(self.spread, 2)}


@dataclass(frozen=True)
class Failure:
    """Why a call could not run, in one line: a row's column of that name."""

    reason: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """What an error says, cut where it goes on."""
        return cls(" ".join(f"{type(error).__name__}: {error}".split())[:200])


def race(
    contenders: Mapping[str, Call],
    device: str,
    repeats: int,
    *,
    lead: float = 0.0,
    seconds: float = 20.0,
    step: Callable[[str], None] = lambda name: None,
    look: Callable[[str, Any], None] = lambda name, result: None,
) -> dict[str, Times | Failure]:
    """Time each call `repeats` times on "cuda" or "cpu", after one that warms up; the order rotates from turn to turn.

    A call that has taken `seconds` in all stops early, after LEAST_RUNS. lead: ms that the GPU idles before each run,
    so that the host's launches are over when the clock starts; 0 measures a call as a waiting caller sees it. The L2
    cache is emptied before each run. step: is told of each warm-up and each turn, len(contenders) + repeats in all.
    look: is given the name and the result of each warm-up. A contender that raises is a Failure, and the others go on.
    """
    found: dict[str, Times | Failure] = {}
    times: dict[str, list[float]] = {}
    for name, call in contenders.items():
        step(f"warm up {name}")
        result = _attempt(call, device)
        if isinstance(result, Failure):
            found[name] = result
        else:
            times[name] = []
            look(name, result)
        del result  # the next one may need its memory
    names = list(times)
    # Made after the warm-ups, so that their peak of memory is their own.
    clock = (
        _gpu_clock(lead, torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")) if device == "cuda" else _wall_clock
    )
    for turn in range(repeats):
        step(f"run {turn + 1} of {repeats}")
        for index in range(len(names)):
            name = names[(turn + index) % len(names)]
            if len(times[name]) < LEAST_RUNS or sum(times[name]) < seconds * 1e3:
                times[name].append(clock(contenders[name]))
    found |= {name: Times.of(runs) for name, runs in times.items()}
    return {name: found[name] for name in contenders}


def time_call(call: Call, device: str, repeats: int, *, lead: float = 0.0) -> Times:
    """The times of one call, after one that warms up; what it raises is raised. lead: as in `race`."""
    clock = _gpu_clock(lead) if device == "cuda" else _wall_clock
    call()
    return Times.of([clock(call) for _ in range(repeats)])


def time_on_device(call: Call, device: str, repeats: int) -> Times:
    """The times of one call as a busy device sees it: on a GPU the clock starts when all launches are made, because in
    a model the host is layers ahead."""
    call()
    begin = time.perf_counter()
    call()
    host = (time.perf_counter() - begin) * 1e3
    return time_call(call, device, repeats, lead=1.5 * host)


def _attempt(call: Call, device: str) -> object:
    """What a call returns, or its Failure: contenders fail in as many ways as there are libraries."""
    try:
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        # Only its words are kept: its traceback would hold on to the memory that was short.
        result = Failure.of(error)
    if isinstance(result, Failure) and device == "cuda":
        torch.cuda.empty_cache()
    return result


def _wall_clock(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _gpu_clock(lead: float = 0.0, cache: torch.Tensor | None = None) -> Callable[[Call], float]:
    """cache: is written before each run, so that the L2 cache holds nothing else."""

    def milliseconds(call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if cache is not None:
            cache.zero_()
        if lead:
            torch.cuda._sleep(int(lead * CYCLES))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return milliseconds
