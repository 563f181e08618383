"""Compile a model in place, with the boundaries of every call taken from its own inputs."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmcompile.input_boundaries import boundary_tensors_of
from mmcompile.modality import bind, bound_boundaries
from mmcompile.options import Options


def compile(model: nn.Module, **options: Any) -> nn.Module:
    """Compile `model` in place with the "mminference" backend and return it.

    Does what `model.compile(backend="mminference", options=options)` does, and besides reads each call's
    modality boundaries from its inputs (`mm_token_type_ids`, or `input_ids` and the config's placeholder ids,
    or multimodal `position_ids`, with the grids of images and videos). Boundaries given through `bind` come
    first. `model.generate(...)` prefills through it.

    Raises OptionError at once for an option that is unknown or out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}: must be a torch.nn.Module")
    model.compile(backend="mminference", options=dict(vars(Options.parse(options))))
    compiled: Callable[..., Any] = model._compiled_call_impl  # type: ignore[assignment]  # set by the line above
    config = getattr(model, "config", None)
    signature = inspect.signature(model.forward)

    @functools.wraps(compiled)
    def call_with_boundaries(*args: Any, **kwargs: Any) -> Any:
        if bound_boundaries() is not None:
            return compiled(*args, **kwargs)
        inputs = signature.bind_partial(*args, **kwargs).arguments
        inputs |= inputs.pop("kwargs", {})
        if _is_decode_step(inputs):
            return compiled(*args, **kwargs)
        boundaries = boundary_tensors_of(config, inputs)
        if boundaries is None:
            return compiled(*args, **kwargs)
        with bind(boundaries):
            return compiled(*args, **kwargs)

    model._compiled_call_impl = call_with_boundaries
    return model


def _is_decode_step(inputs: dict[str, Any]) -> bool:
    """One token a sequence: attention stays dense, and reading boundaries would cost time at every token."""
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs.get("inputs_embeds")
    return isinstance(tokens, torch.Tensor) and tokens.dim() >= 2 and tokens.shape[1] == 1
