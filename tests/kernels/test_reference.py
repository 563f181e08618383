import pytest
import torch

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.reference import attention, element_mask, in_positions, plan_mask, selected_tiles

INVALID = 2**31 - 1


def tags(position: list[int], segment: list[int], span: list[int]) -> torch.Tensor:
    return torch.tensor([[[position, segment, span]]], dtype=torch.int32)  # [1, 1, 3, S]


def test_selected_tiles_reads_full_tiles_from_the_front_and_partial_ones_from_the_back() -> None:
    counts = torch.tensor([[[[2, 1], [0, 2], [4, 0], [0, 0]]]], dtype=torch.int32)
    # Entries outside the counts are never read, whatever they hold.
    tiles = torch.tensor([[[[3, 0, -1, 1], [9, 7, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3]]]], dtype=torch.int32)
    assert selected_tiles(counts, tiles)[0, 0].int().tolist() == [
        [1, 1, 0, 1],
        [1, 0, 1, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
    ]


def test_element_mask_is_causal_valid_span_segment_and_window() -> None:
    query = tags([3, 4, 5], [0, 0, 1], [-1, 2, -1])
    key = tags([0, INVALID, 3, 4, 5, 6], [0, 0, 0, 0, 1, 0], [-1, -2, -1, 2, -1, 2])
    assert element_mask(query, key)[0, 0].int().tolist() == [
        [1, 0, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 1],
        [0, 0, 0, 0, 1, 0],
    ]
    assert element_mask(query, key, window=2)[0, 0].int().tolist() == [
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 1],
        [0, 0, 0, 0, 1, 0],
    ]


def test_plan_mask_joins_tiles_and_elements_over_ragged_tiles() -> None:
    length = TILE + 3
    position = torch.arange(length, dtype=torch.int32)
    token_tags = torch.stack([position, torch.zeros_like(position), -torch.ones_like(position)])[None, None]
    counts = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    tiles = torch.tensor([[[[-1, 0], [0, -1]]]], dtype=torch.int32)
    expected = torch.ones(length, length, dtype=torch.bool).tril()
    expected[TILE:, TILE:] = False
    assert torch.equal(plan_mask(token_tags, token_tags, counts, tiles)[0, 0], expected)


def test_in_positions_undoes_both_orders() -> None:
    torch.manual_seed(0)
    mask = torch.rand(2, 3, 5, 7) < 0.5
    query_order = torch.stack([torch.randperm(5) for _ in range(6)]).view(2, 3, 5).int()
    key_order = torch.stack([torch.randperm(7) for _ in range(6)]).view(2, 3, 7).int()
    moved = in_positions(mask, query_order, key_order)
    for b, p, i, j in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        assert moved[b, p, query_order[b, p, i], key_order[b, p, j]] == mask[b, p, i, j]


def test_attention_is_sdpa_in_float64() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 9, 16), torch.randn(2, 2, 11, 16), torch.randn(2, 2, 11, 16)
    mask = torch.rand(2, 1, 9, 11) < 0.7
    mask[..., 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    actual = attention(query, key, value, mask, scale=0.3)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    chosen = attention(query, key, value, mask, scale=0.3, key_head=[1, 1, 1, 0, 0, 0])
    torch.testing.assert_close(chosen[:, :3], attention(query[:, :3], key[:, 1:], value[:, 1:], mask, 0.3))


def test_a_row_without_keys_is_zero_and_a_nan_of_the_inputs_still_shows() -> None:
    query, key, value = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[False, False, False], [True, True, False]])
    assert attention(query, key, value, mask)[0, 0, 0].tolist() == [0.0] * 4
    key[0, 0, 1, 0] = float("nan")
    assert attention(query, key, value, mask)[0, 0, 1].isnan().all()


def test_query_heads_that_do_not_divide_need_a_key_head() -> None:
    query, key = torch.randn(1, 3, 2, 4), torch.randn(1, 2, 2, 4)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        attention(query, key, key, torch.ones(2, 2, dtype=torch.bool))
