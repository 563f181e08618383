"""Run what lies between attentions on some tokens at a time.

An MLP's intermediates are several times as wide as what goes in and comes out, and at a million tokens they alone fill
a GPU. So each stretch of nodes that work row by row becomes one call of `mminference::in_chunks`, which runs the
stretch on chunks of tokens and writes into the whole results. The inner backend compiles a stretch by itself, for any
number of tokens, and layers that are alike share what it compiled.

Other forms were weighed. The same chunks unrolled in the graph (a fixed number of them, of symbolic size) cost their
number times the compilation. torch's `scan` and `while_loop` copy what they carry from chunk to chunk. Splitting the
graph at the attentions, as serving engines do it, gives up one graph that the inner backend sees whole.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from typing import Any

import torch
from torch import fx

import mmcompile.kernels.in_chunks  # noqa: F401  registers torch.ops.mminference.in_chunks
from mmcompile.kernels.in_chunks import RowOutput, Stretch, register_stretch
from mmcompile.passes.graph import (
    Size,
    expression,
    fake_value,
    hint,
    output_node,
    same_size,
    set_fake_value,
    size_key,
)
from mmcompile.passes.node_operations import operation
from mmcompile.passes.token_rows import EXPANDS, PRODUCTS, RESHAPES, TokenRows, tensors

_FIRST = -1  # the stage of what needs no token-wise node
_VIEWS = (*RESHAPES, *EXPANDS, "transpose", "permute", "getitem", "split", "chunk", "unbind", "select")


@dataclass(frozen=True)
class ChunkedStretch:
    """A stretch as it was registered, and what compiling it needs.

    symbols: of each placeholder of `stretch.run`, a graph module at first, its sizes: an expression where it differs
        from call to call, the same where sizes are equal; None where it is a number.
    """

    name: str
    stretch: Stretch
    symbols: tuple[tuple[Any, ...], ...]


@dataclass
class Chunked:
    """What the pass changed: the kinds of stretches, by name, and how many of each there are."""

    kinds: dict[str, ChunkedStretch] = field(default_factory=dict)
    stretches: int = 0
    products: int = 0  # matrix products in them
    left: int = 0  # matrix products outside of them

    def describe(self) -> str:
        """In one line."""
        if not self.stretches:
            return "no matrix product works token by token"
        outside = f"; {self.left} matrix products stay whole" if self.left else ""
        return f"{self.products} matrix products in {self.stretches} stretches of {len(self.kinds)} kinds{outside}"


def chunk_tokens(module: fx.GraphModule, length: Size, chunk: int | None, compiler: str) -> Chunked:
    """Replace stretches in place.

    length: tokens of a sequence. chunk: tokens at a time; None leaves it to the op. compiler: names what will compile
    stretches; those of one compiler are shared between graphs.
    """
    graph = module.graph
    whole, stages, stretches = _find_stretches(graph, length)
    result = Chunked()
    places = {node: (*stages[node], index) for index, node in enumerate(graph.nodes) if node in stages}
    for nodes in stretches:
        form = _Form(whole, nodes)
        work = form.work(compiler)
        if work.name not in result.kinds:
            result.kinds[work.name] = form.register(work)
        result.stretches += 1
        result.products += sum(operation(node) in PRODUCTS for node in nodes)
        places |= dict.fromkeys(_replace(graph, form, work.name, chunk), places[nodes[0]])
        for node in reversed(nodes):
            graph.erase_node(node)
            del places[node]
    result.left = sum(operation(node) in PRODUCTS for node in graph.nodes)
    if stretches:
        _reorder(graph, places)
        graph.lint()
    return result


def _replace(graph: fx.Graph, form: "_Form", name: str, chunk: int | None) -> list[fx.Node]:
    """Have a call in the place of a stretch; returns the call and its results."""
    with graph.inserting_before(output_node(graph)):
        outputs = graph.call_function(torch.ops.mminference.in_chunks.default, (form.inputs, name, chunk))
        items = [graph.call_function(operator.getitem, (outputs, index)) for index in range(len(form.outputs))]
    set_fake_value(outputs, tuple(fake_value(node) for node in form.outputs))
    inside = set(form.nodes)
    for node, item in zip(form.outputs, items, strict=True):
        form.rows.dims[item] = form.rows.dims[node]
        set_fake_value(item, fake_value(node))
        item.meta |= {known: node.meta[known] for known in ("nn_module_stack", "stack_trace") if known in node.meta}
        for user in [user for user in node.users if user not in inside]:
            user.replace_input_with(node, item)
    return [outputs, *items]


def _find_stretches(graph: fx.Graph, length: Size) -> tuple[TokenRows, dict[fx.Node, Any], list[list[fx.Node]]]:
    """The nodes of each stretch, and of all nodes the stage in which they run and whether that is at its end."""
    rows = TokenRows.of(graph, length)
    while True:
        stages = _stages(graph, rows)
        members: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            if node in rows.computed:
                members.setdefault(stages[node][0], []).append(node)
        # Without a matrix product there is nothing that is wide.
        idle = [nodes for nodes in members.values() if not any(operation(node) in PRODUCTS for node in nodes)]
        stretches = [nodes for nodes in members.values() if nodes not in idle]
        unfit = [node for nodes in stretches for node in _Form(rows, nodes).unfit]
        leaving = unfit or [node for nodes in idle for node in nodes]
        if not leaving:
            return rows, stages, stretches
        rows.computed.difference_update(leaving)


def _stages(graph: fx.Graph, rows: TokenRows) -> dict[fx.Node, tuple[int, bool]]:
    """When each node runs: first what is token-wise in a stage, in one stretch, then the rest of the stage.

    Token-wise nodes run as late as their users allow, so that a view, or what is soon made anew for each layer, is not
    kept from the first layer on.
    """
    first: dict[fx.Node, int] = {}
    reached = _FIRST  # by nodes that must stay in order
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node in rows.computed:
            first[node] = max(0, *(first[one] + (one not in rows.computed) for one in inputs if tensors(one)))
            continue
        first[node] = max((first[one] for one in inputs), default=_FIRST)
        if node in rows.ordered:
            first[node] = reached = max(reached, first[node])
    last: dict[fx.Node, int] = {}
    for node in reversed(graph.nodes):
        if node in rows.computed:
            users = [last.get(user, first[user]) for user in node.users if user.op != "output"]
            returned = len(users) < len(node.users)
            last[node] = min(users) if users and not returned else min([first[node], *users])
    stages = {node: (last.get(node, first[node]), node not in rows.computed) for node in graph.nodes}
    return {node: stage for node, stage in stages.items() if node.op not in ("placeholder", "output")}


def _reorder(graph: fx.Graph, places: dict[fx.Node, tuple[Any, ...]]) -> None:
    after = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in sorted(places, key=lambda node: places[node]):
        after.append(node)
        after = node


@dataclass(frozen=True)
class _Work:
    """What `ChunkedStretch` and its `Stretch` are made of, but for the graph module, which takes long to make."""

    name: str
    graph: fx.Graph
    row_dims: tuple[int | None, ...]
    outputs: tuple[RowOutput, ...]
    symbols: tuple[tuple[Any, ...], ...]


class _Form:
    """A stretch as a graph of its own: what it takes, what it returns, and the graph."""

    def __init__(self, rows: TokenRows, nodes: Sequence[fx.Node]) -> None:
        inside = set(nodes)
        self.rows, self.nodes = rows, nodes
        reads = dict.fromkeys(one for node in nodes for one in node.all_input_nodes if tensors(one))
        self.inputs = [one for one in reads if one not in inside]
        self.outputs = [node for node in nodes if any(user not in inside for user in node.users)]

    @property
    def unfit(self) -> list[fx.Node]:
        """Nodes that would be results and cannot be, or that cannot be made in chunks."""
        bad = [node for node in self.outputs if not self._is_fit_result(node)]
        bad += [node for node in self.nodes if operation(node) in (*RESHAPES, *EXPANDS) and self._sizes(node) is None]
        bad += [node for node in self.nodes if operation(node) in EXPANDS and not self._keeps_unknown_sizes(node)]
        return list(dict.fromkeys(bad))

    def _keeps_unknown_sizes(self, node: fx.Node) -> bool:
        """Whether an expansion leaves sizes as they are that are neither numbers nor the tokens: -1 says so."""
        shape, source = fake_value(node).shape, tensors(node.all_input_nodes[0])[0].shape
        before = (None,) * (len(shape) - len(source))
        return all(
            isinstance(size, int) or dim == self.rows.dims[node] or (own is not None and same_size(size, own))
            for dim, (size, own) in enumerate(zip(shape, (*before, *source), strict=True))
        )

    def _is_fit_result(self, node: fx.Node) -> bool:
        value = fake_value(node)
        if not isinstance(value, torch.Tensor):
            return False
        expanded = any(stride == 0 and size != 1 for size, stride in zip(value.shape, value.stride(), strict=True))
        known = all(hint(stride) is not None for stride in value.stride())
        return known and not expanded and self._shape(node) is not None

    def _shape(self, node: fx.Node) -> tuple[int | tuple[int, int] | None, ...] | None:
        shape: list[int | tuple[int, int] | None] = []
        for dim, size in enumerate(fake_value(node).shape):
            if dim == self.rows.dims[node]:
                shape.append(None)
            elif isinstance(size, int):
                shape.append(size)
            else:
                found = self._find_size(size)
                if found is None:
                    return None
                shape.append(found)
        return tuple(shape)

    def _find_size(self, wanted: Size) -> tuple[int, int] | None:
        for index, one in enumerate(self.inputs):
            for dim, size in enumerate(tensors(one)[0].shape):
                if dim != self.rows.dims.get(one) and same_size(size, wanted):
                    return index, dim
        return None

    def _sizes(self, node: fx.Node) -> list[Any] | None:
        """The sizes of a reshape's result: numbers, None for the tokens, and one -1 at most."""
        sizes: list[Any] = [size if isinstance(size, int) else -1 for size in fake_value(node).shape]
        sizes[self.rows.dims[node]] = None
        return sizes if sizes.count(-1) <= 1 else None

    def work(self, compiler: str) -> "_Work":
        """The stretch with a name that those share which are the same."""
        outputs = tuple(self._result(node) for node in self.outputs)
        graph = self._graph(outputs)
        row_dims = tuple(self.rows.dims.get(one) for one in self.inputs)
        symbols = [self._symbols(one) for one in self.inputs]
        symbols += [self._symbols(node) for node, one in zip(self.outputs, outputs, strict=True) if one.is_written]
        # What tells two stretches apart, and nothing else: the text is part of what the inner backend's caches know.
        said = [compiler, row_dims, outputs, symbols]
        said += [*map(_describe, self.inputs), *map(_call, graph.nodes)]
        name = sha256("\n".join(map(str, said)).encode()).hexdigest()[:32]
        return _Work(name, graph, row_dims, outputs, tuple(symbols))

    def register(self, work: "_Work") -> ChunkedStretch:
        """Register the stretch, or find one that is the same."""
        run = fx.GraphModule(torch.nn.Module(), work.graph)
        stretch = Stretch(work.row_dims, work.outputs, self._token_bytes(), run)
        return ChunkedStretch(work.name, register_stretch(work.name, stretch), work.symbols)

    def _result(self, node: fx.Node) -> RowOutput:
        value, shape = fake_value(node), self._shape(node)
        assert shape is not None
        order = sorted(range(value.dim()), key=lambda dim: (-(hint(value.stride(dim)) or 0), dim))
        return RowOutput(shape, tuple(order), self.rows.dims[node], value.dtype)

    def _symbols(self, node: fx.Node) -> tuple[Any, ...]:
        shape, dim = tensors(node)[0].shape, self.rows.dims.get(node)
        return tuple(
            "tokens" if place == dim else None if isinstance(size, int) else expression(size)
            for place, size in enumerate(shape)
        )

    def _graph(self, outputs: Sequence[RowOutput]) -> fx.Graph:
        graph = fx.Graph()
        copies = {one: graph.placeholder(f"input_{index}") for index, one in enumerate(self.inputs)}
        written = [node for node, one in zip(self.outputs, outputs, strict=True) if one.is_written]
        targets = [graph.placeholder(f"output_{index}") for index in range(len(written))]
        cut = next(one for one in self.inputs if one in self.rows.dims)
        tokens = graph.call_function(torch.ops.aten.sym_size.int, (copies[cut], self.rows.dims[cut]))
        for node in self.nodes:
            sizes = self._sizes(node) if operation(node) in (*RESHAPES, *EXPANDS) else None
            if sizes is None:
                copies[node] = graph.create_node(
                    node.op, node.target, *fx.map_arg((node.args, node.kwargs), copies.__getitem__)
                )
            else:
                method = "expand" if operation(node) in EXPANDS else "reshape"
                source = copies[node.args[0]] if node.args else copies[node.kwargs["input"]]  # type: ignore[index]
                copies[node] = graph.call_method(method, (source, *(tokens if one is None else one for one in sizes)))
        for node, target in zip(written, targets, strict=True):
            graph.call_method("copy_", (target, copies[node]))
        graph.output(tuple(copies[node] for node in self.outputs if node not in written))
        return graph

    def _token_bytes(self) -> int:
        """Most bytes that nodes hold for a token at one time, were each to fill memory of its own."""
        index = {node: place for place, node in enumerate(self.nodes)}
        ends: dict[int, int] = {}
        most = held = 0
        for place, node in enumerate(self.nodes):
            own = 0 if operation(node) in _VIEWS else self._row_bytes(node)
            held += own
            most = max(most, held)
            end = max((index.get(user, place) for user in node.users), default=place)
            ends[end] = ends.get(end, 0) + own
            held -= ends.pop(place, 0)
        return most

    def _row_bytes(self, node: fx.Node) -> int:
        """Bytes of a node's value for one token and one sequence of a batch whose size is not known."""
        total = 0
        for value in tensors(node):
            sizes = [size for dim, size in enumerate(value.shape) if dim != self.rows.dims[node]]
            total += value.element_size() * prod(size for size in sizes if isinstance(size, int))
        return total


def _describe(node: fx.Node) -> str:
    value: Any = tensors(node)[0]
    order = sorted(range(value.dim()), key=lambda dim: (-(hint(value.stride(dim)) or 0), dim))
    strides = [stride for stride in value.stride() if isinstance(stride, int)]
    return f"{value.dtype} {[size_key(size) for size in value.shape]} {order} {strides} {value.device}"


def _call(node: fx.Node) -> str:
    target = node.target
    if not isinstance(target, str | torch._ops.OpOverload):
        target = f"{target.__module__}.{target.__qualname__}"  # what else it prints differs from process to process
    return f"{node.name} {target} {node.args} {node.kwargs}"
