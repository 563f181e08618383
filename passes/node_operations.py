"""What a node of a captured graph does: the plain name of its operation, and whose memory it writes to.

Dynamo's graphs call methods, functions and operators on tensors; exported ones call ATen overloads. Both get
the same names here (`le`, `bitwise_and`, `index`, ...), so that one table of operations reads both.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mmcompile.passes.graph import fake_value

_SPELLINGS = {
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "inv": "bitwise_not",
    "less_equal": "le",
    "less": "lt",
    "greater_equal": "ge",
    "greater": "gt",
    "not_equal": "ne",
    "subtract": "sub",
    "multiply": "mul",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "absolute": "abs",
    "negative": "neg",
    "swapaxes": "transpose",
    "swapdims": "transpose",
}

_REFLECTED = {
    "__radd__": "add",
    "__rmul__": "mul",
    "__rand__": "bitwise_and",
    "__ror__": "bitwise_or",
    "__rxor__": "bitwise_xor",
}

_OPERATORS = (operator, torch, torch.Tensor, torch.nn.functional, torch._C._nn)


def operation(node: fx.Node) -> str:
    """The plain name of what the node computes; names of unknown functions carry their module."""
    if node.op == "call_method":
        return _plain(str(node.target))
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        return _plain(name) if namespace == "aten" else target._schema.name
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, name = target._qualified_op_name.split("::")
        return _plain(name) if namespace == "aten" else target._qualified_op_name
    name = getattr(target, "__name__", type(target).__name__)
    if any(getattr(owner, name, None) is target for owner in _OPERATORS):
        return _plain(name)
    return f"{getattr(target, '__module__', '')}.{name}"


def nodes_in(argument: Any) -> list[fx.Node]:
    """The nodes inside an argument, through lists, tuples and slices."""
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return found


def _plain(name: str) -> str:
    if name in _REFLECTED:
        return _REFLECTED[name]
    bare = name.strip("_") if name.startswith("__") or name in ("and_", "or_", "not_") else name
    return _SPELLINGS.get(bare, bare)


def mutated_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Every node whose memory some node of the graph writes to, its own or that of a tensor it views."""
    owner: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while owner.setdefault(node, node) is not node:
            node = owner[node]
        return node

    written: list[fx.Node] = []
    for node in graph.nodes:
        written.extend(_written_by(node))
        for source in node.all_input_nodes:
            if _may_share_memory(node, source):
                owner[root(source)] = root(node)
    roots = {root(node) for node in written}
    return frozenset(node for node in graph.nodes if root(node) in roots)


def _written_by(node: fx.Node) -> list[fx.Node]:
    """The tensors that the node changes."""
    if node.op not in ("call_method", "call_function"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        return _written_by_schema(node, node.target._schema)
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if "mutation" in name:  # a user's Triton kernel, wrapped: any tensor it gets
        return list(node.all_input_nodes)
    in_place = (
        name == "setitem"
        or (name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_"))
        or (getattr(operator, name, None) is node.target and name.startswith("i") and name[1:] in _IN_PLACE)
        or (name.startswith("__i") and name.strip("_")[1:] in _IN_PLACE)
        or bool(node.kwargs.get("inplace"))
    )
    targets = [*node.args[:1], node.kwargs.get("input"), node.kwargs.get("self")] if in_place else []
    return nodes_in([*targets, node.kwargs.get("out")])


_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul", "concat")


def _written_by_schema(node: fx.Node, schema: Any) -> list[fx.Node]:
    if not schema.is_mutable:
        return []
    written = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.kwargs.get(argument.name, node.args[position] if position < len(node.args) else None)
            written.extend(nodes_in(value))
    return written


# Operations that fill memory of their own; whatever is not here may be a view of an input of the same dtype.
_NUMERIC = (
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "truediv",
    "pow",
    "abs",
    "neg",
    "sum",
    "mean",
    "cumsum",
    "diff",
)
_INTEGER = ("floor_divide", "remainder", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not")
_LOGICAL = (
    "logical_and",
    "logical_or",
    "logical_xor",
    "logical_not",
    "le",
    "lt",
    "ge",
    "gt",
    "eq",
    "ne",
    "any",
)
_CHOICES = ("where", "masked_fill", "maximum", "minimum", "tril", "triu", "all", "softmax", "relu", "sigmoid")
_COPIES = ("clone", "cat", "stack", "pad", "index", "index_select", "gather", "scatter", "masked_scatter")
_FILLED = ("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full", "embedding")
_LAYERS = (
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "layer_norm",
    "silu",
    "gelu",
    "rsqrt",
    "sin",
    "cos",
    "exp",
)
_NEW_MEMORY = frozenset((*_NUMERIC, *_INTEGER, *_LOGICAL, *_CHOICES, *_COPIES, *_FILLED, *_LAYERS))


def _returns_new_memory(node: fx.Node) -> bool:
    """Whether it is one of our own ops; a schema of another's may promise what its code does not keep."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "mminference"


def _may_share_memory(node: fx.Node, source: fx.Node) -> bool:
    name = operation(node)
    if name in _NEW_MEMORY or _returns_new_memory(node):
        return False
    value, other = fake_value(node), fake_value(source)
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        return value.dtype == other.dtype or name == "view"
    return value is not None and other is not None and not isinstance(other, torch.SymInt | int)
