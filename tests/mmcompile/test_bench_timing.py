"""What every measurement rests on: medians, turns, failures, and the tiles that are walked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcompile.bench.op_times import OpTimes
from mmcompile.bench.prefill import shortest_win
from mmcompile.bench.scattered_walk import listed_tiles, scattered_walk, tiles_of_density
from mmcompile.bench.timing import LEAST_RUNS, Failure, Times, race, significant, time_call
from mmcompile.bench.video_prompt import PATTERNS, SHORTEST, boundaries, positions
from mmcompile.input_boundaries import boundaries_from_positions
from mmcompile.kernels.attend import sparse_attention


def fail():
    raise RuntimeError("no kernel\n  for this")


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=9))
def test_times_are_the_median_and_half_the_range(runs):
    times = Times.of(runs)
    assert sum(run < times.ms for run in runs) <= len(runs) / 2
    assert sum(run > times.ms for run in runs) <= len(runs) / 2
    assert times.spread == pytest.approx((max(runs) - min(runs)) / 2)
    assert times.runs == len(runs)


def test_columns_pair_a_median_with_its_spread():
    assert Times.of([1.0, 1.23456, 2.0]).columns("plan ms") == {"plan ms": 1.235, "plan ms spread": 0.5}


def test_figures_keep_the_digits_that_are_read():
    assert [significant(x) for x in (0.000123456, 12345.6, 0.0)] == [0.0001235, 12350.0, 0.0]


def test_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    told = []
    times = race(calls, "cpu", 3, step=told.append)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # a warm-up, then three turns
    assert len(told) == len(calls) + 3
    assert {name: one.runs for name, one in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_contender_that_fails_leaves_the_others_alone():
    seen = {}
    times = race({"bad": fail, "good": lambda: 7}, "cpu", 4, look=seen.__setitem__)
    assert list(times) == ["bad", "good"]
    assert times["bad"] == Failure("RuntimeError: no kernel for this")
    assert times["good"].runs == 4
    assert seen == {"good": 7}


def test_slow_calls_make_fewer_runs():
    assert race({"slow": lambda: None}, "cpu", 10, seconds=0.0)["slow"].runs == LEAST_RUNS


def test_a_single_call_may_raise():
    assert time_call(lambda: None, "cpu", 5).runs == 5
    with pytest.raises(RuntimeError, match="no kernel"):
        time_call(fail, "cpu", 5)


@settings(max_examples=30)
@given(st.integers(1, 40), st.data())
def test_scattered_tiles_are_causal_and_as_many_as_asked_for(count, data):
    wanted = torch.tensor(data.draw(st.lists(st.integers(0, 50), min_size=count, max_size=count)))
    walk = scattered_walk(wanted, 6, 2)
    for tile, (first, full, partial, _, single) in enumerate(walk.counts[0, 0].tolist()):
        listed = walk.tiles[0, 0, first : first + full + partial].tolist()
        assert len(listed) == min(max(int(wanted[tile]), 2), tile + 1)
        assert (partial, single) == (1, 0)
        assert listed == sorted(set(listed))
        assert (listed[0], listed[-1]) == (0, tile)
    assert walk.key_head == (0, 0, 0, 1, 1, 1)


def test_density_is_a_share_of_the_causal_tiles():
    causal = 64 * 65 // 2
    assert listed_tiles(scattered_walk(tiles_of_density(64 * 128, 1.0, "cpu"), 1, 1)) == causal
    assert listed_tiles(scattered_walk(tiles_of_density(64 * 128, 0.25, "cpu"), 1, 1)) / causal == pytest.approx(
        0.25, abs=0.01
    )


@pytest.mark.parametrize("tokens", [SHORTEST, 1000, 2048])
def test_positions_and_boundaries_tell_the_same_prompt(tokens):
    assert positions(tokens).shape == (3, 1, tokens)
    told, known = boundaries_from_positions(positions(tokens)), boundaries(tokens, "cpu")
    assert told.offsets.unique().tolist() == known.offsets.tolist()
    assert known.grid[1].tolist() in told.grid.tolist()


@pytest.mark.parametrize(
    ("sparse", "length"),
    [({1: 9, 2: 9, 4: 9}, 1), ({1: 11, 2: 9, 4: 9}, 2), ({1: 9, 2: 11, 4: 9}, 4), ({4: 10}, None), ({8: 1}, None)],
)
def test_sparse_wins_from_a_length_on(sparse, length):
    assert shortest_win({1: 10, 2: 10, 4: 10}, sparse) == length


def test_op_times_name_every_part_and_change_nothing():
    query, key, value = (torch.randn(1, heads, 640, 16) for heads in (2, 1, 1))
    arguments = (query, key, value, PATTERNS["auto"], boundaries(640, "cpu"))
    plain = sparse_attention(*arguments, density=0.5)
    times = OpTimes("cpu")
    with times:
        watched = sparse_attention(*arguments, density=0.5)
    assert watched.output.equal(plain.output)
    parts = [part for part, _, _ in times.spans]
    assert parts.count("permutations") == 2  # key and value; the attention takes queries in token order
    assert {parts.count(part) for part in ("arrange", "plan", "attention")} == {1}
    assert times.ms("plan", "attention") == pytest.approx(times.ms("plan") + times.ms("attention"))
    assert times.ms("attention") > 0
