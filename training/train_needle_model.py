"""Train the model of `python -m mmcompile needle` from nothing, in minutes on one GPU.

    python training/train_needle_model.py --out examples/needle_model --minutes 5

Prompts grow from two frames to 64K tokens, half of them with a quarter of text. Several questions follow each prompt,
and the loss is on their answers; while prompts are short, the vision tower also learns to name what a card shows.
A phase ends when answers are right, or on the clock, so that the seed fixes the first weights and the order of the
data, and the number of steps depends on the machine. Written to the folder: model, tokenizer, preprocessing, and
`training.json`, the loss and the recall on the way.
"""

import argparse
import copy
import itertools
import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from mmcompile.needle.haystack import CARD, TASKS, Haystack, plan
from mmcompile.needle.layout import Layout
from mmcompile.needle.model import needle_config, preprocessing
from mmcompile.needle.task import draw, pixel_values
from mmcompile.needle.vocabulary import COLOURS, NUMBERS, WORD_NUMBER, word_tokenizer
from mmcompile.vision_attention import pack_vision_attention

DEPTHS = [depth / 10 for depth in range(11)]
MIXED_FROM = 352  # tokens: shorter prompts have no room for text


@dataclass(frozen=True)
class Phase:
    """A part of the training, over once answers are right, at `until` of the time at the latest.

    lengths: of prompts, in tokens; a step takes any of them alike. step_tokens: of a step, at least one prompt.
    needles: the most in a prompt. see: whether the vision tower is trained.
    """

    until: float
    lengths: tuple[int, ...]
    step_tokens: int
    needles: int
    see: bool


PHASES = (
    Phase(0.20, (96, 136, 208, 352), 16384, 4, True),
    Phase(0.45, (208, 352, 512, 768), 24576, 8, True),
    Phase(0.60, (352, 512, 1024, 2048, 4096), 32768, 8, True),
    Phase(0.75, (512, 2048, 4096, 8192, 16384), 65536, 8, True),
    Phase(1.00, (1024, 4096, 8192, 16384, 32768, 65536), 131072, 8, False),
)
RIGHT = 0.97  # share of answers, over `EVERY` steps, that ends a phase before its time
PEAK_RATE, WARM_UP, DECAY_FROM = 1.5e-3, 0.02, 0.5  # fractions of the time
NAMING = 0.5  # weight of the loss on what a card shows
EVERY = 50  # steps of a point of the curve


def phases_within(longest: int, step_tokens: int) -> list[Phase]:
    """The phases, without prompts of more than `longest` tokens, in steps of no more than `step_tokens`."""
    phases = []
    for phase in PHASES:
        lengths = tuple(length for length in phase.lengths if length <= longest) or (longest,)
        phases.append(replace(phase, lengths=lengths, step_tokens=min(step_tokens, phase.step_tokens)))
    return phases


def learning_rate(progress: float) -> float:
    """Rises, stays, and falls in a line to nothing."""
    return PEAK_RATE * min(1.0, progress / WARM_UP, (1 - progress) / (1 - DECAY_FROM))


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


class Batches:
    """Batches made ahead in other processes."""

    def __init__(self, layout: Layout, workers: int, seed: int) -> None:
        self.layout, self.seed, self.step = layout, seed, 0
        self.pool: Executor = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))
        self.ahead: deque[Future[Batch]] = deque()
        self.most = 2 * workers

    def prepare(self, phase: Phase) -> None:
        """Order batches of `phase`, to be had after those already ordered."""
        while len(self.ahead) < self.most:
            prompts = training_prompts(phase, self.step, self.seed)
            self.ahead.append(self.pool.submit(make_batch, self.layout, prompts))
            self.step += 1

    def next(self, phase: Phase) -> Batch:
        """The batch ordered first."""
        self.prepare(phase)
        return self.ahead.popleft().result()

    def ask(self, prompts: list[list[dict[str, Any]]]) -> Iterator[Batch]:
        """Batches of the caller's own prompts."""
        yield from self.pool.map(make_batch, [self.layout] * len(prompts), prompts)


class Reader:
    """The model on batches: hidden states where answers are due."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, layout: Layout, seed: int) -> None:
        self.model, self.layout = model, layout
        self.device, self.dtype = model.device, model.dtype
        self.rng = np.random.default_rng(seed)
        words = layout.words.encode(np.array([WORD_NUMBER[COLOURS[0]], WORD_NUMBER[NUMBERS[0]]]))
        self.first_colour, self.first_number = words.tolist()

    def answers(self, batch: Batch, *, see: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[questions, vocabulary]` where answers are due, the answers' ids, and the loss of naming cards."""
        features = self._look(batch, see=see)
        language = self.model.model.language_model
        ids = torch.as_tensor(batch.ids, device=self.device)
        embedded = language.embed_tokens(ids)
        embedded = embedded.masked_scatter((ids == self.layout.video)[..., None], features)
        positions = torch.as_tensor(batch.positions, device=self.device)
        hidden = language(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        row, position, answer = torch.as_tensor(batch.questions, device=self.device).T
        naming = self._naming_loss(features, batch) if see else features.new_zeros(())
        return self.model.lm_head(hidden[row, position]).float(), answer, naming

    def _look(self, batch: Batch, *, see: bool) -> Tensor:
        """The vision tower's tokens of all prompts, `[tokens, hidden]`."""
        frames = draw(batch.haystacks, self.layout, self.rng, self.device)
        patches = pixel_values(frames, self.layout).to(self.dtype)
        grid = self.layout.grid([len(frames) // self.layout.temporal_patch_size])
        with torch.set_grad_enabled(see and torch.is_grad_enabled()):
            grid_thw = torch.as_tensor(grid, device=self.device)
            return self.model.model.visual(patches, grid_thw=grid_thw).pooler_output

    def _naming_loss(self, features: Tensor, batch: Batch) -> Tensor:
        """Every token of a card, read by the output embeddings, shall name the card's number and its colour."""
        first, cards = 0, []
        for haystack in batch.haystacks:
            cards += [(first + one.frame, one.colour, one.number) for one in haystack.needles if one.modality == CARD]
            first += sum(haystack.clips)
        frame, colour, number = torch.tensor(cards, device=self.device).T
        tokens = features.unflatten(0, (-1, self.layout.frame_tokens))[frame]  # [cards, frame tokens, hidden]
        logits = self.model.lm_head(F.rms_norm(tokens, tokens.shape[-1:])).float().transpose(1, 2)
        seen = tokens.shape[1]
        colours = logits[:, self.first_colour : self.first_colour + len(COLOURS)]
        numbers = logits[:, self.first_number : self.first_number + len(NUMBERS)]
        return F.cross_entropy(colours, colour[:, None].expand(-1, seen)) + F.cross_entropy(
            numbers, number[:, None].expand(-1, seen)
        )


class MasterWeights:
    """AdamW on float32 copies of a model's weights, so that the model itself is what will be kept: bfloat16."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = list(model.parameters())
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        groups = [
            {"params": [one for one in self.masters if one.dim() > 1], "weight_decay": 0.02},
            {"params": [one for one in self.masters if one.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=self.masters[0].is_cuda)

    def step(self, rate: float) -> bool:
        """Apply the gradients, clipped to norm 1; False where they are not finite, and nothing was done."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        if not torch.isfinite(norm):
            return False
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return True


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
    batches.prepare(phases[0])  # before CUDA begins: its processes are forked
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
            logits, answer, naming = reader.answers(batches.next(phase), see=phase.see)
            loss = F.cross_entropy(logits, answer)
            (loss + NAMING * naming).backward()
            done = weights.step(learning_rate(progress))
            step += 1
            spent += time.perf_counter() - begin
            measured = (loss, naming, (logits.argmax(-1) == answer).float().mean())
            bar.update(row, completed=progress, description=log.add(step, spent, phase.lengths[-1], measured, done))
            if len(phases) > 1 and (progress >= phase.until or log.learned(step)):
                phases.pop(0)
                for task in TASKS[: 2 if phase.lengths[-1] >= MIXED_FROM else 1]:
                    log.add_recall(
                        spent, task, phase.lengths[-1], 4, recall(reader, batches, task, phase.lengths[-1], 4)
                    )
    console.print(f"{step} steps in {spent:.0f} s; {log.last()}", highlight=False, soft_wrap=True)
    model.set_attn_implementation("sdpa")
    save(model, tokenizer, out)
    log.write(out / "training.json")
    pack_vision_attention(model)
    for tokens, task in itertools.product(evaluate, TASKS):
        log.add_recall(spent, task, tokens, samples, recall(reader, batches, task, tokens, samples))
        log.write(out / "training.json")
    return log


def save(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Any, out: Path) -> None:
    """Write the model in bfloat16 with all that it travels with."""
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessing(), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its log")
    parser.add_argument("--minutes", type=float, default=5, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--longest", type=int, default=65536, help="prompt to train on, in tokens")
    parser.add_argument("--step-tokens", type=int, default=131072, help="the most in a step; few for a try on a CPU")
    parser.add_argument("--samples", type=int, default=8, help="a depth, of the measurement at the end")
    parser.add_argument("--evaluate", default="1024,4096,8192,16384,32768,65536", help="lengths to measure at the end")
    given = vars(parser.parse_args())
    given["evaluate"] = [int(tokens) for tokens in given["evaluate"].split(",") if tokens]
    train(given.pop("out"), **given)


if __name__ == "__main__":
    main()
