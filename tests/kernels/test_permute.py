"""permute and unpermute are exact copies, and inverses of each other."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mmcompile.kernels.ops  # noqa: F401  registers torch.ops.mminference
from mmcompile.kernels.plan import plan
from tests.kernels.plan_cases import plan_cases

OPS = torch.ops.mminference
pytestmark = pytest.mark.usefixtures("poisoned_memory")
sizes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 150), st.sampled_from([1, 16, 80, 128]))


def orders(batch: int, rows: int, length: int) -> Tensor:
    return torch.rand(batch, rows, length).argsort(-1).int()


@given(sizes, st.integers(1, 3), st.data())
def test_permute_gathers_rows_of_heads(size, rows, data):
    batch, heads, length, width = size
    x = torch.randn(batch, length, heads, width).transpose(1, 2)
    order = orders(batch, rows, length)
    copies = data.draw(st.lists(st.tuples(st.integers(0, heads - 1), st.integers(0, rows - 1)), max_size=4))
    source_head, row = [head for head, _ in copies], [plan for _, plan in copies]
    output = OPS.permute(x, order, source_head, row)
    assert output.is_contiguous()
    for copy, (head, plan_row) in enumerate(copies):
        for b in range(batch):
            assert torch.equal(output[b, copy], x[b, head, order[b, plan_row].long()])


@given(sizes, st.integers(1, 3), st.data())
def test_unpermute_is_the_inverse(size, rows, data):
    batch, heads, length, width = size
    x, order = torch.randn(batch, heads, length, width), orders(batch, rows, length)
    row = data.draw(st.lists(st.integers(0, rows - 1), min_size=heads, max_size=heads))
    output = OPS.unpermute(OPS.permute(x, order, list(range(heads)), row), order, row)
    assert torch.equal(output, x)
    assert output.transpose(1, 2).is_contiguous()


@given(plan_cases())
def test_the_orders_of_a_plan_can_be_undone(case):
    orders_of_plan = plan(**case.arguments(None, 0)).query_order
    rows = list(range(orders_of_plan.shape[1]))
    x = torch.randn(case.batch, len(rows), case.query_length, 16)
    there = OPS.permute(x, orders_of_plan, rows, rows)
    assert torch.equal(OPS.unpermute(there, orders_of_plan, rows), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32], ids=str)
def test_any_dtype_bit_for_bit(dtype):
    x = torch.randint(-(2**15), 2**15, (1, 2, 65, 32)).to(dtype)
    order = orders(1, 1, 65)
    output = OPS.unpermute(OPS.permute(x, order, [0, 1], [0, 0]), order, [0, 0])
    assert torch.equal(output, x)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(3, 20, 8), "x has shape [3, 20, 8]; 4 dimensions [B, H, S, D]"),
        ("order", orders(2, 1, 20), "order has shape [2, 1, 20]; [1, 1, 20] fits the other arguments"),
        ("order", orders(1, 1, 19), "order has shape [1, 1, 19]; [1, 1, 20] fits the other arguments"),
        ("order", orders(1, 1, 20).long(), "order has dtype torch.int64; torch.int32, slot -> position"),
        ("row", [0, 1, 0], "row[1]=1 is not a row of order; from 0 to 0"),
        ("row", [0, 0], "row has 2 entries"),
        ("source_head", [0, 1, -1], "source_head[2]=-1 is not a head of x; from 0 to 2"),
    ],
)
def test_bad_input_is_named_before_anything_runs(name, value, message):
    arguments = {"x": torch.zeros(1, 3, 20, 8), "order": orders(1, 1, 20), "row": [0] * 3}
    if name != "source_head":
        with pytest.raises(ValueError, match=re.escape(message)):
            OPS.unpermute(**arguments | {name: value})
    with pytest.raises(ValueError, match=re.escape(message)):
        OPS.permute(**arguments | {"source_head": [0, 1, 2]} | {name: value})
