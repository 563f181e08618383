"""Fold the permutations of queries and outputs into the attention between them."""

import torch
from torch import fx

import mmcompile.kernels.ops  # noqa: F401  registers torch.ops.mminference
from mmcompile.passes.graph import erase_if_unused, fake_value

_OPS = torch.ops.mminference
_ARGUMENTS = [argument.name for argument in _OPS.block_sparse_attention.default._schema.arguments]


def fold_permutations(module: fx.GraphModule) -> int:
    """Replace `unpermute(attention(permute(query)))` in one and the same order by the attention of queries in token
    order; returns how many were folded.

    The attention then gathers and scatters rows by itself where that was measured to be faster, and elsewhere copies
    them as before: which of the two depends on the prompt's length, so it is decided at each call.
    """
    folded = 0
    for unpermute in module.graph.find_nodes(op="call_function", target=_OPS.unpermute.default):
        attention, *back = unpermute.args
        if attention.target is not _OPS.block_sparse_attention.default or len(attention.users) > 1:
            continue
        of_attention = dict(zip(_ARGUMENTS, attention.args, strict=False)) | attention.kwargs
        permute = of_attention["query"]
        if permute.target is not _OPS.permute.default:
            continue
        source, order, rows, source_head, row = permute.args
        its_own = [order, of_attention["query_row"], list(of_attention["head_plan"])]
        every_head_once = list(source_head) == list(range(fake_value(source).shape[1]))
        if [*back[:2], list(back[2])] == [order, rows, list(row)] == its_own and every_head_once:
            attention.update_arg(0, source)
            attention.update_kwarg("query_order", order)
            unpermute.replace_all_uses_with(attention)
            erase_if_unused(module.graph, [unpermute, permute])
            folded += 1
    return folded
