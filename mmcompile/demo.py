"""The demo: a tiny Qwen2.5-VL reads a real video, dense, compiled with every tile, and compiled sparse."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import mmcompile
from mmcompile.errors import OptionError
from mmcompile.huggingface import example_inputs, load_model
from mmcompile.report import Report
from mmcompile.tiny_qwen import tiny_qwen2_5_vl
from mmcompile.video import VideoError, read_frames

EXAMPLE_VIDEO = Path(__file__).parents[1] / "examples" / "moving_shapes.mp4"
NEW_TOKENS = 8
ROUNDING = 1e-4  # of float32 logits: what "the same as dense" may differ by

Step = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """One way to run the model. `options` None is plain eager PyTorch."""

    name: str
    options: dict[str, Any] | None


@dataclass(frozen=True)
class Run:
    """What one setting gave. Times in seconds; differences are to the dense run."""

    name: str
    first_call: float
    prefill: float
    generate: float
    density: float
    logit_difference: float
    same_tokens: int


@dataclass(frozen=True)
class Demo:
    """Everything that the demo shows."""

    device: str
    video: str
    frames: int
    tokens: int
    inner: str
    versions: dict[str, str]
    report: Report
    runs: tuple[Run, ...]

    @property
    def exact(self) -> bool:
        """Whether every tile computed gave dense attention: logits to rounding, and the same tokens."""
        every_tile = self.runs[1]
        return every_tile.logit_difference <= ROUNDING and every_tile.same_tokens == NEW_TOKENS

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        plain = {name: getattr(self, name) for name in ("device", "video", "frames", "tokens", "inner", "versions")}
        return plain | {
            "exact": self.exact,
            "report": self.report.to_dict(),
            "runs": [asdict(run) for run in self.runs],
        }


def settings(inner: str) -> tuple[Setting, Setting, Setting]:
    """Dense, every tile, sparse; `inner` compiles the rewritten graphs of the last two."""
    common = {"min_tokens": 0, "inner": inner}
    return (
        Setting("dense (eager PyTorch)", None),
        Setting("compiled, every tile", common | {"density": 1.0}),
        Setting("compiled, auto", common),
    )


def step_count() -> int:
    """How many steps `run` announces."""
    return 3 + 3 * len(settings("eager"))


def run(video: Path | None, *, frames: int, tokens: int, inner: str | None, step: Step) -> Demo:
    """Make, save and load the model, read the video, and run every setting.

    Args:
        video: a video file; None takes the one in examples/.
        frames: how many to take, spread evenly over the video.
        tokens: the most that the prompt may have; frames are made smaller to fit.
        inner: what compiles the rewritten graphs; None takes Inductor where it can work here.
        step: called with the name of each of `step_count()` steps as it begins.

    Raises:
        VideoError: the video cannot be read.
        ModelError: it does not fit in `tokens`.
        OptionError: there is no backend `inner`.
    """
    path = _video_path(video)
    inner = inner or default_inner()
    if inner not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise OptionError(f"inner={inner!r}: must be a backend of torch.compile: {', '.join(known)}")
    dense, *compiled = settings(inner)
    with tempfile.TemporaryDirectory() as folder:
        step(f"decode {path.name}")
        pictures = read_frames(path, frames)
        step("make a tiny Qwen2.5-VL, save and load it")
        tiny_qwen2_5_vl(layers=4, hidden_size=256, heads=8, window_size=672).save_pretrained(folder)
        model = load_model(folder)
        inputs = example_inputs(model, frames=pictures, tokens=tokens)
        step("explain: what would be rewritten, and why")
        report = mmcompile.explain(model, **inputs, options=compiled[-1].options)
        runs, reference = [], None
        for setting in (dense, *compiled):
            run, reference = _measure(load_model(folder), setting, inputs, reference, step)
            runs.append(run)
    return Demo(
        device=_device_name(model.device),
        video=str(path),
        frames=len(pictures),
        tokens=inputs["input_ids"].shape[1],
        inner=inner,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        report=report,
        runs=tuple(runs),
    )


def default_inner() -> str:
    """Inductor where a compiler and Python's headers are at hand, else "eager"."""
    compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return "inductor" if compiler and headers else "eager"


@dataclass(frozen=True)
class _Answer:
    logits: torch.Tensor  # [1, vocabulary], of the first new token
    tokens: torch.Tensor  # [1, new tokens]


@torch.no_grad()
def _measure(
    model: Any, setting: Setting, inputs: dict[str, torch.Tensor], dense: _Answer | None, step: Step
) -> tuple[Run, _Answer]:
    """One setting's run, and the reference that all are compared with: the first one's own results."""
    torch.compiler.reset()
    if setting.options is not None:
        mmcompile.compile(model, **setting.options)
    step(f"{setting.name}: first prefill")
    first_call, _ = _timed(lambda: _generate(model, inputs, 1))
    step(f"{setting.name}: prefill")
    prefill, _ = _timed(lambda: _generate(model, inputs, 1))
    densities = [site.density for site in mmcompile.stats(model)]
    step(f"{setting.name}: generate")
    generate, answer = _timed(lambda: _generate(model, inputs, NEW_TOKENS))
    dense = dense or answer
    same = int((answer.tokens == dense.tokens).int().cumprod(-1).sum())
    run = Run(
        name=setting.name,
        first_call=first_call,
        prefill=prefill,
        generate=generate,
        density=sum(densities) / len(densities) if densities else 1.0,
        logit_difference=float((answer.logits - dense.logits).abs().max()),
        same_tokens=same,
    )
    return run, dense


def _generate(model: Any, inputs: dict[str, torch.Tensor], count: int) -> _Answer:
    """Prefill and `count` tokens, as a user has them: `generate` runs the vision tower, then the model."""
    output = model.generate(
        **inputs,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return _Answer(output.logits[0], output.sequences[:, -count:])


def _timed(call: Callable[[], _Answer]) -> tuple[float, _Answer]:
    begin = time.perf_counter()
    answer = call()
    if answer.logits.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, answer


def _video_path(video: Path | None) -> Path:
    if video is None and not EXAMPLE_VIDEO.exists():
        raise VideoError(f"{EXAMPLE_VIDEO}: the example video is not here; give one with --video PATH")
    return video or EXAMPLE_VIDEO


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
