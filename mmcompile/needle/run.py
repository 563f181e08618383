"""One evaluation from end to end: the model and its prompts, what is asked, and the file that it is kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmcompile.bench.figure import Figure
from mmcompile.console import steps
from mmcompile.errors import MMCompileError
from mmcompile.huggingface import ModelError, load_model
from mmcompile.needle.chat_prompts import ChatPrompts, chat_processor
from mmcompile.needle.decoder import Decoder
from mmcompile.needle.evaluate import Plan, count_steps, evaluate
from mmcompile.needle.layout import Layout
from mmcompile.needle.model import KEPT_MODEL
from mmcompile.needle.prompts import Prompts, RealFrames, SyntheticPrompts
from mmcompile.needle.results import TITLE, Results


def load(
    model: str | None, videos: Path | None, questions: int, dtype: str = "auto", device: str | None = None
) -> tuple[Decoder, Prompts]:
    """A model's decoder and prompts for it: by its own processor and chat template where it has them and there are
    videos, else those of the synthetic task. model: None for the kept one."""
    from transformers import AutoTokenizer

    if model is None and not KEPT_MODEL.exists():
        raise ModelError(f"{KEPT_MODEL}: no model is kept; make needle-model trains one on a GPU, or give --model")
    path = str(model or KEPT_MODEL)
    background = None if videos is None else RealFrames(videos)
    loaded = load_model(path, dtype=dtype, device=device)
    processor = None if background is None else chat_processor(path)
    if background is not None and processor is not None:
        return Decoder(loaded), ChatPrompts(loaded, processor, background)
    layout = Layout.of(loaded.config, AutoTokenizer.from_pretrained(path))
    return Decoder(loaded), SyntheticPrompts(layout, loaded.device, loaded.dtype, questions, background)


def begin(plan: Plan, decoder: Decoder, prompts: Prompts, path: Path, *, resume: bool, **told: Any) -> Results:
    """The results that the plan adds to. told: settings besides the plan's, which must agree to go on with a file."""
    for task in plan.tasks:
        if task not in prompts.tasks:
            raise ModelError(f"task {task}: these prompts have {', '.join(prompts.tasks)}")
    settings = {"tasks": list(plan.tasks), "depths": list(plan.depths), "questions": prompts.questions} | told
    device = decoder.model.device.type
    size = sum(parameter.numel() for parameter in decoder.model.parameters()) / 1e6
    dtype = str(decoder.model.dtype).removeprefix("torch.")
    notes = (
        f"{type(decoder.model).__name__} of {size:.3g}M parameters, {dtype}; {len(plan.depths)} depths, "
        f"{prompts.questions} questions a prompt. Recall is of right answers; NAME@auto is a single pattern with the "
        "density that auto used. Attention held: the true share, in tiles of the first prompts that were compared with "
        "dense attention, and how far the planner's own estimate was off there. Times are of one prompt"
    )
    fresh = Results(Figure.begin(TITLE, notes, device), settings)
    return fresh.go_on(path) if resume and path.exists() else fresh


def ask(plan: Plan, decoder: Decoder, prompts: Prompts, results: Results, path: Path) -> None:
    """Ask everything that is missing; the file is written after each batch."""
    try:
        with steps(count_steps(plan, prompts, results)) as step:
            for _ in evaluate(plan, decoder, prompts, results, step):
                results.save(path)
    except torch.OutOfMemoryError as error:
        raise MMCompileError("the device has too little memory for these --tokens; fewer and --resume go on") from error
