"""Compile a graph when it is first called, after Dynamo has finished with it, and know what that took for granted.

What an inner backend assumes of sizes while Dynamo waits for it becomes Dynamo's guards. Later that door is shut. So a
graph is then compiled under symbols of its own, made from the inputs at hand, and what was assumed of them is checked
at each call. (What it assumes of tensors that share memory follows from inputs and mutations, which are those of the
graph that Dynamo waited for.)
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from mmcompile.passes.chunk_tokens import Chunked
from mmcompile.passes.graph import copy_graph, expression, fake_value, placeholders

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]

# What a tracer noted of nodes in terms of its own symbols, and of the tensors that it saw.
_OF_ITS_TRACE = ("example_value", "val", "unbacked_bindings", "grapharg")


class CompiledLater:
    """A graph that `inner` compiles for the first inputs that come, and again for those that its code cannot serve.

    inner: as a backend of `torch.compile`. Sizes that are symbols among the graph's inputs stay symbols.
    symbols: says of each input which they are, where the graph was not traced: as `ChunkedStretch` has them.
    """

    def __init__(
        self, inner: Compiled, module: fx.GraphModule, symbols: Sequence[tuple[Any, ...]] | None = None
    ) -> None:
        self._inner = inner
        nodes = placeholders(module.graph)
        if symbols is None:
            self._inputs = [_Input.of(node) for node in nodes]
        else:
            self._inputs = [_Input.named(node.name, sizes) for node, sizes in zip(nodes, symbols, strict=True)]
        self._module = copy_graph(module)
        for node in self._module.graph.nodes:
            for name in _OF_ITS_TRACE:
                node.meta.pop(name, None)
        self._forms: list[_Form] = []

    def __call__(self, *inputs: Any) -> Any:
        form = self._find(inputs)
        if form is None:
            with compile_lock:  # Dynamo's own: torch compiles one graph at a time
                form = self._find(inputs) or self._compile(inputs)  # another thread may have been here
        return form.run(*inputs)

    def _find(self, inputs: Sequence[Any]) -> "_Form | None":
        return next((form for form in self._forms if form.serves(inputs)), None)

    def _compile(self, inputs: Sequence[Any]) -> "_Form":
        if len(self._forms) == torch._dynamo.config.recompile_limit:
            log.warning("code for these sizes was compiled %d times; others run uncompiled", len(self._forms))
            self._forms.append(_Form(self._module, None))
            return self._forms[-1]
        env = ShapeEnv()
        mode = FakeTensorMode(shape_env=env)
        with tracing(TracingContext(mode)):
            fakes = [known.fake(value, mode) for known, value in zip(self._inputs, inputs, strict=True)]
            _tie_equal_sizes(self._inputs, fakes)
            compiled = self._inner(copy_graph(self._module), fakes)
            assumed = _Assumed.by(env, self._inputs, fakes)
        log.info("compiled after tracing; it serves inputs for which: %s", assumed and assumed.text)
        self._forms.append(_Form(compiled, assumed))
        return self._forms[-1]


def compile_stretches_later(inner: Compiled, chunked: Chunked) -> None:
    """Have `inner` compile each kind of stretch when it first runs, unless another graph's is the same."""
    for kind in chunked.kinds.values():
        if isinstance(kind.stretch.run, fx.GraphModule):
            kind.stretch.run = CompiledLater(inner, kind.stretch.run, kind.symbols)


@dataclass(frozen=True)
class _Form:
    """Compiled code, and what it assumes of sizes; None: nothing."""

    run: Compiled
    assumed: "_Assumed | None"

    def serves(self, inputs: Sequence[Any]) -> bool:
        return self.assumed is None or self.assumed.holds(inputs)


@dataclass(frozen=True)
class _Assumed:
    """What was assumed of the sizes of some inputs, whose indices `of` has."""

    env: ShapeEnv
    of: list[int]
    text: str
    code: Any  # the text, compiled

    @classmethod
    def by(cls, env: ShapeEnv, inputs: Sequence["_Input"], fakes: Sequence[Any]) -> "_Assumed | None":
        indices = [index for index, known in enumerate(inputs) if known.symbols]
        text = env.produce_guards_expression([fakes[index] for index in indices])
        return None if text is None else cls(env, indices, text, compile(text, "<assumed sizes>", "eval"))

    def holds(self, inputs: Sequence[Any]) -> bool:
        return bool(self.env.evaluate_guards_expression(self.code, [inputs[index] for index in self.of]))


@dataclass(frozen=True)
class _Input:
    """What the tracer knew of one input."""

    source: Any
    symbols: tuple[Any, ...]  # of an integer, or of each size of a tensor (None: a number); empty where none is one

    @classmethod
    def of(cls, node: fx.Node) -> "_Input":
        dynamo_node: Any = node
        value = fake_value(node)
        sizes = (value,) if isinstance(value, torch.SymInt) else getattr(value, "shape", ())
        symbols = tuple(expression(size) if isinstance(size, torch.SymInt) else None for size in sizes)
        return cls._with(dynamo_node._dynamo_source, symbols)

    @classmethod
    def named(cls, name: str, symbols: tuple[Any, ...]) -> "_Input":
        return cls._with(LocalSource(name), symbols)

    @classmethod
    def _with(cls, source: Any, symbols: tuple[Any, ...]) -> "_Input":
        return cls(source, symbols if any(symbol is not None for symbol in symbols) else ())

    def fake(self, value: Any, mode: FakeTensorMode) -> Any:
        """A stand-in for `value`, with symbols where the tracer had them."""
        if not isinstance(value, torch.Tensor):
            return self._symbol(value, mode) if self.symbols else value
        if not self.symbols:
            return mode.from_tensor(value, static_shapes=True, source=self.source)
        sizes = [DimDynamic.STATIC if symbol is None else DimDynamic.DYNAMIC for symbol in self.symbols]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * len(sizes))
        # Of a view the tensor that it looks into would get symbols too, which no input could tell.
        value = value.data.requires_grad_(value.requires_grad)
        return mode.from_tensor(value, source=self.source, symbolic_context=context)

    def _symbol(self, value: int, mode: FakeTensorMode) -> torch.SymInt:
        env: Any = mode.shape_env
        symbol = env.create_symbol(value, self.source, dynamic_dim=DimDynamic.DYNAMIC)
        found: torch.SymInt = env.create_symintnode(symbol, hint=value, source=self.source)
        return found


def _tie_equal_sizes(inputs: Sequence[_Input], fakes: Sequence[Any]) -> None:
    """Make sizes one symbol that were one to the tracer."""
    first: dict[Any, Any] = {}
    for known, fake in zip(inputs, fakes, strict=True):
        sizes = fake.shape if isinstance(fake, torch.Tensor) else (fake,)
        for symbol, size in zip(known.symbols, sizes, strict=False):
            if symbol is not None and not first.setdefault(symbol, size) == size:
                raise AssertionError(f"{symbol} is {first[symbol]} and {size}, and Dynamo guards that it is one size")
