"""The curriculum: which prompts a step trains on, and at what learning rate."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmcompile.needle.haystack import TASKS

MIXED_FROM = 352  # tokens: shorter prompts have no room for text


@dataclass(frozen=True)
class Phase:
    """A part of the training, over once answers are right, at `until` of the time at the latest.

    lengths: of prompts, in tokens; a step takes any of them alike. Without any, the vision tower learns to name what
    frames show. step_tokens: of a step, at least one prompt. needles: the most in a prompt. see: whether the vision
    tower is trained.
    """

    until: float
    lengths: tuple[int, ...]
    step_tokens: int
    needles: int
    see: bool


PHASES = (
    Phase(0.30, (), 24576, 0, True),
    Phase(0.45, (96, 136, 208, 352), 16384, 4, True),
    Phase(0.60, (208, 352, 512, 768), 24576, 8, True),
    Phase(0.70, (352, 512, 1024, 2048, 4096), 32768, 8, True),
    Phase(0.80, (512, 2048, 4096, 8192, 16384), 65536, 8, False),
    Phase(1.00, (1024, 4096, 8192, 16384, 32768, 65536), 131072, 8, False),
)
RIGHT = 0.98  # share of answers that ends a phase before its time
PEAK_RATE, WARM_UP, DECAY_FROM = 1.5e-3, 0.02, 0.5  # fractions of the time


def phases_within(longest: int, step_tokens: int) -> list[Phase]:
    """The phases, without prompts of more than `longest` tokens, in steps of no more than `step_tokens`."""
    phases = []
    for phase in PHASES:
        lengths = tuple(length for length in phase.lengths if length <= longest)
        lengths = lengths or (phase.lengths and (longest,))
        phases.append(replace(phase, lengths=lengths, step_tokens=min(step_tokens, phase.step_tokens)))
    return phases


def learning_rate(progress: float) -> float:
    """Rises, stays, and falls in a line to nothing."""
    return PEAK_RATE * min(1.0, progress / WARM_UP, (1 - progress) / (1 - DECAY_FROM))


def training_prompts(phase: Phase, step: int, seed: int) -> list[dict[str, Any]]:
    """What step `step` trains on: one length, both tasks where text has room."""
    rng = np.random.default_rng((seed, step))
    tokens = int(rng.choice(phase.lengths))
    tasks = TASKS if tokens >= MIXED_FROM else TASKS[:1]
    needles = int(rng.integers(2, phase.needles + 1))
    return [
        {
            "task": tasks[(row + step) % len(tasks)],
            "tokens": tokens,
            "depth": float(rng.random()),
            "needles": needles,
            "questions": min(needles, 8 if tokens >= 1024 else 4 if tokens >= 512 else 2 if tokens >= 128 else 1),
            "seed": (seed, step, row),
        }
        for row in range(max(1, phase.step_tokens // tokens))
    ]
