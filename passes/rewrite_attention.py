"""Rewrite each sparse site into arrange -> plan -> permute -> block-sparse attention -> unpermute."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

import mmcompile.kernels.ops  # noqa: F401  registers torch.ops.mminference
from mmcompile.kernels.patterns import KeyCopies, Order, PlanRows, distinct_orders, encode, encode_orders, plan_rows
from mmcompile.passes.add_boundaries import BoundaryInputs
from mmcompile.passes.decide import Decision
from mmcompile.passes.emit_mask import MaskNodes, emit_mask
from mmcompile.passes.graph import call, erase_if_unused, fake_value, replace_attention, size_argument, size_key

_OPS = torch.ops.mminference


@dataclass(frozen=True)
class ArrangementNodes:
    """The outputs of one `mminference::arrange` call as nodes, and what it was called with."""

    query_order: fx.Node
    key_order: fx.Node
    query_tags: fx.Node
    key_tags: fx.Node
    query_site: fx.Node
    key_site: fx.Node
    offset: Any  # position of the first query among the keys: a node or a number

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        return self.query_order, self.key_order, self.query_tags, self.key_tags, self.query_site, self.key_site


@dataclass(frozen=True)
class PlanNodes:
    """The outputs of one `mminference::plan` call as nodes."""

    query_row: fx.Node
    key_row: fx.Node
    counts: fx.Node
    tiles: fx.Node
    columns: fx.Node
    cold: fx.Node
    density: fx.Node
    recall: fx.Node

    @property
    def lists(self) -> tuple[fx.Node, ...]:
        return self.query_row, self.key_row, self.counts, self.tiles, self.columns, self.cold


@dataclass
class RewriteResult:
    """What the rewrite changed: the figures of each rewritten site, float32 tensors as nodes, and how many plans and
    arrangements serve them. Figures: density and estimated recall [B, P]; of a check, error and true recall [H]."""

    figures: list[tuple[fx.Node, ...]] = field(default_factory=list)
    plans: int = 0
    arrangements: int = 0


@dataclass(frozen=True)
class Check:
    """What share of the query tiles is compared with dense attention, and the input that says which."""

    share: float
    seed: fx.Node


@dataclass(frozen=True)
class Budget:
    """What a plan may compute: options of the backend, the same for every site."""

    density: float | None
    recall: float | None
    search_strides: bool = True


def rewrite_attention(
    module: fx.GraphModule,
    decisions: Sequence[Decision],
    boundaries: BoundaryInputs,
    budget: Budget,
    check: Check | None = None,
) -> RewriteResult:
    """Rewrite the sparse decisions in place, and with `check` compare some of what they compute with dense attention.

    Sites with the same mask, lengths and orders share one arrangement, and one plan where their patterns are the same
    and known beforehand: what is estimated from queries and keys is each site's own.
    """
    result = RewriteResult()
    arrangements: dict[Any, ArrangementNodes] = {}
    plans: dict[Any, PlanNodes] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    for index, decision in enumerate(decisions):
        site = _Site(module.graph, _after(decision, replaced), boundaries, budget)
        with module.graph.inserting_before(decision.site.node):
            key = site.mask_key, site.orders, decision.site.node if site.searches else None
            if key not in arrangements:
                arrangements[key] = site.arrange()
            site.permute_keys(arrangements[key])
            plan_key = key, site.rows.patterns, decision.site.node if site.needs_data else None
            if plan_key not in plans:
                plans[plan_key] = site.plan(arrangements[key])
            output = site.attend(arrangements[key], plans[plan_key])
            figures: tuple[fx.Node, ...] = plans[plan_key].density, plans[plan_key].recall
            if check is not None:
                figures += site.compare(output, arrangements[key], plans[plan_key], check, index)
            replaced[decision.site.node] = replace_attention(module.graph, decision.site.node, output)
        result.figures.append(figures)
    result.plans, result.arrangements = len(plans), len(arrangements)
    erase_if_unused(module.graph, dict.fromkeys(decision.site.mask for decision in decisions))
    return result


def _after(decision: Decision, replaced: Mapping[fx.Node, fx.Node]) -> Decision:
    """The decision with the operands that stand now: one site's output may be another's query."""
    site = decision.site
    operands = {name: getattr(site, name) for name in ("query", "key", "value")}
    return replace(decision, site=replace(site, **{k: replaced.get(v, v) for k, v in operands.items()}))


class _Site:
    """One site on its way through the ops. Calls go where the graph inserts."""

    def __init__(self, graph: fx.Graph, decision: Decision, boundaries: BoundaryInputs, budget: Budget) -> None:
        assert decision.mask is not None
        self.graph, self.site, self.spec = graph, decision.site, decision.mask
        self.boundaries, self.budget = boundaries, budget
        self.rows: PlanRows = plan_rows(decision.patterns)
        self.orders = distinct_orders(self.rows.patterns)
        self.query, self.key, self.value = self.site.query, self.site.key, self.site.value
        self.copies = KeyCopies.of(int(self.site.kv_heads), len(self.orders[1]))
        self.scale = self.site.head_dim**-0.5 if self.site.scale is None else self.site.scale

    @property
    def mask_key(self) -> tuple[Any, ...]:
        sizes = (self.site.batch, self.site.query_length, self.site.key_length)
        return (*map(size_key, sizes), self.site.mask, self.spec)

    @property
    def searches(self) -> bool:
        return self.budget.search_strides and any(order.searches for orders in self.orders for order in orders)

    @property
    def needs_data(self) -> bool:
        estimated = any(pattern.needs_data for pattern in self.rows.patterns) and self.budget.density != 1.0
        return estimated or self.searches

    def arrange(self) -> ArrangementNodes:
        sizes = [
            size_argument(self.graph, node, dim) for node, dim in ((self.query, 0), (self.query, 2), (self.key, 2))
        ]
        rows: MaskNodes = emit_mask(self.graph, self.spec, *sizes)
        arguments = (
            *((self.query, self.key) if self.searches else (None, None)),
            *self.boundaries.nodes,
            rows.key_valid,
            rows.query_segment,
            rows.key_segment,
            rows.query_span,
            rows.key_span,
            *sizes,
            rows.offset,
            encode_orders(*self.orders),
            self.scale if self.searches else None,
        )
        return ArrangementNodes(*self._outputs(_OPS.arrange.default, arguments), rows.offset)  # type: ignore[call-arg]

    def permute_keys(self, arrangement: ArrangementNodes) -> None:
        if self.orders[1] == (Order(),):
            return
        copies = (arrangement.key_order, None, list(self.copies.sources), list(self.copies.rows))
        self.key = call(self.graph, _OPS.permute.default, (self.key, *copies))
        self.value = call(self.graph, _OPS.permute.default, (self.value, *copies))

    def plan(self, arrangement: ArrangementNodes) -> PlanNodes:
        arguments = (
            # Patterns that look at neither are planned once for all layers.
            *((self.query, self.key) if self.needs_data else (None, None)),
            *arrangement.outputs,
            *self.boundaries.nodes,
            arrangement.offset,
            self.scale,
            *self._mask_parts(),
            encode(self.rows.patterns),
            list(self.rows.heads),
            self.budget.density,
            self.budget.recall,
        )
        return PlanNodes(*self._outputs(_OPS.plan.default, arguments))

    def attend(self, arrangement: ArrangementNodes, plan: PlanNodes) -> fx.Node:
        of_head = list(self.rows.of_head)
        permutes = self.orders[0] != (Order(),)
        query = self.query
        if permutes:
            heads = list(range(self.site.heads))
            query = call(
                self.graph, _OPS.permute.default, (query, arrangement.query_order, plan.query_row, heads, of_head)
            )
        arguments = (query, self.key, self.value, *self._walk(arrangement, plan))
        output = call(self.graph, _OPS.block_sparse_attention.default, arguments)
        if permutes:
            unpermuted = (output, arrangement.query_order, plan.query_row, of_head)
            output = call(self.graph, _OPS.unpermute.default, unpermuted)
        return output

    def compare(
        self, output: fx.Node, arrangement: ArrangementNodes, plan: PlanNodes, check: Check, index: int
    ) -> tuple[fx.Node, ...]:
        """Error and true recall of each head. index: of the site."""
        tensors = (self.query, self.key, self.value, output, arrangement.query_order)
        drawn = (check.seed, index, check.share)
        arguments = (*tensors, *self._walk(arrangement, plan), *drawn)
        return tuple(self._outputs(_OPS.compare_with_dense.default, arguments))

    def _walk(self, arrangement: ArrangementNodes, plan: PlanNodes) -> tuple[Any, ...]:
        """What the ops over a plan take besides queries, keys and values."""
        return (
            arrangement.query_tags,
            arrangement.key_tags,
            *plan.lists,
            list(self.rows.of_head),
            list(self.copies.of_head(int(self.site.heads))),
            self.scale,
            *self._mask_parts(),
        )

    def _mask_parts(self) -> tuple[int | None, bool, bool]:
        return self.spec.window, self.spec.query_segment is not None, self.spec.query_span is not None

    def _outputs(self, op: Any, arguments: tuple[Any, ...]) -> list[fx.Node]:
        outputs = call(self.graph, op, arguments)
        return [call(self.graph, operator.getitem, (outputs, i)) for i in range(len(fake_value(outputs)))]
