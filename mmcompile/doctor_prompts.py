"""Prompts for a model that nobody has described: from its own processor, or else of text alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmcompile.doctor import Prompts
from mmcompile.huggingface import Text, prompts

# Words of text; some tiles of 128, so that a wrong tile shows.
LENGTHS = (170, 300, 410)
PADDED = (160, 120)
PIXELS = 112  # side of the picture

WORDS = ("a", "the", "red", "small", "house", "stands", "near", "river", "and", "light", "falls", "over", "it", "now")


@dataclass(frozen=True)
class Made:
    """Prompts, and in one line what they hold and why."""

    prompts: Prompts
    told: str


def make_prompts(model: Any, path: str) -> Made:
    """Prompts for `model`, on its device and in its dtype: a picture and text where the processor at `path` makes them.

    path: where the model's processor is: a folder, or a name on a model hub. Whatever keeps it from being loaded or
    from taking a picture is told, and the prompts are then of text alone.
    """
    try:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(path)
        first, longer, longest = (_through(processor, model, [count]) for count in LENGTHS)
        padded = _through(processor, model, PADDED)
        return Made(Prompts(first, longer, longest, padded), "a picture and text, by the model's processor")
    except Exception as error:  # processors fail in as many ways as there are processors, and none is fatal
        why = (str(error).strip().splitlines() or [""])[0]
        first, longer, longest = (prompts(model, [[Text(count)]]) for count in LENGTHS)
        padded = prompts(model, [[Text(count)] for count in PADDED])
        told = f"text alone: the processor could not be used ({type(error).__name__}: {why})"
        return Made(Prompts(first, longer, longest, padded), told)


def _through(processor: Any, model: Any, counts: Sequence[int]) -> dict[str, Any]:
    """The processor's output for prompts of a picture and so many words each, padded on the left."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (PIXELS, PIXELS, 3), generator=generator, dtype=torch.uint8).numpy()
    picture = Image.fromarray(pixels)
    texts = [" ".join(WORDS[i % len(WORDS)] for i in range(count)) for count in counts]
    settings = {"return_tensors": "pt", "padding": True}
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    if getattr(processor, "chat_template", None):
        content = [[{"type": "image", "image": picture}, {"type": "text", "text": text}] for text in texts]
        chats = [[{"role": "user", "content": parts}] for parts in content]
        made = processor.apply_chat_template(
            chats, tokenize=True, add_generation_prompt=True, return_dict=True, processor_kwargs=settings
        )
    else:
        marked = [f"{processor.image_token} {text}" for text in texts]
        made = processor(images=[[picture] for _ in texts], text=marked, **settings)
    inputs = dict(made)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            dtype = model.dtype if value.is_floating_point() else None
            inputs[name] = value.to(device=model.device, dtype=dtype)
    return inputs
