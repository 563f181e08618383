"""The text decoder of a model on its own, so that every method sees one and the same prompt, encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mmcompile
from mmcompile.huggingface import ModelError
from mmcompile.input_boundaries import BoundaryTensors, boundary_tensors_of
from mmcompile.modality import bind
from mmcompile.needle.prompts import Asked
from mmcompile.prefill import SiteStats, forget_stats, stats
from mmcompile.vision_attention import pack_vision_attention
from mmcompile.watch import decoder_of

ATTENTION = "mmcompile_needle"  # the name under which transformers knows the method that runs


class _Seen(Exception):
    """What the decoder was called with: the rest of the model need not run."""


@dataclass(frozen=True)
class Encoded:
    """What the decoder is called with, and the boundaries of its tokens."""

    arguments: dict[str, Any]
    boundaries: BoundaryTensors | None


class Decoder:
    """Runs a model's decoder under one method after another.

    In eager mode, by transformers' `attn_implementation`: the ops are those of a compiled graph, and nothing waits for
    a compiler where a dozen methods meet a dozen lengths. Raises ModelError for a model that has no decoder of its own.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._decoder: Any = decoder_of(model)
        if self._decoder is model or model.get_output_embeddings() is None:
            raise ModelError(f"{type(model).__name__}: has no text decoder with a head that could be run by themselves")
        self._head: nn.Module = model.get_output_embeddings()
        pack_vision_attention(model)

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Any]) -> Encoded:
        """Run what comes before the decoder: towers, projectors, positions."""

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Seen(args, kwargs)

        hook = self._decoder.register_forward_pre_hook(see, with_kwargs=True)
        try:
            self.model(**inputs, use_cache=False)
        except _Seen as seen:
            args, kwargs = seen.args
        else:
            raise ModelError(f"{type(self.model).__name__}: its forward does not call its decoder")
        finally:
            hook.remove()
        if args:
            raise ModelError(f"{type(self.model).__name__}: calls its decoder with arguments without a name")
        kwargs |= {"use_cache": False, "past_key_values": None}
        return Encoded(kwargs, boundary_tensors_of(self.model.config, inputs))

    def use(self, options: Mapping[str, Any] | None) -> None:
        """Attend so from now on: options of `register_attention`, or None for torch's dense attention."""
        if options is None:
            self._decoder.set_attn_implementation("sdpa")
            return
        mmcompile.register_attention(ATTENTION, min_tokens=0, **options)
        self._decoder.set_attn_implementation(ATTENTION)

    @torch.no_grad()
    def run(self, encoded: Encoded) -> Tensor:
        """The hidden states of every token, [B, S, hidden]."""
        forget_stats(self.model)
        with nullcontext() if encoded.boundaries is None else bind(encoded.boundaries):
            hidden: Tensor = self._decoder(**encoded.arguments)[0]
        return hidden

    @torch.no_grad()
    def log_probabilities(self, hidden: Tensor, asked: Sequence[Asked]) -> Tensor:
        """Of every token of the vocabulary after each position that is asked for, float32 [positions, vocabulary]."""
        places = [(one.row, position) for one in asked for position in one.positions]
        row, position = torch.tensor(places, device=hidden.device).T
        return torch.log_softmax(self._head(hidden[row, position]).float(), -1)

    def stats(self) -> list[SiteStats]:
        """Of the last run. Raises ModelError where an attention stayed dense, saying why."""
        found = stats(self.model)
        why = next((site.dense for site in found if site.dense), "" if found else "no attention of ours ran")
        if why:
            raise ModelError(f"{type(self.model).__name__}: its attention cannot be sparse here: {why}")
        return found
