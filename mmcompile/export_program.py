"""Export a prefill with its boundaries as inputs: `torch.export`, then the passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from transformers import PreTrainedModel

from mmcompile.architecture import Architecture
from mmcompile.errors import ExportError
from mmcompile.huggingface import first_line
from mmcompile.prefill_module import MOST_TOKENS, PrefillModule, prefill_shapes, require_text, two_batches
from mmcompile.tables import PatternTable
from mmcompile.transform_program import program_options, transform


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    tokens_max: int = MOST_TOKENS,
    cache_length: int | None = None,
    **options: Any,
) -> ExportedProgram:
    """Export a prefill: the program takes any batch, length and number of segments, and its attention is sparse.

    A model of transformers, or its decoder (`model.get_decoder()`), is exported as `PrefillModule`: tensors in, logits
    of the last tokens (or the last hidden state) and the KV cache out. Any other module is exported as it is.

    Args:
        model: in eval mode. Encoders of images and videos are no part of it; `text_prefill` gives what is left.
        args, kwargs: an example call, short (a few hundred tokens). A model of transformers takes keywords alone.
        dynamic_shapes: as `torch.export.export` takes it; by default batch and tokens of the inputs of a prefill are
            free, and for modules that are not transformers' whatever torch.export finds to be.
        tokens_max: the longest prompt that the program takes. A package indexes by 64 bits where that needs it.
        cache_length: the KV cache comes with room for so many tokens, as a StaticCache has it.
        options: as of `transform`, which see for the inputs that are added.

    Raises:
        ExportError: the model cannot be exported; it says what can.
        OptionError, TableError, UnsupportedSitesError: as `transform` does.
    """
    parsed = program_options(options)
    if isinstance(parsed.patterns, PatternTable):
        parsed.patterns.require(Architecture.of(model))
    given = dict(kwargs or {})
    require_text(given)
    if isinstance(model, PreTrainedModel):
        if args:
            raise ExportError("args: a model of transformers is exported by its keyword arguments; pass kwargs alone")
        given = two_batches(given)
        shapes = (
            prefill_shapes(given, min(tokens_max, cache_length or tokens_max))
            if dynamic_shapes is None
            else dynamic_shapes
        )
        program = _export(PrefillModule(model, cache_length), (), given, shapes)
    else:
        if cache_length is not None:
            raise ExportError("cache_length: only a model of transformers has a cache that is known here")
        program = _export(model, args, given, dynamic_shapes)
    return transform(program, **options)


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except GuardOnDataDependentSymNode as error:
        name = type(module.model if isinstance(module, PrefillModule) else module).__name__
        raise ExportError(
            f"{name}: its code depends on data ({first_line(error)}). Of a vision-language model the prefill of its "
            "text can be exported, with encoders left out: mmcompile.text_prefill(model, **inputs) gives it"
        ) from error
