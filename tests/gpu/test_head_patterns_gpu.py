"""Every pattern, boundary kind and order on the GPU: the cases of tests/kernels/test_head_patterns.py, in bfloat16.

MMCOMPILE_CASES=5000 runs that many instead of 500.
"""

import os

import pytest
import torch

from tests.kernels.pattern_cases import PatternCase, check_case

CASES = int(os.environ.get("MMCOMPILE_CASES", "500"))
AT_ONCE = 25
PARTS = 4  # `-k part0` to `-k part3` share the cases out to processes
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "first", [pytest.param(n, id=f"part{n // AT_ONCE % PARTS}-{n}") for n in range(0, CASES, AT_ONCE)]
)
def test_attention_over_a_plan_is_that_of_its_mask(first):
    for seed in range(first, min(first + AT_ONCE, CASES)):
        check_case(PatternCase.of(seed), "cuda", torch.bfloat16)
