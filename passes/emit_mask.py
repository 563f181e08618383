"""Writing a read mask back into the graph as rows: [B, Sk] and [B, Sq] tensors, never queries x keys."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from mmcompile.passes.emit_rows import RowEmitter, SizeArgument, emit_size
from mmcompile.passes.id_ranges import fits_int32
from mmcompile.passes.index_expressions import KEY, QUERY
from mmcompile.passes.mask_spec import MaskSpec

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class MaskNodes:
    """The rows of a mask as nodes that `plan` takes; None where the mask has no such part.

    key_valid: bool [B, Sk]; query_segment, query_span: integer [B, Sq]; key_segment, key_span: integer
    [B, Sk]; the ids fit 32 bits. offset: how many keys lie before the first query, an int or a SymInt's node.
    """

    key_valid: fx.Node | None
    query_segment: fx.Node | None
    key_segment: fx.Node | None
    query_span: fx.Node | None
    key_span: fx.Node | None
    offset: SizeArgument


def emit_mask(
    graph: fx.Graph, spec: MaskSpec, batch: SizeArgument, query_length: SizeArgument, key_length: SizeArgument
) -> MaskNodes:
    """Insert the rows of `spec` at the graph's insertion point, behind the tensors that it reads.

    batch, query_length, key_length: ints, or nodes of SymInts. Every new node gets its fake value; all are
    ATen operations, which a torch-level graph runs as well as an exported one.
    """
    queries = RowEmitter(graph, spec, QUERY, batch, query_length)
    keys = RowEmitter(graph, spec, KEY, batch, key_length)
    query_segment, key_segment = _equal_ids(queries, keys, spec.query_segment, spec.key_segment)
    query_span, key_span = _equal_ids(queries, keys, spec.query_span, spec.key_span)
    if query_span is not None and not _small_ids(spec, spec.query_span, spec.key_span):
        ids = queries.full(queries.number(spec.query_span))
        query_span = queries.call(_ATEN.where.ScalarOther, queries.call(_ATEN.ge.Scalar, ids, 0), query_span, -1)
    return MaskNodes(
        key_valid=None if spec.key_valid is None else keys.full(keys.condition(spec.key_valid)),
        query_segment=query_segment,
        key_segment=key_segment,
        query_span=query_span,
        key_span=key_span,
        offset=emit_size(graph, sympy.sympify(spec.offset)),
    )


def _equal_ids(
    queries: RowEmitter, keys: RowEmitter, query_id: sympy.Expr | None, key_id: sympy.Expr | None
) -> tuple[fx.Node | None, fx.Node | None]:
    """Both sides of an equality of ids, in 32 bits: larger ids become their rank among all ids of the row."""
    if query_id is None or key_id is None:
        return None, None
    sides = queries.full(queries.number(query_id)), keys.full(keys.number(key_id))
    if _small_ids(queries.spec, query_id, key_id):
        return sides
    both = queries.call(_ATEN.cat.default, list(sides), 1)  # [B, Sq + Sk]
    ordered = queries.call(operator.getitem, queries.call(_ATEN.sort.default, both, 1), 0)
    query_rank, key_rank = (
        queries.call(_ATEN.searchsorted.Tensor, ordered, queries.call(_ATEN.contiguous.default, side), out_int32=True)
        for side in sides
    )
    return query_rank, key_rank


def _small_ids(spec: MaskSpec, *ids: sympy.Expr | None) -> bool:
    return all(fits_int32(identity, spec.tensors) for identity in ids if identity is not None)
