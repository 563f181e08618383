"""Reading the graph behind a mask: every node is a function from its own index to a value.

`element(node, index)` asks a node for one element at a symbolic index and follows the graph to its inputs. A
tensor that is not understood is an unknown function of its index (`Element`), as long as it is small enough
to stay in the rewritten graph: one row of queries or of keys, never queries x keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.core.symbol import Str
from torch import fx

from mmcompile.passes.element_values import Operand, Unreadable, Value, constant, convert
from mmcompile.passes.graph import fake_value
from mmcompile.passes.index_expressions import KEY, QUERY, Bounds, Element, equal, has_unknown
from mmcompile.passes.node_operations import mutated_nodes, operation

Index = tuple[sympy.Expr, ...]
Shape = tuple[sympy.Expr, ...]

# name of an operation -> how one of its elements is made: rule(reader, node, index, *args, **kwargs)
RULES: dict[str, Callable[..., Value]] = {}

_ROW_DTYPES = frozenset((torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))


def rule(*names: str) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Register how an operation's elements are read, under each of its plain names."""

    def register(function: Callable[..., Value]) -> Callable[..., Value]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class TensorReader:
    """Reads elements of one graph's tensors and remembers every unknown tensor that it met."""

    def __init__(self, graph: fx.Graph, query_length: sympy.Expr, key_length: sympy.Expr, bounds: Bounds) -> None:
        self.query_length = query_length
        self.key_length = key_length
        self.bounds = bounds
        self.unknown: dict[str, fx.Node] = {}
        self.mutated = mutated_nodes(graph)
        self._inside_vmap = _nodes_inside_vmap(graph)
        self._read: dict[tuple[fx.Node, Index], Value | Unreadable] = {}

    def element(self, node: fx.Node, index: Sequence[sympy.Expr]) -> Value:
        """The value of `node[index]`, index within bounds; Unreadable says what is not understood."""
        position = tuple(index)
        if (node, position) not in self._read:
            try:
                self._read[node, position] = self._interpret(node, position)
            except Unreadable as refusal:
                self._read[node, position] = refusal
        known = self._read[node, position]
        if isinstance(known, Unreadable):
            raise known
        return known

    def _interpret(self, node: fx.Node, index: Index) -> Value:
        if node in self.mutated:
            raise Unreadable(f"{node.name} is changed in place")
        function = RULES.get(operation(node))
        if function is None:
            return self.unknown_element(node, index, self._foreign(node))
        try:
            bound = inspect.signature(function).bind(self, node, index, *node.args, **node.kwargs)
        except TypeError:
            return self.unknown_element(node, index, Unreadable(f"arguments of {operation(node)}"))
        try:
            return function(*bound.args, **bound.kwargs)
        except Unreadable as refusal:
            return self.unknown_element(node, index, refusal)

    def _foreign(self, node: fx.Node) -> Unreadable:
        if node.op in ("placeholder", "get_attr"):
            return Unreadable(f"the values of {node.name}, a {self.dtype(node)} input")
        return Unreadable(f"operation {operation(node)}")

    def unknown_element(self, node: fx.Node, index: Index, why: Unreadable) -> Value:
        """`node[index]` as an unknown value; where the node cannot be kept either, `why` it was not read."""
        self._check_keepable(node, index, why)
        self.unknown[node.name] = node
        value = Element(Str(node.name), *index)
        return sympy.Not(equal(value, sympy.S.Zero)) if self.dtype(node) == torch.bool else ((sympy.true, value),)

    def _check_keepable(self, node: fx.Node, index: Index, why: Unreadable) -> None:
        if node in self.mutated:
            raise Unreadable(f"{node.name} is changed in place")
        if self.dtype(node) not in _ROW_DTYPES or node in self._inside_vmap or any(map(has_unknown, index)):
            raise why
        if node.op in ("placeholder", "get_attr"):
            return
        if self._holds_queries_by_keys(node):
            raise why
        axes = [axis for axis in (QUERY, KEY) if any(axis in place.free_symbols for place in index)]
        if len(axes) > 1:
            raise why

    def _holds_queries_by_keys(self, node: fx.Node) -> bool:
        """Whether keeping the node keeps a tensor of queries x keys, its own or one that it is made of."""
        pending, seen = [node], set()
        while pending:
            current = pending.pop()
            if current in seen or current.op in ("placeholder", "get_attr"):
                continue
            seen.add(current)
            if isinstance(fake_value(current), torch.Tensor) and self._is_wide(self.shape(current)):
                return True
            pending.extend(current.all_input_nodes)
        return False

    def _is_wide(self, shape: Shape) -> bool:
        sides = self.query_length, self.key_length
        if 1 in sides:
            return False
        return shape.count(sides[0]) > 1 if sides[0] == sides[1] else set(sides) <= set(shape)

    def shape(self, node: fx.Node) -> Shape:
        """The dimensions of the node's tensor as expressions."""
        return tuple(self.bounds.learn_size(size) for size in self._tensor(node).shape)

    def dtype(self, node: fx.Node) -> torch.dtype:
        """The node's dtype."""
        return self._tensor(node).dtype

    def _tensor(self, node: fx.Node) -> torch.Tensor:
        value = fake_value(node)
        if not isinstance(value, torch.Tensor):
            raise Unreadable(f"{node.name} has no recorded tensor")
        return value

    def is_unsigned(self, expr: sympy.Expr) -> bool:
        """Whether `expr` is an element of a tensor whose dtype has no negative values."""
        return isinstance(expr, Element) and not self.dtype(self.unknown[expr.args[0].name]).is_signed

    def size(self, argument: Any) -> sympy.Expr:
        """An integer argument as an expression: a Python int, a SymInt or the node of one."""
        value = fake_value(argument) if isinstance(argument, fx.Node) else argument
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise Unreadable(f"{argument} is not an integer")
        return self.bounds.learn_size(value)

    def integer(self, argument: Any) -> int:
        """An argument that must be a plain Python int."""
        if isinstance(argument, bool) or not isinstance(argument, int):
            raise Unreadable(f"{argument} is not a constant integer")
        return argument

    def operand(self, argument: Any, node: fx.Node, index: Index) -> Operand:
        """An argument of the elementwise operation `node` whose result is asked for at `index`."""
        if isinstance(argument, fx.Node) and isinstance(fake_value(argument), torch.Tensor):
            place = self.broadcast(argument, self.shape(node), index)
            return Operand(self.element(argument, place), self.dtype(argument), len(self.shape(argument)))
        if isinstance(argument, bool | float):
            return Operand(constant(argument), None)
        return Operand(((sympy.true, self.size(argument)),), None)

    def converted(self, argument: Any, node: fx.Node, index: Index) -> Value:
        """The operand's value after promotion to the dtype of `node`."""
        operand = self.operand(argument, node, index)
        return convert(operand.value, operand.dtype, self.dtype(node), self.bounds)

    def broadcast(self, node: fx.Node, shape: Shape, index: Index) -> Index:
        """Where `node` is read when a tensor of `shape` that it broadcasts into is asked for at `index`."""
        own = self.shape(node)
        if len(own) > len(shape):
            raise Unreadable(f"{node.name} has more dimensions than its result")
        skipped = len(shape) - len(own)
        places = []
        for size, target, place in zip(own, shape[skipped:], index[skipped:], strict=True):
            if size not in (1, target) and not self.bounds.never_positive(2 - size):
                raise Unreadable(f"a dimension of {node.name} that may be 1")
            places.append(sympy.S.Zero if size == 1 else place)
        return tuple(places)


def _nodes_inside_vmap(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes of one sample's view: they exist between vmap's entry and exit, so none of them can be kept."""
    inside: set[fx.Node] = set()
    for node in graph.nodes:
        if operation(node).endswith("._add_batch_dim") or any(source in inside for source in node.all_input_nodes):
            inside.add(node)
    return frozenset(inside)
