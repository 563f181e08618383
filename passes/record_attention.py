"""Replace attention by a visitor that is handed its operands, so that queries, keys and values of a model are seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mmcompile.passes.add_boundaries import BoundaryInputs
from mmcompile.passes.decide import Decision
from mmcompile.passes.emit_mask import emit_mask
from mmcompile.passes.graph import erase_if_unused, fake_value, has_merged_heads, set_fake_value, size_argument


@dataclass(frozen=True, eq=False)
class SeenAttention:
    """One causal attention of a running prefill.

    query: [B, H, Sq, D]; key, value: [B, KV, Sk, D], before heads were repeated. boundaries: offsets int32 [M + 1],
    modality int32 [M], grid int32 [M, 3]. The rest is its mask, as `plan_attention` takes it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    boundaries: tuple[Tensor, Tensor, Tensor]
    scale: float
    window: int | None
    query_offset: int
    key_valid: Tensor | None
    segments: tuple[Tensor, Tensor] | None
    spans: tuple[Tensor, Tensor] | None
    module_path: str

    @property
    def mask(self) -> dict[str, Any]:
        """Arguments of `plan_attention`."""
        names = ("scale", "window", "query_offset", "key_valid", "segments", "spans")
        return {name: getattr(self, name) for name in names}


Visit = Callable[[SeenAttention], Tensor]  # returns the output [B, H, Sq, D]


def record_attention(
    module: fx.GraphModule, decisions: Sequence[Decision], boundaries: BoundaryInputs, visit: Visit
) -> None:
    """Put `visit` in the place of each sparse decision's attention, in the order in which they run.

    The graph then holds calls of Python: it runs as it is, and no compiler takes it. Masks of queries x keys are gone.
    """
    graph = module.graph
    for index, decision in enumerate(decisions):
        assert decision.mask is not None
        site = decision.site
        with graph.inserting_before(site.node):
            sizes = [size_argument(graph, *where) for where in ((site.query, 0), (site.query, 2), (site.key, 2))]
            rows = emit_mask(graph, decision.mask, *sizes)
            name = f"seen_attention_{index}"
            module.add_submodule(name, _Visited(decision, visit))
            mask = (rows.key_valid, rows.query_segment, rows.key_segment, rows.query_span, rows.key_span, rows.offset)
            seen = graph.call_module(name, (site.query, site.key, site.value, *boundaries.nodes, *mask))
        set_fake_value(seen, fake_value(site.node))
        operands = site.node.all_input_nodes
        site.node.replace_all_uses_with(seen)
        graph.erase_node(site.node)
        erase_if_unused(graph, [operand for operand in operands if operand is not site.mask])
    erase_if_unused(graph, dict.fromkeys(decision.site.mask for decision in decisions))


class _Visited(nn.Module):
    """The call of one site."""

    def __init__(self, decision: Decision, visit: Visit) -> None:
        super().__init__()
        assert decision.mask is not None
        site = decision.site
        self._scale = float(site.head_dim) ** -0.5 if site.scale is None else site.scale
        self._window = decision.mask.window
        self._path = site.module_path
        self._merged = has_merged_heads(fake_value(site.node))
        self._visit = visit

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        offsets: Tensor,
        modality: Tensor,
        grid: Tensor,
        key_valid: Tensor | None,
        query_segment: Tensor | None,
        key_segment: Tensor | None,
        query_span: Tensor | None,
        key_span: Tensor | None,
        query_offset: int,
    ) -> Tensor:
        output = self._visit(
            SeenAttention(
                query,
                key,
                value,
                (offsets, modality, grid),
                self._scale,
                self._window,
                query_offset,
                key_valid,
                None if query_segment is None or key_segment is None else (query_segment, key_segment),
                None if query_span is None or key_span is None else (query_span, key_span),
                self._path,
            )
        )
        # In the memory layout that its users were traced with.
        if self._merged:
            return output.transpose(1, 2).contiguous().transpose(1, 2)
        return output.contiguous(memory_format=torch.contiguous_format)
