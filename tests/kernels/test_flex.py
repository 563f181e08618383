"""FlexAttention runs the same plan to the same result."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from mmcompile.kernels import reference
from mmcompile.kernels.block_sparse_cpu import block_sparse_attention
from mmcompile.kernels.flex import block_mask, flex_attention_on_plan
from tests.kernels.tile_walks import WalkCase, assert_as_exact_as_torch, mask_of, walk_cases

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@settings(max_examples=6)  # uncompiled FlexAttention takes about a second a case
@given(walk_cases(max_length=260, columns=False))
def test_any_walk(case):
    walk, inputs = case.walk(), case.inputs()
    output = flex_attention_on_plan(*inputs, walk, case.width**-0.5)
    assert_as_exact_as_torch(output, inputs, mask_of(walk), walk)


def test_the_block_mask_lists_the_tiles_of_the_plan():
    walk = WalkCase(batch=2, query_length=400, key_length=500, query_offset=100, plans=3, heads=5).walk()
    dense = block_mask(walk).to_dense()  # [B, H, nQ, nK]
    tiles = reference.selected_tiles(walk.counts, walk.tiles, 4)[:, list(walk.head_plan)]
    assert torch.equal(dense.bool(), tiles)


def test_mask_mod_is_the_plan_mask():
    case = WalkCase(query_length=300, key_length=300, window=200, spans=True, segments=True, permuted=True)
    case = replace(case, plans=4, query_orders=2, key_orders=2, heads=4)
    walk = case.walk()
    b, h, q, k = torch.meshgrid(*(torch.arange(size) for size in (1, case.heads, 300, 300)), indexing="ij")
    assert torch.equal(block_mask(walk).mask_mod(b, h, q, k), mask_of(walk))


@pytest.mark.parametrize("key_head", [(0, 0, 1, 1), (0, 1, 0, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("key_orders", [1, 2])
def test_any_head_map(key_head, key_orders):
    case = WalkCase(batch=2, heads=4, plans=4, copies=2, query_length=140, key_length=140, key_orders=key_orders)
    walk, inputs = case.walk()._replace(key_head=key_head), case.inputs()
    ours = block_sparse_attention(*inputs, walk, case.width**-0.5)
    flex = flex_attention_on_plan(*inputs, walk, case.width**-0.5)
    torch.testing.assert_close(flex, ours, atol=1e-6, rtol=1e-6)


def test_columns_are_refused_by_name():
    case = WalkCase(columns="shared")
    walk = case.walk()
    said = f"columns has shape {list(walk.columns.shape)}; FlexAttention takes none"
    with pytest.raises(ValueError, match=re.escape(said)):
        flex_attention_on_plan(*case.inputs(), walk, 0.2)
