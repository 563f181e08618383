"""Matching the clauses of a mask's condition to the parts of a MaskSpec."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import sympy
from sympy.logic.boolalg import Boolean

from mmcompile.passes.element_values import Unreadable
from mmcompile.passes.index_expressions import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    Element,
    Select,
    nonpositive,
    terms,
)
from mmcompile.passes.mask_clauses import Clause, Literal, clauses_of, implies, negated
from mmcompile.passes.packed_positions import in_places, token_places
from mmcompile.passes.read_tensors import TensorReader

Sides: TypeAlias = tuple[sympy.Expr, sympy.Expr]  # over the query, and what it equals over the key

_OF_QUERIES, _OF_KEYS = {BATCH, QUERY}, {BATCH, KEY}


def assemble(clauses: Iterable[Clause], reader: TensorReader) -> dict[str, Any]:
    """The fields of the MaskSpec that the conjunction of `clauses` is; Unreadable where it is none."""
    upper: set[sympy.Expr] = set()
    lower: set[sympy.Expr] = set()
    spans: dict[sympy.Expr, list[Clause]] = {}
    others: list[Clause] = []
    for clause in sorted(_among_tokens(clauses, reader), key=str):
        reach = {literal: _reach(literal) for literal in clause}
        limits = [limit for limit in reach.values() if limit is not None]
        if not limits:
            others.append(clause)
        elif len(clause) == 1:
            (upper if limits[0][0] == "upper" else lower).add(limits[0][1])
        elif [side for side, _ in limits] == ["upper"]:
            alternatives = frozenset(literal for literal, limit in reach.items() if limit is None)
            spans.setdefault(limits[0][1], []).append(alternatives)
        else:
            raise Unreadable(_reason(clause))
    fields = _rows(others)
    if len(upper | set(spans)) > 1:
        raise Unreadable("more than one causal bound")
    if spans:
        ((bound, clauses_of_spans),) = spans.items()
        fields |= _spans(clauses_of_spans, reader)
        upper = {bound}
    return fields | _limits(upper, lower, reader)


def _among_tokens(clauses: Iterable[Clause], reader: TensorReader) -> frozenset[Clause]:
    """The clauses with comparisons of packed position ids turned into comparisons of tokens."""
    places: dict[sympy.Expr, sympy.Expr] = {}
    for clause in clauses:
        if len(clause) == 1 and isinstance(next(iter(clause)), sympy.Eq):
            places |= token_places(next(iter(clause)), reader)
    if not places:
        return frozenset(clauses)
    rewritten = [sympy.Or(*(in_places(literal, places) for literal in clause)) for clause in clauses]
    result = clauses_of(sympy.And(*rewritten), reader.bounds)
    if result is None:
        raise Unreadable("no position is allowed")
    return result


def _reach(literal: Literal) -> tuple[str, sympy.Expr] | None:
    """("upper", c) for key <= query + c, ("lower", c) for key >= query + c, c the same for every element."""
    if not isinstance(literal, sympy.Le):
        return None
    rest = terms(literal.lhs)
    pair = rest.pop(KEY, 0), rest.pop(QUERY, 0)
    offset = sympy.Add(*(factor * term for term, factor in rest.items()))
    if offset.free_symbols & {BATCH, HEAD, KEY, QUERY} or offset.has(Element):
        return None
    return {(1, -1): ("upper", -offset), (-1, 1): ("lower", offset)}.get(pair)


def _limits(upper: set[sympy.Expr], lower: set[sympy.Expr], reader: TensorReader) -> dict[str, Any]:
    """The causal, offset and window fields."""
    bounds = reader.bounds
    if len(lower) > 1:
        raise Unreadable("more than one window")
    first = next(iter(lower), None)
    if not upper:
        if first is None:
            return {"causal": False}
        offset = first if bounds.never_positive(1 - first) else sympy.S.Zero
    else:
        offset = next(iter(upper))
    if bounds.never_positive(offset + 1):
        raise Unreadable(f"the first queries see no key (offset {offset})")
    if upper and bounds.never_positive(reader.key_length - reader.query_length + 1 - offset):
        raise Unreadable(f"queries see later keys than their own (offset {offset})")
    window = None if first is None else sympy.expand(offset - first + 1)
    if window is not None and not window.is_Integer:
        raise Unreadable(f"a window of {window}, which is no constant")
    return {
        "causal": bool(upper),
        "offset": int(offset) if offset.is_Integer else offset,
        "window": None if window is None else int(window),
    }


class _Matches:
    """Clauses by what they restrict: equal ids of query and key, queries alone, keys alone."""

    def __init__(self, clauses: Iterable[Clause]) -> None:
        self.equal: list[Sides] = []
        self.queries: list[Clause] = []
        self.keys: list[Clause] = []
        pending = list(clauses)
        while pending:
            clause = pending.pop(0)
            partner = frozenset(negated(literal) for literal in clause)
            if _over(clause, _OF_KEYS):
                self.keys.append(clause)
            elif _over(clause, _OF_QUERIES):
                self.queries.append(clause)
            elif (sides := _equal_ids(clause)) is not None:
                self.equal.append(sides)
            elif partner in pending and (sides := _equal_conditions(clause)) is not None:
                pending.remove(partner)
                self.equal.append(sides)
            else:
                raise Unreadable(_reason(clause))


def _rows(clauses: list[Clause]) -> dict[str, Any]:
    """The key_valid and segment fields."""
    found = _Matches(clauses)
    if found.queries:
        raise Unreadable(f"a condition on queries alone: {_text(found.queries[0])}")
    if len(found.equal) > 1:
        raise Unreadable("more than one equality of ids")
    query_segment, key_segment = found.equal[0] if found.equal else (None, None)
    return {
        "key_valid": _conjunction(found.keys) if found.keys else None,
        "query_segment": query_segment,
        "key_segment": key_segment,
    }


def _spans(clauses: list[Clause], reader: TensorReader) -> dict[str, Any]:
    """The span fields out of what is allowed besides causal."""
    # Beside the causal bound each clause was an alternative; now that they stand alone, one settles parts of another.
    settled = clauses_of(_conjunction(clauses), reader.bounds)
    if settled is None:
        raise Unreadable("no span is allowed")
    found = _Matches(sorted(settled, key=str))
    if len(found.equal) > 1:
        raise Unreadable("more than one equality of ids among the spans")
    query_id, key_id = found.equal[0] if found.equal else (sympy.S.Zero, sympy.S.Zero)
    if not _never_negative(query_id, key_id, found, reader):
        raise Unreadable("spans by equal ids without a condition that the ids are not negative")
    of_queries = [clause for clause in found.queries if clause != _nonnegative(query_id)]
    of_keys = [clause for clause in found.keys if clause != _nonnegative(key_id)]
    return {
        "query_span": Select(_conjunction(of_queries), query_id, -1) if of_queries else query_id,
        "key_span": Select(_conjunction(of_keys), key_id, -2) if of_keys else key_id,
    }


def _never_negative(query_id: sympy.Expr, key_id: sympy.Expr, found: _Matches, reader: TensorReader) -> bool:
    """Whether the ids of a span are sure to be 0 or more, which the plan asks of the query's."""
    for identity, conditions in ((query_id, found.queries), (key_id, found.keys)):
        goal = nonpositive(-identity)
        if reader.bounds.never_positive(-identity) or reader.is_unsigned(identity):
            return True
        if any(len(c) == 1 and implies(next(iter(c)), goal, reader.bounds) for c in conditions):
            return True
    return False


def _nonnegative(identity: sympy.Expr) -> Clause:
    return frozenset([nonpositive(-identity)])


def _conjunction(clauses: Iterable[Clause]) -> Boolean:
    return sympy.And(*(sympy.Or(*clause) for clause in clauses))


def _over(part: Clause | Literal | sympy.Expr, symbols: set[sympy.Symbol]) -> bool:
    """Whether the indices in `part` are all among `symbols`; sizes do not count."""
    literals = part if isinstance(part, frozenset) else (part,)
    return all(_indices(literal) <= symbols for literal in literals)


def _indices(part: sympy.Basic) -> set[sympy.Symbol]:
    return {symbol for symbol in part.free_symbols if symbol in (BATCH, HEAD, QUERY, KEY) or " " in symbol.name}


def _equal_ids(clause: Clause) -> Sides | None:
    literal = next(iter(clause))
    if len(clause) != 1 or not isinstance(literal, sympy.Eq):
        return None
    for sides in (literal.args, literal.args[::-1]):
        if _over(sides[0], _OF_QUERIES) and _over(sides[1], _OF_KEYS):
            return sides
    return None


def _equal_conditions(clause: Clause) -> Sides | None:
    """`(x or y) and (not x or not y)`, x on queries, y on keys: x differs from y, as ids of 1 and 0 do."""
    literals = sorted(clause, key=lambda literal: _over(literal, _OF_KEYS))
    if len(literals) != 2 or not _over(literals[0], _OF_QUERIES) or not _over(literals[1], _OF_KEYS):
        return None
    return Select(literals[0], 1, 0), Select(literals[1], 0, 1)


def _reason(clause: Clause) -> str:
    """Why a clause is no part of a MaskSpec."""
    indices = set().union(*(_indices(literal) for literal in clause))
    if HEAD in indices:
        return f"a condition that differs between heads: {_text(clause)}"
    for literal in clause:
        for element in literal.atoms(Element):
            if {QUERY, KEY} <= element.free_symbols:
                return f"the values of {element.args[0].name}, one for each query and key"
    if len(clause) == 1 and isinstance(next(iter(clause)), sympy.Le):
        return f"a data-dependent bound between query and key: {_text(clause)}"
    return f"a condition between query and key of no known form: {_text(clause)}"


def _text(clause: Clause) -> str:
    return " or ".join(sorted(map(str, clause)))[:200]
