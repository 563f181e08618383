"""Batches of prompts, laid out ahead in other processes."""

import multiprocessing
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmcompile.needle.haystack import Haystack, plan
from mmcompile.needle.layout import Layout
from mmcompile.needle.training.schedule import Phase, training_prompts

USES = 3  # of a batch
KEPT = 24  # batches to be used again


@dataclass(frozen=True)
class Batch:
    """Prompts of one length. ids: `[B, S]`. positions: `[3, B, S]`. questions: `[n, 3]`: row, position, answer."""

    haystacks: list[Haystack]
    ids: np.ndarray
    positions: np.ndarray
    questions: np.ndarray


def make_batch(layout: Layout, prompts: list[dict[str, Any]]) -> Batch:
    """Lay out prompts of one length; each is the arguments of `plan`, with a seed in the place of `rng`."""
    found = []
    for arguments in prompts:
        rng = np.random.default_rng(arguments.pop("seed"))
        found.append(plan(**arguments, rng=rng, layout=layout))
    positions = [layout.positions(one.types, one.clips) for one in found]
    questions = [(row, *pair) for row, one in enumerate(found) for pair in one.questions.tolist()]
    return Batch(found, np.stack([one.ids for one in found]), np.stack(positions, axis=1), np.array(questions))


class Batches:
    """Batches made ahead in other processes.

    Laying prompts out takes longer than a step on a fast GPU: each batch is had `USES` times, between others, and the
    frames are drawn anew every time.
    """

    def __init__(self, layout: Layout, workers: int, seed: int) -> None:
        self.layout, self.seed, self.ordered, self.had = layout, seed, 0, 0
        self.rng = np.random.default_rng(seed)
        self.pool: Executor = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))
        self.ahead: deque[Future[Batch]] = deque()
        self.recent: deque[Batch] = deque(maxlen=KEPT)
        self.most = 2 * workers
        self.waited = 0.0  # seconds, for batches that were not ready

    def prepare(self, phase: Phase) -> None:
        """Order batches of `phase`, to be had after those already ordered."""
        while len(self.ahead) < self.most:
            prompts = training_prompts(phase, self.ordered, self.seed)
            self.ahead.append(self.pool.submit(make_batch, self.layout, prompts))
            self.ordered += 1

    def next(self, phase: Phase) -> Batch:
        """A new batch, or one of the last `KEPT` again."""
        self.prepare(phase)
        self.had += 1
        if self.had % USES == 1:
            begin = time.perf_counter()
            self.recent.append(self.ahead.popleft().result())
            self.waited += time.perf_counter() - begin
            return self.recent[-1]
        return self.recent[int(self.rng.integers(len(self.recent)))]

    def drop(self) -> None:
        """Forget what was ordered and kept: the next batch is of the next phase."""
        for one in self.ahead:
            one.cancel()
        self.ahead.clear()
        self.recent.clear()
        self.had = 0

    def ask(self, prompts: list[list[dict[str, Any]]]) -> Iterator[Batch]:
        """Batches of the caller's own prompts."""
        yield from self.pool.map(make_batch, [self.layout] * len(prompts), prompts)
