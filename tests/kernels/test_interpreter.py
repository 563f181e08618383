"""The Triton kernels run by Triton's interpreter on the CPU, against the float64 oracle.

Float32 and float16 only: the interpreter multiplies bfloat16 wrongly.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcompile.kernels import block_sparse, permute, permute_cpu
from mmcompile.kernels.attention_config import LARGE, SMALL, Config, padded_head_dim
from tests.kernels.tile_walks import WalkCase, assert_as_exact_as_torch, mask_of, walk_cases

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]
BASE = WalkCase(query_length=130, key_length=300, query_offset=170, heads=2, copies=1, plans=2, density=0.8)


def check(case: WalkCase, dtype: torch.dtype, config: Config, descriptors: bool) -> None:
    walk, inputs = case.walk(), case.inputs(dtype)
    output = block_sparse.launch(*inputs, walk, case.width**-0.5, config, descriptors)
    assert output.stride() == torch.empty_like(inputs[0].transpose(1, 2)).transpose(1, 2).stride()
    assert_as_exact_as_torch(output, inputs, mask_of(walk), walk)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("width", [32, 64, 80, 96, 128, 256])
def test_every_head_dim_in_the_launch_shape_of_a_hopper(width, descriptors):
    check(WalkCase(width=width), torch.float16, LARGE[2, padded_head_dim(width)], descriptors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [32, 80, 128, 256])
def test_every_small_launch_shape(width, dtype):
    config = SMALL[dtype.itemsize, padded_head_dim(width)]
    check(WalkCase(query_length=100, key_length=150, query_offset=50, width=width), dtype, config, False)


@settings(max_examples=15)
@given(
    walk_cases(max_length=260),
    st.sampled_from([torch.float16, torch.float32]),
    st.sampled_from([Config(128, 128, 4, 1), Config(64, 64, 4, 1), Config(128, 32, 4, 1)]),
    st.booleans(),
)
def test_any_walk(case, dtype, config, descriptors):
    check(case, dtype, config, descriptors)
