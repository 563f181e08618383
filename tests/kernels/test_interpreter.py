"""The Triton kernels run by Triton's interpreter on the CPU, against the float64 oracle.

Float32 and float16 only: the interpreter multiplies bfloat16 wrongly.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcompile.kernels import (
    block_sparse,
    column_mass_kernel,
    compare_with_dense,
    compare_with_dense_kernel,
    gather_columns,
    last_queries,
    last_queries_kernel,
    levels,
    levels_kernel,
    lines,
    lines_kernel,
    ops,
    permute,
    permute_cpu,
    probes,
    probes_kernel,
    search_stride,
    search_stride_kernel,
    tile_mass,
    tile_mass_kernel,
    tile_shares_kernel,
)
from mmcompile.kernels.attention_config import LARGE, SMALL, Config, padded_head_dim
from tests.kernels.pattern_cases import PatternCase, check_case, combinations, walk_of
from tests.kernels.tile_walks import (
    MASKS,
    WalkCase,
    assert_as_exact_as_torch,
    mask_of,
    of_heads,
    unread,
    walk_cases,
)

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]


def check(case: WalkCase, dtype: torch.dtype, config: Config, descriptors: bool) -> None:
    walk, inputs = case.walk(), case.inputs(dtype)
    output = block_sparse.launch(*inputs, walk, case.width**-0.5, config, descriptors)
    assert output.stride() == torch.empty_like(inputs[0].transpose(1, 2)).transpose(1, 2).stride()
    assert_as_exact_as_torch(output, inputs, mask_of(walk), walk)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_part_of_the_mask(mask, descriptors):
    check(MASKS[mask], torch.float32, Config(128, 128, 4, 1), descriptors)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("width", [32, 64, 80, 96, 128, 256])
def test_every_head_dim_in_the_launch_shape_of_a_hopper(width, descriptors):
    check(WalkCase(width=width), torch.float16, LARGE[2, padded_head_dim(width)], descriptors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [32, 80, 128, 256])
def test_every_small_launch_shape(width, dtype):
    config = SMALL[dtype.itemsize, padded_head_dim(width)]
    check(WalkCase(query_length=100, key_length=150, query_offset=50, width=width), dtype, config, False)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("block_n", [32, 64, 128])
@pytest.mark.parametrize("width", [32, 80])
def test_columns_in_steps_of_every_size(width, block_n, descriptors):
    """Lists that end inside a step, on its edge, and empty ones."""
    case = WalkCase(query_length=600, key_length=260, density=0.3, columns="each", width=width, permuted=True)
    check(case, torch.float16, Config(128, block_n, 4, 1), descriptors)


@settings(max_examples=10)
@given(
    walk_cases(max_length=260),
    st.sampled_from([torch.float16, torch.float32]),
    st.sampled_from([Config(128, 128, 4, 1), Config(64, 64, 4, 1), Config(128, 32, 4, 1)]),
    st.booleans(),
)
def test_any_walk(case, dtype, config, descriptors):
    check(case, dtype, config, descriptors)


@settings(max_examples=15)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 200), st.sampled_from([8, 80, 128])),
    st.tuples(st.integers(1, 2), st.integers(0, 3)),
    st.booleans(),
    st.data(),
)
def test_row_copies(size, choice, merged, data):
    batch, heads, length, width = size
    x = torch.randn(batch, heads, length, width)
    if merged:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    orders, plans = choice  # no plan rows: each copy names its order
    order = torch.rand(batch, orders, length).argsort(-1).int()
    rows = torch.randint(orders, (batch, plans), dtype=torch.int32) if plans else None
    copies = data.draw(st.integers(1, 4))
    source_head, row = torch.randint(heads, (copies,)).tolist(), torch.randint(plans or orders, (copies,)).tolist()
    expected = permute_cpu.permute(x, order, rows, source_head, row)
    output = permute.permute(x, order, rows, source_head, row)
    assert torch.equal(output, expected)
    back = permute.unpermute(output, order, rows, row)
    assert back.transpose(1, 2).is_contiguous()
    assert torch.equal(back, permute_cpu.unpermute(expected, order, rows, row))


def test_any_strides():
    case = WalkCase(batch=2, query_length=130, key_length=130, columns="shared")
    walk, inputs = case.walk(), case.inputs()
    expected = block_sparse.block_sparse_attention(*inputs, walk, 0.2)
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in inputs]
    assert torch.equal(block_sparse.block_sparse_attention(*strided, walk, 0.2), expected)
    expanded = [inputs[0], *(x[:, :1].expand(-1, 2, -1, -1) for x in inputs[1:])]
    expected = block_sparse.block_sparse_attention(*(x.contiguous() for x in expanded), walk, 0.2)
    assert torch.equal(block_sparse.block_sparse_attention(*expanded, walk, 0.2), expected)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("columns", ["none", "each"])
def test_keys_that_are_not_listed_are_not_read(columns, descriptors):
    case = WalkCase(query_length=100, key_length=700, query_offset=600, density=0.3, copies=1, columns=columns)
    walk, (query, key, value) = case.walk(), case.inputs()
    config = Config(128, 128, 4, 1)
    expected = block_sparse.launch(query, key, value, walk, 0.2, config, descriptors)
    for keys in (key, value):
        keys[:, :, unread(walk)] = float("nan")
    output = block_sparse.launch(query, key, value, walk, 0.2, config, descriptors)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("columns", ["shared", "each"])
@pytest.mark.parametrize("case", [WalkCase(query_length=1000, key_length=90), MASKS["everything with columns"]])
def test_gathered_columns_are_those_of_a_list(case, columns, monkeypatch):
    """Of every head; entries outside all lists name keys that nobody may read, and become zeros."""
    monkeypatch.setattr(gather_columns, "LISTS", 4)  # more query tiles than one look takes
    case = replace(case, columns=columns)
    walk, (_, key, value) = case.walk(), case.inputs()
    first, single = walk.counts[:, list(walk.head_plan), :, 3:].unsqueeze(3).unbind(-1)  # [B, H, nQ, 1]
    entry = torch.arange(walk.columns.shape[2])
    listed = ((first <= entry) & (entry < first + single)).any(2)  # [B, H, C]
    assert listed.any() and not listed.all()
    slots = walk.columns[:, list(walk.head_plan)].long().where(listed, 0)
    gathered = gather_columns.gather_columns(key, value, walk)
    for source, rows in zip((key, value), gathered, strict=True):
        expected = of_heads(source, walk).gather(2, slots.unsqueeze(3).expand(-1, -1, -1, case.width))
        assert torch.equal(rows, expected * listed.unsqueeze(3))


@pytest.fixture
def every_op_by_triton(monkeypatch):
    """The ops run their kernels for tensors of the CPU too, those that planners sample with among them."""

    def stride_profiles(query, key, last, rows, keys, offset, scale):
        return search_stride_kernel.profiles(query, key, last, rows, keys, offset, search_stride.NEAR, scale)

    def stride_response(by_distance, by_key, least, max_stride):
        latest = 2 * search_stride.LAST_QUERIES
        return search_stride_kernel.response(by_distance, by_key, least, max_stride, latest)

    def attention(query, key, value, walk, scale, query_order=None):
        rows = walk.query_row, walk.head_plan
        if query_order is not None:
            query = permute.permute(query, query_order, rows[0], range(query.shape[1]), rows[1])
        config = SMALL[4, padded_head_dim(query.shape[3])]
        output = block_sparse.launch(query, key, value, walk, scale, config, False)
        return output if query_order is None else permute.unpermute(output, query_order, *rows)

    monkeypatch.setattr(ops, "_row_copies", lambda device: permute)
    monkeypatch.setattr(ops, "_executor", lambda device: SimpleNamespace(block_sparse_attention=attention))
    monkeypatch.setattr(tile_mass, "tile_log_mass_cpu", tile_mass_kernel.tile_log_mass)
    monkeypatch.setattr(tile_mass, "column_mass_cpu", column_mass_kernel.column_mass)
    monkeypatch.setattr(tile_mass, "slots_log_mass_cpu", tile_mass_kernel.slots_log_mass)
    monkeypatch.setattr(tile_mass, "tile_shares_cpu", tile_shares_kernel.tile_shares)
    monkeypatch.setattr(levels.MassLevels, "put_cpu", levels_kernel.put)
    monkeypatch.setattr(levels.MassLevels, "put_samples_cpu", levels_kernel.put_samples)
    monkeypatch.setattr(tile_mass, "spread_out_share_cpu", tile_shares_kernel.spread_out_share)
    monkeypatch.setattr(probes.Probes, "of_cpu", probes_kernel.place)
    monkeypatch.setattr(probes.Measured, "recall_cpu", probes_kernel.recall)
    monkeypatch.setattr(probes, "_totals_cpu", probes_kernel.totals)
    monkeypatch.setattr(probes, "_agreement_cpu", probes_kernel.agreement)
    monkeypatch.setattr(probes, "_choose_cpu", probes_kernel.choose)
    monkeypatch.setattr(probes, "_hot_weight_cpu", probes_kernel.hot_weight)
    monkeypatch.setattr(lines, "site_totals_cpu", lines_kernel.site_totals)
    monkeypatch.setattr(search_stride, "_profiles_cpu", stride_profiles)
    monkeypatch.setattr(search_stride, "_response_cpu", stride_response)
    monkeypatch.setattr(last_queries, "last_queries_cpu", last_queries_kernel.last_queries)


@pytest.mark.parametrize("seed", range(0, len(combinations()), 4))
def test_every_pattern_boundary_and_order(seed, every_op_by_triton):
    """The cases of test_head_patterns.py, from the estimate to the output; short ones, the interpreter is slow."""
    check_case(PatternCase.of(seed).shortened(140, 130))


@pytest.mark.parametrize("first", [0, 40])
def test_dense_attention_of_drawn_tiles(first):
    """The kernel against the torch operations, which are tested against float64."""
    for seed in range(first, first + 40, 10):
        case = PatternCase.of(seed).shortened(260, 100)
        query, key, value = case.inputs()
        planned = case.plan(query, key)
        walk, order = walk_of(planned), planned.arrangement.query_order
        value = value.repeat_interleave(planned.key.shape[1] // value.shape[1], 1)  # of any order: dense does not care
        tiles = torch.arange(0, case.batch * walk.counts.shape[2] * query.shape[1], 2)
        drawn = compare_with_dense.Drawn.of(tiles, order, walk, query.shape[1], query.shape[2])
        arguments = (drawn, query, planned.key, value, walk, planned.scale)
        found, held = compare_with_dense_kernel.attend(*arguments)
        expected, share = compare_with_dense._attend_cpu(*arguments)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(held, share, atol=1e-5, rtol=1e-4, equal_nan=True)
