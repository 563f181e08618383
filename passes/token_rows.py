"""Which nodes compute the row of each token from the rows of that token alone.

Read off the operations, never off names of modules: a node's tokens lie along one of its dimensions, and each operation
has a rule that says along which one they lie in its result, or that it mixes tokens. What has no rule mixes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn

from mmcompile.passes.graph import Size, expression, fake_value, same_size
from mmcompile.passes.node_operations import mutated_nodes, nodes_in, operation

Rule = Callable[["TokenRows", fx.Node], "int | None"]

_RULES: dict[str, Rule] = {}
RESHAPES = ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as", "_unsafe_view")
EXPANDS = ("expand", "expand_as", "broadcast_to")
PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm")

_NUMERIC = """add sub rsub mul div truediv floor_divide remainder pow neg abs sign exp exp2 expm1 log log2 log1p sqrt
    rsqrt square reciprocal sin cos tanh sigmoid erf round floor ceil clamp clip lerp addcmul nan_to_num minimum
    maximum"""
_ACTIVATIONS = "silu gelu relu relu6 softplus leaky_relu elu hardswish hardsigmoid hardtanh mish logsigmoid"
_LOGICAL = """eq ne lt le gt ge logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor
    bitwise_not where masked_fill isnan isinf"""
_COPIES = "to float half bfloat16 double int long bool type type_as contiguous clone detach zeros_like ones_like"
_ELEMENTWISE = f"{_NUMERIC} {_ACTIVATIONS} {_LOGICAL} {_COPIES}".split()
_ALONG = ("softmax", "log_softmax", "cumsum", "cumprod", "sort", "argsort", "topk")
_REDUCTIONS = (
    *("mean", "sum", "prod", "var", "std", "norm", "logsumexp", "any", "all"),
    *("amax", "amin", "argmax", "argmin", "max", "min"),
)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations, by the names that `operation` gives."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass
class TokenRows:
    """Where the tokens of one graph's values lie.

    dims: the dimension of tokens of each value that has one; of a tuple, that of its tensors. A value that is not
        computed row by row has one where exactly one of its sizes is that of the tokens, and may be cut there.
    computed: the nodes that work row by row.
    ordered: the nodes that must keep their order among each other, for memory that is written or state that changes.
    """

    dims: dict[fx.Node, int]
    computed: set[fx.Node]
    ordered: frozenset[fx.Node]
    length: Size

    @classmethod
    def of(cls, graph: fx.Graph, length: Size) -> TokenRows:
        """length: the number of tokens of a sequence, as the graph has it."""
        rows = cls({}, set(), _ordered_nodes(graph), length)
        for node in graph.nodes:
            dim = rows._computed_along(node)
            if dim is not None:
                rows.dims[node] = dim
                rows.computed.add(node)
            elif (dim := rows._only_dim(node)) is not None:
                rows.dims[node] = dim
        return rows

    def with_tokens(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that have tokens."""
        return [one for one in node.all_input_nodes if one in self.dims]

    def without_tokens(self, node: fx.Node) -> list[fx.Node]:
        """The tensors among the inputs that have none: weights, say."""
        return [one for one in node.all_input_nodes if one not in self.dims]

    def _computed_along(self, node: fx.Node) -> int | None:
        if node.op not in ("call_function", "call_method") or node in self.ordered or not self.with_tokens(node):
            return None
        found = _RULES.get(operation(node))
        dim = None if found is None or not self._plain_sizes(node) else found(self, node)
        return dim if dim is not None and self._holds(node, dim) else None

    def _plain_sizes(self, node: fx.Node) -> bool:
        """Whether no size is an argument, but where a reshape will be given its sizes anew."""
        sizes = [one for one in node.all_input_nodes if not tensors(one)]
        return not sizes or operation(node) in (*RESHAPES, *EXPANDS)

    def _holds(self, node: fx.Node, dim: int) -> bool:
        results, device = tensors(node), tensors(self.with_tokens(node)[0])[0].device
        return bool(results) and all(
            0 <= dim < result.dim()
            and same_size(result.shape[dim], self.length)
            and result.device == device
            and not result.requires_grad
            for result in results
        )

    def _only_dim(self, node: fx.Node) -> int | None:
        value = fake_value(node)
        if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
            return None
        dims = [dim for dim, size in enumerate(value.shape) if same_size(size, self.length)]
        return dims[0] if len(dims) == 1 else None


def tensors(node: fx.Node) -> list[torch.Tensor]:
    """The tensors that a node's value is or consists of."""
    value = fake_value(node)
    values = value if isinstance(value, tuple | list) else (value,)
    return [one for one in values if isinstance(one, torch.Tensor)]


def _ordered_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    written = mutated_nodes(graph)
    ordered: set[fx.Node] = set()
    depth = 0  # of contexts that change what the calls inside them compute
    for node in graph.nodes:
        name = operation(node)
        depth += "_enter_" in name or "increment_nesting" in name
        inside, reads = depth > 0, any(one in written for one in node.all_input_nodes)
        depth -= "_exit_" in name or "decrement_nesting" in name
        if node.op not in ("placeholder", "output") and (inside or reads or node in written or node.is_impure()):
            ordered.add(node)
    return frozenset(ordered)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _source(node: fx.Node) -> Any:
    return _argument(node, 0, "input")


def _rank(node: fx.Node) -> int:
    return tensors(node)[0].dim()


def _dims(node: fx.Node, position: int, name: str, rank: int) -> set[int] | None:
    """Dimensions given as one argument, counted from the front; None where none are."""
    given = _argument(node, position, name)
    given = (given,) if isinstance(given, int) and not isinstance(given, bool) else given
    if not isinstance(given, tuple | list) or not given or not all(isinstance(dim, int) for dim in given):
        return None
    return {dim % rank for dim in given}


@rule(*_ELEMENTWISE)
def _elementwise(rows: TokenRows, node: fx.Node) -> int | None:
    places = {rows.dims[one] - _rank(one) for one in rows.with_tokens(node)}  # from the back, as tensors are aligned
    if len(places) != 1 or len(tensors(node)) != 1:
        return None
    (place,) = places
    for one in rows.without_tokens(node):
        shape = tensors(one)[0].shape
        if len(shape) >= -place and not _is_one(shape[place]):
            return None
    return _rank(node) + place


@rule("dropout")
def _dropout(rows: TokenRows, node: fx.Node) -> int | None:
    drops = _argument(node, 1, "p", 0.5) != 0 and _argument(node, 2, "training", True)
    return None if drops else rows.dims.get(_source(node))


@rule(*RESHAPES)
def _reshape(rows: TokenRows, node: fx.Node) -> int | None:
    source = _source(node)
    if source not in rows.dims or isinstance(_argument(node, 1, "dtype"), torch.dtype):
        return None
    # Elements keep their order, so tokens stay tokens where as much lies before them and they are as many.
    before = _product(tensors(source)[0].shape[: rows.dims[source]])
    shape = tensors(node)[0].shape
    for dim, size in enumerate(shape):
        if same_size(size, rows.length) and _product(shape[:dim]) == before:
            return dim
    return None


@rule(*EXPANDS)
def _expand(rows: TokenRows, node: fx.Node) -> int | None:
    source = _source(node)
    return rows.dims[source] - _rank(source) + _rank(node) if source in rows.dims else None


@rule("transpose")
def _transpose(rows: TokenRows, node: fx.Node) -> int | None:
    source = _source(node)
    rank = _rank(source)
    first, second = _argument(node, 1, "dim0"), _argument(node, 2, "dim1")
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    swapped = {first % rank: second % rank, second % rank: first % rank}
    return swapped.get(rows.dims[source], rows.dims[source])


@rule("permute")
def _permute(rows: TokenRows, node: fx.Node) -> int | None:
    source, *order = node.args or (None,)
    if len(order) == 1 and isinstance(order[0], tuple | list):
        order = list(order[0])
    if not isinstance(source, fx.Node) or len(order) != _rank(source) or not all(isinstance(one, int) for one in order):
        return None
    return [int(dim) % len(order) for dim in order].index(rows.dims[source])  # type: ignore[arg-type]


@rule("getitem")
def _getitem(rows: TokenRows, node: fx.Node) -> int | None:
    source, index = node.args
    if not isinstance(source, fx.Node) or source not in rows.dims:
        return None
    if isinstance(fake_value(source), tuple | list):
        return rows.dims[source] if isinstance(index, int) else None
    index = index if isinstance(index, tuple) else (index,)
    # Tensors among them may have a token's own entries.
    if any(one is not None and one is not Ellipsis and not isinstance(one, slice | int) for one in index):
        return None
    taken = sum(1 for one in index if one is not None and one is not Ellipsis)
    rest = [slice(None)] * (_rank(source) - taken)
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    dim, place = 0, 0  # of the source, of the result
    for one in (*index[:at], *rest, *index[at + 1 :]):
        if one is None:
            place += 1
        elif isinstance(one, slice):
            if dim == rows.dims[source]:
                return place if (one.start, one.stop, one.step) in _WHOLE else None
            dim, place = dim + 1, place + 1
        elif type(one) is int and dim != rows.dims[source]:
            dim += 1
        else:
            return None
    return None


_WHOLE = [(start, None, step) for start in (None, 0) for step in (None, 1)]


@rule("split", "chunk", "split_with_sizes", "tensor_split")
def _split(rows: TokenRows, node: fx.Node) -> int | None:
    source = _source(node)
    dim = _argument(node, 2, "dim", 0)
    fits = isinstance(dim, int) and source in rows.dims and dim % _rank(source) != rows.dims[source]
    return rows.dims[source] if fits else None


@rule("unbind", "select")
def _unbind(rows: TokenRows, node: fx.Node) -> int | None:
    source = _source(node)
    dim = _argument(node, 1, "dim", 0)
    if not isinstance(dim, int) or source not in rows.dims or dim % _rank(source) == rows.dims[source]:
        return None
    return rows.dims[source] - (dim % _rank(source) < rows.dims[source])


@rule("cat", "concat")
def _cat(rows: TokenRows, node: fx.Node) -> int | None:
    parts = [one for one in nodes_in(_argument(node, 0, "tensors")) if list(tensors(one)[0].shape) != [0]]
    dims = {rows.dims.get(one) for one in parts}
    (dim,) = dims if len(dims) == 1 else (None,)
    along = _argument(node, 1, "dim", 0)
    # A cache that is empty yet is joined with the first keys along the tokens.
    joins = len(parts) > 1 and (not isinstance(along, int) or along % _rank(node) == dim)
    return None if joins else dim


@rule("stack")
def _stack(rows: TokenRows, node: fx.Node) -> int | None:
    dims = {rows.dims.get(one) for one in nodes_in(_argument(node, 0, "tensors"))}
    (dim,) = dims if len(dims) == 1 else (None,)
    along = _argument(node, 1, "dim", 0)
    return None if dim is None or not isinstance(along, int) else dim + (along % _rank(node) <= dim)


@rule(*_ALONG)
def _along(rows: TokenRows, node: fx.Node) -> int | None:
    source = _source(node)
    position = 2 if operation(node) == "topk" else 1
    dims = _dims(node, position, "dim", _rank(source))
    return None if dims is None or rows.dims.get(source) in dims else rows.dims.get(source)


@rule(*_REDUCTIONS)
def _reduce(rows: TokenRows, node: fx.Node) -> int | None:
    source = _source(node)
    position = 2 if operation(node) == "norm" else 1
    dims = _dims(node, position, "dim", _rank(source))
    if dims is None or source not in rows.dims or rows.dims[source] in dims or len(node.all_input_nodes) > 1:
        return None
    kept = _rank(node) == _rank(source)
    return rows.dims[source] - (0 if kept else sum(dim < rows.dims[source] for dim in dims))


@rule("layer_norm", "rms_norm")
def _normalize(rows: TokenRows, node: fx.Node) -> int | None:
    source, shape = _source(node), _argument(node, 1, "normalized_shape")
    if rows.with_tokens(node) != [source] or not isinstance(shape, tuple | list):
        return None
    return rows.dims[source] if rows.dims[source] < _rank(source) - len(shape) else None


@rule("linear")
def _linear(rows: TokenRows, node: fx.Node) -> int | None:
    source = _source(node)
    fits = rows.with_tokens(node) == [source] and rows.dims[source] < _rank(source) - 1
    return rows.dims[source] if fits else None


@rule("addmm")
def _addmm(rows: TokenRows, node: fx.Node) -> int | None:
    source = _argument(node, 1, "mat1")  # the bias comes first
    return 0 if rows.with_tokens(node) == [source] and rows.dims[source] == 0 else None


@rule("matmul", "mm", "bmm")
def _matmul(rows: TokenRows, node: fx.Node) -> int | None:
    left, right = node.args if len(node.args) == 2 else (None, None)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or min(_rank(left), _rank(right)) < 2:
        return None
    if rows.with_tokens(node) == [left] and rows.dims[left] == _rank(left) - 2:
        return _rank(node) - 2
    if rows.with_tokens(node) == [right] and rows.dims[right] == _rank(right) - 1:
        return _rank(node) - 1
    return None


@rule("embedding")
def _embedding(rows: TokenRows, node: fx.Node) -> int | None:
    source = _source(node)
    plain = _argument(node, 3, "max_norm") is None and rows.with_tokens(node) == [source]
    return rows.dims[source] if plain else None


def _is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def _product(sizes: Any) -> sympy.Expr:
    return sympy.Mul(*map(expression, sizes))
