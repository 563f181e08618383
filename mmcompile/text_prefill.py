"""The part of a vision-language model that can be exported, and what one call gives it: encoders run before."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmcompile.errors import ExportError

_OF_DECODER = ("visual_pos_masks", "deepstack_visual_embeds")  # no parent takes them


class TextPrefill(NamedTuple):
    """module: the model, called without pixels, or its decoder. kwargs: what it is called with; tensors."""

    module: PreTrainedModel
    kwargs: dict[str, Any]


def text_prefill(model: PreTrainedModel, **inputs: Any) -> TextPrefill:
    """What is left of a call after the encoders of images and videos: `export(*...)` takes it, and so does the program.

    Runs the model's forward up to its decoder, under no_grad: embeddings with features in their places, positions, and
    whatever else the decoder is given. The module is the model itself, which gives logits, except where features go
    into the decoder's layers too (Qwen3-VL): there it is the decoder.

    model: of transformers. inputs: keyword arguments of its forward, as its processor makes them.
    Raises ExportError for a model without a decoder of its own.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None:
        raise ExportError(f"{type(model).__name__} has no get_decoder(): what can be exported of it is not known")
    given = _given(model, decoder, inputs)
    by_decoder = {name: given[name] for name in _OF_DECODER if given.get(name) is not None}
    own: PreTrainedModel = decoder if by_decoder else model
    passed = {name: inputs.get(name) for name in ("attention_mask", "token_type_ids")}
    if not isinstance(given.get("attention_mask"), dict):  # else it is made by the parent, of the types
        passed.pop("token_type_ids")
    embeds, positions = given["inputs_embeds"], given.get("position_ids")
    if positions is None and _is_multimodal(model):  # a prompt of text alone; its program must take a video's too
        positions = torch.arange(embeds.shape[1], device=embeds.device).repeat(3, len(embeds), 1)
    kwargs = {"inputs_embeds": embeds, "position_ids": positions} | passed | by_decoder
    return TextPrefill(own, {name: value for name, value in kwargs.items() if isinstance(value, Tensor | list)})


def _is_multimodal(model: PreTrainedModel) -> bool:
    """Whether rotary positions are [3, B, S]: time, row and column."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return "mrope_section" in rope


def _given(model: PreTrainedModel, decoder: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        given.update(kwargs)
        raise _Reached

    hook = decoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model.forward(**inputs, use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    if not isinstance(given.get("inputs_embeds"), Tensor):
        given["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    return given


class _Reached(Exception):
    """The decoder is about to run."""
