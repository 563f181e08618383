"""One layer's queries, keys and values, and no more of the prefill than that takes."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from mmcompile.errors import OptionError
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pattern_search.record import record
from mmcompile.pattern_search.score import LayerAttention


class _Enough(Exception):
    """The layer was seen."""


def seen_layer(model: nn.Module, inputs: Mapping[str, Any], layer: int) -> SeenAttention:
    """The causal attention of `model(**inputs)` that runs after `layer` others.

    Raises OptionError where there are no more.
    """
    earlier = 0
    found: list[SeenAttention] = []

    def visit(seen: SeenAttention) -> Tensor:
        nonlocal earlier
        if earlier == layer:
            found.append(seen)
            raise _Enough
        earlier += 1
        return LayerAttention(seen).output

    with suppress(_Enough):
        record(model, inputs, visit)
    if not found:
        raise OptionError(f"--layer {layer}: this prefill has {earlier} causal attentions, counted from 0")
    return found[0]
