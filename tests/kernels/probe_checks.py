"""The kernels that probes run, against torch operations on the same tensors, in the course of planning."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.planted_heads import plant_heads, random_plant
from mmcompile.kernels import lines, lines_kernel, probes, probes_kernel
from mmcompile.kernels.attend import plan_attention
from mmcompile.kernels.patterns import HeadPattern

FUNCTIONS: dict[str, tuple[Any, str, Any, str]] = {
    "place": (probes.Probes, "of_cpu", probes_kernel, "place"),
    "recall": (probes.Measured, "recall_cpu", probes_kernel, "recall"),
    "totals": (probes, "_totals_cpu", probes_kernel, "totals"),
    "agreement": (probes, "_agreement_cpu", probes_kernel, "agreement"),
    "choose": (probes, "_choose_cpu", probes_kernel, "choose"),
    "site totals": (lines, "site_totals_cpu", lines_kernel, "site_totals"),
    "hot weight": (probes, "_hot_weight_cpu", probes_kernel, "hot_weight"),
}


@contextmanager
def both_ways(on_gpu: bool) -> Iterator[dict[str, int]]:
    """Whoever asks for one way gets it compared with the other. Yields how often each was."""
    calls = dict.fromkeys(FUNCTIONS, 0)
    with pytest.MonkeyPatch.context() as patch:
        for name, (owner, attribute, kernels, kernel) in FUNCTIONS.items():
            checked = _checked(name, getattr(owner, attribute), getattr(kernels, kernel), calls)
            patch.setattr(*((kernels, kernel) if on_gpu else (owner, attribute)), checked)
        yield calls


def _checked(name: str, torch_way: Callable[..., Any], kernel: Callable[..., Any], calls: dict[str, int]) -> Any:
    def run(*arguments: Any) -> Any:
        calls[name] += 1
        found, expected = kernel(*arguments), torch_way(*arguments)
        for index, (one, other) in enumerate(zip(_parts(found), _parts(expected), strict=True)):
            assert one.dtype == other.dtype and one.shape == other.shape, (name, index)
            if one.is_floating_point():
                torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5, msg=lambda m, i=index: f"{name} {i}: {m}")
            else:
                assert torch.equal(one, other), (name, index)
        return found

    return run


def _parts(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def check_plan(kind: str, tokens: int, seed: int, density: float | None, device: str) -> dict[str, int]:
    """Plans of planted heads, `"auto"` and a grid. Returns how often each function ran."""
    planted = plant_heads(random_plant(kind, tokens, seed, 2, 1), device)
    with both_ways(device == "cuda") as calls:
        for pattern in (
            HeadPattern("top_p", order="auto", columns=300),
            HeadPattern("top_p", order="auto"),
            HeadPattern("top_p", boundary="2d", columns=20),
            HeadPattern("grid", lines="vs"),
        ):
            plan_attention(planted.query, planted.key, pattern, planted.boundaries, density=density)
    return calls
