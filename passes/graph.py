"""Working on FX graphs without losing what Dynamo attached to them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

Size = int | torch.SymInt

# Dynamo attaches these as plain attributes; fx copies neither. Without them Inductor no longer knows
# which inputs are static (weights), and re-allocates for them.
_NODE_ATTRIBUTES = ("_dynamo_source",)
_MODULE_ATTRIBUTES = ("_param_name_to_source", "_source_to_user_stacks", "compile_subgraph_reason")


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A graph module whose graph may be edited; parameters, buffers and submodules are shared with `module`."""
    graph = fx.Graph(tracer_cls=module.graph._tracer_cls)
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, copies)
    graph.output(output)
    original_output = module.graph.find_nodes(op="output")[0]
    graph.find_nodes(op="output")[0].meta = dict(original_output.meta)
    for original, copied in copies.items():
        for name in _NODE_ATTRIBUTES:
            if hasattr(original, name):
                setattr(copied, name, getattr(original, name))
    copy = fx.GraphModule(module, graph, class_name=type(module).__name__)
    copy.meta = dict(module.meta)
    for name in _MODULE_ATTRIBUTES:
        if hasattr(module, name):
            setattr(copy, name, getattr(module, name))
    return copy


def fake_value(node: fx.Node) -> Any:
    """What the tracer knew of a node's value: a fake tensor, a SymInt, a tuple of them, or None if unknown.

    Dynamo records it as `example_value`, `torch.export` as `val`.
    """
    return node.meta.get("example_value", node.meta.get("val"))


def set_fake_value(node: fx.Node, value: Any) -> None:
    """Record `value` where both Dynamo's and export's readers look for it."""
    node.meta["example_value"] = value
    node.meta["val"] = value


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The graph's inputs, in order."""
    return list(graph.find_nodes(op="placeholder"))


def output_node(graph: fx.Graph) -> fx.Node:
    """The graph's single output node."""
    return next(iter(graph.find_nodes(op="output")))


def op_count(module: fx.GraphModule, *targets: Any) -> int:
    """How many call_function nodes of the graph have one of the targets."""
    return sum(len(module.graph.find_nodes(op="call_function", target=target)) for target in targets)


def same_size(left: Size, right: Size) -> bool:
    """Whether two sizes are equal for every input this graph serves. Never adds a guard."""
    if isinstance(left, torch.SymInt) or isinstance(right, torch.SymInt):
        return bool(expression(left) == expression(right))
    return left == right


def settle_equal(left: Size, right: Size) -> bool:
    """Whether two sizes are equal that attention has no meaning without.

    A cache's keys and values come as separate inputs, and a tracer gives each a length of its own. Where these are
    equal now they always are, so the tracer is told, and then holds them for one.
    """
    if same_size(left, right):
        return True
    known = hint(left), hint(right)
    return None not in known and known[0] == known[1] and bool(left == right)


def hint(size: Size) -> int | None:
    """A size in the call that the graph is compiled for; None where the data alone tells it."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def size_key(size: Size) -> str:
    """A text that is the same for two sizes exactly when `same_size` says so."""
    return str(expression(size))


def expression(size: Size) -> sympy.Expr:
    """A size in sympy's terms."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def is_contiguous(tensor: torch.Tensor) -> bool:
    """Whether a [B, H, S, D] tensor lies in memory in that order. Never adds a guard."""
    _, heads, length, width = tensor.shape
    return _has_strides(tensor, (heads * length * width, length * width, width, 1))


def has_merged_heads(tensor: torch.Tensor) -> bool:
    """Whether a [B, H, S, D] tensor lies in memory as [B, S, H, D]. Never adds a guard."""
    _, heads, length, width = tensor.shape
    return _has_strides(tensor, (length * heads * width, width, heads * width, 1))


def _has_strides(tensor: torch.Tensor, strides: Sequence[Size]) -> bool:
    return all(
        same_size(got, wanted) or (isinstance(size, int) and size == 1)  # a dimension of size 1 has no stride
        for got, wanted, size in zip(tensor.stride(), strides, tensor.shape, strict=True)
    )


def size_argument(graph: fx.Graph, tensor: fx.Node, dim: int) -> int | fx.Node:
    """One dimension of `tensor` as a graph argument: the int where it is static, else a node that reads it."""
    size = fake_value(tensor).shape[dim]
    if not isinstance(size, torch.SymInt):
        return int(size)
    node = graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
    set_fake_value(node, size)
    return node


def erase_if_unused(graph: fx.Graph, roots: Iterable[fx.Node | None]) -> int:
    """Erase the roots and what only they needed; returns how many nodes went.

    Plain dead-code elimination looks at the whole graph, and there it removes calls made for their side
    effect alone (the nesting calls of vmap, say), which breaks masks we do not touch. This stays inside the
    backward slice of the roots.
    """
    pending = [root for root in roots if root is not None]
    erased = 0
    while pending:
        node = pending.pop()
        if node._erased or node.users or node.op in ("placeholder", "output") or node.is_impure():
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        erased += 1
        pending.extend(inputs)
    return erased


def call(graph: fx.Graph, target: Callable[..., Any], arguments: Sequence[Any], **options: Any) -> fx.Node:
    """Insert a call whose fake value is computed from its arguments' fake values."""
    node = graph.call_function(target, tuple(arguments), options)
    values, named = fx.map_arg((tuple(arguments), options), fake_value)
    mode = _fake_mode((*values, *named.values()))
    if mode is None:
        set_fake_value(node, target(*values, **named))
    else:
        with mode:
            set_fake_value(node, target(*values, **named))
    return node


def replace_attention(graph: fx.Graph, old: fx.Node, new: fx.Node) -> fx.Node:
    """Put `new` [B, H, S, D] in the place of `old`, in the memory layout that its users were traced with.

    Returns what stands there now. Each copy is one more pass over the output; most models merge their heads next, and
    were traced with the layout that attention returns by itself.
    """
    if not has_merged_heads(fake_value(old)):
        new = call(graph, torch.ops.aten.contiguous.default, (new,))
    elif not has_merged_heads(fake_value(new)):
        merged = call(graph, torch.ops.aten.transpose.int, (new, 1, 2))
        merged = call(graph, torch.ops.aten.contiguous.default, (merged,))
        new = call(graph, torch.ops.aten.transpose.int, (merged, 1, 2))
    new.meta["nn_module_stack"] = old.meta.get("nn_module_stack")
    new.meta["stack_trace"] = old.meta.get("stack_trace")
    operands = old.all_input_nodes
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    # The repeated keys and values, too large to keep for nothing; masks are shared and go last.
    erase_if_unused(graph, operands)
    return new


def _fake_mode(values: Sequence[Any]) -> Any:
    for value in values:
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return None
