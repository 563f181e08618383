"""A mask's condition as a conjunction of clauses, each a set of alternatives, without what is certain.

Conjunctive form is what a MaskSpec is: every clause narrows the mask by itself. `(causal and padding) or
(same block and padding)` and `(causal or same block) and padding` come out the same.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import TypeAlias

import sympy
from sympy.logic.boolalg import Boolean, to_nnf

from mmcompile.passes.element_values import Unreadable
from mmcompile.passes.index_expressions import Bounds, nonpositive

Literal: TypeAlias = Boolean
Clause: TypeAlias = frozenset[Literal]

MOST_CLAUSES = 256


def clauses_of(condition: Boolean, bounds: Bounds) -> frozenset[Clause] | None:
    """The simplified clauses of a condition; empty where it always holds, None where it never does."""
    clauses = _distribute(to_nnf(condition, simplify=False), bounds)
    return _propagate(clauses, bounds)


@lru_cache(maxsize=4096)
def negated(literal: Literal) -> Literal:
    """The opposite literal, in normal form."""
    return normal(sympy.Not(literal))


def implies(first: Literal, second: Literal, bounds: Bounds) -> bool:
    """True only where `first` can never hold without `second`."""
    if first == second:
        return True
    if isinstance(first, sympy.Le) and isinstance(second, sympy.Le):
        return bounds.never_positive(second.lhs - first.lhs)
    if isinstance(first, sympy.Le) and isinstance(second, sympy.Ne):
        # Were the two sides equal, `first` would be positive.
        difference = second.lhs - second.rhs
        return any(bounds.never_positive(1 - first.lhs - sign * difference) for sign in (1, -1))
    return False


def normal(literal: Boolean) -> Boolean:
    """Inequalities as `expr <= 0`; equalities as they are."""
    if isinstance(literal, sympy.Gt):
        return nonpositive(literal.rhs - literal.lhs + 1)
    if isinstance(literal, sympy.Lt):
        return nonpositive(literal.lhs - literal.rhs + 1)
    if isinstance(literal, sympy.Ge):
        return nonpositive(literal.rhs - literal.lhs)
    if isinstance(literal, sympy.Le):
        return nonpositive(literal.lhs - literal.rhs)
    return literal


def _distribute(condition: Boolean, bounds: Bounds) -> frozenset[Clause]:
    if isinstance(condition, sympy.And):
        return _absorb([clause for part in condition.args for clause in _distribute(part, bounds)], bounds)
    if isinstance(condition, sympy.Or):
        clauses: frozenset[Clause] = frozenset([frozenset()])
        for part in condition.args:
            combined = [a | b for a, b in product(clauses, _distribute(part, bounds))]
            clauses = _absorb(combined, bounds)
        return clauses
    if condition is sympy.true:
        return frozenset()
    if condition is sympy.false:
        return frozenset([frozenset()])
    return _absorb([frozenset([normal(condition)])], bounds)


def _absorb(clauses: list[Clause], bounds: Bounds) -> frozenset[Clause]:
    """Without clauses that always hold or that follow from another one."""
    kept: list[Clause] = []
    narrowed = {_narrowed(clause, bounds) for clause in clauses}
    for clause in sorted((c for c in narrowed if c is not None), key=len):
        if not any(_follows(other, clause, bounds) for other in kept):
            kept.append(clause)
    if len(kept) > MOST_CLAUSES:
        raise Unreadable("a condition of too many clauses")
    return frozenset(kept)


def _narrowed(clause: Clause, bounds: Bounds) -> Clause | None:
    """The clause without alternatives that never hold or that another covers; None where it always holds."""
    literals = [literal for literal in clause if not _never(literal, bounds)]
    if any(_always(literal, bounds) for literal in literals):
        return None
    for literal in literals:
        opposite = negated(literal)
        if any(implies(opposite, other, bounds) for other in literals):
            return None
    widest: list[Literal] = []
    for literal in sorted(literals, key=str):
        if any(implies(literal, other, bounds) for other in widest):
            continue
        widest = [other for other in widest if not implies(other, literal, bounds)] + [literal]
    return frozenset(widest)


def _follows(clause: Clause, other: Clause, bounds: Bounds) -> bool:
    return all(any(implies(literal, wider, bounds) for wider in other) for literal in clause)


def _always(literal: Literal, bounds: Bounds) -> bool:
    return literal is sympy.true or (isinstance(literal, sympy.Le) and bounds.never_positive(literal.lhs))


def _never(literal: Literal, bounds: Bounds) -> bool:
    return literal is sympy.false or (isinstance(literal, sympy.Le) and bounds.never_positive(1 - literal.lhs))


def _propagate(clauses: frozenset[Clause], bounds: Bounds) -> frozenset[Clause] | None:
    """Drop alternatives that a one-literal clause rules out, until nothing changes."""
    while True:
        facts = [next(iter(clause)) for clause in clauses if len(clause) == 1]
        narrowed = []
        for clause in clauses:
            ruled_out = {
                literal
                for literal in clause
                if any(fact is not literal and implies(fact, negated(literal), bounds) for fact in facts)
            }
            narrowed.append(clause - ruled_out)
        if frozenset() in narrowed:
            return None
        simplified = _absorb(narrowed, bounds)
        if simplified == clauses:
            return clauses
        clauses = simplified
