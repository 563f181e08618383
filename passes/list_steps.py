"""What a graph does to memory at given sizes: a list of steps, with the storages that each reads and makes.

The graph runs on fake tensors, which have sizes and no memory, so that any length costs the time of a trace.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmcompile.kernels.workspace import WORKSPACE_BYTES
from mmcompile.passes.find_attention import SDPA_TARGETS, module_path
from mmcompile.passes.graph import expression, fake_value, has_merged_heads, hint, placeholders

# Operations on each element that torch does not tag as such, and reductions: a compiler makes one kernel of a run of
# them, and writes what the last ones return.
_REDUCES = frozenset(
    ("all", "amax", "amin", "any", "argmax", "argmin", "max", "mean", "min", "prod", "std", "sum", "var", "var_mean")
)
_NORMS = ("_fused_rms_norm", "_safe_softmax", "_softmax", "native_group_norm", "native_layer_norm")
_FILLS = ("arange", "empty", "empty_like", "eye", "full", "full_like", "new_empty", "new_full", "new_ones", "new_zeros",
          "ones", "ones_like", "scalar_tensor", "zeros", "zeros_like")  # fmt: skip
_MOVES = ("_to_copy", "_unsafe_view", "cat", "clone", "constant_pad_nd", "copy", "cumsum", "embedding", "expand_copy",
          "gather", "index", "index_select", "masked_fill", "repeat", "roll", "select_scatter", "slice_scatter",
          "stack", "tril", "triu", "where")  # fmt: skip
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_FUSES = _REDUCES.union(_NORMS, _FILLS, _MOVES)


@dataclass(frozen=True)
class Buffer:
    """Memory that one step makes. name: of the operation. module_path: of the innermost module around it. reusable:
    whether a compiler allocates it, and may put something else there later; operations that it does not know do so by
    themselves."""

    name: str
    module_path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    reusable: bool = False


@dataclass(frozen=True)
class Step:
    """One operation; reads and makes are indices of buffers.

    fuses: a compiler may make one kernel of it and its neighbours. reduces: and what it makes is small and written.
    workspace: bytes that it needs while it runs.
    """

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    fuses: bool
    reduces: bool
    workspace: int


@dataclass
class Steps:
    """All of a graph's steps. given: buffers that are there before, the graph's inputs; weights: those of them that are
    parameters. returned: buffers that are there after it. mutated: that are written to."""

    buffers: list[Buffer] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    returned: set[int] = field(default_factory=set)


def list_steps(module: fx.GraphModule, tokens: int | None, traced: int | None) -> Steps:
    """The steps of a Dynamo graph.

    tokens: the prompt's length to answer for. traced: the length that the graph was traced with; sizes that follow it
    become those of `tokens`, other symbols are what they were. None for the sizes of the trace.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    recorder = _Recorder()
    nodes = placeholders(module.graph)
    sizes = _Sizes([fake_value(node) for node in nodes], tokens, traced)
    inputs = []
    with torch.no_grad(), mode:
        for node in nodes:
            value = sizes.of(fake_value(node))
            inputs.append(value)
            recorder.give(node, value)
        with recorder:
            results = _Run(module, recorder).run(*inputs)
    recorder.found.returned = {recorder.index(tensor) for tensor in tree_leaves(results) if isinstance(tensor, Tensor)}
    return recorder.found


class _Sizes:
    """The inputs' values for another length than the traced one."""

    def __init__(self, inputs: Sequence[Any], tokens: int | None, traced: int | None) -> None:
        known = {expression(size): hint(size) for value in inputs for size in _symbols(value)}
        self._values = {
            symbol: tokens if tokens is not None and value == traced else value for symbol, value in known.items()
        }

    def of(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self._number(value)
        if not isinstance(value, Tensor):
            return value
        shape, strides = ([self._number(size) for size in sizes] for sizes in (value.shape, value.stride()))
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)

    def _number(self, size: int | torch.SymInt) -> int:
        return int(expression(size).subs(self._values))


def _symbols(value: Any) -> list[torch.SymInt]:
    sizes = value.shape if isinstance(value, Tensor) else [value]
    return [size for size in sizes if isinstance(size, torch.SymInt) and expression(size).is_Symbol]


class _Recorder(TorchDispatchMode):
    """While active, notes each operation that makes or reads memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Steps()
        self.module_path = ""
        self._paused = False
        # Kept, so that no later storage gets the address of an earlier one: they hold no memory.
        self._storages: dict[int, tuple[Any, int]] = {}

    def give(self, node: fx.Node, value: Any) -> None:
        """Note one of the graph's inputs."""
        if not isinstance(value, Tensor):
            return
        index, new = self._note(value, str(node.name))
        if new:
            self.found.given.append(index)
        if isinstance(fake_value(node), torch.nn.Parameter):
            self.found.weights.append(index)

    def index(self, tensor: Tensor) -> int:
        """Which buffer a tensor lies in."""
        return self._note(tensor, "constant")[0]

    def place(self, tensor: Tensor) -> None:
        """Say which module a tensor is of, where what made it could not tell: one of several results."""
        index = self.index(tensor)
        buffer = self.found.buffers[index]
        if not buffer.module_path and index not in self.found.given:
            self.found.buffers[index] = replace(buffer, module_path=self.module_path)

    def _note(self, tensor: Tensor, name: str, *, reusable: bool = False) -> tuple[int, bool]:
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is not None:
            return known[1], False
        index = len(self.found.buffers)
        nbytes = _number(storage.nbytes())
        shape = tuple(_number(size) for size in tensor.shape)
        self.found.buffers.append(Buffer(name, self.module_path, shape, tensor.dtype, nbytes, reusable))
        self._storages[storage._cdata] = storage, index
        return index, True

    def record(self, name: str, operation: Callable[[], Any], reads: Any, workspace: int = 0) -> Any:
        """Note one step for all that `operation` does."""
        self._paused = True
        try:
            result = operation()
        finally:
            self._paused = False
        self._add(name, reads, result, fuses=False, reduces=False, workspace=workspace)
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._paused:
            return result
        namespace, name = func._schema.name.split("::")
        plain = name.removesuffix("_")  # in place
        fuses = namespace in ("aten", "prims") and (torch.Tag.pointwise in func.tags or plain in _FUSES)
        workspace = WORKSPACE_BYTES[func](*args, **kwargs) if func in WORKSPACE_BYTES else 0
        self._add(name, (args, kwargs), result, fuses, fuses and plain in _REDUCES, workspace)
        return result

    def _add(self, name: str, arguments: Any, results: Any, fuses: bool, reduces: bool, workspace: int) -> None:
        reads = tuple(dict.fromkeys(self.index(value) for value in _tensors(arguments)))
        reusable = fuses or name in _PRODUCTS
        noted = [self._note(value, name, reusable=reusable) for value in _tensors(results)]
        makes = tuple(dict.fromkeys(index for index, new in noted if new))
        # A view makes nothing, and neither does what writes to its argument: that reads it.
        if makes or workspace or not all(index in reads for index, _ in noted):
            self.found.steps.append(Step(name, reads, makes, fuses, reduces, workspace))


class _Run(fx.Interpreter):
    """Runs the graph, with attention as one step whatever the device: which library takes it shows there alone."""

    def __init__(self, module: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(module)
        self._recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        self._recorder.module_path = module_path(n)
        if n.op == "call_function" and n.target in SDPA_TARGETS:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            query, value = args[0] if args else kwargs["query"], args[2] if len(args) > 2 else kwargs["value"]
            merged = has_merged_heads(fake_value(n))
            return self._recorder.record("attention", lambda: _attended(query, value, merged), (args, kwargs))
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self._recorder.place(result)
        return result


def _attended(query: Tensor, value: Tensor, merged: bool) -> Tensor:
    """A result of attention: [B, H, S, D]. merged: in [B, S, H, D] memory."""
    batch, heads, length, _ = query.shape
    width = value.shape[3]
    if merged:
        return query.new_empty(batch, length, heads, width).transpose(1, 2)
    return query.new_empty(batch, heads, length, width)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _number(size: int | torch.SymInt) -> int:
    """A size; 0 where the data alone tells it."""
    return hint(size) or 0
