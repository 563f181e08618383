"""The most memory that a graph holds at once, from its steps: what lives until when, and what a compiler never writes.

Inductor makes one kernel of a run of operations on elements. Its rules, as far as they decide what is written
(torch/_inductor: `StorageBox.mark_reuse`, `realize_hint`): a value is computed again by each reader, unless one of them
is no such operation, or it has several readers and reads much itself. A kernel may write over an input that nobody
reads again, and a copy of what is written already is none. Memory that is free again may be held for a later buffer of
the same size, up to the peak that Inductor knows of (`AllocateLine.should_reuse_buffer`), which is one without
what an operation needs besides.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from mmcompile.passes.list_steps import Buffer, Steps

READS_TO_WRITE = 4  # more buffers than these are read for a value once only (`realize_reads_threshold`)
_COPIES = ("cat", "clone")  # of one tensor, where nothing else is in them
READS_AT_MOST = 8  # and more than these for none (`realize_acc_reads_threshold`)


@dataclass(frozen=True)
class Peak:
    """A graph's memory where it is greatest.

    nbytes: all of `live` and `workspace`. live: buffers that are held then, the graph's inputs among them and without
    its weights, the largest first. step: the operation that runs. workspace: what it needs besides, and memory that is
    held for later.
    """

    nbytes: int
    live: tuple[Buffer, ...]
    step: str
    workspace: int


def peak_memory(steps: Steps, *, fused: bool) -> Peak:
    """The peak of a graph's own memory, its weights left out. Inputs live throughout: the caller holds them.

    fused: as Inductor compiles it; else each operation writes what it returns, as without a compiler.
    """
    if fused:
        steps = fuse(steps)
    lives = _Lives.of(steps, in_place=fused)
    now = lives.totals()
    if fused:
        now = [total + held for total, held in zip(now, lives.held_for_later(now), strict=True)]
    with_workspace = [total + step.workspace for total, step in zip(now, steps.steps, strict=True)]
    given = sum(lives.sizes[index] for index in lives.first if lives.first[index] < 0)
    if max(with_workspace, default=0) <= given:
        return Peak(given, lives.at(-1), "nothing", 0)
    at = max(range(len(now)), key=lambda at: with_workspace[at])
    return Peak(with_workspace[at], lives.at(at), steps.steps[at].name, with_workspace[at] - lives.totals()[at])


@dataclass
class _Lives:
    """From which step to which each buffer's memory is held. Steps count from 0; what is given is there before."""

    steps: Steps
    sizes: list[int]  # 0 for weights
    first: dict[int, int]
    last: dict[int, int]
    over: dict[int, int]  # the buffer that a buffer is written over

    @classmethod
    def of(cls, steps: Steps, *, in_place: bool) -> "_Lives":
        weights, end = set(steps.weights), len(steps.steps)
        sizes = [0 if index in weights else buffer.nbytes for index, buffer in enumerate(steps.buffers)]
        reads = {index: at for at, step in enumerate(steps.steps) for index in step.reads}
        kept = set(steps.given) | steps.returned
        first, last = dict.fromkeys(steps.given, -1), dict.fromkeys(steps.given, end)
        over: dict[int, int] = {}
        for at, step in enumerate(steps.steps):
            first |= dict.fromkeys(step.makes, at)
            last |= {index: end if index in kept else reads.get(index, at) for index in step.makes}
            if in_place and step.fuses:
                dying = [index for index in step.reads if last.get(index) == at and index not in over.values()]
                for made in step.makes:
                    same = next((index for index in dying if sizes[index] == sizes[made]), None)
                    if same is not None:
                        dying.remove(same)
                        over[made] = same
                        last[same] = at - 1
        return cls(steps, sizes, first, last, over)

    def totals(self) -> list[int]:
        """Bytes held during each step."""
        change = [0] * (len(self.steps.steps) + 1)
        for index, begin in self.first.items():
            if begin <= self.last[index]:
                change[max(begin, 0)] += self.sizes[index]
                change[min(self.last[index] + 1, len(change) - 1)] -= self.sizes[index]
        return list(accumulate(change[:-1]))

    def at(self, step: int) -> tuple[Buffer, ...]:
        """What is held then, the largest first."""
        held = [index for index, begin in self.first.items() if begin <= step <= self.last[index] and self.sizes[index]]
        return tuple(sorted((self.steps.buffers[index] for index in held), key=lambda one: -one.nbytes))

    def held_for_later(self, totals: list[int]) -> list[int]:
        """Bytes during each step that are free, and that Inductor keeps for a later buffer of their size: where all
        that lives between comes with it to no more than the peak."""
        most, held = max(totals, default=0), [0] * len(totals)
        free: dict[Any, list[int]] = {}  # since which step, by what can take it
        ends: dict[int, list[int]] = {}
        for index in self.first:
            if (
                self.steps.buffers[index].reusable
                and self.last[index] < len(totals)
                and index not in self.over.values()
            ):
                ends.setdefault(self.last[index], []).append(index)
        for at, step in enumerate(self.steps.steps):
            for index in step.makes:
                buffer = self.steps.buffers[index]
                since = free.get((buffer.dtype, buffer.nbytes), [])
                if not buffer.reusable or index in self.over or not since:
                    continue
                between = range(since[-1] + 1, at)
                if all(totals[one] + held[one] + buffer.nbytes <= most for one in between):
                    since.pop()
                    for one in between:
                        held[one] += buffer.nbytes
            for index in ends.get(at, ()):
                buffer = self.steps.buffers[index]
                free.setdefault((buffer.dtype, buffer.nbytes), []).append(at)
        return held


def fuse(steps: Steps) -> Steps:
    """The steps that are left where a compiler makes kernels of what stands side by side."""
    needed = _read_outside_of_kernels(steps)
    readers = Counter(index for step in steps.steps for index in step.reads)
    sources: dict[int, tuple[int, ...]] = {}  # of what is never written
    found = []
    for step in steps.steps:
        filled = [index for index in step.reads if steps.buffers[index].nbytes]
        reads = tuple(dict.fromkeys(source for index in filled for source in sources.get(index, (index,))))
        made = replace(step, reads=reads)
        copies = step.name in _COPIES and len(filled) == 1 and filled[0] not in sources
        if copies and _nbytes(steps, filled) == _nbytes(steps, step.makes):
            sources |= dict.fromkeys(step.makes, reads)
            continue
        if step.fuses and step.makes and not step.reduces and needed.isdisjoint(step.makes):
            several = any(readers[index] > 1 for index in step.makes)
            if len(reads) <= (READS_TO_WRITE if several else READS_AT_MOST):
                sources |= dict.fromkeys(step.makes, reads)
                continue
        found.append(made)
    returned = {source for index in steps.returned for source in sources.get(index, (index,))}
    return replace(steps, steps=found, returned=returned)


def _nbytes(steps: Steps, indices: Iterable[int]) -> int:
    return sum(steps.buffers[index].nbytes for index in indices)


def _read_outside_of_kernels(steps: Steps) -> set[int]:
    """Buffers that something other than a fused kernel reads, or that are written to again."""
    outside = (step for step in steps.steps if not step.fuses or not step.makes)
    return steps.returned.union(*(step.reads for step in outside))
