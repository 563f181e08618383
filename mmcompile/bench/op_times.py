"""The time of each of our ops in one attention, without touching the code that calls them."""

import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PARTS = {
    "arrange": "arrange",
    "plan": "plan",
    "permute": "permutations",
    "unpermute": "permutations",
    "block_sparse_attention": "attention",
    "compare_with_dense": "check",
}


class OpTimes(TorchDispatchMode):
    """While active, marks when each op `mminference::*` begins and ends, on the device and on the host."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.on_gpu = device == "cuda"
        self.spans: list[tuple[str, float, tuple[torch.cuda.Event, torch.cuda.Event] | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "mminference":
            return func(*args, **(kwargs or {}))
        marks = None
        if self.on_gpu:
            marks = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            marks[0].record()
        begin = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        host = (time.perf_counter() - begin) * 1e3
        if marks is not None:
            marks[1].record()
        self.spans.append((PARTS[func._schema.name.split("::")[1]], host, marks))
        return result

    def host_ms(self, *parts: str) -> float:
        """How long the host was busy with the ops of some parts; on a GPU, with launching them."""
        return sum(host for part, host, _ in self.spans if part in parts)

    def ms(self, *parts: str) -> float:
        """How long the device was, once it has finished them."""
        if not self.on_gpu:
            return self.host_ms(*parts)
        return sum(marks[0].elapsed_time(marks[1]) for part, _, marks in self.spans if part in parts and marks)
