"""Watch a compiled model: what it compiles, which of its attentions run on our kernels, and why others do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.registry import lookup_backend, register_backend
from torch.overrides import TorchFunctionMode

from mmcompile.options import Options
from mmcompile.passes.decide import Reason, SiteRecord, decide, record_unread
from mmcompile.passes.find_attention import find_attention, find_unread

WATCHED = "mmcompile_doctor"  # the inner backend that `Watch` stands behind


class Watch:
    """An inner backend that counts what it compiles and what of it runs, and keeps why attentions stayed dense.

    Counting what runs tells a graph that serves a call from one that Dynamo gave up and left to eager mode.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.graphs = 0
        self.rewritten: list[int] = []  # rewritten attentions that ran, of each run
        self._refused: dict[str, None] = {}  # an ordered set

    @property
    def fewest_rewritten(self) -> int:
        """Rewritten attentions that ran, of the run that had fewest."""
        return min(self.rewritten, default=0)

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why attentions stayed dense, each reason once."""
        return tuple(self._refused)

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        target = torch.ops.mminference.block_sparse_attention.default
        count = len(module.graph.find_nodes(op="call_function", target=target))
        passes = self.options.for_passes
        decisions = decide(find_attention(module), passes["patterns"], passes["min_tokens"])
        for record in (*(one.record for one in decisions), *map(record_unread, find_unread(module))):
            # Vision towers are not causal: that they stay dense is no news.
            if record.reason.is_refusal and record.reason is not Reason.NON_CAUSAL:
                self._refused[_describe(record)] = None
        compiled = lookup_backend(self.options.inner)(module, list(example_inputs))

        def run(*inputs: Any) -> Any:
            self.rewritten[-1] += count
            return compiled(*inputs)

        return run


_watches: list[Watch] = []


@contextmanager
def watched(options: Options) -> Iterator[Watch]:
    """A watch behind the backend `WATCHED`, in fresh Dynamo caches."""
    if WATCHED not in torch._dynamo.list_backends(exclude_tags=()):
        register_backend(lambda module, example_inputs: _watches[-1](module, example_inputs), name=WATCHED)
    _watches.append(Watch(options))
    torch._dynamo.reset()
    try:
        yield _watches[-1]
    finally:
        _watches.pop()
        torch._dynamo.reset()


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder of a transformers model, the module that its `get_decoder` names."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = model if get_decoder is None else get_decoder()
    assert isinstance(decoder, nn.Module)
    return decoder


class _AttentionCounter(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.counting = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention and self.counting:
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_attentions(model: nn.Module, call: Callable[[nn.Module], Any]) -> int:
    """How many attentions the decoder of `model` runs in `call(model)`, in eager mode. Leaves hooks on the model."""
    counter, decoder = _AttentionCounter(), decoder_of(model)

    def counting(on: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counter.counting = on

        return hook

    decoder.register_forward_pre_hook(counting(True))
    decoder.register_forward_hook(counting(False))
    with counter:
        call(model)
    return counter.count


def _describe(record: SiteRecord) -> str:
    return f"{record.reason}: {record.detail}" if record.detail else str(record.reason)
