"""A transformers model as a function of tensors, which torch.export takes: a prefill's logits and KV cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mmcompile.errors import ExportError

MOST_BATCHES, MOST_TOKENS = 1024, 2**20  # without an end to them a package would index by 32 bits
# Of each input that a text prefill may have, which dimension is the batch and which the tokens; None where it has none.
# Positions are [B, S], or [3 or 4, B, S] where they are multimodal.
_BATCH_AND_TOKENS = {
    "inputs_embeds": (0, 1),
    "input_ids": (0, 1),
    "attention_mask": (0, 1),
    "position_ids": (-2, -1),
    "token_type_ids": (0, 1),
    "mm_token_type_ids": (0, 1),
    "visual_pos_masks": (0, 1),
}
_FEATURES = ("deepstack_visual_embeds",)  # a list of [N, D]: N is free
_OF_ENCODERS = ("pixel", "image", "video", "input_features", "feature_attention_mask", "second_per_grid")


class PrefillModule(nn.Module):
    """A prefill of a transformers model: tensors in, a dict of tensors out.

    Inputs are the model's own keyword arguments, such as `inputs_embeds` [B, S, D], `position_ids`, `attention_mask`
    [B, S]. Outputs: "logits" [B, 1, V] of the last token of each sequence, or of a model without a head
    "last_hidden_state" [B, S, D]; "keys" and "values", tuples of [B, Hkv, S, D], one a layer, sliding layers whole.

    cache_length: keys and values have room for so many tokens, [B, Hkv, cache_length, D], zeros behind the prompt, as
        a `StaticCache` keeps them. A prompt may not be longer.
    """

    def __init__(self, model: PreTrainedModel, cache_length: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.cache_length = cache_length
        names = inspect.signature(model.forward).parameters
        self._settings = {"logits_to_keep": 1} if "logits_to_keep" in names else {}

    def forward(
        self,
        *,
        inputs_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        visual_pos_masks: Tensor | None = None,
        deepstack_visual_embeds: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        # Named one by one: torch.export does not know the names below a `**`.
        known: dict[str, Any] = {
            "inputs_embeds": inputs_embeds,
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "mm_token_type_ids": mm_token_type_ids,
            "visual_pos_masks": visual_pos_masks,
            "deepstack_visual_embeds": deepstack_visual_embeds,
        }
        inputs = {name: value for name, value in known.items() if value is not None}
        # One made from the config would cut the keys of sliding layers, at a place that depends on the length.
        cache = Cache(layer_class_to_replicate=DynamicLayer)
        # The model itself, also where `mmcompile.compile` has put compiled code in its place.
        output = self.model._call_impl(**inputs, **self._settings, past_key_values=cache, use_cache=True)
        name = "logits" if getattr(output, "logits", None) is not None else "last_hidden_state"
        layers: list[Any] = cache.layers
        return {
            name: output[name],
            "keys": tuple(self._with_room(layer.keys) for layer in layers),
            "values": tuple(self._with_room(layer.values) for layer in layers),
        }

    def _with_room(self, cached: Tensor) -> Tensor:
        if self.cache_length is None:
            return cached
        return nn.functional.pad(cached, (0, 0, 0, self.cache_length - cached.shape[2]))


def require_text(kwargs: Mapping[str, Any]) -> None:
    """Raise ExportError for inputs of encoders, whose code depends on data: it says what can be exported."""
    pixels = [name for name, value in kwargs.items() if value is not None and name.startswith(_OF_ENCODERS)]
    if pixels:
        raise ExportError(
            f"{', '.join(pixels)}: encoders of images and videos depend on data, and cannot be exported with the rest. "
            "The text prefill can: run the encoders as they are, and export it with the embeddings that they fill, as "
            "mmcompile.text_prefill(model, **inputs) gives them; or pass inputs_embeds, position_ids and "
            "attention_mask yourself"
        )


def two_batches(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Example inputs with a batch of at least 2: a tracer takes a size of 1 for fixed."""
    sizes = {value.shape[_dims(name, value)[0]] for name, value in kwargs.items() if _is_by_token(name, value)}
    if sizes != {1}:
        return dict(kwargs)
    return {
        name: torch.cat([value, value], _dims(name, value)[0])
        if _is_by_token(name, value)
        else [torch.cat([one, one]) for one in value]
        if name in _FEATURES
        else value
        for name, value in kwargs.items()
    }


def prefill_shapes(kwargs: Mapping[str, Any], tokens_max: int = MOST_TOKENS) -> dict[str, Any]:
    """`dynamic_shapes` of a prefill: batch and tokens are free, tokens from 2 to `tokens_max`; heads are fixed.

    Raises ExportError for an input that is not known, whose dimensions the caller has to name.
    """
    batch = Dim("batch", min=1, max=MOST_BATCHES)
    tokens: Any = Dim.AUTO(min=2, max=tokens_max)
    shapes: dict[str, Any] = {}
    for name, value in kwargs.items():
        if _is_by_token(name, value):
            first, second = _dims(name, value)
            shapes[name] = {first: batch, second: tokens}
        elif name in _FEATURES:
            shapes[name] = [{0: Dim.AUTO} for _ in value]
        elif isinstance(value, Tensor):
            raise ExportError(
                f"{name}: which of its dimensions are the batch and the tokens is not known here; pass dynamic_shapes"
            )
        else:
            shapes[name] = None
    return shapes


def _is_by_token(name: str, value: Any) -> bool:
    return name in _BATCH_AND_TOKENS and isinstance(value, Tensor)


def _dims(name: str, value: Tensor) -> tuple[int, int]:
    batch, tokens = _BATCH_AND_TOKENS[name]
    return batch % value.dim(), tokens % value.dim()
