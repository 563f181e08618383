"""Where the time of a compiled prefill goes: each kernel counts for the operation that launched it."""

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ATTENTION, PLAN, PRODUCTS = "attention", "plan", "projections and MLP"
PARTS = {
    "mminference::block_sparse_attention": ATTENTION,
    "aten::_scaled_dot_product_cudnn_attention": ATTENTION,
    "aten::_scaled_dot_product_flash_attention": ATTENTION,
    "aten::_scaled_dot_product_flash_attention_for_cpu": ATTENTION,
    "aten::_scaled_dot_product_efficient_attention": ATTENTION,
    "aten::scaled_dot_product_attention": ATTENTION,
    "mminference::arrange": PLAN,
    "mminference::permute": PLAN,
    "mminference::unpermute": PLAN,
    "mminference::plan": PLAN,
    "aten::mm": PRODUCTS,
    "aten::addmm": PRODUCTS,
    "aten::bmm": PRODUCTS,
    "aten::linear": PRODUCTS,
    "mkldnn::_linear_pointwise": PRODUCTS,
}


class TimeSplit:
    """The times of one call by part, in ms, the name of the kernel that attention spent most on, and how long a GPU was
    busy in all."""

    def __init__(self, events: list[Any], device: str) -> None:
        self.ms = dict.fromkeys(dict.fromkeys(PARTS.values()), 0.0)
        self.attention_kernel = ""
        self.busy_ms = sum(event.duration_ns() for event in events if not _on_host(event)) / 1e6
        spans = _outermost(events)
        if device == "cuda":
            self._add_kernels(events, spans)
        else:
            for begin, end, part in spans:
                self.ms[part] += (end - begin) / 1e6

    @classmethod
    def of(cls, call: Callable[[], Any], device: str) -> "tuple[Any, TimeSplit]":
        """What a call returns, and its times. device: "cuda" or "cpu"."""
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
        with profile(activities=activities, acc_events=True) as profiled:
            result = call()
            if device == "cuda":
                torch.cuda.synchronize()
        profiler: Any = profiled.profiler
        return result, cls(profiler.kineto_results.events(), device)

    def _add_kernels(self, events: list[Any], spans: list[tuple[int, int, str]]) -> None:
        launched = {event.correlation_id(): event.start_ns() for event in events if _on_host(event)}
        begins = [begin for begin, _, _ in spans]
        of_kernel: dict[str, int] = {}
        for event in events:
            begin = None if _on_host(event) else launched.get(event.linked_correlation_id())
            if begin is None:
                continue
            index = bisect_right(begins, begin) - 1
            if index < 0 or begin > spans[index][1]:
                continue
            part = spans[index][2]
            self.ms[part] += event.duration_ns() / 1e6
            if part == ATTENTION:
                of_kernel[event.name()] = of_kernel.get(event.name(), 0) + event.duration_ns()
        self.attention_kernel = max(of_kernel, key=lambda name: of_kernel[name], default="")[:60]


def _on_host(event: Any) -> bool:
    return bool(event.device_type() == torch.autograd.DeviceType.CPU)


def _outermost(events: list[Any]) -> list[tuple[int, int, str]]:
    """Begin, end and part of each operation that PARTS names, in order, none inside another."""
    found: list[tuple[int, int, str]] = []
    named = (event for event in events if event.name() in PARTS and _on_host(event))
    for event in sorted(named, key=lambda event: event.start_ns()):
        if not found or event.start_ns() >= found[-1][1]:
            begin = event.start_ns()
            found.append((begin, begin + event.duration_ns(), PARTS[event.name()]))
    return found
