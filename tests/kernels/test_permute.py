"""permute and unpermute are exact copies, and inverses of each other."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmcompile.kernels.arrange import arrange
from mmcompile.kernels.check_inputs import check_permute, check_unpermute
from mmcompile.kernels.patterns import Order, encode_orders
from mmcompile.kernels.permute_cpu import permute, unpermute

pytestmark = pytest.mark.usefixtures("poisoned_memory")
sizes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 150), st.sampled_from([1, 16, 80, 128]))


def orders(batch: int, rows: int, length: int) -> Tensor:
    return torch.rand(batch, rows, length).argsort(-1).int()


def plan_rows(batch: int, plans: int, order_rows: int) -> Tensor | None:
    """The order of each plan row; None where copies name their orders themselves."""
    return torch.randint(order_rows, (batch, plans), dtype=torch.int32) if plans else None


@given(sizes, st.integers(1, 3), st.integers(0, 3), st.data())
def test_permute_gathers_rows_of_heads(size, order_rows, plans, data):
    batch, heads, length, width = size
    x = torch.randn(batch, length, heads, width).transpose(1, 2)
    order, rows = orders(batch, order_rows, length), plan_rows(batch, plans, order_rows)
    row = st.integers(0, (plans or order_rows) - 1)
    copies = data.draw(st.lists(st.tuples(st.integers(0, heads - 1), row), max_size=4))
    source_head, row = [head for head, _ in copies], [chosen for _, chosen in copies]
    output = permute(x, order, rows, source_head, row)
    assert output.is_contiguous()
    for copy, (head, chosen) in enumerate(copies):
        for b in range(batch):
            order_row = chosen if rows is None else int(rows[b, chosen])
            assert torch.equal(output[b, copy], x[b, head, order[b, order_row].long()])


@given(sizes, st.integers(1, 3), st.integers(0, 3), st.data())
def test_unpermute_is_the_inverse(size, order_rows, plans, data):
    batch, heads, length, width = size
    x = torch.randn(batch, heads, length, width)
    order, rows = orders(batch, order_rows, length), plan_rows(batch, plans, order_rows)
    row = data.draw(st.lists(st.integers(0, (plans or order_rows) - 1), min_size=heads, max_size=heads))
    output = unpermute(permute(x, order, rows, list(range(heads)), row), order, rows, row)
    assert torch.equal(output, x)
    assert output.transpose(1, 2).is_contiguous()


ORDERS = st.lists(
    st.builds(Order, st.booleans(), st.sampled_from(["raster", "site", "column"]), st.integers(1, 70)),
    min_size=1,
    max_size=3,
)


@given(ORDERS, st.integers(1, 2), st.integers(1, 300), st.data())
def test_the_orders_of_an_arrangement_can_be_undone(names, batch, length, data):
    ends = sorted(data.draw(st.lists(st.integers(0, batch * length + 50), max_size=5)))
    modality = torch.randint(4, (len(ends),), dtype=torch.int32)
    grid = torch.randint(40, (len(ends), 3), dtype=torch.int32)
    offsets = torch.tensor([0, *ends], dtype=torch.int32)
    sizes = (batch, length, length, 0)
    order = arrange(None, None, offsets, modality, grid, *[None] * 5, *sizes, encode_orders(names, names)).query_order
    rows = plan_rows(batch, 4, len(names))
    x = torch.randn(batch, 4, length, 16)
    heads = [0, 1, 2, 3]  # one of each plan row
    assert torch.equal(unpermute(permute(x, order, rows, heads, heads), order, rows, heads), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32], ids=str)
def test_any_dtype_bit_for_bit(dtype):
    x = torch.randint(-(2**15), 2**15, (1, 2, 65, 32)).to(dtype)
    order = orders(1, 1, 65)
    output = unpermute(permute(x, order, None, [0, 1], [0, 0]), order, None, [0, 0])
    assert torch.equal(output, x)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(3, 20, 8), "x has shape [3, 20, 8]; 4 dimensions [B, H, S, D]"),
        ("order", orders(2, 1, 20), "order has shape [2, 1, 20]; [1, 1, 20] fits the other arguments"),
        ("order", orders(1, 1, 19), "order has shape [1, 1, 19]; [1, 1, 20] fits the other arguments"),
        ("order", orders(1, 1, 20).long(), "order has dtype torch.int64; torch.int32, slot -> position"),
        ("rows", torch.zeros(1, 2), "rows has dtype torch.float32; torch.int32, plan row -> row of order"),
        ("rows", torch.zeros(2, 2).int(), "rows has shape [2, 2]; [1, 2] fits the other arguments"),
        ("rows", torch.zeros(2).int(), "rows has shape [2]; 2 dimensions [B, P]"),
        ("rows", torch.zeros(1, 0).int(), "row[0]=0 is not a plan row of rows; from 0 to -1"),
        ("row", [0, 1, 0], "row[1]=1 is not a row of order; from 0 to 0"),
        ("row", [0, 0], "row has 2 entries"),
        ("source_head", [0, 1, -1], "source_head[2]=-1 is not a head of x; from 0 to 2"),
    ],
)
def test_bad_input_is_named_before_anything_runs(name, value, message):
    arguments = {"x": torch.zeros(1, 3, 20, 8), "order": orders(1, 1, 20), "rows": None, "row": [0] * 3}
    if name != "source_head":
        with pytest.raises(ValueError, match=re.escape(message)):
            check_unpermute(**arguments | {name: value})
    with pytest.raises(ValueError, match=re.escape(message)):
        check_permute(**arguments | {"source_head": [0, 1, 2]} | {name: value})
