"""Reading an attention mask: from the graph that builds it to an exact MaskSpec, or to the reason why not."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from sympy.core.symbol import Str
from sympy.logic.boolalg import Boolean
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

import mmcompile.passes.value_rules
import mmcompile.passes.view_rules  # noqa: F401  (both register rules)
from mmcompile.passes.element_values import Unreadable, Value, cases_of, is_constant
from mmcompile.passes.emit_sizes import UnknownSize, check_size
from mmcompile.passes.graph import fake_value
from mmcompile.passes.index_expressions import BATCH, HEAD, KEY, QUERY, Bounds, Element
from mmcompile.passes.mask_clauses import clauses_of
from mmcompile.passes.mask_parts import assemble
from mmcompile.passes.mask_spec import MaskSpec, OpaqueMask
from mmcompile.passes.read_tensors import TensorReader


def read_mask(
    mask: fx.Node, query_length: int | torch.SymInt | sympy.Expr, key_length: int | torch.SymInt | sympy.Expr
) -> MaskSpec | OpaqueMask:
    """Read the mask of a `scaled_dot_product_attention` node.

    `mask` is the node given as `attn_mask`: bool (True: allowed) or additive float, `[Sq, Sk]` up to
    `[B, H, Sq, Sk]`, in a torch-level graph (`meta["example_value"]`) or an ATen graph (`meta["val"]`).
    Nothing is allocated and no size is guarded. The result is exact for every position and every size,
    whatever the graph's inputs hold, or it is opaque.
    """
    bounds = Bounds()
    lengths = bounds.learn_size(query_length), bounds.learn_size(key_length)
    try:
        with unset_fake_temporarily():
            return _read(mask, *lengths, bounds)
    except Unreadable as refusal:
        return OpaqueMask(str(refusal))
    except RecursionError:
        return OpaqueMask("a mask of too many operations")


def _read(mask: fx.Node, query_length: sympy.Expr, key_length: sympy.Expr, bounds: Bounds) -> MaskSpec:
    reader = TensorReader(mask.graph, query_length, key_length, bounds)
    index = _mask_index(mask, reader)
    condition, finite = _allowed(reader.element(mask, index), reader.dtype(mask), bounds)
    clauses = clauses_of(condition, bounds)
    if clauses is None:
        raise Unreadable("no position is allowed")
    parts = assemble(clauses, reader)
    spec = MaskSpec(query_length=query_length, key_length=key_length, **parts)
    if finite and not _no_row_is_empty(spec, bounds):
        raise Unreadable("additive mask with a finite value: a row without any allowed key would attend to all of them")
    _check_sizes(spec, mask.graph)
    return replace(spec, tensors=_tensors_of(spec, reader), device=fake_value(mask).device)


def _mask_index(mask: fx.Node, reader: TensorReader) -> tuple[sympy.Expr, ...]:
    """The index of element (batch, head, query, key), aligned to the right as SDPA broadcasts it."""
    if not isinstance(fake_value(mask), torch.Tensor):
        raise Unreadable("the mask has no recorded shape")
    shape = reader.shape(mask)
    if len(shape) > 4:
        raise Unreadable(f"a mask of {len(shape)} dimensions")
    for size, expected in zip(shape[-2:], (reader.query_length, reader.key_length)[-len(shape) :], strict=False):
        if size != 1 and size.is_Integer and expected.is_Integer and size != expected:
            raise Unreadable(f"a mask of shape {list(shape)}")
    lengths = reader.bounds.lengths
    lengths[QUERY], lengths[KEY] = reader.query_length, reader.key_length
    symbols = (BATCH, HEAD, QUERY, KEY)[4 - len(shape) :]
    for symbol, size in zip(symbols, shape, strict=True):
        lengths[symbol] = size
    return tuple(sympy.S.Zero if size == 1 else symbol for symbol, size in zip(symbols, shape, strict=True))


def _allowed(value: Value, dtype: torch.dtype, bounds: Bounds) -> tuple[Boolean, bool]:
    """Where the mask lets a key through, and whether it stops others by a finite number instead of -inf."""
    if dtype == torch.bool:
        return value, False
    if not dtype.is_floating_point:
        raise Unreadable(f"a mask of {dtype}")
    allowed, finite = sympy.false, False
    for guard, number in cases_of(value):
        if not is_constant(number):
            raise Unreadable("additive mask with values that are not constants")
        if number == 0.0:
            allowed = sympy.Or(allowed, guard)
        elif number != float("-inf") and clauses_of(guard, bounds) is not None:
            if not number == torch.finfo(dtype).min:
                raise Unreadable(f"additive mask with the value {number}")
            finite = True
    return allowed, finite


def _no_row_is_empty(spec: MaskSpec, bounds: Bounds) -> bool:
    """Whether every query is sure to have an allowed key."""
    if spec.key_valid is not None:
        return False
    if spec.query_segment is not None and spec.key_segment is not None:
        same = spec.query_segment.xreplace({QUERY: KEY}) == spec.key_segment
        if not same or spec.query_length != spec.key_length or spec.offset != 0:
            return False
    if spec.window is not None and not bounds.never_positive(spec.query_length + spec.offset - spec.key_length):
        return False  # the window of the last queries may lie behind the last key
    return not spec.causal or bounds.never_positive(-sympy.sympify(spec.offset))


def _check_sizes(spec: MaskSpec, graph: fx.Graph) -> None:
    """Unreadable where the spec has a size that cannot be had from the graph's inputs."""
    pending: list[sympy.Basic] = [sympy.sympify(spec.offset), *_rows(spec)]
    while pending:
        part = pending.pop()
        if isinstance(part, sympy.Expr) and not part.has(BATCH, QUERY, KEY, Element):
            try:
                check_size(graph, part)
            except UnknownSize as error:
                raise Unreadable(str(error)) from error
        elif not isinstance(part, Str):
            pending.extend(part.args)


def _rows(spec: MaskSpec) -> list[sympy.Basic]:
    sides = (spec.key_valid, spec.query_segment, spec.key_segment, spec.query_span, spec.key_span)
    return [side for side in sides if side is not None]


def _tensors_of(spec: MaskSpec, reader: TensorReader) -> dict[str, fx.Node]:
    names = {atom.name for side in _rows(spec) for atom in side.atoms(Str)}
    return {name: reader.unknown[name] for name in sorted(names)}
