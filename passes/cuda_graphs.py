"""Which graphs are left out of CUDA graphs, where Inductor makes them."""

from torch import fx

from mmcompile.passes.find_attention import find_attention
from mmcompile.passes.graph import output_node
from mmcompile.passes.pipeline import Rewritten


def why_no_cuda_graph(rewritten: Rewritten) -> str | None:
    """Why a graph must not be recorded as a CUDA graph; None where it may be."""
    if rewritten.sparse:
        return "its attention is sparse: each length would be recorded anew, with all the memory of its prefill"
    if _returns_keys(rewritten.module):
        return "it returns a cache that grows: the next token's run would overwrite what it reads"
    return None


def _returns_keys(module: fx.GraphModule) -> bool:
    """Whether the keys of an attention, or a part of them, are among the graph's outputs.

    What comes from the attention's own result does not count: logits are no cache.
    """
    output, sites = output_node(module.graph), find_attention(module)
    attentions = {site.node for site in sites}
    pending, seen = [site.key for site in sites], set(attentions)
    while pending:
        node = pending.pop()
        if node is output:
            return True
        if node not in seen:
            seen.add(node)
            pending.extend(node.users)
    return False
