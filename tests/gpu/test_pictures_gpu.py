"""What pictures are made from, on the device: the same as on the CPU, and at 128K tokens in little memory."""

import time
from dataclasses import replace

import pytest
import torch

from mmcompile.kernels.attend import plan_attention
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.pictures.attention_map import attention_map
from mmcompile.pictures.recall_curve import recall_curves, swept_patterns
from tests.mmcompile.pictures.seen import boundaries, seen_attention

pytestmark = pytest.mark.gpu
PATTERNS = (
    HeadPattern("a_shape", local=100),
    HeadPattern("grid", lines="vs"),
    HeadPattern("tri_shape", local=200, order="site", boundary="2d"),
    HeadPattern("a_shape", local=64, boundary="q"),
)  # planned without estimates, so that both devices plan the same


def on_device(seen):
    moved = {name: value.cuda() for name, value in vars(seen).items() if isinstance(value, torch.Tensor)}
    pairs = {name: tuple(part.cuda() for part in value) for name, value in vars(seen).items() if type(value) is tuple}
    return replace(seen, **moved, **pairs)


@pytest.mark.parametrize("mask", ["causal", "padding", "window"])
def test_a_map_is_that_of_the_cpu(mask):
    torch.backends.cuda.matmul.allow_tf32 = False
    here = seen_attention(mask)
    for pattern in PATTERNS:
        maps = []
        for seen in (here, on_device(here)):
            planned = plan_attention(seen.query, seen.key, pattern, seen.boundaries, **seen.mask)
            maps.append(attention_map(seen, planned, 3, 1, cells=100))
        for of_cpu, of_gpu in ((maps[0].raster, maps[1].raster), (maps[0].ordered, maps[1].ordered)):
            torch.testing.assert_close(of_gpu.covered.cpu(), of_cpu.covered, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(of_gpu.missed.cpu(), of_cpu.missed, rtol=1e-3, atol=1e-3)
            assert torch.equal(of_gpu.computed.cpu(), of_cpu.computed)
            assert of_gpu.changes == of_cpu.changes
        assert maps[1].recall == pytest.approx(maps[0].recall, rel=1e-4)


def test_recall_curves_run_on_the_device():
    seen = on_device(seen_attention(length=1500, batch=1))
    curves = recall_curves(seen, [0, 3], swept_patterns(1500), [0.5, 0.9])
    assert all(0 < point.recall <= 1 for points in curves.values() for point in points)


def test_131072_tokens_take_little_memory():
    length = 131072
    small = on_device(seen_attention(batch=1, heads=1, kv_heads=1))
    query, key = (torch.randn(1, 1, length, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    of_length = tuple(part.cuda() for part in boundaries(length, 1))
    seen = replace(small, query=query, key=key, value=key, boundaries=of_length, scale=128**-0.5)
    planned = plan_attention(query, key, HeadPattern("top_p", order="site"), seen.boundaries, density=0.1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    drawn = attention_map(seen, planned, 0)
    seconds = time.perf_counter() - began
    print(f"a map of {length} tokens: {seconds:.1f} s, recall {drawn.recall:.3f}, density {drawn.density:.3f}")
    assert drawn.raster.covered.shape == (512, 512)
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**30  # queries x keys would be 16 GiB in bytes alone
    assert drawn.density == pytest.approx(0.1, abs=0.01)
