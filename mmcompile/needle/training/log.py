"""What is told of a training: shown on the way, and kept in `training.json`."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mmcompile.needle.training.schedule import RIGHT

EVERY = 50  # steps of a point of the curve


class Log:
    """What `training.json` holds, and what is shown on the way.

    curve: every `EVERY` steps the seconds of training, steps, longest prompt in tokens, the mean loss on answers and on
    what cards show, the share of answers that were right, and steps skipped so far because a gradient was not finite.
    """

    def __init__(self, settings: dict[str, Any], console: Console) -> None:
        self.settings, self.console = settings, console
        self.curve: list[dict[str, float]] = []
        self.recall: list[dict[str, Any]] = []
        self.skipped = 0
        self._recent: list[Tensor] = []

    def add(self, step: int, seconds: float, longest: int, measured: tuple[Tensor, Tensor, Tensor], done: bool) -> str:
        """Note a step's two losses and share of right answers; returns the last point of the curve in words."""
        self.skipped += not done
        self._recent.append(torch.stack([one.detach().float() for one in measured]))
        if len(self._recent) == EVERY:
            loss, naming, right = torch.stack(self._recent).mean(0).tolist()
            self._recent.clear()
            point = {"seconds": round(seconds, 2), "step": step, "longest": longest, "loss": loss, "naming": naming}
            self.curve.append(point | {"right": right, "skipped": self.skipped})
            if not self.console.is_terminal and len(self.curve) % 4 == 0:
                print(f"{seconds:6.1f} s, {self.last()}", flush=True)
        return self.last()

    def learned(self, step: int) -> bool:
        """Whether answers were right over the point of the curve that ends with this step."""
        return bool(self.curve) and self.curve[-1]["step"] == step and self.curve[-1]["right"] >= RIGHT

    def last(self) -> str:
        """The last point of the curve in words."""
        if not self.curve:
            return ""
        point = self.curve[-1]
        return (
            f"step {point['step']}, to {point['longest']} tokens, loss {point['loss']:.3f}, "
            f"naming {point['naming']:.3f}, right {point['right']:.3f}, skipped {point['skipped']}"
        )

    def add_recall(self, seconds: float, task: str, tokens: int, samples: int, by_depth: list[float]) -> None:
        mean = sum(by_depth) / len(by_depth)
        self.recall.append(
            {"seconds": round(seconds, 2), "task": task, "tokens": tokens, "samples": samples, "recall": mean}
            | {"by_depth": [round(one, 4) for one in by_depth]}
        )
        depths = " ".join(f"{one:.2f}" for one in by_depth)
        text = f"{task:6} {tokens:7} tokens: recall {mean:.4f} ({samples} a depth: {depths})"
        self.console.print(text, highlight=False, soft_wrap=True)

    def write(self, path: Path) -> None:
        found = {"settings": self.settings, "recall": self.recall, "curve": self.curve}
        path.write_text(json.dumps(found, indent=1) + "\n")
