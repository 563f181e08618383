"""The CPU path against the float64 oracle, and that it does only the work that a plan lists."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import scaled_dot_product_attention

from mmcompile.kernels import block_sparse_cpu
from mmcompile.kernels.block_sparse_cpu import block_sparse_attention
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.reference import attention
from tests.kernels.tile_walks import MASKS, WalkCase, assert_as_exact_as_torch, mask_of, of_heads, unread, walk_cases

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(case: WalkCase, dtype: torch.dtype = torch.float32) -> None:
    walk, inputs = case.walk(), case.inputs(dtype)
    output = block_sparse_attention(*inputs, walk, case.width**-0.5)
    assert_as_exact_as_torch(output, inputs, mask_of(walk), walk)


@pytest.mark.parametrize("mask", MASKS)
def test_every_part_of_the_mask(mask):
    check(MASKS[mask])


@settings(max_examples=100)
@given(walk_cases())
def test_any_walk_as_exact_as_torch(case):
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=30)
@given(case=walk_cases())
def test_any_walk_in_half_precision(dtype, case):
    check(case, dtype)


@pytest.mark.parametrize("stacked_mask", [0, 2 * TILE * 5 * TILE])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("columns", ["none", "shared"])
def test_heads_stacked_and_not(stacked_mask, permuted, columns, monkeypatch):
    monkeypatch.setattr(block_sparse_cpu, "STACKED_MASK", stacked_mask)  # elements: two heads of five tiles
    case = WalkCase(query_length=200, key_length=901, query_offset=701, density=0.9, heads=4, copies=2)
    check(replace(case, permuted=permuted, columns=columns))


@pytest.mark.parametrize("length", [1, 127, 128, 129, 500])
def test_every_tile_is_dense_causal_attention(length):
    case = WalkCase(query_length=length, key_length=length, heads=4, copies=2, density=1.0)
    walk, (query, key, value) = case.walk(), case.inputs()
    output = block_sparse_attention(query, key, value, walk, case.width**-0.5)
    dense = scaled_dot_product_attention(query, of_heads(key, walk), of_heads(value, walk), is_causal=True)
    torch.testing.assert_close(output, dense, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_of_every_tile_is_at_most_half_more_than_torchs(dtype):
    """Law 1, with no floor under the bound."""
    case = WalkCase(query_length=1000, key_length=1000, heads=4, copies=2, width=128, density=1.0)
    walk, (query, key, value) = case.walk(), case.inputs(dtype)
    ours = block_sparse_attention(query, key, value, walk, 128**-0.5)
    key, value = of_heads(key, walk), of_heads(value, walk)
    dense = scaled_dot_product_attention(query, key, value, is_causal=True)
    exact = attention(query, key, value, mask_of(walk))
    assert (ours.double() - exact).norm() <= 1.5 * (dense.double() - exact).norm()


def test_rows_without_a_key_are_zero():
    case = WalkCase(batch=2, padding="empty", density=1.0)
    output = block_sparse_attention(*case.inputs(), case.walk(), 1.0)
    assert (output[0] == 0).all()
    assert (output[1] != 0).all()


def test_large_scores_do_not_overflow():
    case = WalkCase(width=64, density=1.0)
    walk, (query, key, value) = case.walk(), case.inputs()
    output = block_sparse_attention(query * 100, key * 100, value, walk, 1.0)
    assert output.isfinite().all()


def test_the_output_lies_as_a_model_merges_it():
    case = WalkCase(batch=2, query_length=130, heads=3, copies=1)
    output = block_sparse_attention(*case.inputs(), case.walk(), 1.0)
    assert output.transpose(1, 2).is_contiguous()


def test_any_strides():
    case = WalkCase(batch=2, heads=2, copies=2, width=32, key_orders=2, columns="shared")
    walk, inputs = case.walk(), case.inputs()
    expected = block_sparse_attention(*(x.contiguous() for x in inputs), walk, 0.2)
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in inputs]
    torch.testing.assert_close(block_sparse_attention(*strided, walk, 0.2), expected)


@pytest.mark.parametrize("columns", ["none", "each"])
def test_keys_that_are_not_listed_are_not_read(columns):
    case = WalkCase(query_length=100, key_length=700, query_offset=600, density=0.3, copies=1, columns=columns)
    walk, (query, key, value) = case.walk(), case.inputs()
    expected = block_sparse_attention(query, key, value, walk, 0.2)
    for keys in (key, value):
        keys[:, :, unread(walk)] = float("nan")
    assert torch.equal(block_sparse_attention(query, key, value, walk, 0.2), expected)


@pytest.mark.parametrize("columns", ["shared", "each"])
def test_columns_that_are_no_tile_are_attended_wherever_the_mask_allows(columns):
    """Not one key tile listed: all there is comes from the columns."""
    case = WalkCase(query_length=300, key_length=300, density=0.0, columns=columns)
    walk = case.walk()
    mask = mask_of(walk)
    assert mask.any() and not mask.all()
    check(case)


def test_a_key_order_and_its_copy_are_those_of_the_batch_row_and_plan_row():
    case = WalkCase(batch=2, plans=4, query_orders=2, key_orders=2, heads=4, permuted=True, density=1.0, seed=2)
    walk = case.walk()
    for row in (walk.query_row, walk.key_row):
        assert not torch.equal(row[0], row[1])
        assert len(set(row[0].tolist())) == 2
    check(case)


def test_only_listed_tiles_are_multiplied(monkeypatch):
    multiplied = []

    def counting(query, key, value, **options):
        multiplied.append(query.shape[:-1].numel() * key.shape[2])
        return scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(block_sparse_cpu, "scaled_dot_product_attention", counting)
    case = WalkCase(query_length=640, key_length=640, heads=6, copies=2, plans=2, density=0.5, columns="each")
    walk = case.walk()
    block_sparse_attention(*case.inputs(), walk, 0.2)
    _, full, partial, _, columns = walk.counts[0].sum(1).unbind(-1)  # [P] each
    keys = (full + partial) * TILE + columns
    assert sum(multiplied) == sum(int(keys[plan]) for plan in walk.head_plan) * TILE
