"""Which ids are sure to fit 32 bits, the width that the kernels compare ids in."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

import sympy
import torch
from torch import fx

from mmcompile.passes.graph import fake_value
from mmcompile.passes.index_expressions import LONGEST_DIMENSION, Element, Select, Shifted
from mmcompile.passes.node_operations import operation

_LARGEST = 2**31 - 1
_DEPTH = 16

_CASTS = ("to", "_to_copy", "long", "int", "contiguous", "clone", "detach", "alias")
_VIEWS = ("view", "reshape", "flatten", "expand", "unsqueeze", "squeeze", "transpose", "permute")
_PICKS = ("slice", "select", "getitem", "index")


def fits_int32(identity: sympy.Expr, tensors: Mapping[str, fx.Node]) -> bool:
    """Whether every value of an expression of ids fits int32, whatever the graph's inputs hold."""
    if isinstance(identity, Element):
        return _reach(tensors[identity.args[0].name], _DEPTH) <= _LARGEST
    if isinstance(identity, Select):
        return all(fits_int32(side, tensors) for side in identity.args[1:])
    return not identity.has(Element, Shifted)  # positions and constants


def _reach(argument: Any, depth: int) -> float:
    """The largest magnitude among an integer argument's values; infinite where 64-bit inputs decide it."""
    if isinstance(argument, int):
        return abs(argument)
    value = fake_value(argument) if isinstance(argument, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex() or depth == 0:
        return inf
    if value.dtype != torch.int64:
        return 1 if value.dtype == torch.bool else torch.iinfo(value.dtype).max
    if argument.op not in ("call_function", "call_method"):
        return inf
    name, sources = operation(argument), argument.args
    if name == "cumsum":
        return LONGEST_DIMENSION * _reach(sources[0], depth - 1)
    if name in ("where", "masked_fill"):
        sides = sources[1:] if name == "where" else sources[::2]
        return max(_reach(side, depth - 1) for side in sides)
    if name in ("add", "sub") and not argument.kwargs:
        return sum(_reach(side, depth - 1) for side in sources)
    return _reach(sources[0], depth - 1) if name in (*_CASTS, *_VIEWS, *_PICKS) else inf
