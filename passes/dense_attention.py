"""Give the causal attentions of a short prefill the form that torch's fastest dense kernels take."""

from collections.abc import Sequence

import torch
from torch import fx

from mmcompile.passes.decide import Decision
from mmcompile.passes.graph import call, erase_if_unused, replace_attention

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def dense_attention(module: fx.GraphModule, decisions: Sequence[Decision]) -> int:
    """Rewrite the sites of some decisions in place; returns how many changed.

    A mask that says key <= query and nothing else becomes `is_causal`, for which no mask is made; grouped heads are
    repeated, which cuDNN's kernel needs and flash attention does not mind. Other masks stay as they are.
    """
    masks: list[fx.Node | None] = []
    replaced: dict[fx.Node, fx.Node] = {}
    for decision in decisions:
        site, mask = decision.site, decision.mask
        groups = int(site.heads) // int(site.kv_heads)
        grouped = groups > 1 and bool(site.node.kwargs.get("enable_gqa", False))
        if mask is None or not mask.is_only_causal or not (site.mask or grouped):
            continue
        # One site's output may be another's query.
        query, key, value = (replaced.get(node, node) for node in (site.query, site.key, site.value))
        with module.graph.inserting_before(site.node):
            if groups > 1:
                key, value = (_repeat_heads(module.graph, node, groups) for node in (key, value))
            dense = call(module.graph, _ATTENTION, (query, key, value), is_causal=True, scale=site.scale)
            replaced[site.node] = replace_attention(module.graph, site.node, dense)
        masks.append(site.mask)
    erase_if_unused(module.graph, dict.fromkeys(masks))
    return len(masks)


def _repeat_heads(graph: fx.Graph, node: fx.Node, groups: int) -> fx.Node:
    return call(graph, torch.ops.aten.repeat_interleave.self_int, (node, groups, 1))
