"""The CPU path against the float64 oracle."""

import pytest
import torch
from hypothesis import given, settings

from mmcompile.kernels import block_sparse_cpu
from mmcompile.kernels.block_sparse_cpu import block_sparse_attention
from tests.kernels.tile_walks import WalkCase, assert_as_exact_as_torch, mask_of, walk_cases


def check(case: WalkCase, dtype: torch.dtype = torch.float32) -> None:
    walk, inputs = case.walk(), case.inputs(dtype)
    output = block_sparse_attention(*inputs, walk, case.width**-0.5)
    assert_as_exact_as_torch(output, inputs, mask_of(walk), walk)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@settings(max_examples=60)
@given(walk_cases())
def test_any_walk_as_exact_as_torch(case):
    check(case)
