"""The values that one element of a mask's tensors can take, and exact arithmetic on them.

A bool element is a condition. A number is a few guarded cases: `where(c, 0, -inf)` is c: 0.0, not c: -inf.
Constants are computed by torch itself, so promotion, overflow and rounding are torch's. Positions and ids
stay symbolic, where arithmetic on them is exact in the tensor's dtype; the rest is `Unreadable`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.utils._sympy.functions import FloorDiv, PythonMod

from mmcompile.passes.index_expressions import (
    Bounds,
    Shifted,
    at_most,
    equal,
    has_unknown,
    less,
)

Number: TypeAlias = sympy.Expr | float
Cases: TypeAlias = tuple[tuple[Boolean, Number], ...]
Value: TypeAlias = Boolean | Cases

MOST_CASES = 16


class Unreadable(Exception):
    """Part of a mask that is not understood; the text says what."""


@dataclass(frozen=True)
class Operand:
    """A value with what torch's promotion looks at; dtype None is a Python scalar."""

    value: Value
    dtype: torch.dtype | None
    dimensions: int = 0


def constant(scalar: bool | int | float) -> Value:
    """A Python scalar as a value."""
    if isinstance(scalar, bool):
        return sympy.true if scalar else sympy.false
    return ((sympy.true, sympy.Integer(scalar) if isinstance(scalar, int) else scalar),)


def cases_of(value: Value) -> Cases:
    """The guarded numbers of a value; a condition counts as 1 or 0."""
    if isinstance(value, tuple):
        return value
    return _merged([(value, sympy.S.One), (sympy.Not(value), sympy.S.Zero)])


def truth(value: Value) -> Boolean:
    """Where the value is not zero, as a cast to bool says."""
    if not isinstance(value, tuple):
        return value
    holds = [sympy.And(guard, _nonzero(number)) for guard, number in value]
    return sympy.Or(*holds)


def choose(condition: Boolean, chosen: Value, other: Value) -> Value:
    """`where(condition, chosen, other)`, both already in the result's dtype."""
    if not isinstance(chosen, tuple) and not isinstance(other, tuple):
        return sympy.Or(sympy.And(condition, chosen), sympy.And(sympy.Not(condition), other))
    sides = [(condition, chosen), (sympy.Not(condition), other)]
    return _merged([(sympy.And(side, guard), n) for side, value in sides for guard, n in cases_of(value)])


def convert(value: Value, source: torch.dtype | None, target: torch.dtype, bounds: Bounds) -> Value:
    """`value.to(target)`; Unreadable where the cast could change a value that is not a constant."""
    if target == torch.bool:
        return truth(value)
    converted: list[tuple[Boolean, Number]] = []
    for guard, number in cases_of(value):
        if is_constant(number):
            converted.append((guard, _cast(number, source, target)))
        elif _exact_in(number, source, target, bounds):
            converted.append((guard, number))
        else:
            raise Unreadable(f"cast of positions or ids to {target}")
    return _merged(converted)


COMPARISONS: dict[str, Callable] = {
    "le": at_most,
    "lt": less,
    "ge": lambda left, right: at_most(right, left),
    "gt": lambda left, right: less(right, left),
    "eq": equal,
    "ne": lambda left, right: sympy.Not(equal(left, right)),
}


def compare(name: str, left: Operand, right: Operand, bounds: Bounds) -> Boolean:
    """The condition `left <name> right`, in the dtype that torch compares in."""
    if name in ("eq", "ne") and _is_condition(left.value) and _is_condition(right.value):
        differ = sympy.Xor(left.value, right.value)
        return differ if name == "ne" else sympy.Not(differ)
    common = _common_dtype(left, right)
    holds = []
    for (guard, a), (other, b) in _pairs(left, right):
        if is_constant(a) and is_constant(b):
            verdict = bool(_fold(getattr(operator, name), [(left, a), (right, b)]))
        elif _exact_in(a, left.dtype, common, bounds) and _exact_in(b, right.dtype, common, bounds):
            verdict = COMPARISONS[name](a, b)
        else:
            raise Unreadable(f"comparison of positions or ids in {common}")
        holds.append(sympy.And(guard, other, verdict))
    return sympy.Or(*holds)


ARITHMETIC: dict[str, Callable] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "bitwise_and": operator.and_,
    "bitwise_or": operator.or_,
    "bitwise_xor": operator.xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}


def arithmetic(name: str, left: Operand, right: Operand, result: torch.dtype, bounds: Bounds) -> Value:
    """`left <name> right` as numbers of dtype `result`."""
    if _common_dtype(left, right) != result:
        raise Unreadable(f"{name} into {result}")
    cases: list[tuple[Boolean, Number]] = []
    for (guard, a), (other, b) in _pairs(left, right):
        if is_constant(a) and is_constant(b):
            number = _fold(ARITHMETIC[name], [(left, a), (right, b)])
        elif all(_exact_in(n, side.dtype, result, bounds) for n, side in ((a, left), (b, right))):
            number = _symbolic(name, a, b, result, bounds)
        else:
            raise Unreadable(f"{name} on positions or ids in {result}")
        cases.append((sympy.And(guard, other), number))
    return _merged(cases)


def absolute(operand: Operand) -> Value:
    """`abs` of numbers."""
    cases: list[tuple[Boolean, Number]] = []
    for guard, number in cases_of(operand.value):
        if is_constant(number):
            cases.append((guard, _fold(torch.abs, [(operand, number)])))
        elif has_unknown(number):
            raise Unreadable("the absolute value of a tensor's values")
        else:
            cases.append((guard, sympy.Abs(number)))
    return _merged(cases)


def is_constant(number: Number) -> bool:
    """Whether the number is the same at every position and for every size."""
    return isinstance(number, float) or number.is_Integer


def _symbolic(name: str, a: sympy.Expr, b: sympy.Expr, dtype: torch.dtype, bounds: Bounds) -> sympy.Expr:
    if name in ("add", "sub") and has_unknown(a) and b.is_Integer:
        return _shift(a, b if name == "add" else -b, dtype)
    if name == "add" and has_unknown(b) and a.is_Integer:
        return _shift(b, a, dtype)
    if has_unknown(a) or has_unknown(b):
        raise Unreadable(f"{name} on the values of a tensor")
    if name in ("add", "sub") or (name == "mul" and (a.is_Integer or b.is_Integer)):
        result = sympy.expand({"add": a + b, "sub": a - b, "mul": a * b}[name])
        if not bounds.fits(result, dtype):
            raise Unreadable(f"{name} that may overflow {dtype}")
        return result
    if name in ("floor_divide", "remainder") and b.is_Integer and b > 0:
        return FloorDiv(a, b) if name == "floor_divide" else PythonMod(a, b)
    raise Unreadable(f"{name} on positions")


def _shift(expr: sympy.Expr, by: sympy.Integer, dtype: torch.dtype) -> sympy.Expr:
    if by == 0:
        return expr
    if dtype != torch.int64 or abs(by) > 2**31:
        raise Unreadable(f"a shift of ids by {by} in {dtype}")
    if isinstance(expr, Shifted):
        return _shift(expr.args[0], expr.args[1] + by, dtype)
    return Shifted(expr, by)


def _is_condition(value: Value) -> bool:
    return not isinstance(value, tuple)


def _nonzero(number: Number) -> Boolean:
    if is_constant(number):
        return sympy.true if bool(number != 0) else sympy.false
    return sympy.Not(equal(number, sympy.S.Zero))


def _pairs(left: Operand, right: Operand):
    return product(cases_of(left.value), cases_of(right.value))


def _merged(cases: Sequence[tuple[Boolean, Number]]) -> Cases:
    """Cases with one guard for each number, in order, without those that never hold."""
    guards: dict[tuple[type, Number], Boolean] = {}
    for guard, number in cases:
        if guard is not sympy.false:
            key = (type(number), number)
            guards[key] = sympy.Or(guards.get(key, sympy.false), guard)
    if len(guards) > MOST_CASES:
        raise Unreadable("too many distinct values")
    return tuple((guard, number) for (_, number), guard in guards.items())


def _sample(dtype: torch.dtype | None, dimensions: int, scalar: bool | int | float):
    if dtype is None:
        return scalar
    return torch.full((1,) if dimensions else (), scalar, dtype=dtype, device="cpu")


def _common_dtype(left: Operand, right: Operand) -> torch.dtype:
    """torch's result type; a condition out of a Python bool or bool tensor has its own category."""
    samples = []
    for operand in (left, right):
        numbers = [number for _, number in cases_of(operand.value)]
        scalar = True if _is_condition(operand.value) else 1.0 if isinstance(numbers[0], float) else 1
        samples.append(_sample(operand.dtype, operand.dimensions, scalar))
    return torch.result_type(*samples)


def _cast(number: Number, source: torch.dtype | None, target: torch.dtype) -> Number:
    try:
        if source is None:
            return _number(torch.full((), _python(number), dtype=target, device="cpu"))
        return _number(torch.full((), _python(number), dtype=source, device="cpu").to(target))
    except (RuntimeError, OverflowError) as error:
        raise Unreadable(f"the constant {number} as {target}") from error


def _fold(function: Callable, operands: list[tuple[Operand, Number]]) -> Number:
    values = []
    for operand, number in operands:
        scalar = bool(number) if _is_condition(operand.value) else _python(number)
        values.append(_sample(operand.dtype, operand.dimensions, scalar))
    try:
        return _number(torch.as_tensor(function(*values), device="cpu"))
    except (RuntimeError, OverflowError, ZeroDivisionError) as error:
        raise Unreadable(f"{function.__name__} of the constants {values}") from error


def _python(number: Number) -> int | float:
    return number if isinstance(number, float) else int(number)


def _number(tensor: torch.Tensor) -> Number:
    scalar = tensor.item()
    return scalar if isinstance(scalar, float) else sympy.Integer(int(scalar))


def _exact_in(number: Number, source: torch.dtype | None, target: torch.dtype, bounds: Bounds) -> bool:
    """Whether a number held in `source` keeps its value in `target`."""
    if isinstance(number, float):
        return False
    if target.is_floating_point or target.is_complex or target == torch.bool:
        return False
    info = torch.iinfo(target)
    if number.is_Integer:
        return info.min <= number <= info.max
    if source is not None and torch.iinfo(source).min >= info.min and torch.iinfo(source).max <= info.max:
        return True
    return not has_unknown(number) and bounds.fits(number, target)
