"""Reading operations that make values: constants, positions, comparisons, logic, arithmetic, selection."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from mmcompile.passes import element_values as values
from mmcompile.passes.element_values import Operand, Unreadable, Value
from mmcompile.passes.index_expressions import at_most
from mmcompile.passes.read_tensors import Index, TensorReader, rule


def _filled(reader: TensorReader, node: fx.Node, scalar: Any) -> Value:
    """The value of a tensor that holds one scalar everywhere."""
    if isinstance(scalar, fx.Node | torch.SymInt):
        return values.convert(((sympy.true, reader.size(scalar)),), None, reader.dtype(node), reader.bounds)
    if not isinstance(scalar, bool | int | float):
        raise Unreadable(f"{node.name} is filled with {scalar}")
    return values.convert(values.constant(scalar), None, reader.dtype(node), reader.bounds)


@rule("ones", "new_ones", "ones_like")
def ones(reader: TensorReader, node: fx.Node, index: Index, *shape: Any, **options: Any) -> Value:
    return _filled(reader, node, 1)


@rule("zeros", "new_zeros", "zeros_like")
def zeros(reader: TensorReader, node: fx.Node, index: Index, *shape: Any, **options: Any) -> Value:
    return _filled(reader, node, 0)


@rule("full", "full_like")
def full(reader: TensorReader, node: fx.Node, index: Index, shape: Any, fill_value: Any, **options: Any) -> Value:
    return _filled(reader, node, fill_value)


@rule("new_full")
def new_full(
    reader: TensorReader, node: fx.Node, index: Index, like: Any, shape: Any, fill_value: Any, **options: Any
) -> Value:
    return _filled(reader, node, fill_value)


@rule("tensor", "scalar_tensor")
def scalar_tensor(reader: TensorReader, node: fx.Node, index: Index, scalar: Any, **options: Any) -> Value:
    return _filled(reader, node, scalar)


@rule("arange")
def arange(reader: TensorReader, node: fx.Node, index: Index, *limits: Any, **options: Any) -> Value:
    if reader.dtype(node) not in (torch.int32, torch.int64):
        raise Unreadable(f"arange of {reader.dtype(node)}")
    start = options.get("start", limits[0] if len(limits) > 1 else 0)
    step = options.get("step", limits[2] if len(limits) > 2 else 1)
    position = sympy.expand(reader.size(start) + reader.integer(step) * index[0])
    if not reader.bounds.fits(position, reader.dtype(node)):
        raise Unreadable("arange that may overflow its dtype")
    return ((sympy.true, position),)


@rule("contiguous", "clone", "detach", "alias", "lift_fresh_copy", "positive")
def same(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, **options: Any) -> Value:
    return reader.element(source, index)


@rule(
    "to",
    "type",
    "type_as",
    "_to_copy",
    "bool",
    "int",
    "long",
    "float",
    "double",
    "half",
    "bfloat16",
    "cuda",
    "cpu",
)
def cast(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, *target: Any, **options: Any) -> Value:
    """Any spelling of a change of dtype or device: the recorded dtypes say which."""
    value = reader.element(source, index)
    if reader.dtype(source) == reader.dtype(node):
        return value
    return values.convert(value, reader.dtype(source), reader.dtype(node), reader.bounds)


def _comparison(name: str) -> None:
    @rule(name)
    def compare(reader: TensorReader, node: fx.Node, index: Index, left: Any, right: Any) -> Value:
        pair = reader.operand(left, node, index), reader.operand(right, node, index)
        return values.compare(name, *pair, reader.bounds)


for _name in values.COMPARISONS:
    _comparison(_name)


_LOGIC = {"and": sympy.And, "or": sympy.Or, "xor": sympy.Xor}


def _logic(name: str) -> None:
    connective = _LOGIC[name]

    @rule(f"logical_{name}")
    def logical(reader: TensorReader, node: fx.Node, index: Index, left: Any, right: Any) -> Value:
        sides = (reader.operand(side, node, index) for side in (left, right))
        return connective(*(values.truth(side.value) for side in sides))

    @rule(f"bitwise_{name}")
    def bitwise(reader: TensorReader, node: fx.Node, index: Index, left: Any, right: Any) -> Value:
        first, second = (reader.operand(side, node, index) for side in (left, right))
        if reader.dtype(node) == torch.bool:
            return connective(values.truth(first.value), values.truth(second.value))
        return values.arithmetic(f"bitwise_{name}", first, second, reader.dtype(node), reader.bounds)


for _name in _LOGIC:
    _logic(_name)


@rule("logical_not")
def logical_not(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node) -> Value:
    return sympy.Not(values.truth(reader.element(source, index)))


@rule("bitwise_not")
def bitwise_not(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node) -> Value:
    if reader.dtype(node) != torch.bool:
        raise Unreadable("bitwise not of integers")
    return sympy.Not(values.truth(reader.element(source, index)))


def _arithmetic(name: str) -> None:
    @rule(name)
    def arithmetic(
        reader: TensorReader, node: fx.Node, index: Index, left: Any, right: Any, *, alpha: Any = 1
    ) -> Value:
        if alpha != 1:
            raise Unreadable(f"{name} with alpha={alpha}")
        first, second = (reader.operand(side, node, index) for side in (left, right))
        if reader.dtype(node) != torch.bool:
            return values.arithmetic(name, first, second, reader.dtype(node), reader.bounds)
        if name not in _ON_CONDITIONS:
            raise Unreadable(f"{name} on conditions")
        return _ON_CONDITIONS[name](values.truth(first.value), values.truth(second.value))


# on bool tensors a sum is "or", a product "and"
_ON_CONDITIONS = {"add": sympy.Or, "maximum": sympy.Or, "mul": sympy.And, "minimum": sympy.And}
for _name in ("add", "sub", "mul", "floor_divide", "remainder", "maximum", "minimum"):
    _arithmetic(_name)


@rule("rsub")
def subtract_from(reader: TensorReader, node: fx.Node, index: Index, left: Any, right: Any, alpha: Any = 1) -> Value:
    if alpha != 1:
        raise Unreadable(f"rsub with alpha={alpha}")
    first, second = (reader.operand(side, node, index) for side in (right, left))
    return values.arithmetic("sub", first, second, reader.dtype(node), reader.bounds)


@rule("div")
def divide(
    reader: TensorReader,
    node: fx.Node,
    index: Index,
    left: Any,
    right: Any,
    *,
    rounding_mode: str | None = None,
) -> Value:
    if rounding_mode != "floor":
        raise Unreadable(f"division rounded by {rounding_mode}")
    first, second = (reader.operand(side, node, index) for side in (left, right))
    return values.arithmetic("floor_divide", first, second, reader.dtype(node), reader.bounds)


@rule("neg")
def negative(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node) -> Value:
    sides = Operand(values.constant(-1), None), reader.operand(source, node, index)
    return values.arithmetic("mul", *sides, reader.dtype(node), reader.bounds)


@rule("abs")
def absolute(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node) -> Value:
    return values.absolute(reader.operand(source, node, index))


@rule("where")
def where(reader: TensorReader, node: fx.Node, index: Index, condition: Any, chosen: Any, other: Any) -> Value:
    holds = values.truth(reader.operand(condition, node, index).value)
    return values.choose(holds, reader.converted(chosen, node, index), reader.converted(other, node, index))


@rule("masked_fill")
def masked_fill(reader: TensorReader, node: fx.Node, index: Index, source: Any, mask: Any, value: Any) -> Value:
    return where(reader, node, index, mask, value, source)


def _triangle(name: str, below: bool) -> None:
    @rule(name)
    def triangle(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, diagonal: Any = 0) -> Value:
        """The elements on one side of a diagonal, zeros elsewhere."""
        row, column = index[-2:]
        limit = row + reader.size(diagonal)
        kept = at_most(column, limit) if below else at_most(limit, column)
        return values.choose(kept, reader.element(source, index), _filled(reader, node, 0))


_triangle("tril", below=True)
_triangle("triu", below=False)


@rule("torch._functorch.predispatch._add_batch_dim", "torch._C._functorch._add_batch_dim")
def enter_vmap(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, dim: int, level: int) -> Value:
    """One sample's view of a batched tensor; which sample is a symbol until vmap's exit."""
    dim = dim % (len(index) + 1)
    sample = _sample_index(reader, level, reader.shape(source)[dim])
    return reader.element(source, (*index[:dim], sample, *index[dim:]))


@rule("torch._functorch.predispatch._remove_batch_dim", "torch._C._functorch._remove_batch_dim")
def leave_vmap(
    reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, level: int, size: Any, dim: int
) -> Value:
    dim = dim % len(index)
    inner = reader.element(source, index[:dim] + index[dim + 1 :])
    chosen = {_sample_index(reader, level, reader.size(size)): index[dim]}
    if not isinstance(inner, tuple):
        return inner.xreplace(chosen)
    return tuple((guard.xreplace(chosen), n if isinstance(n, float) else n.xreplace(chosen)) for guard, n in inner)


def _sample_index(reader: TensorReader, level: int, size: sympy.Expr) -> sympy.Symbol:
    sample = sympy.Symbol(f"sample of {size} at level {level}", integer=True, nonnegative=True)
    reader.bounds.lengths[sample] = size
    return sample
