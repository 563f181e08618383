"""Find every scaled dot-product attention of a graph, whichever tracer made it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mmcompile.passes.graph import Size, fake_value, same_size
from mmcompile.passes.node_operations import mutated_nodes, operation

SDPA_TARGETS = (
    torch._C._nn.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_SDPA_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # positional, in order
_NOT_A_SITE = "query, key and value are not all [B, H, S, D], or scale or dropout are known to the data alone"
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class AttentionSite:
    """One attention call of a graph, in one form for Dynamo's and for export's graphs.

    `query` [B, H, Sq, D]; `key` and `value` [B, Hkv, Sk, D], before heads were repeated.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    is_causal: bool
    dropout_p: float
    scale: float | None
    module_path: str

    @property
    def batch(self) -> Size:
        return fake_value(self.query).shape[0]

    @property
    def heads(self) -> Size:
        return fake_value(self.query).shape[1]

    @property
    def kv_heads(self) -> Size:
        return fake_value(self.key).shape[1]

    @property
    def head_dim(self) -> Size:
        return fake_value(self.query).shape[3]

    @property
    def query_length(self) -> Size:
        return fake_value(self.query).shape[2]

    @property
    def key_length(self) -> Size:
        return fake_value(self.key).shape[2]

    @property
    def layer(self) -> int | None:
        """The last number in the module path: the layer, as far as this graph's names tell it."""
        numbers = _LAYER.findall(self.module_path)
        return int(numbers[-1]) if numbers else None

    @property
    def stack(self) -> str:
        """The module path with the layer's number left out: the same for all layers of one stack."""
        return stack_of(self.module_path)


def stack_of(module_path: str) -> str:
    """A module path with its last number, the layer's, replaced by "*"."""
    numbers = list(_LAYER.finditer(module_path))
    if not numbers:
        return module_path
    return module_path[: numbers[-1].start(1)] + "*" + module_path[numbers[-1].end(1) :]


@dataclass(frozen=True)
class UnreadAttention:
    """Something that computes attention in a form that is no site, and why."""

    node: fx.Node
    module_path: str
    why: str


def find_attention(module: fx.GraphModule) -> list[AttentionSite]:
    """The attention sites of a graph in execution order.

    A call whose arguments have no recorded fake value, or are not 4-dimensional, is no site: nothing about it could
    be proved. Neither is a call inside vmap, whose tensors have one dimension less than they are.
    """
    return [found for found in _scan(module) if isinstance(found, AttentionSite)]


def find_unread(module: fx.GraphModule) -> list[UnreadAttention]:
    """The attention of a graph that is no site, and so stays as it is."""
    return [found for found in _scan(module) if isinstance(found, UnreadAttention)]


def _scan(module: fx.GraphModule) -> Iterator[AttentionSite | UnreadAttention]:
    written = mutated_nodes(module.graph)
    nesting = 0
    for node in module.graph.nodes:
        name = getattr(node.target, "__name__", "")
        nesting += name == "_vmap_increment_nesting"
        nesting -= name == "_vmap_decrement_nesting"
        why = None
        if node.op == "call_function" and node.target in SDPA_TARGETS:
            site = None if nesting else _bind(node, written)
            if site is not None:
                yield site
            else:
                why = "inside vmap" if nesting else _NOT_A_SITE
        elif name == "flex_attention":
            why = "FlexAttention, not scaled_dot_product_attention"
        elif name.startswith("_scaled_dot_product_"):
            why = f"taken apart into {name}, by run_decompositions"
        elif _weighs_values(node):
            why = "written out as softmax and matmul"
        if why is not None:
            yield UnreadAttention(node, module_path(node), why)


_PASSED_ON = ("dropout", "to", "type_as", "contiguous", "float", "half", "bfloat16", "where", "expand", "view")
_PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm")


def _weighs_values(node: fx.Node) -> bool:
    """A softmax over a matrix of scores whose result is multiplied with something: attention written by hand."""
    value = fake_value(node)
    if operation(node) not in ("softmax", "_softmax") or not isinstance(value, torch.Tensor) or value.dim() < 3:
        return False
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if any(word in operation(user) for word in _PRODUCTS):
            return True
        if operation(user).split(".")[-1] in _PASSED_ON:
            pending.extend(user.users)
    return False


def _bind(node: fx.Node, written: frozenset[fx.Node]) -> AttentionSite | None:
    bound: dict[str, Any] = dict(zip(_SDPA_PARAMETERS, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = bound["query"], bound["key"], bound["value"]
    for operand in (query, key, value):
        operand_value = fake_value(operand) if isinstance(operand, fx.Node) else None
        if not isinstance(operand_value, torch.Tensor) or operand_value.dim() != 4:
            return None
    dropout_p, scale = _constant(bound.get("dropout_p", 0.0)), _constant(bound.get("scale"))
    if dropout_p is None or (scale is None and bound.get("scale") is not None):
        return None
    unrepeated = undo_repeat_kv(key), undo_repeat_kv(value)
    same_heads = same_size(fake_value(unrepeated[0]).shape[1], fake_value(unrepeated[1]).shape[1])
    # Heads that were repeated into new memory no longer follow a source that is written to afterwards.
    if same_heads and not written.intersection(unrepeated):
        key, value = unrepeated
    return AttentionSite(
        node=node,
        query=query,
        key=key,
        value=value,
        mask=bound.get("attn_mask"),
        is_causal=bool(bound.get("is_causal", False)),
        dropout_p=dropout_p,
        scale=scale,
        module_path=module_path(node),
    )


def _constant(number: Any) -> float | None:
    """A scale or a probability as a number; None where it is none, or is known to the data alone.

    With `dynamic=True` Dynamo makes symbols of a model's floats; reading one tells it to compile for that value.
    """
    value = fake_value(number) if isinstance(number, fx.Node) else number
    known = isinstance(value, int | float) or (isinstance(value, torch.SymFloat) and value.node.hint is not None)
    return float(value) if known else None


def undo_repeat_kv(node: fx.Node) -> fx.Node:
    """The [B, Hkv, S, D] tensor whose heads `node` repeats, or `node` itself if it repeats none.

    The form is `repeat_interleave`, or: insert an axis after the heads, expand it to n, merge it into the heads. Shapes
    decide, so that the ways to write each step (indexing with None or unsqueeze, view or reshape) need no list; only
    n copies of each head side by side count, since that is the layout grouped-query attention means.
    """
    merge = node
    if operation(node) == "repeat_interleave":
        return _interleaved(node)
    if operation(merge) not in ("reshape", "view"):
        return node
    expand = merge.args[0]
    if not isinstance(expand, fx.Node) or operation(expand) != "expand":
        return node
    insert = expand.args[0]
    if not isinstance(insert, fx.Node) or not insert.args or not isinstance(insert.args[0], fx.Node):
        return node
    source = insert.args[0]
    shapes = [fake_value(step) for step in (source, insert, expand, merge)]
    if not all(isinstance(shape, torch.Tensor) for shape in shapes):
        return node
    if _inserts_axis(insert) and _repeats_heads(*(tuple(shape.shape) for shape in shapes)):
        return source
    return node


def _interleaved(node: fx.Node) -> fx.Node:
    """What `repeat_interleave` repeats, where that is each head, as often as the next."""
    bound: dict[str, Any] = dict(zip(("input", "repeats", "dim"), node.args, strict=False)) | dict(node.kwargs)
    source = bound.get("input", bound.get("self"))
    if not isinstance(source, fx.Node) or not isinstance(bound.get("repeats"), int) or bound.get("dim") not in (1, -3):
        return node
    value = fake_value(source)
    return source if isinstance(value, torch.Tensor) and value.dim() == 4 else node


def _inserts_axis(node: fx.Node) -> bool:
    if operation(node) == "unsqueeze":
        return True
    if operation(node) != "getitem" or not isinstance(node.args[1], tuple):
        return False
    return all(index is None or index is Ellipsis or index == slice(None) for index in node.args[1])


def _repeats_heads(source: tuple, insert: tuple, expand: tuple, merge: tuple) -> bool:
    if (len(source), len(insert), len(expand), len(merge)) != (4, 5, 5, 4):
        return False
    batch, heads, length, dim = source
    repeats = expand[2]
    if isinstance(repeats, torch.SymInt) or isinstance(heads, torch.SymInt):
        return False
    expected = (
        (insert, (batch, heads, 1, length, dim)),
        (expand, (batch, heads, repeats, length, dim)),
        (merge, (batch, heads * repeats, length, dim)),
    )
    return all(same_size(a, b) for got, want in expected for a, b in zip(got, want, strict=True))


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module, relative to what was compiled; empty where the tracer lost it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"^L\['\w+'\]\.?", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    return path.replace("_modules.", "").strip(".")
