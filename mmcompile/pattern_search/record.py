"""Run a model's prefill through the backend's own capture, with every causal attention handed to a visitor."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from mmcompile.errors import MMCompileError
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.model import compile_with
from mmcompile.passes.add_boundaries import add_boundaries
from mmcompile.passes.decide import SiteRecord, decide, record_unread
from mmcompile.passes.find_attention import find_attention, find_unread
from mmcompile.passes.graph import copy_graph, fake_value, placeholders
from mmcompile.passes.record_attention import Visit, record_attention
from mmcompile.prefill import CallBoundaries
from mmcompile.reference_runs import copy_sharing_weights


class SearchError(MMCompileError, ValueError):
    """A search that cannot begin or go on, and why."""


def record(model: nn.Module, inputs: Mapping[str, Any], visit: Visit) -> list[SiteRecord]:
    """Call `visit` for each causal attention of `model(**inputs)`, layer after layer; what it returns is the layer's
    output. Returns what was decided for each attention of each graph.

    The model itself is left as it is: a copy that shares its weights runs. Dynamo's caches are reset before and after.
    No cache of keys and values is kept, and logits of the last token alone are made, where the model can.
    """
    copy = copy_sharing_weights(model).eval()
    known = inspect.signature(copy.forward).parameters
    spare = {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in known}
    recorder = _Recorder(visit)
    torch.compiler.reset()
    try:
        # Gradients off by itself would do; inference tensors cannot be saved in graphs that are compiled later.
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1024):
            compile_with(copy, recorder)(**{**spare, **inputs})
    finally:
        torch.compiler.reset()
    return recorder.records


class _Recorder:
    """A backend that runs each graph as it is, with its causal attentions replaced by the visitor."""

    __name__ = "mminference"

    def __init__(self, visit: Visit) -> None:
        self._visit = visit
        self.records: list[SiteRecord] = []

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        copy = copy_graph(module)
        decisions = decide(find_attention(copy), HeadPattern(), 0)
        self.records += [decision.record for decision in decisions] + [*map(record_unread, find_unread(copy))]
        causal = [decision for decision in decisions if decision.record.sparse]
        if not causal:
            return module
        boundaries = add_boundaries(copy, fake_value(causal[0].site.query).device)
        record_attention(copy, causal, boundaries, self._visit)
        copy.graph.lint()
        copy.recompile()
        of_call = CallBoundaries(placeholders(copy.graph)[: -len(boundaries.nodes)], causal[0].site)
        return lambda *inputs: copy(*inputs, *of_call.of(inputs))
