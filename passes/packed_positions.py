"""Packed sequences: comparing position ids compares tokens where the sequences were counted from those ids.

transformers numbers the sequences packed into a row by `cumsum(diff(position_ids) != 1)` and compares
position ids inside one sequence. There they rise by one a token, so the ids of two tokens differ as their
places do: `position[k] <= position[q]` is `k <= q`. (Ids that wrap around int64 are left out of account.)
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from mmcompile.passes.element_values import Unreadable, cases_of
from mmcompile.passes.index_expressions import Element, Shifted, nonpositive, terms
from mmcompile.passes.node_operations import operation
from mmcompile.passes.read_tensors import TensorReader

Places = dict[sympy.Expr, sympy.Expr]

_CASTS = ("to", "_to_copy", "long", "int")


def token_places(segment: Boolean, reader: TensorReader) -> Places:
    """{element of the position ids: the token's place}, inside the segments of `segment` (`a == b`)."""
    sides = segment.args
    if not all(isinstance(side, Element) for side in sides) or sides[0].args[:-1] != sides[1].args[:-1]:
        return {}
    positions = _counted_from(reader.unknown[sides[0].args[0].name], reader)
    if positions is None:
        return {}
    places: Places = {}
    for side in sides:
        index = side.args[1:]
        try:
            cases = cases_of(reader.element(positions, index))
        except Unreadable:
            return {}
        if len(cases) != 1 or not isinstance(cases[0][1], Element):
            return {}
        places[cases[0][1]] = index[-1]
    return places


def in_places(literal: Boolean, places: Places) -> Boolean:
    """The literal with a difference of two position ids replaced by the difference of the tokens' places."""
    if not places or not isinstance(literal, sympy.Le):
        return literal
    known = {term: _place(term, places) for term in terms(literal.lhs)}
    found = {term: place for term, place in known.items() if place is not None}
    if sorted(terms(literal.lhs)[term] for term in found) != [-1, 1]:
        return literal
    return nonpositive(literal.lhs.xreplace(found))


def _place(term: sympy.Expr, places: Places) -> sympy.Expr | None:
    if isinstance(term, Shifted):
        inner = places.get(term.args[0])
        return None if inner is None else inner + term.args[1]
    return places.get(term)


def _counted_from(node: fx.Node, reader: TensorReader) -> fx.Node | None:
    """`x` where the node is `cumsum(diff(x, prepend=one) != 1)` over the last dimension, of int64 `x`."""
    count = _arguments(node, "cumsum", ("input", "dim", "dtype"))
    if count is None or not _is_last(count.get("dim"), node, reader) or reader.dtype(node) != torch.int64:
        return None
    breaks = count["input"]
    while isinstance(breaks, fx.Node) and operation(breaks) in _CASTS and reader.dtype(breaks) == torch.int64:
        breaks = breaks.args[0]
    compared = _arguments(breaks, "ne", ("input", "other"))
    if compared is None or compared.get("other") != 1 or reader.dtype(breaks) != torch.bool:
        return None
    steps = _arguments(compared["input"], "diff", ("input", "n", "dim", "prepend", "append"))
    if steps is None or steps.get("n", 1) != 1 or not _is_last(steps.get("dim", -1), node, reader):
        return None
    positions = steps["input"]
    if reader.dtype(positions) != torch.int64 or reader.shape(positions) != reader.shape(node):
        return None
    if reader.shape(compared["input"]) != reader.shape(node) or not _one_before(steps, reader):
        return None
    chain = (node, count["input"], breaks, compared["input"], positions)
    return None if any(link in reader.mutated for link in chain) else positions


def _one_before(steps: dict[str, Any], reader: TensorReader) -> bool:
    """Whether the differences start with one for the first element, so that each stands at its token."""
    before = steps.get("prepend")
    return steps.get("append") is None and isinstance(before, fx.Node) and reader.shape(before)[-1] == 1


def _is_last(dim: Any, node: fx.Node, reader: TensorReader) -> bool:
    return isinstance(dim, int) and dim in (-1, len(reader.shape(node)) - 1)


def _arguments(node: Any, name: str, parameters: tuple[str, ...]) -> dict[str, Any] | None:
    """The arguments of a call of the operation `name` by parameter; None for any other node."""
    if not isinstance(node, fx.Node) or operation(node) != name:
        return None
    given = dict(zip(parameters, node.args, strict=False)) | node.kwargs
    given.setdefault("input", given.pop("self", None))
    return given if set(given) <= set(parameters) and isinstance(given["input"], fx.Node) else None
