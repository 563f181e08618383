"""What torch.export writes around operations and the passes have no use for: wrapped indexing, checks, empty vmaps."""

import torch
from torch import fx

from mmcompile.passes.graph import erase_if_unused
from mmcompile.passes.node_operations import operation

_WRAPPED_INDEX = "torch._dynamo._trace_wrapped_higher_order_op.ModIndex"
_NESTING = ("lazy_load_decompositions", "_vmap_increment_nesting", "_vmap_decrement_nesting")


def simplify(module: fx.GraphModule) -> None:
    """Spell indexing inside vmap as ATen does, and drop checks of tensors that the graph itself made.

    Checks, and the unused expansions that vmap's exits leave, would keep a mask of queries x keys alive.
    """
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default and node.args[0].op != "placeholder":
            module.graph.erase_node(node)
        elif operation(node) == "expand" and not node.users:
            erase_if_unused(module.graph, [node])
        elif operation(node) == "torch.ops.higher_order.flat_apply" and _WRAPPED_INDEX in node.args:
            source, *positions = node.args[node.args.index(_WRAPPED_INDEX) + 1 :]
            with module.graph.inserting_before(node):
                index = module.graph.call_function(torch.ops.aten.index.Tensor, (source, positions))
            index.meta = dict(node.meta)
            node.replace_all_uses_with(index)
            erase_if_unused(module.graph, [node])


def erase_empty_vmap(module: fx.GraphModule) -> int:
    """Erase the calls that enter and leave vmap where nothing is left inside; returns how many went.

    `torch.export.save` takes no program that has them.
    """
    entered = [node for node in module.graph.nodes if operation(node).endswith("._add_batch_dim")]
    if any(node.users for node in entered):
        return 0
    erase_if_unused(module.graph, entered)
    calls = [node for node in module.graph.nodes if operation(node).rpartition(".")[2] in _NESTING]
    for node in reversed(calls):
        module.graph.erase_node(node)
    return len(calls)
