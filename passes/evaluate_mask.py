"""A MaskSpec evaluated element by element on real tensors: what a reading claims, taken literally."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils._sympy.functions import FloorDiv, PythonMod

from mmcompile.passes.index_expressions import BATCH, KEY, QUERY, Element, Select, Shifted
from mmcompile.passes.mask_spec import MaskSpec

_OPERATIONS: dict[type, Callable[..., Any]] = {
    sympy.Add: lambda *parts: reduce(operator.add, parts),
    sympy.Mul: lambda *parts: reduce(operator.mul, parts),
    sympy.And: lambda *parts: reduce(operator.and_, parts),
    sympy.Or: lambda *parts: reduce(operator.or_, parts),
    sympy.Not: lambda part: ~part,
    sympy.Le: operator.le,
    sympy.Lt: operator.lt,
    sympy.Ge: operator.ge,
    sympy.Gt: operator.gt,
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.Abs: abs,
    FloorDiv: operator.floordiv,
    PythonMod: operator.mod,
    Shifted: operator.add,
    Select: torch.where,
}


def evaluate(expr: sympy.Basic, symbols: Mapping[sympy.Symbol, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """An expression as a tensor (int64 or bool), given its symbols' values and the tensors it reads."""
    if expr in (sympy.true, sympy.false):
        return torch.tensor(bool(expr))
    if isinstance(expr, sympy.Integer):
        return torch.tensor(int(expr))
    if expr.is_Symbol:
        return torch.as_tensor(symbols[expr])
    if isinstance(expr, Element):
        index = torch.broadcast_tensors(*(evaluate(place, symbols, tensors) for place in expr.args[1:]))
        return tensors[expr.args[0].name][tuple(index)].to(torch.int64)
    return _OPERATIONS[expr.func](*(evaluate(part, symbols, tensors) for part in expr.args))


def allowed(spec: MaskSpec, batch: int, sizes: Mapping[sympy.Symbol, int], tensors: Mapping[str, Tensor]) -> Tensor:
    """The mask that `spec` claims: bool [batch, Sq, Sk], for sizes given as numbers."""
    query_length, key_length = (int(length.xreplace(dict(sizes))) for length in (spec.query_length, spec.key_length))
    symbols: dict[sympy.Symbol, Any] = {
        **sizes,
        BATCH: torch.arange(batch)[:, None, None],
        QUERY: torch.arange(query_length)[:, None],
        KEY: torch.arange(key_length),
    }

    def value(expr: sympy.Basic) -> Tensor:
        return evaluate(expr, symbols, tensors)

    last = symbols[QUERY] + value(sympy.sympify(spec.offset))
    mask = torch.ones(batch, query_length, key_length, dtype=torch.bool)
    if spec.causal:
        within = symbols[KEY] <= last
        if spec.query_span is not None and spec.key_span is not None:
            span = value(spec.query_span)
            within = within | ((span == value(spec.key_span)) & (span >= 0))
        mask &= within
    if spec.window is not None:
        mask &= symbols[KEY] > last - spec.window
    if spec.key_valid is not None:
        mask &= value(spec.key_valid)
    if spec.query_segment is not None and spec.key_segment is not None:
        mask &= value(spec.query_segment) == value(spec.key_segment)
    return mask
