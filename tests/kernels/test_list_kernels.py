"""The kernels of the list side of planning, run by Triton's interpreter, make the plans that torch operations make."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmcompile.kernels import (
    a_shape,
    a_shape_kernel,
    levels,
    tile_bounds,
    tile_bounds_kernel,
    tile_classes,
    tile_list,
    tile_list_kernel,
)
from mmcompile.kernels import plan as planning
from mmcompile.kernels.a_shape import Intervals
from mmcompile.kernels.levels import MASS_LEVELS, OCTAVE, MassLevels
from mmcompile.kernels.patterns import TILE, HeadPattern
from mmcompile.kernels.tags import INVALID, INVALID_SPAN
from mmcompile.kernels.tile_bounds import TileBounds
from mmcompile.kernels.tile_classes import Chosen
from mmcompile.kernels.tile_list import Cut, Layout, Places, Streamed
from tests.kernels.pattern_cases import PatternCase, combinations
from tests.kernels.plan_cases import Made, PlanCase, plan_cases, site_cases

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]
few = settings(deadline=None, max_examples=max(10, settings().max_examples // 4))
every_kind = st.one_of(plan_cases(), site_cases())
some_density = st.sampled_from([None, 0.01, 0.1, 0.29, 0.5, 0.75, 0.95, 1.0])


@contextmanager
def by_triton(key_tiles: int = 4) -> Iterator[pytest.MonkeyPatch]:
    """Plans run the kernels for tensors of the CPU too, in steps of so few key tiles that a case takes several.

    All but `MassLevels.put`, of which the logarithms may round another way.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_bounds, "query_bounds_cpu", partial(tile_bounds_kernel.tag_bounds, of_keys=False))
        patch.setattr(tile_bounds, "key_bounds_cpu", partial(tile_bounds_kernel.tag_bounds, of_keys=True))
        patch.setattr(tile_bounds, "site_bounds_cpu", tile_bounds_kernel.site_bounds)
        patch.setattr(tile_bounds, "count_non_empty_cpu", tile_bounds_kernel.count_non_empty)
        patch.setattr(tile_classes, "classify_cpu", tile_bounds_kernel.classify)
        patch.setattr(a_shape, "sort_keys_cpu", a_shape_kernel.sort_keys)
        patch.setattr(a_shape, "runs_cpu", a_shape_kernel.runs)
        patch.setattr(tile_list, "find_cut_cpu", tile_list_kernel.find_cut)
        patch.setattr(tile_list, "list_tiles_cpu", tile_list_kernel.list_tiles)
        patch.setattr(tile_bounds_kernel, "KEY_TILES", key_tiles)
        patch.setattr(tile_list_kernel, "KEY_TILES", key_tiles)
        patch.setattr(tile_list_kernel, "SUMMED", 2)
        patch.setattr(tile_list_kernel, "QUERY_TILES", 2)
        yield patch


def assert_same(one: Made, other: Made) -> None:
    for parts in zip(one[2:4], other[2:4], strict=True):
        for name, a, b in zip(parts[0]._fields, *parts, strict=True):
            assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) if a.is_floating_point() else torch.equal(a, b), (
                name
            )


@few
@given(every_kind, some_density)
def test_plans_that_need_no_data(case: PlanCase, density: float | None) -> None:
    expected = case.plan(density)
    with by_triton():
        assert_same(case.plan(density), expected)


@few
@given(plan_cases(), st.integers(0, 12))
def test_nothing_is_written_outside_the_room(case: PlanCase, room: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_tile_room", lambda *_: room)
        expected = case.plan(0.5)
        with by_triton():
            assert_same(case.plan(0.5), expected)


@pytest.mark.parametrize("seed", range(len(combinations())))
def test_plans_from_data(seed: int) -> None:
    case = PatternCase.of(seed)
    query, key, _ = case.inputs()
    expected = case.plan(query, key)
    with by_triton():
        made = case.plan(query, key)
    for name, a, b in zip(expected.lists._fields, made.lists, expected.lists, strict=True):
        assert torch.equal(a, b), f"{name}\n{case}"
    for a, b in ((made.density, expected.density), (made.recall, expected.recall)):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)), case
