"""Launch shapes measured on a real GPU: exact whichever is chosen, kept for the next process, never while recording."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmcompile.kernels import block_sparse, choose_config
from mmcompile.kernels.attention_config import padded_head_dim, table_config
from mmcompile.kernels.measure_configs import MEBIBYTES, measure, shapes_to_try
from mmcompile.kernels.which_kernel import which_kernel
from tests.gpu.test_kernels_gpu import CASE, assert_exact, on_gpu
from tests.kernels.tile_walks import MASKS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def forced(tmp_path, monkeypatch) -> Iterator[None]:
    """Measures, also where the table was, with an empty cache folder, as the first process of a user would."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(choose_config.VARIABLE, "force")
    monkeypatch.setattr(choose_config, "_known", {})


SECOND_PROCESS = """
import torch
from mmcompile.kernels import block_sparse

def measure(*arguments):
    raise AssertionError("measured again")

block_sparse.measure = measure
query = torch.empty(1, 1, 5000, {width}, device="cuda", dtype={dtype})
print(*block_sparse.choose_config(query, measure))
"""


@pytest.mark.parametrize(("width", "dtype"), [(64, torch.bfloat16), (80, torch.float16), (64, torch.float32)], ids=str)
def test_the_measured_shape_is_exact_and_the_next_process_takes_it(width, dtype, tmp_path):
    case = replace(MASKS["everything with columns"], width=width)
    walk, inputs = on_gpu(case.walk()), case.inputs(dtype, "cuda")
    random, memory = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert_exact(block_sparse.portable_attention(*inputs, walk, width**-0.5), inputs, walk)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert torch.cuda.max_memory_allocated() - memory < (MEBIBYTES + 20) * 2**20  # and the test's own
    (chosen,) = choose_config._known.values()
    assert chosen in shapes_to_try(dtype.itemsize, padded_head_dim(width))
    if dtype == torch.float32:
        assert "measured on this device" in which_kernel(inputs[0].device, dtype, width)
    command = [sys.executable, "-c", SECOND_PROCESS.format(width=width, dtype=dtype)]
    second = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)
    assert second.stdout == " ".join(map(str, chosen)) + "\n"


def test_nothing_is_measured_while_a_graph_is_recorded(monkeypatch, tmp_path):
    case = replace(CASE, width=64)
    walk, inputs = on_gpu(case.walk()), case.inputs(torch.bfloat16, "cuda")
    monkeypatch.setenv(choose_config.VARIABLE, "0")
    expected = block_sparse.portable_attention(*inputs, walk, 0.125)  # compiles
    monkeypatch.setenv(choose_config.VARIABLE, "force")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = block_sparse.portable_attention(*inputs, walk, 0.125)
    graph.replay()
    assert torch.equal(output, expected)
    assert not choose_config._known and not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_measured_is_the_table_and_some_others(dtype):
    query = torch.empty(1, 1, 1, 64, device="cuda", dtype=dtype)
    table = table_config(query.device, query.dtype, query.shape[3])
    milliseconds = measure(block_sparse.run, query.device, dtype, 64, table)
    assert next(iter(milliseconds)) == table
    assert len(milliseconds) > 2 and all(0 < median < 100 for median in milliseconds.values())
