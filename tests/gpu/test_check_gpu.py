"""The option `check` on a GPU: the kernel against float64, no wait for the device, and warnings that come later."""

import warnings

import pytest
import torch

import mmcompile
from mmcompile import CheckWarning, HeadPattern
from mmcompile.kernels.attend import plan_attention
from mmcompile.options import AUTO_PATTERN
from tests.kernels.test_compare_with_dense import check_comparison, moved
from tests.mmcompile.test_backend import Decoder, compiled

pytestmark = pytest.mark.gpu
CASES = range(0, 300, 10)
NARROW = HeadPattern("a_shape", sink=128, local=128)
COLUMNS = HeadPattern("columns", columns=500)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_and_recall_are_those_of_float64(dtype):
    for seed in CASES:
        check_comparison(seed, "cuda", dtype, 2e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(
    "pattern", [AUTO_PATTERN, NARROW, HeadPattern("columns", columns=500)], ids=lambda one: one.kind
)
def test_a_comparison_waits_for_nothing(pattern):
    query, key, value = torch.randn(3, 1, 4, 2000, 64)
    boundaries = tuple(torch.tensor(x, dtype=torch.int32) for x in ([0, 2000], [2], [[20, 10, 10]]))
    planned = moved(plan_attention(query, key, pattern, boundaries, density=0.2), "cuda")
    query, value, output = (x.cuda() for x in (query, value, torch.randn_like(query)))
    seed = torch.zeros(1, dtype=torch.int64, device="cuda")
    planned.compare(query, value, output, seed, 0.1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        error, recall = planned.compare(query, value, output, seed + 1, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert error.isfinite().any() and bool((recall[~recall.isnan()] <= 1.001).all())


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_prefill_waits_for_nothing_and_the_warning_comes_with_a_later_call(inner):
    model = Decoder().cuda().to(torch.bfloat16)
    run = compiled(model, patterns=NARROW, check=1.0, check_bound=1e-2, inner=inner)
    x = torch.randn(1, 2000, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.warns(CheckWarning):
        run(x)
        mmcompile.stats(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", CheckWarning)
            run(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with pytest.warns(CheckWarning, match=r"check_bound=0.01 in 8 heads .*: layer [01] head [0-3] \(0\.\d+\)"):
        run(x)
    assert all(head.error > 0.01 for site in mmcompile.stats(model) for head in site.heads)
