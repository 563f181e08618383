"""Sums of what comes before, for kernels of which each program needs those of others."""

import triton
import triton.language as tl

SUMMED = 1024  # values that are added up in one step


@triton.jit
def sum_before(values, count, SUMMED: tl.constexpr):
    """Sum of the first `count` of some int32 values, int64."""
    total = tl.zeros([SUMMED], tl.int64)
    for start in range(0, count, SUMMED):
        index = start + tl.arange(0, SUMMED)
        total += tl.load(values + index, mask=index < count, other=0)
    return tl.sum(total)
