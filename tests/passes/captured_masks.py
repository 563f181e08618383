"""Capturing mask programs as graphs, without Dynamo where its seconds are not the point, and running what was read.

A program is a Python function of named tensors, `query` and `key` among them ([B, H, S, D]), that returns a mask.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode

from mmcompile.passes.emit_mask import emit_mask
from mmcompile.passes.emit_sizes import emit_size
from mmcompile.passes.find_attention import find_attention
from mmcompile.passes.graph import copy_graph, expression, fake_value
from mmcompile.passes.mask_spec import MaskSpec, OpaqueMask
from mmcompile.passes.read_mask import read_mask

Program = Callable[..., Tensor]
Inputs = Mapping[str, Tensor]

HEADS, DIM = 2, 4


@dataclass
class Captured:
    """A program's graph: its tensor inputs by name, and the node of the mask."""

    graph: fx.Graph
    tensors: dict[str, fx.Node]
    mask: fx.Node

    def length(self, name: str) -> int | torch.SymInt:
        """The number of tokens of the input `name`, as the capture knows it."""
        return fake_value(self.tensors[name]).shape[2]

    def read(self) -> MaskSpec | OpaqueMask:
        """What the reader makes of the mask."""
        return read_mask(self.mask, self.length("query"), self.length("key"))


class _Recorder(TorchFunctionMode):
    """Writes each torch function that makes a tensor into a graph, in the spelling of Dynamo's graphs."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Tensor] = []

    def know(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["example_value"] = tensor
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is Tensor.__setitem__:
            self.graph.call_function(operator.setitem, self._arguments(args))
        if isinstance(result, Tensor) and function.__name__ != "__get__":
            self.know(result, self._call(function, self._arguments(args), self._arguments(kwargs or {})))
        return result

    def _call(self, function: Callable, args: tuple, kwargs: dict) -> fx.Node:
        name = function.__name__
        if getattr(torch.Tensor, name, None) is not function:
            return self.graph.call_function(function, args, kwargs)
        if name.startswith("__r") and hasattr(operator, name[3:-2]):  # 1 - x
            return self.graph.call_function(getattr(operator, name[3:-2]), args[::-1])
        spelled = getattr(operator, name, None)
        if spelled is not None and name.startswith("__"):
            return self.graph.call_function(getattr(operator, spelled.__name__), args, kwargs)
        return self.graph.call_method(name, args, kwargs)

    def _arguments(self, arguments: Any) -> Any:
        def known(argument: Any) -> Any:
            if isinstance(argument, Tensor):
                return self.nodes[id(argument)]
            if isinstance(argument, torch.SymInt):
                return emit_size(self.graph, expression(argument))
            return argument

        return fx.node.map_aggregate(arguments, known)


def record(program: Program, inputs: Inputs, *, dynamic: bool) -> Captured:
    """The torch-level graph of `program`; dynamic: every dimension but the heads' is a symbol."""
    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    fakes = {name: _fake(mode, tensor, name, dynamic) for name, tensor in inputs.items()}
    graph = fx.Graph()
    symbols = {expression(size): size for fake in fakes.values() for size in fake.shape}
    for expr, size in symbols.items():
        if isinstance(size, torch.SymInt):
            graph.placeholder(str(expr)).meta["example_value"] = size
    recorder = _Recorder(graph)
    tensors = {name: graph.placeholder(name) for name in fakes}
    for name, fake in fakes.items():
        recorder.know(fake, tensors[name])
    with mode, recorder:
        mask = program(**fakes)
    return Captured(graph, tensors, recorder.nodes[id(mask)])


def _fake(mode: FakeTensorMode, tensor: Tensor, name: str, dynamic: bool) -> Tensor:
    from torch._dynamo.source import ConstantSource

    if not dynamic:
        return mode.from_tensor(tensor)
    fixed = (1, 3) if tensor.dim() == 4 and tensor.shape[1] == HEADS else ()
    sizes = [DimDynamic.STATIC if dim in fixed else DimDynamic.DUCK for dim in range(tensor.dim())]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(name))


def trace_aten(program: Program, inputs: Inputs, *, dynamic: bool) -> Captured:
    """The ATen graph of `program`."""
    names = list(inputs)
    module = make_fx(
        lambda *tensors: program(**dict(zip(names, tensors, strict=True))),
        tracing_mode="symbolic" if dynamic else "fake",
        pre_dispatch=True,
    )(*inputs.values())
    placeholders = module.graph.find_nodes(op="placeholder")
    (mask,) = module.graph.find_nodes(op="output")[0].all_input_nodes
    return Captured(module.graph, dict(zip(names, placeholders, strict=True)), mask)


def rewritten_mask(captured: Captured, spec: MaskSpec, inputs: Inputs) -> Tensor:
    """The mask that the rows of `spec`, emitted into the graph and run on `inputs`, make: bool [B, Sq, Sk].

    The graph is left with the rows as its output.
    """
    return combine(run_rows(emit_rows(captured, spec), captured, inputs), spec, inputs)


def emit_rows(captured: Captured, spec: MaskSpec) -> fx.GraphModule:
    """The captured graph with the rows of `spec` as outputs in place of the mask."""
    graph = captured.graph
    for output in graph.find_nodes(op="output"):
        graph.erase_node(output)
    query, key = (fake_value(captured.tensors[name]).shape for name in ("query", "key"))
    sizes = [emit_size(graph, expression(size)) for size in (query[0], query[2], key[2])]
    rows = emit_mask(graph, spec, *sizes)
    graph.output((rows.key_valid, rows.query_segment, rows.key_segment, rows.query_span, rows.key_span, rows.offset))
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph)


def run_rows(module: fx.GraphModule, captured: Captured, inputs: Inputs) -> tuple:
    """The rows for some inputs."""
    by_node = {node: inputs[name] for name, node in captured.tensors.items()}
    sizes = {
        expression(size): actual
        for node, tensor in by_node.items()
        for size, actual in zip(fake_value(node).shape, tensor.shape, strict=True)
    }
    arguments = [
        by_node[node] if node in by_node else sizes[expression(fake_value(node))]
        for node in module.graph.find_nodes(op="placeholder")
    ]
    return module(*arguments)


def combine(rows: tuple, spec: MaskSpec, inputs: Inputs) -> Tensor:
    """The element mask that the kernels make of a plan's rows."""
    key_valid, query_segment, key_segment, query_span, key_span, offset = rows
    batch, length, keys = inputs["query"].shape[0], inputs["query"].shape[2], inputs["key"].shape[2]
    for row, tokens in zip(rows[:5], (keys, length, keys, length, keys), strict=True):
        assert row is None or row.shape == (batch, tokens)
    place, last = torch.arange(keys), torch.arange(length)[:, None] + offset
    mask = torch.ones(batch, length, keys, dtype=torch.bool)
    if spec.causal:
        reached = (place <= last).expand(batch, length, keys)
        if query_span is not None:
            query_span, key_span = query_span.int()[:, :, None], key_span.int()[:, None, :]
            reached = reached | ((query_span == key_span) & (query_span >= 0))
        mask &= reached
    if spec.window is not None:
        mask &= place > last - spec.window
    if key_valid is not None:
        assert key_valid.dtype == torch.bool
        mask &= key_valid[:, None, :]
    if query_segment is not None:
        mask &= query_segment.int()[:, :, None] == key_segment.int()[:, None, :]
    return mask


def real_mask(program: Program, inputs: Inputs) -> Tensor:
    """What the program itself lets through: bool [B, H or 1, Sq, Sk]."""
    mask = program(**inputs)
    allowed = mask if mask.dtype == torch.bool else mask == 0
    batch, length, keys = inputs["query"].shape[0], inputs["query"].shape[2], inputs["key"].shape[2]
    while allowed.dim() < 4:
        allowed = allowed[None]
    return allowed.expand(batch, -1, length, keys)


def trace_dynamo(program: Program, inputs: Inputs, *, dynamic: bool) -> Captured:
    """The graph that Dynamo hands a backend for an attention under the program's mask."""
    graphs: list[fx.GraphModule] = []

    def attend(query, key, am, ids, pos, score, bias):
        mask = program(query, key, am, ids, pos, score, bias)
        if mask.is_floating_point():
            query, key = query.to(mask.dtype), key.to(mask.dtype)
        return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)

    def backend(module, example_inputs):
        graphs.append(copy_graph(module))
        return module.forward

    torch.compiler.reset()
    torch.compile(attend, backend=backend, dynamic=dynamic, fullgraph=True)(**inputs)
    graph = graphs[0].graph
    tensors = {str(node.target)[2:-1]: node for node in graph.find_nodes(op="placeholder")}  # L_query_
    (site,) = find_attention(graphs[0])
    return Captured(graph, {name: tensors[name] for name in inputs if name in tensors}, site.mask)
