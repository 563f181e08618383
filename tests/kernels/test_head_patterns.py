"""Attention over the plan of every head pattern, against float64, and what the patterns select, against plain loops.

MMCOMPILE_CASES=5000 runs that many random attentions instead of 500.
"""

import os
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from mmcompile.kernels import reference
from mmcompile.kernels.attend import plan_attention
from mmcompile.kernels.patterns import SCORES, TILE, HeadPattern
from tests.kernels.pattern_cases import (
    PatternCase,
    check_case,
    check_output,
    combinations,
    drop_tile,
    times_attended,
)

CASES = int(os.environ.get("MMCOMPILE_CASES", "500"))
AT_ONCE = 10  # cases of one test


@pytest.mark.parametrize("first", range(0, CASES, AT_ONCE))
def test_attention_over_a_plan_is_that_of_its_mask(first, poisoned_memory):
    for seed in range(first, min(first + AT_ONCE, CASES)):
        check_case(PatternCase.of(seed))


def test_cases_go_through_every_combination():
    assert len(combinations()) <= CASES


@pytest.mark.parametrize("seed", range(0, CASES, 7))
def test_density_one_is_dense_attention(seed):
    case = replace(PatternCase.of(seed), density=1.0)
    query, key, value = case.inputs()
    planned = case.plan(query, key)
    allowed = case.allowed().unsqueeze(1).expand(-1, len(case.patterns), -1, -1)
    assert torch.equal(times_attended(planned) > 0, allowed), str(case)
    check_output(case, planned.attend(query, value), allowed, query, key, value, planned.scale)


def test_a_dropped_tile_shows():
    shown = 0
    for seed in range(0, CASES, 10):
        case = PatternCase.of(seed)
        query, key, value = case.inputs()
        planned = case.plan(query, key)
        less = drop_tile(planned)
        if less is None:
            continue
        mask = times_attended(planned) > 0
        output = less.attend(query, value)
        check_output(case, output, times_attended(less) > 0, query, key, value, planned.scale)
        with pytest.raises(AssertionError, match="torch's"):
            check_output(case, output, mask, query, key, value, planned.scale)
        shown += 1
    assert shown > CASES // 20


class Estimated:
    """One head over a video, planned, and its float64 softmax in the head's orders; S a multiple of no tile."""

    def __init__(self, pattern, seed=0, density=None, tokens=1000, stride=40, looks="vs"):
        generator = torch.Generator().manual_seed(seed)
        query, key = torch.randn(2, 1, 1, tokens, 32, generator=generator)
        site = torch.arange(tokens) % stride
        code = 4 * torch.nn.functional.normalize(torch.randn(stride + 1, 32, generator=generator), dim=1)
        if "s" in looks:
            query, key = query + code[site], key + 2 * code[site]
        if "v" in looks:  # site 2 has a code of its own, which every query looks for
            query, key = query + 2 * code[-1], key + 3 * code[-1] * (site == 2)[:, None]
        if "h" in looks:  # queries of site 3 look nowhere
            query = query * (site != 3)[:, None]
        boundaries = ([0, tokens], [2], [[tokens // stride, 1, stride]])
        boundaries = tuple(torch.tensor(part, dtype=torch.int32) for part in boundaries)
        self.planned = plan_attention(query, key, pattern, boundaries, density=density)
        lists, arrangement = self.planned.lists, self.planned.arrangement
        self.query_order, self.key_order = (
            order[0, int(row)].long()
            for order, row in (
                (arrangement.query_order, lists.query_row[0, 0]),
                (arrangement.key_order, lists.key_row[0, 0]),
            )
        )
        # All in slots from here on.
        self.query, self.key = query[0, 0, self.query_order].double(), key[0, 0, self.key_order].double()
        self.site = site[self.query_order], site[self.key_order]
        self.causal = self.key_order <= self.query_order[:, None]
        self.scores = (self.query @ self.key.T * 32**-0.5).masked_fill(~self.causal, float("-inf"))
        self.weights = self.scores.softmax(-1)
        self.tiles = -(-tokens // TILE)
        counts = lists.counts
        self.listed = reference.selected_tiles(counts, lists.tiles, self.tiles)[0, 0]
        self.columns = [set(lists.columns[0, 0, s : s + n].tolist()) for *_, s, n in counts[0, 0].tolist()]
        own = self.key_order.argsort()[self.query_order] // TILE  # key tile of each query slot's own token
        self.own = own
        self.mandatory = torch.zeros_like(self.listed)
        self.mandatory[torch.arange(tokens) // TILE, own] = True
        self.mandatory[:, 0] = True
        self.non_empty = self.by_tile(self.causal.double()).unflatten(0, (-1, TILE)).sum(1) > 0

    def by_tile(self, rows):
        """Sums over the keys of each tile; rows completed to whole tiles. [S, S] to [nQ * TILE, nK]."""
        missing = -rows.shape[1] % TILE
        return pad(rows, (0, missing, 0, -rows.shape[0] % TILE)).unflatten(1, (-1, TILE)).sum(2)

    def assert_best(self, share, tiles_of, mass=None):
        """The listed tiles hold as much of `share` [nQ, nK] as any as many; `mass` of it where that is given.

        Attention is compared in steps of a sixteenth of an octave.
        """
        for index in range(self.tiles):
            free = self.non_empty[index] & ~self.mandatory[index]
            chosen = self.listed[index] & free
            best = share[index, free].sort(descending=True).values[: int(chosen.sum())].sum()
            assert share[index, chosen].sum() >= 0.955 * best, (tiles_of, index)
            if mass is not None:
                covered = share[index, self.listed[index]].sum() / share[index].sum().clamp(min=1e-9)
                assert covered >= 0.95 * mass, (tiles_of, index)
                # And no more than that: without its least tile it would fall short.
                if chosen.any():
                    least = share[index, chosen].min()
                    equals = share[index, chosen & (share[index] <= 1.05 * least)].sum()
                    assert covered - equals / share[index].sum() < 1.05 * mass, (tiles_of, index)


RASTER_AND_SITE = ("raster", "site")


@pytest.mark.parametrize("order", RASTER_AND_SITE)
@pytest.mark.parametrize("seed", range(3))
def test_vertical_slash_takes_the_largest_sums_of_the_last_queries(order, seed):
    one = Estimated(HeadPattern("vertical_slash", sink=1, vertical=30, slash=200, order=order), seed)
    last = slice(-64, None)
    sees = one.causal[last].sum(0)
    column = one.weights[last].sum(0) / sees.clamp(min=1)
    chosen = torch.tensor(sorted(set().union(*one.columns)))
    assert len(chosen) == 30
    assert float(column[chosen].sum()) == pytest.approx(float(column.topk(30).values.sum()), rel=1e-4)
    distance = one.own[:, None] - torch.arange(one.tiles)
    held = torch.zeros(one.tiles, dtype=torch.float64)
    of_tile = one.by_tile(one.weights)[: len(one.own)]
    for row in range(len(one.own) - 64, len(one.own)):
        for tile in range(one.tiles):
            if distance[row, tile] >= 0:
                held[distance[row, tile]] += of_tile[row, tile]
    wanted = held.topk(2).indices
    ends = torch.arange(one.tiles) * TILE, (torch.arange(one.tiles) * TILE + TILE - 1).clamp(max=len(one.own) - 1)
    diagonal = sum(torch.isin(distance[end], wanted) for end in ends) > 0
    expected = (diagonal & one.non_empty) | (one.mandatory & one.non_empty)
    assert torch.equal(one.listed, expected)


@pytest.mark.parametrize("lines", ["s", "v", "vs", "hs", "hvs"])
@pytest.mark.parametrize("seed", range(2))
def test_grid_covers_its_lines(lines, seed):
    one = Estimated(HeadPattern("grid", sink=1, lines=lines), seed, tokens=2500, stride=10, looks=lines)
    same = one.site[0][:, None] == one.site[1]
    wanted = torch.zeros_like(same)
    if "s" in lines:
        wanted |= same
    if "v" in lines:
        of_site = torch.stack([one.weights[:, one.site[1] == each].sum() for each in range(10)])
        wanted |= one.site[1] == of_site.argmax()
        assert of_site.argmax() == 2
    if "h" in lines:
        wanted |= (one.site[0] == 3)[:, None]
    needed = one.by_tile((wanted & one.causal).double()).unflatten(0, (-1, TILE)).sum(1) > 0
    # Sinks stand in front, at no site.
    needed[:, 0] = one.non_empty[:, 0]
    assert not (needed & ~one.listed).any()
    assert one.listed.sum() <= 1.6 * (needed | (one.mandatory & one.non_empty)).sum()


@pytest.mark.parametrize("order", RASTER_AND_SITE)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("seed", range(3))
def test_top_p_takes_the_tiles_with_the_most_estimated_attention(order, scores, seed):
    mass = 0.9
    one = Estimated(HeadPattern("top_p", sink=1, order=order, scores=scores, mass=mass), seed)
    tokens = len(one.own)
    share = torch.zeros(one.tiles, one.tiles, dtype=torch.float64)
    for index in range(one.tiles):
        rows = torch.arange(index * TILE, index * TILE + TILE).clamp(max=tokens - 1)
        if scores == "sampled":
            second = TILE - 1 if order == "raster" else (37 * index + 64) % TILE
            share[index] = one.by_tile(one.weights)[rows[[0, second, (37 * index + 32) % TILE]]].mean(0)
        elif scores == "pooled":
            pooled = torch.stack([tile.mean(0) for tile in one.key.split(TILE)])
            keys = torch.tensor([len(tile) for tile in one.key.split(TILE)])
            score = pooled @ one.query[rows].mean(0) * 32**-0.5 + keys.log()
            share[index] = score.masked_fill(~one.non_empty[index], float("-inf")).softmax(-1)
        else:
            share[index] = antidiagonal_share(one, rows, one.non_empty[index])
    one.assert_best(share, scores, mass)


def antidiagonal_share(one, rows, non_empty):
    """Sums along one antidiagonal of each 16 x 16 block, softmax over blocks: float64 [nK]."""
    blocks = -(-len(one.key) // TILE) * 8
    score = torch.full((8, blocks), float("-inf"), dtype=torch.float64)
    for i in range(8):
        for j in range(blocks):
            if non_empty[j // 8]:
                pairs = [(rows[i * 16 + 15 - step], j * 16 + step) for step in range(16)]
                score[i, j] = sum(one.query[q] @ one.key[k] for q, k in pairs if k < len(one.key)) * 32**-0.5 / 16
    return score.softmax(-1).unflatten(1, (-1, 8)).sum(2).mean(0)


@pytest.mark.parametrize("order", RASTER_AND_SITE)
@pytest.mark.parametrize("seed", range(3))
def test_columns_are_those_of_each_tiles_mean_query(order, seed):
    one = Estimated(HeadPattern("columns", sink=1, columns=25, order=order), seed)
    assert torch.equal(one.listed, one.mandatory & one.non_empty)
    for index, columns in enumerate(one.columns):
        rows = torch.arange(index * TILE, index * TILE + TILE).clamp(max=len(one.own) - 1)
        score = one.key @ one.query[rows].mean(0)
        usable = one.causal[rows].any(0) & ~one.listed[index].repeat_interleave(TILE)[: len(score)]
        best = score[usable].topk(min(25, int(usable.sum()))).values.sum()
        assert len(columns) == min(25, int(usable.sum()))
        assert float(score[sorted(columns)].sum()) == pytest.approx(float(best), rel=1e-4, abs=1e-4)
        assert usable[sorted(columns)].all()
