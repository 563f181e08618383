"""The training itself: the steps, the recall on the way and at the end, and what is written."""

import copy
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from mmcompile.needle.haystack import TASKS
from mmcompile.needle.layout import Layout
from mmcompile.needle.model import needle_config, preprocessing
from mmcompile.needle.training.batches import Batches
from mmcompile.needle.training.log import Log
from mmcompile.needle.training.master_weights import MasterWeights
from mmcompile.needle.training.reader import Reader
from mmcompile.needle.training.schedule import MIXED_FROM, Phase, learning_rate, phases_within
from mmcompile.needle.vocabulary import word_tokenizer
from mmcompile.vision_attention import pack_vision_attention

DEPTHS = [depth / 10 for depth in range(11)]
NAMING = 0.5  # weight of the loss on what a card shows


@torch.no_grad()
def recall(reader: Reader, batches: Batches, task: str, tokens: int, samples: int) -> list[float]:
    """The share of single questions answered right at each of 11 depths, over `samples` prompts a depth."""
    rows = max(1, 131072 // tokens)
    prompts = [
        {"task": task, "tokens": tokens, "depth": depth, "seed": (batches.seed, 10**9, tokens, place, number)}
        for place, depth in enumerate(DEPTHS)
        for number in range(samples)
    ]
    right: list[Tensor] = []
    for batch in batches.ask([prompts[start : start + rows] for start in range(0, len(prompts), rows)]):
        logits, answer, _ = reader.answers(batch, see=False)
        right.append(logits.argmax(-1) == answer)
    return torch.cat(right).float().view(len(DEPTHS), samples).mean(1).tolist()


def train(
    out: Path,
    *,
    minutes: float,
    seed: int,
    device: str,
    workers: int,
    longest: int,
    step_tokens: int,
    samples: int,
    evaluate: list[int],
) -> Log:
    """Train, measure recall on the way and at the end, and write the model and its log to `out`.

    Args:
        minutes: of training; reading and writing, and measuring recall, come on top of it.
        seed: of the weights and the data.
        device: "cuda" or "cpu"; weights are bfloat16 on a GPU, float32 elsewhere.
        workers: processes that lay prompts out.
        longest: prompt, in tokens, to train on.
        step_tokens: the most in a step, but for prompts that are longer.
        samples: a depth, of the measurement at the end.
        evaluate: lengths to measure there.
    """
    config, tokenizer = needle_config(), word_tokenizer()
    layout, phases = Layout.of(config, tokenizer), phases_within(longest, step_tokens)
    batches = Batches(layout, workers, seed)
    batches.prepare(next(phase for phase in phases if phase.lengths))  # before CUDA begins: processes are forked
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = Qwen2_5_VLForConditionalGeneration(config).to(device, dtype)
    pack_vision_attention(model)
    reader, weights = Reader(model, layout, seed), MasterWeights(model)
    console = Console()
    log = Log({"minutes": minutes, "seed": seed, "longest": longest, "parameters": model.num_parameters()}, console)
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    step, spent = 0, 0.0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task("", total=1.0)
        while (progress := spent / (60 * minutes)) < 1:
            begin = time.perf_counter()
            phase = phases[0]
            loss, naming, right = _losses(reader, batches, phase)
            (loss + NAMING * naming).backward()
            done = weights.step(learning_rate(progress))
            step += 1
            spent += time.perf_counter() - begin
            longest_now = max(phase.lengths, default=0)
            text = log.add(step, spent, longest_now, (loss, naming, right), done)
            bar.update(row, completed=progress, description=text)
            if len(phases) > 1 and (progress >= phase.until or log.learned(step)):
                phases.pop(0)
                console.print(f"{spent:.1f} s, waited {batches.waited:.1f} s for batches; {text}", soft_wrap=True)
                if phase.lengths:
                    batches.drop()
                    batches.prepare(phases[0])
                for task in TASKS[: (longest_now > 0) + (longest_now >= MIXED_FROM)]:
                    log.add_recall(spent, task, longest_now, 4, recall(reader, batches, task, longest_now, 4))
    console.print(f"{step} steps in {spent:.0f} s; {log.last()}", highlight=False, soft_wrap=True)
    model.set_attn_implementation("sdpa")
    save(model, tokenizer, out)
    log.write(out / "training.json")
    pack_vision_attention(model)
    for tokens, task in itertools.product(evaluate, TASKS):
        log.add_recall(spent, task, tokens, samples, recall(reader, batches, task, tokens, samples))
        log.write(out / "training.json")
    return log


def _losses(reader: Reader, batches: Batches, phase: Phase) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of a step, on answers and on what frames show, and the share of right answers."""
    if not phase.lengths:
        naming, right = reader.name_cards(phase.step_tokens // reader.layout.frame_tokens)
        return torch.zeros_like(naming), naming, right
    logits, answer, naming = reader.answers(batches.next(phase), see=phase.see)
    return F.cross_entropy(logits, answer), naming, (logits.argmax(-1) == answer).float().mean()


def save(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Any, out: Path) -> None:
    """Write the model in bfloat16 with all that it travels with."""
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessing(), indent=2) + "\n")
