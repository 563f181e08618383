"""The layers of a running prefill, one after the other."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from mmcompile.architecture import Architecture
from mmcompile.errors import MMCompileError, OptionError
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pattern_search.record import record
from mmcompile.pattern_search.score import LayerAttention
from mmcompile.pictures.palette import modality_name

MOST_SEGMENTS = 8  # that are named one by one


def visit_layers(model: nn.Module, inputs: Mapping[str, Any], visit: Callable[[int, SeenAttention], Tensor]) -> None:
    """Call `visit` with each layer of the text decoder of `model(**inputs)` and its number; it returns the output.

    Raises MMCompileError, with the reasons, where no attention of it could be made sparse.
    """
    architecture = architecture_of(model)
    layer = 0

    def next_layer(seen: SeenAttention) -> Tensor:
        nonlocal layer
        geometry = (seen.query.shape[1], seen.key.shape[1], seen.query.shape[3])
        if geometry != (architecture.heads, architecture.kv_heads, architecture.head_dim):
            return LayerAttention(seen).output  # a model may have another causal stack besides
        output = visit(layer, seen)
        layer += 1
        return output

    records = record(model, inputs, next_layer)
    if layer == 0:
        reasons = dict.fromkeys(f"{one.reason}: {one.detail}" for one in records if one.reason.is_refusal)
        raise MMCompileError(f"no attention of the text decoder could be made sparse ({'; '.join(reasons) or 'none'})")


class _Enough(Exception):
    """The layer was seen."""


def seen_layer(model: nn.Module, inputs: Mapping[str, Any], layer: int) -> SeenAttention:
    """One layer of `model(**inputs)`; the prefill ends there. Raises OptionError where there is no such layer."""
    count = architecture_of(model).layers
    if layer >= count:
        raise OptionError(f"--layer {layer}: the model has layers 0 to {count - 1}")
    found: list[SeenAttention] = []

    def visit(number: int, seen: SeenAttention) -> Tensor:
        if number == layer:
            found.append(seen)
            raise _Enough
        return LayerAttention(seen).output

    with suppress(_Enough):
        visit_layers(model, inputs, visit)
    if not found:
        raise OptionError(f"--layer {layer}: that attention stays dense; `python -m mmcompile explain` says why")
    return found[0]


def architecture_of(model: nn.Module) -> Architecture:
    """The model's text decoder. Raises MMCompileError where its config tells none."""
    architecture = Architecture.of(model)
    if architecture is None:
        raise MMCompileError(f"{type(model).__name__}: its config tells no text decoder with layers and heads")
    return architecture


def describe_sample(seen: SeenAttention) -> str:
    """The tokens of an attention's first sequence and its segments, in words."""
    tokens = seen.query.shape[2]
    offsets, modality, grid = (tensor.tolist() for tensor in seen.boundaries)
    told = []
    for (start, end), kind, sizes in zip(pairwise(offsets), modality, grid, strict=True):
        length = min(end, tokens) - start
        if length > 0:
            shape = f" ({' x '.join(map(str, sizes))})" if all(sizes) else ""
            told.append(f"{modality_name(kind)} {length}{shape}")
    rest = f", and {len(told) - MOST_SEGMENTS} segments more" if len(told) > MOST_SEGMENTS else ""
    return f"{tokens} tokens: {', '.join(told[:MOST_SEGMENTS])}{rest}"
