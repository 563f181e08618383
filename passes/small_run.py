"""Running the part of a graph that builds a mask, eagerly, at sizes of a few tokens and on made-up inputs.

Symbols get small numbers. Sizes baked into the graph as numbers are replaced by small ones wherever they
occur, and so is what a model computes from them in Python: numbers within 2 of a length, of the
difference of the lengths, or of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from mmcompile.passes.graph import expression, fake_value
from mmcompile.passes.index_expressions import Bounds
from mmcompile.passes.node_operations import mutated_nodes, operation
from mmcompile.passes.read_tensors import RULES

MOST_ELEMENTS = 2**20
KEPT_SIZE = 64  # sizes up to this stay as they are
NEAR = 2

# Operations that follow the sizes of their inputs; the results of any other operation are made up.
_SCANS = ("cumsum", "diff", "any", "all", "sum", "max", "min", "amax", "amin", "sort", "argsort")
_MOVES = (
    "pad",
    "constant_pad_nd",
    "cat",
    "stack",
    "roll",
    "flip",
    "repeat",
    "repeat_interleave",
    "chunk",
    "split",
)
_LOOKUPS = ("gather", "scatter", "masked_scatter", "isin", "eye")
_NUMERIC = ("div", "truediv", "pow", "clamp")
_RUNNABLE = frozenset((*_SCANS, *_MOVES, *_LOOKUPS, *_NUMERIC))
_NESTING = ("lazy_load_decompositions", "_vmap_increment_nesting", "_vmap_decrement_nesting")


class CannotRun(Exception):
    """Why the part of the graph cannot be run at the sizes asked for."""


@dataclass(frozen=True)
class SmallSizes:
    """Small numbers for symbols, and for the large numbers that a graph was captured with."""

    symbols: Mapping[sympy.Symbol, int]
    numbers: Mapping[int, int] = field(default_factory=dict)

    def number(self, value: int) -> int:
        """A number out of the graph at the small sizes; one that has nothing to do with a size stays."""
        for known, small in self.numbers.items():
            if abs(abs(value) - known) <= NEAR:
                shifted = small + abs(value) - known
                return shifted if value >= 0 else -shifted
        return value

    def size(self, value: int | torch.SymInt | sympy.Expr) -> int:
        """A size of the graph at the small sizes."""
        expr = value if isinstance(value, sympy.Expr) else expression(value)
        if expr.is_Integer:
            return self.number(int(expr))
        known: dict[sympy.Basic, sympy.Integer] = {
            symbol: sympy.Integer(number) for symbol, number in self.symbols.items()
        }
        # Past and new tokens may be one symbol and one number: a cache of a known length.
        known |= {number: sympy.Integer(self.number(int(number))) for number in expr.atoms(sympy.Integer)}
        small = expr.xreplace(known)
        if not small.is_Integer:
            raise CannotRun(f"the size {expr}")
        return int(small)

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """A fake tensor's shape at the small sizes."""
        return tuple(self.size(size) for size in tensor.shape)


class SmallProgram:
    """The nodes behind a mask and `others`, in order, up to inputs and to operations not worth running."""

    def __init__(self, mask: fx.Node, others: Iterable[fx.Node]) -> None:
        graph = mask.graph
        self.mask = mask
        self._mutated = mutated_nodes(graph)
        needed = self._behind([mask, *others])
        if any(operation(node).endswith("._remove_batch_dim") for node in needed):
            # vmap's entries and exits have no users; all of the graph's, so that they stay balanced
            needed |= self._behind(node for node in graph.nodes if _is_nesting(node))
        self.nodes = [node for node in graph.nodes if node in needed]

    def _behind(self, results: Iterable[fx.Node]) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        pending = list(results)
        while pending:
            node = pending.pop()
            if node not in needed:
                needed.add(node)
                pending.extend([] if self.is_made_up(node) else node.all_input_nodes)
        return needed

    def lowest_sizes(self) -> dict[sympy.Symbol, int]:
        """Every size symbol that a run needs a number for, with the smallest that its range allows."""
        bounds = Bounds()
        for size in self._sizes():
            bounds.learn_size(size)
        return {symbol: low or 0 for symbol, (low, _) in bounds.sizes.items()}

    def fixed_sizes(self) -> set[int]:
        """The dimensions of the program's tensors that are numbers in the graph."""
        return {size for size in self._sizes() if not isinstance(size, torch.SymInt)}

    def leading_symbol(self) -> sympy.Expr | None:
        """The first dimension of a mask of four, which is the batch."""
        shape = fake_value(self.mask).shape
        return expression(shape[0]) if len(shape) == 4 else None

    def _sizes(self) -> list[int | torch.SymInt]:
        values = [fake_value(node) for node in self.nodes]
        tensors = [size for value in values if isinstance(value, Tensor) for size in value.shape]
        return tensors + [value for value in values if isinstance(value, torch.SymInt)]

    def is_made_up(self, node: fx.Node) -> bool:
        """Whether a node's value is an input of the run."""
        if isinstance(fake_value(node), torch.SymInt | int):
            return True
        name = operation(node)
        return (
            node.op not in ("call_function", "call_method")
            or node in self._mutated
            or not (name in RULES or name in _RUNNABLE or _is_nesting(node))
        )

    def run(self, sizes: SmallSizes, make_up: Callable[[fx.Node, tuple[int, ...]], Tensor]) -> dict[fx.Node, Any]:
        """The value of every node; `make_up(node, shape)` gives those of the inputs."""
        values: dict[fx.Node, Any] = {}
        depth = 0
        try:
            for node in self.nodes:
                values[node] = self._value(node, values, sizes, make_up)
                name = operation(node)
                depth += name.endswith("_vmap_increment_nesting") - name.endswith("_vmap_decrement_nesting")
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise CannotRun(f"{node.name}: {str(error).splitlines()[0]}") from error
        finally:
            for _ in range(depth):  # an error inside vmap must not leave its levels behind
                torch._C._functorch._vmap_decrement_nesting()
        return values

    def _value(self, node: fx.Node, values: dict, sizes: SmallSizes, make_up: Callable) -> Any:
        expected = fake_value(node)
        if isinstance(expected, torch.SymInt | int):
            return sizes.size(expected)
        shape = sizes.shape(expected) if isinstance(expected, Tensor) else None
        if shape is not None and torch.Size(shape).numel() > MOST_ELEMENTS:
            raise CannotRun(f"{node.name} would have the shape {list(shape)}")
        if self.is_made_up(node):
            if shape is None:
                raise CannotRun(f"{node.name} is no tensor")
            return make_up(node, shape)
        value = _call(node, values, sizes)
        if shape is not None and tuple(value.shape) != shape:
            raise CannotRun(f"{node.name} has the shape {list(value.shape)} instead of {list(shape)}")
        return value


def _is_nesting(node: fx.Node) -> bool:
    return operation(node).rpartition(".")[2] in _NESTING


def _call(node: fx.Node, values: dict[fx.Node, Any], sizes: SmallSizes) -> Any:
    def small(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return values[argument]
        if isinstance(argument, torch.device) or (isinstance(argument, str) and argument.startswith("cuda")):
            return torch.device("cpu")
        if isinstance(argument, int) and not isinstance(argument, bool):
            return sizes.number(argument)
        return argument

    arguments = fx.node.map_aggregate(node.args, small)
    options = fx.node.map_aggregate(node.kwargs, small)
    if callable(node.target):
        return node.target(*arguments, **options)
    method = "cpu" if node.target == "cuda" else node.target
    return getattr(arguments[0], method)(*arguments[1:], **options)
