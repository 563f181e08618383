"""What comes before each prefill of a compiled model: encoders, positions and boundaries, and how Dynamo traces."""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from mmcompile.caches import fetching_in_order, is_offloaded, prefilled
from mmcompile.check_bound import warn_of_arrived
from mmcompile.encode_first import EncodeFirst, encodes_first, without_checks
from mmcompile.input_boundaries import boundary_tensors_of
from mmcompile.modality import bind, bound_boundaries
from mmcompile.prefill import forget_stats, prefilling

log = logging.getLogger(__name__)

# Prefill and decode, with and without padding, cache, beams and chunks are graphs of their own; past torch's limit of 8
# all of them would run uncompiled, and with a mask of queries x keys.
_MOST_GRAPHS = 64


def with_prefill_steps(model: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled call, with what comes before a prefill; decode steps go straight to it."""
    config = getattr(model, "config", None)
    signature = inspect.signature(model.forward)
    encode = EncodeFirst(model) if encodes_first(model) else None

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return compiled(*args, **kwargs)
        inputs = by_name(signature, args, kwargs)
        if inputs is None:
            return model._call_impl(*args, **kwargs)
        cache = inputs.get("past_key_values")
        if is_decode_step(inputs):
            warn_of_arrived()
            if is_offloaded(cache):
                with fetching_in_order(cache):
                    return model._call_impl(*args, **kwargs)
            with tracing():
                return compiled(*args, **kwargs)
        forget_stats(model)
        fits = None
        if encode is not None:
            args, (kwargs, fits) = (), encode(inputs)
            inputs |= {name: kwargs.get(name) for name in ("position_ids", "mm_encoder_outputs")}
        if fits is False:
            log.warning("placeholder tokens and features differ in number: this call runs uncompiled")
            return model._call_impl(**kwargs)
        boundaries = boundary_tensors_of(config, inputs) if bound_boundaries() is None else None
        bound = nullcontext() if boundaries is None else bind(boundaries)
        positions = encode is None and inputs.get("position_ids") is None
        with tracing(checks=not fits, positions=positions), bound, prefilling(), prefilled(cache):
            return compiled(*args, **kwargs)

    return call


@contextmanager
def tracing(*, checks: bool = True, positions: bool = False) -> Iterator[None]:
    """How Dynamo traces inside the `with` block.

    checks: with transformers' checks of features against placeholders. positions: the forward may make multimodal
    rotary positions, where the graph has to break.
    """
    config: Any = torch._dynamo.config
    settings: dict[str, Any] = {"recompile_limit": max(config.recompile_limit, _MOST_GRAPHS)}
    if not positions:
        # Decoders that add features at the placeholders of some layers index by a mask (Qwen3-VL's deepstack): each
        # such layer would break the graph.
        settings["capture_dynamic_output_shape_ops"] = True
    with config.patch(settings | ({} if checks else without_checks())):
        yield


def by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """A call's arguments by their names; None where they do not fit, which the call itself says best."""
    try:
        inputs = dict(signature.bind_partial(*args, **kwargs).arguments)
    except TypeError:
        return None
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            inputs |= inputs.pop(parameter.name, {})
    return inputs


def is_decode_step(inputs: Mapping[str, Any]) -> bool:
    """One token a sequence: attention stays dense, and what precedes a prefill would cost time at every token."""
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs.get("inputs_embeds")
    return isinstance(tokens, torch.Tensor) and tokens.dim() >= 2 and tokens.shape[1] == 1
