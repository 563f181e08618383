"""The layers of a running prefill, one after the other."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from mmcompile.architecture import Architecture
from mmcompile.errors import MMCompileError, OptionError
from mmcompile.passes.decide import Reason
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pattern_search.record import record
from mmcompile.pattern_search.score import LayerAttention
from mmcompile.pictures.palette import modality_name

MOST_SEGMENTS = 8  # that are named one by one


def visit_layers(model: nn.Module, inputs: Mapping[str, Any], visit: Callable[[int, SeenAttention], Tensor]) -> int:
    """Call `visit` with each layer's attention in the text decoder of `model(**inputs)`, and its number among them;
    what it returns is the attention's output. Returns how many there were.

    Raises MMCompileError, with the reasons, where one of them had to stay dense: those behind it would be misnumbered.
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
    refused = dict.fromkeys(
        f"{one.reason}: {one.detail}"
        for one in records
        if one.reason.is_refusal and one.reason is not Reason.NON_CAUSAL  # as vision towers are
    )
    if layer == 0 or (refused and layer < architecture.layers):
        raise MMCompileError(
            f"{layer} of the text decoder's {architecture.layers} attentions can be made sparse "
            f"({'; '.join(refused) or 'no others were found'}); `python -m mmcompile explain` lists them"
        )
    return layer


def seen_layer(model: nn.Module, inputs: Mapping[str, Any], layer: int) -> SeenAttention:
    """The attention of one layer of `model(**inputs)`. Raises OptionError where there is no such layer."""
    found: list[SeenAttention] = []

    def visit(number: int, seen: SeenAttention) -> Tensor:
        if number == layer:
            found.append(seen)
        return LayerAttention(seen).output

    count = visit_layers(model, inputs, visit)
    if not found:
        raise OptionError(f"--layer {layer}: the model has layers 0 to {count - 1}")
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
