"""Fold the permutations of queries and outputs into the attention between them."""

import torch
from torch import fx

from mmcompile.passes.graph import erase_if_unused, fake_value

_OPS = torch.ops.mminference


def fold_permutations(module: fx.GraphModule) -> int:
    """Replace `unpermute(attention(permute(query)))` in one and the same order by the attention of queries in token
    order; returns how many were folded.

    The attention then gathers and scatters rows by itself where that was measured to be faster, and elsewhere copies
    them as before: which of the two depends on the prompt's length, so it is decided at each call.
    """
    folded = 0
    for unpermute in module.graph.find_nodes(op="call_function", target=_OPS.unpermute.default):
        attention, order, rows, row = unpermute.args
        if attention.target is not _OPS.block_sparse_attention.default or len(attention.users) > 1:
            continue
        permute = attention.args[0]
        if permute.target is not _OPS.permute.default:
            continue
        source, inner_order, inner_rows, source_head, inner_row = permute.args
        every_head_once = list(source_head) == list(range(fake_value(source).shape[1]))
        if (inner_order, inner_rows, list(inner_row)) != (order, rows, list(row)) or not every_head_once:
            continue
        attention.args = (source, *attention.args[1:], order)
        unpermute.replace_all_uses_with(attention)
        erase_if_unused(module.graph, [unpermute, permute])
        folded += 1
    return folded
