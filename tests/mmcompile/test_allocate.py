"""Fronts and budgets: what is dominated is gone, and a shared budget is never spent worse than an even one."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcompile import HeadPattern
from mmcompile.pattern_search.allocate import allocate, front, to_recall, uniform
from mmcompile.pattern_search.layer_search import Evaluation, on_fronts
from mmcompile.tables import FrontPoint

few = settings(deadline=None, max_examples=100)
figures = st.integers(1, 40).map(lambda n: n / 8)


def pattern(index):
    return HeadPattern("a_shape", local=index + 1)


@st.composite
def evaluations(draw, heads=2):
    count = draw(st.integers(1, 8))
    four = st.tuples(*[st.tuples(*[figures] * heads)] * 4)
    return [Evaluation((pattern(index),) * heads, *draw(four)) for index in range(count)]


def made(*points):
    """A front of (ms, error) pairs."""
    return tuple(FrontPoint(pattern(index), ms, 0.1, error, 1 - error) for index, (ms, error) in enumerate(points))


@st.composite
def fronts(draw):
    def one():
        size = draw(st.integers(1, 4))
        times = sorted(draw(st.sets(st.integers(1, 20), min_size=size, max_size=size)))
        errors = sorted(draw(st.sets(st.integers(0, 50), min_size=size, max_size=size)), reverse=True)
        return made(*zip(map(float, times), map(float, errors), strict=True))

    return [one() for _ in range(draw(st.integers(1, 4)))]


@few
@given(evaluations())
def test_a_front_holds_what_nothing_cheaper_matches(tried):
    for head in range(2):
        kept = front(tried, head)
        for one in tried:
            assert any(point.ms <= one.ms[head] and point.error <= one.error[head] for point in kept)
        for left, right in itertools.pairwise(kept):
            assert left.ms < right.ms and left.error > right.error


@few
@given(evaluations())
def test_what_is_on_no_front_may_be_dropped(tried):
    kept = on_fronts(tried)
    for head in range(2):
        assert [(p.ms, p.error) for p in front(kept, head)] == [(p.ms, p.error) for p in front(tried, head)]


@few
@given(fronts(), st.integers(0, 80))
def test_a_shared_budget_holds_and_is_near_the_best_there_is(of_heads, budget):
    least = math.fsum(of_head[0].ms for of_head in of_heads)
    total = max(float(budget), least)
    chosen = allocate(of_heads, total)
    assert all(point in of_head for point, of_head in zip(chosen, of_heads, strict=True))
    assert math.fsum(point.ms for point in chosen) <= total + 1e-6
    best = min(
        math.fsum(point.error for point in points)
        for points in itertools.product(*of_heads)
        if math.fsum(point.ms for point in points) <= total
    )
    # Greedy on hulls is off by one step of one head at most.
    largest = max(left.error - of_head[-1].error for of_head in of_heads for left in of_head)
    assert best - 1e-9 <= math.fsum(point.error for point in chosen) <= best + largest


def test_heads_that_need_little_give_to_those_that_need_much():
    easy = made((1.0, 0.02), (2.0, 0.01))
    hard = made((1.0, 1.0), (2.0, 0.6), (3.0, 0.1))
    even = uniform([easy, hard], 2.0)
    shared = allocate([easy, hard], 4.0)
    assert [point.error for point in even] == [0.01, 0.6]
    assert [point.error for point in shared] == [0.02, 0.1]


def test_what_is_left_goes_to_points_off_the_hull():
    (chosen,) = allocate([made((1.0, 10.0), (2.0, 9.5), (3.0, 1.0))], 2.5)
    assert chosen.error == 9.5


def test_an_even_budget_takes_the_cheapest_where_nothing_fits():
    assert [point.ms for point in uniform([made((3.0, 0.5), (4.0, 0.1))], 2.0)] == [3.0]


def test_a_recall_takes_the_cheapest_that_covers_it_and_else_what_covers_most():
    of_head = made((1.0, 0.5), (2.0, 0.2), (3.0, 0.1))
    assert to_recall([of_head], 0.75)[0].ms == 2.0
    assert to_recall([of_head], 0.99)[0].ms == 3.0


def test_evaluations_survive_json():
    same = Evaluation((pattern(1),) * 2, (0.1, 0.2), (0.3, 1 / 3), (0.5, 0.6), (0.7, math.nan))
    mixed = Evaluation((pattern(1), HeadPattern("grid")), (0.1, 0.2), (0.3, 0.4), (0.5, 0.6), (0.7, 0.8))
    assert Evaluation.from_dict(mixed.to_dict()) == mixed
    assert len(same.to_dict()["patterns"]) == 1
    assert Evaluation.from_dict(same.to_dict()).patterns == same.patterns


@pytest.mark.parametrize("heads", [1, 5])
def test_the_order_of_heads_is_kept(heads):
    of_heads = [made((1.0, float(head))) for head in range(heads)]
    assert [point.error for point in allocate(of_heads, 100.0)] == [float(head) for head in range(heads)]
