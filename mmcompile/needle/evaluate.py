"""Ask every prompt under every method, and count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompile.bench.op_times import OpTimes
from mmcompile.bench.timing import time_call
from mmcompile.console import Step
from mmcompile.needle.decoder import Decoder, Encoded
from mmcompile.needle.methods import AUTO, DENSE, Method
from mmcompile.needle.prompts import Asked, Batch, Prompts
from mmcompile.needle.results import HeadFigures, Record, Results, nearest
from mmcompile.prefill import SiteStats

TOKENS_AT_ONCE = 2**16  # of a batch
REPEATS = 3  # of what is timed


@dataclass(frozen=True)
class Plan:
    """What is asked. samples: questions of each (task, length, depth), at least. check: share of the query tiles that
    is compared with dense attention in the first batch of each (task, length)."""

    tasks: tuple[str, ...]
    tokens: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    methods: tuple[Method, ...]
    check: float

    def missing(self, prompts: Prompts, tokens: int, done: int) -> list[list[tuple[float, int]]]:
        """The (depth, seed) of each prompt of a length, in batches, without the first that are done."""
        rounds = -(-self.samples // prompts.questions)
        every = [(depth, seed) for seed in range(rounds) for depth in self.depths][done:]
        size = max(1, TOKENS_AT_ONCE // tokens) if prompts.together else 1
        return [every[first : first + size] for first in range(0, len(every), size)]


def count_steps(plan: Plan, prompts: Prompts, results: Results) -> int:
    """How often `evaluate` will call its `step`."""
    cells = [(task, tokens) for task in plan.tasks for tokens in plan.tokens]
    return sum(len(plan.missing(prompts, tokens, results.done(task, tokens))) for task, tokens in cells)


def evaluate(plan: Plan, decoder: Decoder, prompts: Prompts, results: Results, step: Step) -> Iterator[None]:
    """Add to `results` what is missing there; yields after each batch. step: is told of each batch as it begins."""
    for tokens in plan.tokens:
        for task in plan.tasks:
            done = results.done(task, tokens)
            for index, wanted in enumerate(plan.missing(prompts, tokens, done)):
                step(f"{task}, {tokens} tokens")
                batch = prompts.batch(task, tokens, wanted)
                _Cell(plan, decoder, results, task, tokens, batch).run(first=done == 0 and index == 0)
                results.count_prompts(task, tokens, len(wanted))
                yield


@dataclass(frozen=True)
class _Cell:
    """One batch of one task and length."""

    plan: Plan
    decoder: Decoder
    results: Results
    task: str
    tokens: int
    batch: Batch

    def run(self, *, first: bool) -> None:
        encoded = self.decoder.encode(self.batch.inputs)
        dense: Tensor | None = None
        for method in self.plan.methods:
            record = self.results.record(self.task, self.tokens, method.name)
            options = None if method.name == DENSE else method.options(self.batch.tokens, self._auto_density())
            self.decoder.use(options)
            if first:  # kernels compile, and launch shapes are measured
                record.heads = self._check(encoded, options)
                self._time(encoded, record)
            hidden = self.decoder.run(encoded)
            found = self.decoder.log_probabilities(hidden, self.batch.asked)
            if dense is None:
                dense = found
            record.density += 1.0 if options is None else _mean_density(self.decoder.stats())
            record.batches += 1
            _count(record, self.plan.depths, self.batch.asked, found, dense)

    def _auto_density(self) -> float | None:
        """Of the first batch: the methods that take it keep one setting for all."""
        record = self.results.record(self.task, self.tokens, AUTO)
        if record.first_density is None and record.batches:
            record.first_density = record.density / record.batches
        return record.first_density

    def _check(self, encoded: Encoded, options: dict | None) -> list[HeadFigures]:
        if options is None or not self.plan.check:
            return []
        self.decoder.use(options | {"check": self.plan.check})
        self.decoder.run(encoded)
        found = self.decoder.stats()
        self.decoder.use(options)
        return [
            HeadFigures(site.layer or 0, head, one.recall, one.true_recall, one.error)
            for site in found
            for head, one in enumerate(site.heads)
        ]

    def _time(self, encoded: Encoded, record: Record) -> None:
        """Of one prompt: the decoder, and in it our ops; torch's own attention is not told apart."""
        device = self.decoder.model.device.type
        prompts = len(self.batch.inputs["input_ids"])
        record.ms = time_call(lambda: self.decoder.run(encoded), device, REPEATS).ms / prompts
        with OpTimes(device) as times:
            self.decoder.run(encoded)
        if device == "cuda":
            torch.cuda.synchronize()
        if times.spans:
            record.plan_ms = times.ms("arrange", "plan") / prompts
            record.attention_ms = times.ms("attention", "permutations") / prompts


def _mean_density(sites: Sequence[SiteStats]) -> float:
    return sum(site.density for site in sites) / len(sites)


def _count(record: Record, depths: Sequence[float], asked: Sequence[Asked], found: Tensor, dense: Tensor) -> None:
    """found, dense: log probabilities [positions, vocabulary] of the positions of all that was asked, in order."""
    said, meant = found.argmax(-1).tolist(), dense.argmax(-1).tolist()
    divergence = (dense.exp() * (dense - found)).sum(-1).clamp(min=0).tolist()
    start = 0
    for one in asked:
        here = slice(start, start + len(one.ids))
        start = here.stop
        place = nearest(depths, one.depth)
        right = said[here] == list(one.ids)
        record.asked[place] += 1
        record.right[place] += right
        record.agreed += said[here] == meant[here]
        record.divergence += sum(divergence[here]) / len(one.ids)
        tally = record.by_modality.setdefault(one.modality, [0, 0])
        tally[0] += 1
        tally[1] += right
