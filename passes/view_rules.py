"""Reading views: a view's element is its source's element at another index."""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from mmcompile.passes.element_values import Unreadable, Value, cases_of
from mmcompile.passes.graph import fake_value
from mmcompile.passes.index_expressions import has_unknown
from mmcompile.passes.read_tensors import Index, TensorReader, rule

_WHOLE = slice(None)
_NO_END = 2**63 - 1


@rule("unsqueeze")
def unsqueeze(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, dim: int) -> Value:
    dim = reader.integer(dim) % len(index)
    return reader.element(source, index[:dim] + index[dim + 1 :])


@rule("squeeze", "view", "reshape", "view_as", "reshape_as", "_unsafe_view", "flatten", "unflatten")
def reshape(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, *sizes: Any, **options: Any) -> Value:
    """A reshape that only adds or removes dimensions of 1, whatever its arguments look like."""
    kept = [place for place, size in zip(index, reader.shape(node), strict=True) if size != 1]
    shape = reader.shape(source)
    if [size for size in shape if size != 1] != [size for size in reader.shape(node) if size != 1]:
        raise Unreadable(f"{node.name} reshapes more than dimensions of 1")
    places = iter(kept)
    return reader.element(source, [sympy.S.Zero if size == 1 else next(places) for size in shape])


@rule("expand", "expand_as", "broadcast_to")
def expand(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, *sizes: Any, **options: Any) -> Value:
    return reader.element(source, reader.broadcast(source, reader.shape(node), index))


@rule("permute")
def permute(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, *dims: Any) -> Value:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
    places = list(index)
    for position, dim in enumerate(order):
        places[reader.integer(dim) % len(index)] = index[position]
    return reader.element(source, places)


@rule("transpose")
def transpose(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, dim0: int, dim1: int) -> Value:
    first, second = reader.integer(dim0) % len(index), reader.integer(dim1) % len(index)
    places = list(index)
    places[first], places[second] = places[second], places[first]
    return reader.element(source, places)


@rule("t", "mT", "adjoint")
def transpose_last(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node) -> Value:
    return reader.element(source, index[:-2] + index[-2:][::-1])


@rule("slice")
def slice_dim(
    reader: TensorReader,
    node: fx.Node,
    index: Index,
    source: fx.Node,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Value:
    key = [_WHOLE] * len(index)
    key[reader.integer(dim) % len(index)] = slice(start, None if end == _NO_END else end, step)
    return subscript(reader, node, index, source, tuple(key))


@rule("narrow")
def narrow(
    reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, dim: int, start: Any, length: Any
) -> Value:
    first = reader.size(start)
    if not reader.bounds.never_positive(-first):
        raise Unreadable(f"{node.name} starts at a position that may be negative")
    dim = reader.integer(dim) % len(index)
    return reader.element(source, (*index[:dim], index[dim] + first, *index[dim + 1 :]))


@rule("select")
def select(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, dim: int, position: Any) -> Value:
    shape = reader.shape(source)
    dim = reader.integer(dim) % len(shape)
    return reader.element(source, (*index[:dim], _wrapped(reader, position, shape[dim]), *index[dim:]))


@rule("index")
def index_tensor(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, indices: Any) -> Value:
    key = tuple(_WHOLE if entry is None else entry for entry in indices)
    return subscript(reader, node, index, source, key)


@rule("index_select")
def index_select(
    reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, dim: int, positions: fx.Node
) -> Value:
    key: list[Any] = [_WHOLE] * len(index)
    key[reader.integer(dim) % len(index)] = positions
    return subscript(reader, node, index, source, tuple(key))


@rule("getitem")
def subscript(reader: TensorReader, node: fx.Node, index: Index, source: fx.Node, key: Any) -> Value:
    """`source[key]` with None, Ellipsis, slices, integers and tensors of positions in the key."""
    shape = reader.shape(source)
    entries = _without_ellipsis(key if isinstance(key, tuple) else (key,), len(shape))
    tensors = [_is_tensor(entry) for entry in entries]
    block = _advanced_dimensions(reader, entries, tensors)
    apart = _at_front(entries, tensors)
    rest = list(index)
    position = rest[: len(block)] if apart else None
    rest = rest[len(block) :] if apart else rest

    places: list[sympy.Expr] = []
    certain = True
    dims = iter(shape)
    for entry, advanced in zip(entries, tensors, strict=True):
        if entry is None:
            rest.pop(0)
            continue
        size = next(dims)
        if advanced:
            if position is None:
                position, rest = rest[: len(block)], rest[len(block) :]
            places.append(_gathered(reader, entry, block, tuple(position)))
            certain = certain and reader.bounds.within(places[-1], size)
        elif isinstance(entry, slice):
            length = reader.shape(node)[len(index) - len(rest)]
            places.append(_sliced(reader, entry, size, length, rest.pop(0)))
        else:
            places.append(_wrapped(reader, entry, size))
    if rest:
        raise Unreadable(f"subscript of {source.name}")
    if certain:
        return reader.element(source, places)
    # Positions out of range count from the end or fail. They still will, if the tensor itself is read by them.
    outside = Unreadable(f"positions that {node.name} may take outside of {source.name}")
    return reader.unknown_element(source, tuple(places), outside)


def _without_ellipsis(key: tuple | list, dimensions: int) -> list[Any]:
    consumed = sum(entry is not None and entry is not Ellipsis for entry in key)
    missing = [_WHOLE] * (dimensions - consumed)
    entries: list[Any] = []
    for entry in key:
        entries.extend(missing if entry is Ellipsis else [entry])
    return entries if any(entry is Ellipsis for entry in key) else entries + missing


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, fx.Node) and hasattr(fake_value(entry), "dtype")


def _advanced_dimensions(reader: TensorReader, entries: list[Any], tensors: list[bool]) -> tuple[sympy.Expr, ...]:
    """The shape that the key's position tensors broadcast to."""
    shapes = [reader.shape(entry) for entry, advanced in zip(entries, tensors, strict=True) if advanced]
    if () in shapes and any(shapes):
        raise Unreadable("a subscript by scalar tensors among others")  # torch selects by those first
    block = [sympy.S.One] * max(map(len, shapes), default=0)
    for shape in shapes:
        for back, size in enumerate(reversed(shape), start=1):
            block[-back] = size if block[-back] == 1 else block[-back]
    return tuple(block)


def _at_front(entries: list[Any], tensors: list[bool]) -> bool:
    """Whether torch puts the broadcast positions first: more than integers stands between them."""
    kept = [
        advanced
        for entry, advanced in zip(entries, tensors, strict=True)
        if advanced or entry is None or isinstance(entry, slice)
    ]
    spots = [spot for spot, advanced in enumerate(kept) if advanced]
    return bool(spots) and spots[-1] - spots[0] + 1 != len(spots)


def _gathered(reader: TensorReader, positions: fx.Node, block: tuple, place: Index) -> sympy.Expr:
    """The position that a tensor inside a key names."""
    if not reader.dtype(positions).is_signed or reader.dtype(positions).is_floating_point:
        raise Unreadable(f"{positions.name} selects positions by a mask")
    cases = cases_of(reader.element(positions, reader.broadcast(positions, block, place)))
    if len(cases) != 1 or isinstance(cases[0][1], float) or has_unknown(cases[0][1]):
        raise Unreadable(f"positions in {positions.name} depend on data")
    return cases[0][1]


def _wrapped(reader: TensorReader, position: Any, size: sympy.Expr) -> sympy.Expr:
    """An integer position, counted from the end where it is negative."""
    place = reader.size(position)
    if reader.bounds.never_positive(-place):
        return place
    if reader.bounds.never_positive(place + 1):
        return place + size
    raise Unreadable(f"position {position} of unknown sign")


def _sliced(reader: TensorReader, bounds: slice, size: sympy.Expr, length: sympy.Expr, place: sympy.Expr) -> sympy.Expr:
    """Where element `place` of a slice with `length` elements lies in a dimension of `size`."""
    step = 1 if bounds.step is None else reader.integer(bounds.step)
    if bounds.start is None:
        return step * place
    start = reader.size(bounds.start)
    if reader.bounds.never_positive(-start):
        return start + step * place
    if bounds.stop is None and step == 1:
        return size - length + place  # exact also where the start lies before the first element
    if reader.bounds.never_positive(start + 1) and reader.bounds.never_positive(-start - size):
        return size + start + step * place
    raise Unreadable(f"slice that starts at {bounds.start}")
