"""Prompts for a model with a processor and a chat template: cards among the frames of real videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmcompile.huggingface import ModelError
from mmcompile.needle.cards import cards
from mmcompile.needle.haystack import CARD, NEEDLES
from mmcompile.needle.prompts import SEEDS, Asked, Batch, RealFrames
from mmcompile.needle.vocabulary import COLOURS, NUMBERS, SHAPES

QUESTION = "What number is on the {} card? Answer with the number alone."
HEIGHT = 224  # of a frame, the width by its aspect
TOGETHER = 2  # frames of one card: models that merge frames in pairs see it whole
TRIED = (8, 24)  # frames by which it is found how many tokens one takes


def chat_processor(path: str) -> Any:
    """The processor of a model, or None where it has none that takes videos and chats."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError, KeyError):
        return None
    chats = getattr(processor, "chat_template", None) and hasattr(processor, "tokenizer")
    return processor if chats and hasattr(processor, "video_processor") else None


class ChatPrompts:
    """One question about one video, as the model's chat template puts it; one prompt a batch."""

    tasks: tuple[str, ...] = ("video",)
    questions = 1
    together = False

    def __init__(self, model: Any, processor: Any, background: RealFrames) -> None:
        self._model, self._processor, self._background = model, processor, background
        height, width = background.size()
        self._size = HEIGHT, max(1, round(width * HEIGHT / height))
        still = torch.zeros(TRIED[1], *self._size, 3, dtype=torch.uint8)
        few, many = (self._through(still[:count], "red")["input_ids"].shape[1] for count in TRIED)
        self._of_frame = (many - few) / (TRIED[1] - TRIED[0])
        self._of_text = few - TRIED[0] * self._of_frame

    def batch(self, task: str, tokens: int, wanted: Sequence[tuple[float, int]]) -> Batch:
        """wanted: one."""
        ((depth, seed),) = wanted
        rng = np.random.default_rng((tokens, round(depth * 1e6), SEEDS + seed))
        places = int((tokens - self._of_text) / self._of_frame) // TOGETHER
        if places < 2:
            raise ModelError(f"tokens={tokens}: too few for two cards; a frame takes {self._of_frame:.0f}")
        frames = self._background.frames(places * TOGETHER, *self._size, rng)
        count = min(NEEDLES, places)
        colours, numbers = (rng.permutation(len(words))[:count] for words in (COLOURS, NUMBERS))
        first = round(depth * (places - 1))
        stand = np.concatenate([[first], rng.permutation(np.delete(np.arange(places), first))[: count - 1]])
        shapes = rng.integers(len(SHAPES), size=count)
        drawn = cards(colours, shapes, numbers, *self._size, rng, "cpu")
        frames.unflatten(0, (places, TOGETHER))[torch.as_tensor(stand)] = drawn[:, None]
        inputs = self._through(frames, COLOURS[colours[0]])
        answer = self._processor.tokenizer.encode(NUMBERS[numbers[0]], add_special_tokens=False)
        asked = _append(inputs, answer, depth)
        return Batch(inputs, (asked,))

    def _through(self, frames: Tensor, colour: str) -> dict[str, Tensor]:
        """What the processor makes of frames and the question about a colour."""
        content = [{"type": "video"}, {"type": "text", "text": QUESTION.format(colour)}]
        text = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        made = self._processor(text=[text], videos=[frames.permute(0, 3, 1, 2)], return_tensors="pt")
        inputs = {name: value for name, value in dict(made).items() if isinstance(value, Tensor)}
        return {
            name: value.to(self._model.device, self._model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }


def _append(inputs: dict[str, Tensor], answer: list[int], depth: float) -> Asked:
    """Let the prompt end with all of the answer but its last token, so that each can be asked for."""
    length, more = inputs["input_ids"].shape[1], len(answer) - 1
    ids = inputs["input_ids"].new_tensor([answer[:-1]])
    for name, value in (("input_ids", ids), ("attention_mask", torch.ones_like(ids)), ("mm_token_type_ids", ids * 0)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], value.to(inputs[name].dtype)], 1)
    positions = range(length - 1, length + more)
    return Asked(0, tuple(positions), tuple(answer), depth, CARD)
