import pytest
import torch

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.reference import (
    attended_twice,
    attention,
    by_plan_row,
    element_mask,
    in_positions,
    plan_mask,
    selected_tiles,
)

INVALID = 2**31 - 1


def tags(position: list[int], segment: list[int], span: list[int]) -> torch.Tensor:
    return torch.tensor([[[position, segment, span]]], dtype=torch.int32)  # [1, 1, 3, S]


def ints(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def causal_plan(length: int) -> dict[str, torch.Tensor]:
    """Every causal tile of one sequence, those on the diagonal as partial ones, and room for two columns."""
    position = torch.arange(length, dtype=torch.int32)
    token_tags = torch.stack([position, torch.zeros_like(position), -torch.ones_like(position)])[None, None]
    rows = -(-length // TILE)
    starts = [row * (row + 1) // 2 for row in range(rows)]
    return {
        "query_tags": token_tags,
        "key_tags": token_tags,
        "query_row": ints([[0]]),
        "key_row": ints([[0]]),
        "counts": ints([[[[start, row, 1, 0, 0] for row, start in enumerate(starts)]]]),
        "tiles": ints([[[tile for row in range(rows) for tile in range(row + 1)]]]),
        "columns": ints([[[-1, -1]]]),
        "cold": torch.ones(1, 1, length, dtype=torch.bool),
    }


def test_by_plan_row_gives_each_plan_row_its_own():
    rows = torch.arange(2 * 3 * 4).view(2, 3, 4)
    chosen = by_plan_row(rows, ints([[2, 0], [1, 1]]))
    assert torch.equal(chosen, torch.stack([rows[0, [2, 0]], rows[1, [1, 1]]]))


def test_selected_tiles_reads_each_list_where_it_begins() -> None:
    counts = ints([[[[1, 2, 1, 9, 9], [0, 0, 2, 9, 9], [5, 4, 0, 9, 9], [7, 0, 0, 9, 9]]]])
    # Lists may overlap, and entries outside them are never read, whatever they hold.
    tiles = ints([[[2, 0, 3, 1, -7, 3, 1, 2, 0, 99]]])
    assert selected_tiles(counts, tiles, 4)[0, 0].int().tolist() == [
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
    plan = causal_plan(length)
    assert torch.equal(plan_mask(**plan)[0, 0], torch.ones(length, length, dtype=torch.bool).tril())
    plan["counts"] = ints([[[[0, 0, 1, 0, 0], [0, 1, 0, 0, 0]]]])
    expected = torch.ones(length, length, dtype=torch.bool).tril()
    expected[TILE:, TILE:] = False
    assert torch.equal(plan_mask(**plan)[0, 0], expected)


def test_plan_mask_takes_the_tags_of_each_plan_rows_orders() -> None:
    length = 9
    forward = causal_plan(length)["query_tags"]
    both = torch.cat([forward, forward.flip(-1)], 1)
    plan = causal_plan(length) | {"query_tags": both, "key_tags": both}
    plan |= {"query_row": ints([[0, 1, 1]]), "key_row": ints([[0, 0, 1]])}
    plan |= {
        name: plan[name].repeat(1, 3, *[1] * (plan[name].dim() - 2)) for name in ("counts", "tiles", "columns", "cold")
    }
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(plan_mask(**plan)[0], torch.stack([causal, causal.flip(0), causal.flip(0, 1)]))


def test_plan_mask_counts_a_full_tile_whole() -> None:
    """As an executor does, so that a full tile with an element that is not allowed shows."""
    plan = causal_plan(TILE)
    plan["counts"] = ints([[[[0, 1, 0, 0, 0]]]])
    assert plan_mask(**plan).all()


def test_plan_mask_attends_columns_where_allowed_and_partial_tiles_where_cold() -> None:
    length = 2 * TILE
    plan = causal_plan(length)
    # Tile row 0: its tile. Tile row 1: columns 200 (inside a tile that it lists), 5 and 7, and its own tile.
    plan["counts"] = ints([[[[0, 0, 1, 0, 0], [2, 0, 1, 1, 3]]]])
    plan["columns"] = ints([[[9, 200, 5, 7, 99]]])
    plan["cold"][0, 0, [5, 200]] = False
    expected = torch.ones(length, length, dtype=torch.bool).tril()
    expected[:TILE, 5] = False  # not cold, and no column here
    expected[TILE:, :TILE] = False
    expected[TILE:, [5, 7]] = True  # 7 is cold, but no tile of this row has it
    assert torch.equal(plan_mask(**plan)[0, 0], expected)
    assert not attended_twice(**plan).any()


@pytest.mark.parametrize("tile_row", [0, 1])
def test_a_cold_column_of_a_listed_tile_is_attended_twice(tile_row) -> None:
    plan = causal_plan(2 * TILE)
    plan["counts"][0, 0, tile_row, 3:] = ints([1, 1])
    plan["columns"] = ints([[[0, 3]]])
    twice = torch.zeros(2 * TILE, 2 * TILE, dtype=torch.bool)
    twice[max(3, TILE * tile_row) : TILE * (tile_row + 1), 3] = True
    assert torch.equal(attended_twice(**plan)[0, 0], twice)


def test_a_column_of_a_full_tile_is_attended_twice_even_if_not_cold() -> None:
    plan = causal_plan(2 * TILE)
    plan["counts"][0, 0, 1, 3:] = ints([0, 1])
    plan["columns"] = ints([[[3, 0]]])
    plan["cold"][0, 0, 3] = False
    assert attended_twice(**plan)[0, 0].nonzero().tolist() == [[TILE + row, 3] for row in range(TILE)]


def test_a_column_or_a_tile_that_is_listed_twice_is_attended_twice() -> None:
    plan = causal_plan(TILE)
    column = plan | {"counts": ints([[[[0, 0, 0, 0, 2]]]]), "columns": ints([[[3, 3]]])}
    assert attended_twice(**column)[0, 0].nonzero().tolist() == [[row, 3] for row in range(3, TILE)]
    tile = plan | {"counts": ints([[[[0, 0, 2, 0, 0]]]]), "tiles": ints([[[0, 0]]])}
    assert torch.equal(attended_twice(**tile), plan_mask(**plan))


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
