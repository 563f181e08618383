"""Rewrite each sparse site into plan -> permute -> block-sparse attention -> unpermute."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

import mmcompile.kernels.ops  # noqa: F401  registers torch.ops.mminference
from mmcompile.kernels.patterns import HeadPattern, distinct, encode
from mmcompile.passes.add_boundaries import BoundaryInputs
from mmcompile.passes.decide import Decision
from mmcompile.passes.emit_mask import MaskNodes, emit_mask
from mmcompile.passes.graph import call, erase_if_unused, fake_value, has_merged_heads, size_argument, size_key

_OPS = torch.ops.mminference


@dataclass(frozen=True)
class PlanNodes:
    """The outputs of one `mminference::plan` call as nodes."""

    query_order: fx.Node
    key_order: fx.Node
    query_tags: fx.Node
    key_tags: fx.Node
    counts: fx.Node
    tiles: fx.Node
    density: fx.Node


@dataclass
class RewriteResult:
    """What the rewrite changed: the density node of each rewritten site, and how many plans serve them."""

    densities: list[tuple[Decision, fx.Node]] = field(default_factory=list)
    plans: int = 0


def rewrite_attention(
    module: fx.GraphModule,
    decisions: Sequence[Decision],
    boundaries: BoundaryInputs,
    *,
    density: float | None,
    min_tokens: int,
) -> RewriteResult:
    """Rewrite the sparse decisions in place; sites with the same mask, lengths and patterns share one plan."""
    result = RewriteResult()
    plans: dict[Any, PlanNodes] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    for decision in decisions:
        decision = _after(decision, replaced)
        site = decision.site
        assert decision.mask is not None
        patterns, head_plan = distinct(decision.patterns)
        key = (
            *(size_key(size) for size in (site.batch, site.query_length, site.key_length)),
            site.mask,
            decision.mask,
            patterns,
        )
        with module.graph.inserting_before(site.node):
            if key not in plans:
                plans[key] = _emit_plan(module.graph, decision, patterns, boundaries, density, min_tokens)
            output = _emit_attention(module.graph, decision, patterns, list(head_plan), plans[key], min_tokens)
            replaced[site.node] = _replace(module.graph, site.node, output)
        result.densities.append((decision, plans[key].density))
    result.plans = len(plans)
    erase_if_unused(module.graph, dict.fromkeys(decision.site.mask for decision in decisions))
    return result


def _after(decision: Decision, replaced: Mapping[fx.Node, fx.Node]) -> Decision:
    """The decision with the operands that stand now: one site's output may be another's query."""
    site = decision.site
    operands = {name: getattr(site, name) for name in ("query", "key", "value")}
    return replace(decision, site=replace(site, **{k: replaced.get(v, v) for k, v in operands.items()}))


def _emit_plan(
    graph: fx.Graph,
    decision: Decision,
    patterns: Sequence[HeadPattern],
    boundaries: BoundaryInputs,
    density: float | None,
    min_tokens: int,
) -> PlanNodes:
    site, spec = decision.site, decision.mask
    assert spec is not None
    batch, query_length, key_length = (
        size_argument(graph, site.query, 0),
        size_argument(graph, site.query, 2),
        size_argument(graph, site.key, 2),
    )
    rows: MaskNodes = emit_mask(graph, spec, batch, query_length, key_length)
    plan = call(
        graph,
        _OPS.plan.default,
        (
            None,  # queries and keys: the static patterns look at neither
            None,
            *boundaries.nodes,
            rows.key_valid,
            rows.query_segment,
            rows.key_segment,
            rows.query_span,
            rows.key_span,
            batch,
            query_length,
            key_length,
            rows.offset,
            spec.window,
            encode(patterns),
            density,
            min_tokens,
        ),
    )
    return PlanNodes(*(call(graph, operator.getitem, (plan, i)) for i in range(len(fake_value(plan)))))


def _emit_attention(
    graph: fx.Graph,
    decision: Decision,
    patterns: Sequence[HeadPattern],
    head_plan: list[int],
    plan: PlanNodes,
    min_tokens: int,
) -> fx.Node:
    site, spec = decision.site, decision.mask
    assert spec is not None
    query, key, value = site.query, site.key, site.value
    permutes_queries = any(pattern.query_order != "raster" for pattern in patterns)
    if permutes_queries:
        query = call(graph, _OPS.permute.default, (query, plan.query_order, list(range(site.heads)), head_plan))
    copies = _key_copies(decision, head_plan)
    if any(pattern.key_order != "raster" for pattern in patterns):
        sources, rows = list(copies.sources), list(copies.rows)
        key = call(graph, _OPS.permute.default, (key, plan.key_order, sources, rows))
        value = call(graph, _OPS.permute.default, (value, plan.key_order, sources, rows))
    output = call(
        graph,
        _OPS.block_sparse_attention.default,
        (
            query,
            key,
            value,
            plan.query_tags,
            plan.key_tags,
            plan.counts,
            plan.tiles,
            head_plan,
            list(copies.of_head),
            site.head_dim**-0.5 if site.scale is None else site.scale,
            spec.window,
            spec.query_segment is not None,
            spec.query_span is not None,
            min_tokens,
            spec.is_only_causal,
        ),
    )
    if permutes_queries:
        output = call(graph, _OPS.unpermute.default, (output, plan.query_order, head_plan))
    return output


@dataclass(frozen=True)
class _KeyCopies:
    """Which copies of keys and values to make: each KV head once for every key order its heads use."""

    sources: tuple[int, ...]  # KV head of each copy
    rows: tuple[int, ...]  # a plan row that has the copy's order
    of_head: tuple[int, ...]  # the copy that each query head reads


def _key_copies(decision: Decision, head_plan: Sequence[int]) -> _KeyCopies:
    site = decision.site
    group = site.heads // site.kv_heads
    copies: dict[tuple[int, str], int] = {}
    rows: list[int] = []
    of_head = []
    for head, pattern in enumerate(decision.patterns):
        wanted = (head // group, pattern.key_order)
        if wanted not in copies:
            copies[wanted] = len(copies)
            rows.append(head_plan[head])
        of_head.append(copies[wanted])
    return _KeyCopies(tuple(head for head, _ in copies), tuple(rows), tuple(of_head))


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> fx.Node:
    """Put `new` in the place of `old`, in the memory layout that its users were traced with."""
    if not has_merged_heads(fake_value(old)):
        # One more pass over the output; a model that merges its heads next was traced with the layout of `new`.
        new = call(graph, torch.ops.aten.contiguous.default, (new,))
    new.meta["nn_module_stack"] = old.meta.get("nn_module_stack")
    new.meta["stack_trace"] = old.meta.get("stack_trace")
    operands = old.all_input_nodes
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    # The repeated keys and values, too large to keep for nothing; masks are shared and go last.
    erase_if_unused(graph, operands)
    return new
