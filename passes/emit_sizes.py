"""Expressions of sizes as arguments of a graph's calls."""

from __future__ import annotations

import operator
from functools import reduce

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from mmcompile.passes.graph import expression, fake_value, set_fake_value

SizeArgument = int | fx.Node


class UnknownSize(ValueError):
    """A size that no input of the graph has."""


def emit_size(graph: fx.Graph, size: sympy.Expr) -> SizeArgument:
    """An int where the size is a constant, else a node of its SymInt, made at the graph's insertion point.

    Raises UnknownSize where a symbol in it is neither an input of the graph nor a dimension of one.
    """
    if size.is_Integer:
        return int(size)
    return _emit(graph, size)


def check_size(graph: fx.Graph, size: sympy.Expr) -> None:
    """Raise UnknownSize where `emit_size` would."""
    for part in sympy.preorder_traversal(size):
        if part.is_Symbol:
            _source(graph, part)
        elif not isinstance(part, sympy.Integer | sympy.Add | sympy.Mul | FloorDiv):
            raise UnknownSize(f"the size {size}")


def _emit(graph: fx.Graph, size: sympy.Expr) -> SizeArgument:
    if size.is_Integer:
        return int(size)
    if size.is_Symbol:
        node, dim = _source(graph, size)
        return node if dim is None else _call(graph, torch.ops.aten.sym_size.int, node, dim)
    function = {sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv}.get(size.func)
    if function is None:
        raise UnknownSize(f"the size {size}")
    return reduce(lambda left, right: _call(graph, function, left, right), (_emit(graph, a) for a in size.args))


def _source(graph: fx.Graph, symbol: sympy.Symbol) -> tuple[fx.Node, int | None]:
    """The input that is the symbol, or the one with a dimension that is, and which."""
    inputs = graph.find_nodes(op="placeholder")
    for node in inputs:
        value = fake_value(node)
        if isinstance(value, torch.SymInt) and expression(value) == symbol:
            return node, None
    for node in inputs:
        value = fake_value(node)
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if expression(size) == symbol:
                return node, dim
    raise UnknownSize(f"the size {symbol}, which is no dimension of an input")


def _call(graph: fx.Graph, target, *arguments) -> fx.Node:
    node = graph.call_function(target, arguments)
    set_fake_value(node, target(*fx.map_arg(arguments, fake_value)))
    return node
