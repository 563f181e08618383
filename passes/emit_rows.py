"""Lowering expressions over (batch, query) or (batch, key) to nodes that hold one value for each token."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._sympy.functions import FloorDiv, PythonMod

from mmcompile.passes.emit_sizes import SizeArgument, emit_size
from mmcompile.passes.graph import expression, fake_value, set_fake_value
from mmcompile.passes.index_expressions import BATCH, Element, Select, Shifted, has_unknown, terms
from mmcompile.passes.mask_clauses import normal
from mmcompile.passes.mask_spec import MaskSpec

_ATEN = torch.ops.aten

# Which operation says the same with its sides exchanged.
_MIRRORED = {_ATEN.le: _ATEN.ge, _ATEN.ge: _ATEN.le}


class RowEmitter:
    """Inserts nodes for expressions over BATCH and one of QUERY or KEY; equal expressions share a node."""

    def __init__(
        self, graph: fx.Graph, spec: MaskSpec, axis: sympy.Symbol, batch: SizeArgument, length: SizeArgument
    ) -> None:
        self.graph, self.spec, self.axis = graph, spec, axis
        self.sizes = {BATCH: batch, axis: length}
        self._mode = _fake_mode(graph)
        self._emitted: dict[Any, Any] = {}

    def call(self, target: Callable[..., Any], *arguments: Any, **options: Any) -> fx.Node:
        """Insert a call with its fake value."""
        node = self.graph.call_function(target, arguments, options)
        with self._mode:
            set_fake_value(node, target(*fx.map_arg(arguments, fake_value), **options))
        return node

    def full(self, row: fx.Node | int | bool) -> fx.Node:
        """An emitted expression as a [B, length] tensor."""
        shape = [self.sizes[BATCH], self.sizes[self.axis]]
        if not isinstance(row, fx.Node) or not _is_tensor(row):
            dtype = torch.bool if isinstance(row, bool) else torch.int64
            return self.call(_ATEN.full.default, shape, row, dtype=dtype, device=self.spec.device)
        if _shape(row) == tuple(map(_size_expression, shape)):
            return row
        return self.call(_ATEN.expand.default, row, shape)

    def number(self, expr: sympy.Expr) -> fx.Node | int:
        """An integer expression as an int64 tensor that broadcasts to [B, length]; a size if no index."""
        if expr not in self._emitted:
            self._emitted[expr] = self._number(expr)
        return self._emitted[expr]

    def condition(self, expr: Boolean) -> fx.Node | bool:
        """A condition: a bool tensor that broadcasts to [B, length], or a constant."""
        if expr not in self._emitted:
            self._emitted[expr] = self._condition(expr)
        return self._emitted[expr]

    def _number(self, expr: sympy.Expr) -> fx.Node | int:
        if not self._varies(expr):
            return emit_size(self.graph, expr)
        if expr in self.sizes:
            return self._positions(expr)
        if isinstance(expr, Element):
            return self._int64(self._element(expr))
        if isinstance(expr, sympy.Add | sympy.Mul):
            return self._combine(expr)
        if isinstance(expr, Shifted):
            return self.call(_ATEN.add.Tensor, self.number(expr.args[0]), int(expr.args[1]))
        if isinstance(expr, FloorDiv):
            return self.call(_ATEN.floor_divide.default, self.number(expr.args[0]), int(expr.args[1]))
        if isinstance(expr, PythonMod):
            return self.call(_ATEN.remainder.Scalar, self.number(expr.args[0]), int(expr.args[1]))
        if isinstance(expr, sympy.Abs):
            return self.call(_ATEN.abs.default, self.number(expr.args[0]))
        if isinstance(expr, Select):
            return self._select(*expr.args)
        raise ValueError(f"no tensor operation for {expr}")

    def _combine(self, expr: sympy.Add | sympy.Mul) -> fx.Node | int:
        """A sum or a product: its tensors first, then all that is the same for every token."""
        operation = _ATEN.add.Tensor if isinstance(expr, sympy.Add) else _ATEN.mul.Tensor
        tensors = [self.number(part) for part in expr.args if self._varies(part)]
        total = reduce(lambda left, right: self.call(operation, left, right), tensors)
        scalar = expr.func(*(part for part in expr.args if not self._varies(part)))
        if scalar == expr.func():  # the neutral element
            return total
        return self.call(operation, total, emit_size(self.graph, scalar))

    def _condition(self, expr: Boolean) -> fx.Node | bool:
        if expr in (sympy.true, sympy.false):
            return bool(expr)
        if isinstance(expr, sympy.And | sympy.Or):
            operation = _ATEN.bitwise_and if isinstance(expr, sympy.And) else _ATEN.bitwise_or
            parts = [self.condition(part) for part in expr.args]
            return reduce(lambda left, right: self.call(operation.Tensor, left, right), parts)
        if isinstance(expr, sympy.Eq | sympy.Ne):
            return self._equality(expr)
        return self._inequality(normal(expr))

    def _equality(self, expr: sympy.Eq | sympy.Ne) -> fx.Node:
        left, right = expr.args
        holds = isinstance(expr, sympy.Eq)
        if right == 0 and isinstance(left, Element) and self._source(left)[1].dtype == torch.bool:
            flags = self._element(left)
            return self.call(_ATEN.bitwise_not.default, flags) if holds else flags
        return self._compare(_ATEN.eq if holds else _ATEN.ne, self.number(left), self.number(right))

    def _inequality(self, literal: Boolean) -> fx.Node | bool:
        """`expr <= 0` with a tensor's values alone on their side: a sum of them could overflow."""
        if literal in (sympy.true, sympy.false):
            return bool(literal)
        values = {term: factor for term, factor in terms(literal.lhs).items() if has_unknown(term)}
        rest = sympy.expand(literal.lhs - sympy.Add(*(factor * term for term, factor in values.items())))
        sides = {int(factor): term for term, factor in values.items()}
        if len(sides) != len(values) or not set(sides) <= {1, -1} or (len(sides) == 2 and rest not in (0, 1)):
            raise ValueError(f"no tensor operation for {literal}")
        if len(sides) == 2:
            return self._compare(_ATEN.le if rest == 0 else _ATEN.lt, self.number(sides[1]), self.number(sides[-1]))
        if -1 in sides:
            return self._compare(_ATEN.ge, self.number(sides[-1]), self.number(rest))
        if 1 in sides:
            return self._compare(_ATEN.le, self.number(sides[1]), self.number(sympy.expand(-rest)))
        return self._compare(_ATEN.le, self.number(rest), 0)

    def _compare(self, operation: Any, left: fx.Node | int, right: fx.Node | int) -> fx.Node:
        if not _is_tensor(left):
            left, right, operation = right, left, _MIRRORED.get(operation, operation)
        return self.call(operation.Tensor if _is_tensor(right) else operation.Scalar, left, right)

    def _select(self, condition: Boolean, chosen: sympy.Expr, other: sympy.Expr) -> fx.Node | int:
        where, sides = self.condition(condition), (self.number(chosen), self.number(other))
        if isinstance(where, bool):
            return sides[0] if where else sides[1]
        overload = {
            (True, True): _ATEN.where.self,
            (True, False): _ATEN.where.ScalarOther,
            (False, True): _ATEN.where.ScalarSelf,
            (False, False): _ATEN.where.Scalar,
        }[_is_tensor(sides[0]), _is_tensor(sides[1])]
        return self.call(overload, where, *sides)

    def _varies(self, expr: sympy.Basic) -> bool:
        """Whether the expression has an index or a tensor in it, not only sizes."""
        return bool(expr.free_symbols & set(self.sizes)) or expr.has(Element)

    def _positions(self, symbol: sympy.Symbol) -> fx.Node:
        """0, 1, 2, ... along the rows' first or second dimension."""
        line = self.call(_ATEN.arange.default, self.sizes[symbol], dtype=torch.int64, device=self.spec.device)
        return self.call(_ATEN.unsqueeze.default, line, 1 if symbol == BATCH else 0)

    def _source(self, element: Element) -> tuple[fx.Node, torch.Tensor]:
        node = self.spec.tensors[element.args[0].name]
        return node, fake_value(node)

    def _element(self, element: Element) -> fx.Node:
        """A tensor's values over the rows, in its own dtype: as it is if that fits, else gathered."""
        if ("as stored", element) not in self._emitted:
            self._emitted["as stored", element] = self._gathered(self._source(element)[0], element.args[1:])
        return self._emitted["as stored", element]

    def _gathered(self, source: fx.Node, index: tuple[sympy.Expr, ...]) -> fx.Node:
        for dim in reversed(range(len(index))):
            if not self._varies(index[dim]):
                source = self.call(_ATEN.select.int, source, dim, emit_size(self.graph, index[dim]))
        index = tuple(place for place in index if self._varies(place))
        whole = tuple(_size_expression(self.sizes[place]) for place in index if place in self.sizes)
        if index in ((BATCH, self.axis), (self.axis,), (BATCH,), ()) and _shape(source) == whole:
            return source if index != (BATCH,) else self.call(_ATEN.unsqueeze.default, source, 1)
        return self.call(_ATEN.index.Tensor, source, [self.number(place) for place in index])

    def _int64(self, node: fx.Node) -> fx.Node:
        return node if fake_value(node).dtype == torch.int64 else self.call(_ATEN.to.dtype, node, torch.int64)


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and isinstance(fake_value(argument), torch.Tensor)


def _shape(node: fx.Node) -> tuple[sympy.Expr, ...]:
    return tuple(expression(size) for size in fake_value(node).shape)


def _size_expression(size: SizeArgument) -> sympy.Expr:
    return expression(fake_value(size) if isinstance(size, fx.Node) else size)


def _fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode that the graph was captured under."""
    for node in graph.nodes:
        mode = getattr(fake_value(node), "fake_mode", None)
        if mode is not None:
            return mode
    raise ValueError("the graph has no fake values")
