"""The comparison with dense attention against float64: error and recall of random plans, and which tiles are drawn."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

from mmcompile.kernels import compare_with_dense as comparing
from mmcompile.kernels import reference
from mmcompile.kernels.attend import plan_attention
from mmcompile.kernels.patterns import TILE, HeadPattern
from tests.kernels.pattern_cases import PatternCase, times_attended


def exact(case, planned, output, query, key, value):
    """Error and recall of each head, float64 [H], over all of its queries."""
    allowed, computed = case.allowed().unsqueeze(1), times_attended(planned) > 0
    query, key, value = (x.cpu().double() for x in (query, key, value))
    dense = reference.attention(query, key, value, allowed, planned.scale)
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * planned.scale
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    held = (weights * computed).sum(-1)  # [B, H, Sq], NaN where a query has no key
    error = ((output.cpu().double() - dense).square().sum((0, 2, 3)) / dense.square().sum((0, 2, 3))).sqrt()
    return error, held.nanmean((0, 2))


def check_comparison(seed, device="cpu", dtype=torch.float32, tolerance=1e-5):
    """One random plan, made on the CPU, whole; a wrong output shows as one."""
    case = PatternCase.of(seed)
    query, key, value = case.inputs(dtype=dtype)
    planned = case.plan(query, key)
    if not case.allowed().any():
        return
    there = moved(planned, device)
    for output in (planned.attend(query, value), torch.randn_like(query)):
        drawn = torch.zeros(1, dtype=torch.int64, device=device), 1.0
        found = there.compare(*(x.to(device) for x in (query, value, output)), *drawn)
        for got, true in zip(found, exact(case, planned, output, query, key, value), strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(
                got.cpu().double(), true, atol=tolerance, rtol=1e-4, msg=lambda text: f"{text}\n{case}"
            )


def moved(planned, device):
    """A plan with its tensors on another device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), planned)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_error_and_recall_are_those_of_float64(first, poisoned_memory):
    for seed in range(first, first + 20):
        check_comparison(seed)


def test_long_keys_come_in_parts(monkeypatch):
    monkeypatch.setattr(comparing, "KEYS_AT_ONCE", TILE)
    monkeypatch.setattr(comparing, "ELEMENTS_AT_ONCE", 3 * TILE * TILE)
    for seed in range(0, 60, 6):
        check_comparison(seed)


def test_heads_of_which_nothing_is_drawn_have_no_figures():
    query, key, value = torch.randn(3, 1, 4, 700, 16)
    boundaries = tuple(torch.tensor(x, dtype=torch.int32) for x in ([0, 700], [0], [[0, 0, 0]]))
    planned = plan_attention(query, key, HeadPattern("a_shape", local=128), boundaries)
    output = planned.attend(query, value)
    error, recall = planned.compare(query, value, output, torch.tensor([5]), 1e-6)
    assert error.isnan().sum() == recall.isnan().sum() == 3


@pytest.mark.parametrize("tiles", [1, 2, 7, 128, 1000])
@pytest.mark.parametrize("share", [1e-9, 0.01, 0.3, 0.5, 0.99, 1.0])
def test_so_many_different_tiles_are_drawn(tiles, share):
    for seed in range(20):
        drawn = comparing.draw_tiles(torch.tensor([seed]), 0, share, tiles)
        assert len(drawn) == max(1, round(share * tiles))
        assert drawn[0] >= 0 and drawn[-1] < tiles and (drawn.diff() > 0).all()


def test_other_prefills_and_other_layers_draw_other_tiles_evenly():
    draws = [comparing.draw_tiles(torch.tensor([seed]), site, 0.1, 500) for seed in range(100) for site in range(10)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 1000
    counts = torch.bincount(torch.cat(draws), minlength=500).double()  # 100 of each are expected
    assert counts.min() > 60 and counts.max() < 140
    assert torch.equal(draws[5], comparing.draw_tiles(torch.tensor([0]), 5, 0.1, 500))
