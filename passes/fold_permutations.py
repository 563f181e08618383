"""Remove permutations that undo each other."""

import torch
from torch import fx

from mmcompile.passes.graph import erase_if_unused, fake_value

_OPS = torch.ops.mminference


def fold_permutations(module: fx.GraphModule) -> int:
    """Replace `permute(unpermute(x))` in one and the same order by x; returns how many pairs went.

    They meet where two attentions follow each other with nothing but the layout between them.
    """
    folded = 0
    for permute in module.graph.find_nodes(op="call_function", target=_OPS.permute.default):
        inner, order, rows, source_head, row = permute.args
        if inner.target is not _OPS.unpermute.default:
            continue
        source, inner_order, inner_rows, inner_row = inner.args
        every_head_once = list(source_head) == list(range(fake_value(source).shape[1]))
        if (inner_order, inner_rows, list(inner_row)) == (order, rows, list(row)) and every_head_once:
            permute.replace_all_uses_with(source)
            erase_if_unused(module.graph, [permute])
            folded += 1
    return folded
