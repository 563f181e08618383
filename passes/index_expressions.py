"""Integers and conditions over the position of a mask's element: its batch row, head, query and key.

Every inequality is kept in one form, `expr <= 0` over integers, so that equal conditions compare equal
however a model wrote them. Nothing here evaluates a comparison of sizes: that would guard the graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd, inf

import sympy
import torch
from sympy.core.sorting import default_sort_key
from sympy.logic.boolalg import Boolean


def _index(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


BATCH, HEAD, QUERY, KEY = _index("batch"), _index("head"), _index("query"), _index("key")

# No dimension of a mask is longer: what lets arithmetic on positions be read without overflow.
LONGEST_DIMENSION = 2**29


class Element(sympy.Expr):
    """`Element(Str(node name), *index)`: one value of a tensor about which nothing else is known."""

    is_commutative = True
    is_integer = True


class Shifted(sympy.Expr):
    """`Shifted(element, n)`: element + n in the tensor's own dtype; kept whole because that sum can wrap."""

    is_commutative = True
    is_integer = True


class Select(sympy.Expr):
    """`Select(condition, chosen, other)`: one of two integers; left as it is, unlike sympy's Piecewise."""

    is_commutative = True
    is_integer = True

    def __new__(cls, condition: Boolean, chosen: sympy.Expr | int, other: sympy.Expr | int) -> Select:
        return super().__new__(cls, condition, sympy.sympify(chosen), sympy.sympify(other))


def size_expression(size: int | torch.SymInt | sympy.Expr) -> sympy.Expr:
    """The expression of a dimension, read off a SymInt without adding a guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)


def terms(expr: sympy.Expr) -> dict[sympy.Expr, sympy.Integer]:
    """`expr` as {term: coefficient}; the constant is the coefficient of one."""
    return dict(_terms(expr))


@lru_cache(maxsize=4096)
def _terms(expr: sympy.Expr) -> tuple[tuple[sympy.Expr, sympy.Integer], ...]:
    return tuple(sympy.expand(expr).as_coefficients_dict().items())


def has_unknown(expr: sympy.Basic) -> bool:
    """Whether a tensor's value takes part."""
    return expr.has(Element)


@lru_cache(maxsize=4096)
def nonpositive(expr: sympy.Expr) -> Boolean:
    """The condition `expr <= 0`, divided by the common factor of its coefficients."""
    parts = terms(expr)
    constant = parts.pop(sympy.S.One, sympy.S.Zero)
    if not parts:
        return sympy.true if constant <= 0 else sympy.false
    if all(c.is_Integer for c in (constant, *parts.values())):
        factor = gcd(*(int(c) for c in parts.values()))
        parts = {term: c / factor for term, c in parts.items()}
        constant = sympy.ceiling(constant / factor)
    return sympy.Le(sympy.Add(constant, *(c * term for term, c in parts.items())), 0)


def at_most(left: sympy.Expr, right: sympy.Expr) -> Boolean:
    """The condition `left <= right`; an absolute value on either side is split into its two cases."""
    if isinstance(left, sympy.Abs):
        return sympy.And(at_most(left.args[0], right), at_most(-left.args[0], right))
    if isinstance(right, sympy.Abs):
        return sympy.Or(at_most(left, right.args[0]), at_most(left, -right.args[0]))
    return nonpositive(left - right)


def less(left: sympy.Expr, right: sympy.Expr) -> Boolean:
    """The condition `left < right`."""
    return sympy.Not(at_most(right, left))


def equal(left: sympy.Expr, right: sympy.Expr) -> Boolean:
    """The condition `left == right`; between sums of positions it is a pair of inequalities."""
    difference = sympy.expand(left - right)
    if difference.is_Integer:
        return sympy.true if difference == 0 else sympy.false
    if all(term.is_Symbol or term == 1 for term in terms(difference)):
        return sympy.And(nonpositive(difference), nonpositive(-difference))
    first, second = sorted((left, right), key=lambda side: (side.is_Integer, default_sort_key(side)))
    return sympy.Eq(first, second)


@dataclass
class Bounds:
    """What is known of the symbols: an index lies in [0, length), a size in its range."""

    lengths: dict[sympy.Symbol, sympy.Expr] = field(default_factory=dict)
    sizes: dict[sympy.Symbol, tuple[int | None, int | None]] = field(default_factory=dict)

    def learn_size(self, size: int | torch.SymInt) -> sympy.Expr:
        """`size_expression`, remembering the ranges of the symbols in it."""
        expr = size_expression(size)
        for symbol in expr.free_symbols:
            if symbol not in self.sizes and isinstance(size, torch.SymInt):
                self.sizes[symbol] = _range(size.node.shape_env, symbol)
        return expr

    def never_positive(self, expr: sympy.Expr) -> bool:
        """True only where `expr <= 0` holds for every index and every size."""
        total = sympy.S.Zero
        for term, factor in terms(self._at_extreme(expr)).items():
            if term == 1:
                total += factor
            elif term in self.sizes:
                low, high = self.sizes[term]
                extreme = high if factor > 0 else low
                if extreme is None:
                    return False
                total += factor * extreme
            elif not (factor < 0 and term.is_nonnegative):
                return False
        return bool(total <= 0)

    def within(self, expr: sympy.Expr, length: sympy.Expr) -> bool:
        """True only where `0 <= expr < length` always holds."""
        return self.never_positive(-expr) and self.never_positive(expr + 1 - length)

    def fits(self, expr: sympy.Expr, dtype: torch.dtype) -> bool:
        """Whether positions and sizes can never take `expr` out of an integer dtype."""
        return max(self._reach(expr), self._reach(-expr)) <= torch.iinfo(dtype).max

    def _reach(self, expr: sympy.Expr) -> float:
        """How large `expr` can get; infinite where a scalar input, neither position nor size, takes part."""
        reach = 0
        for term, factor in terms(self._at_extreme(expr)).items():
            low = 1 if term == 1 else self.sizes.get(term, (None, None))[0]
            if low is None or low < 0:
                return inf
            reach += int(factor) * (1 if term == 1 else LONGEST_DIMENSION if factor > 0 else low)
        return reach

    def _at_extreme(self, expr: sympy.Expr) -> sympy.Expr:
        """`expr` with each index where it makes the value largest."""
        for _ in range(len(self.lengths)):  # a length can itself hold no index, so one round for each suffices
            for term, factor in terms(expr).items():
                if term in self.lengths:
                    expr = expr.subs(term, self.lengths[term] - 1 if factor > 0 else 0)
                    break
        return sympy.expand(expr)


def _range(shape_env, symbol: sympy.Symbol) -> tuple[int | None, int | None]:
    known = shape_env.var_to_range.get(symbol)
    if known is None:
        return None, None
    low, high = (int(bound) if bound.is_Integer else None for bound in (known.lower, known.upper))
    return low, high
