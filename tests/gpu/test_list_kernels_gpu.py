"""The kernels of the list side of planning on a real GPU, against the torch operations that they stand for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mmcompile.kernels import (
    a_shape,
    a_shape_kernel,
    levels_kernel,
    lines,
    lines_kernel,
    orders,
    orders_kernel,
    scene_kernel,
    tile_bounds,
    tile_bounds_kernel,
    tile_classes,
    tile_list,
    tile_list_kernel,
    top_keys,
    top_keys_kernel,
)
from mmcompile.kernels import arrange as arranging
from mmcompile.kernels.arrange import arrange
from mmcompile.kernels.levels import MassLevels
from mmcompile.kernels.plan import plan
from mmcompile.kernels.scene import Rows
from mmcompile.kernels.tile_bounds import by_tile
from mmcompile.kernels.tile_mass import KeyPositions
from tests.kernels.pattern_cases import PatternCase
from tests.kernels.plan_cases import random_case, random_site_case

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic.*")]
DENSITIES = [None, 0.05, 0.3, 0.7, 1.0]


@pytest.fixture(autouse=True)
def torch_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels by torch, so that both ways of listing see the same ones; the kernel's are next to them."""

    def checked(kernel: Callable[..., Any], by_torch: Callable[..., Any]) -> Callable[..., Any]:
        def both(levels: MassLevels, rows: slice, *mass: Any) -> Any:
            kernel(levels, rows, *mass)
            made, some = levels.levels[:, rows].clone(), levels.layout.non_empty(rows)
            held = by_torch(levels, rows, *mass)
            assert not (((made - levels.levels[:, rows]).abs() > 1) & some).any()
            return held

        return both

    monkeypatch.setattr(levels_kernel, "put", checked(levels_kernel.put, MassLevels.put_cpu))
    monkeypatch.setattr(levels_kernel, "put_samples", checked(levels_kernel.put_samples, MassLevels.put_samples_cpu))


@contextmanager
def by_torch() -> Iterator[None]:
    """Torch operations in the place of kernels, on the same GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_bounds_kernel, "tag_bounds", tile_bounds.tag_bounds_cpu)
        patch.setattr(tile_bounds_kernel, "site_bounds", tile_bounds.site_bounds_cpu)
        patch.setattr(tile_bounds_kernel, "count_non_empty", tile_bounds.count_non_empty_cpu)
        patch.setattr(tile_bounds_kernel, "classify", tile_classes.classify_cpu)
        patch.setattr(a_shape_kernel, "sort_keys", a_shape.sort_keys_cpu)
        patch.setattr(a_shape_kernel, "rank_valid_keys", a_shape.rank_valid_keys_cpu)
        patch.setattr(lines_kernel, "rank_diagonals", lines.rank_diagonals_cpu)
        patch.setattr(top_keys_kernel, "list_top_keys", top_keys.sort_top_keys)
        patch.setattr(top_keys_kernel, "hot_tiles", lambda cold: by_tile(~cold, False).any(-1))
        patch.setattr(scene_kernel, "own_tiles", Rows.own_tiles_cpu)
        patch.setattr(orders_kernel, "modalities", orders.modalities_cpu)
        patch.setattr(orders_kernel, "slots", orders.slots_cpu)
        patch.setattr(orders_kernel, "sort_by", orders.sort_by_cpu)
        patch.setattr(orders_kernel, "token_sites", orders.TokenSites.of_cpu)
        patch.setattr(orders_kernel, "fill", arranging.fill_cpu)
        patch.setattr(tile_bounds_kernel, "key_positions", KeyPositions.of_cpu)
        patch.setattr(a_shape_kernel, "runs", a_shape.runs_cpu)
        patch.setattr(tile_list_kernel, "find_cut", tile_list.find_cut_cpu)
        patch.setattr(tile_list_kernel, "list_tiles", tile_list.list_tiles_cpu)
        patch.setattr(tile_list_kernel, "density", tile_list.density_cpu)
        yield


@pytest.mark.parametrize("seed", range(20))
def test_plans_that_need_no_data(seed: int) -> None:
    case = random_case(seed) if seed % 2 else random_site_case(seed)
    on_gpu = [
        {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
        for arguments in (case.arrange_arguments(), case.plan_arguments(case.arrange(), DENSITIES[seed % 5]))
    ]
    arrangement = arrange(**on_gpu[0])
    arguments = on_gpu[1] | {"arrangement": arrangement}
    made, stats = plan(**arguments)
    with by_torch():
        expected, expected_stats = plan(**arguments)
        for name, a, b in zip(arrangement._fields, arrangement, arrange(**on_gpu[0]), strict=True):
            assert torch.equal(a, b), f"{name}\n{case}"
    for name, a, b in zip(made._fields, made, expected, strict=True):
        assert torch.equal(a, b), f"{name}\n{case}"
    assert torch.equal(stats.density, expected_stats.density), case


@pytest.mark.parametrize("seed", range(20))
def test_plans_from_data(seed: int) -> None:
    case = PatternCase.of(seed * 31)
    query, key, _ = case.inputs("cuda")
    made = case.plan(query, key)
    with by_torch():
        expected = case.plan(query, key)
    for name, a, b in zip(made.lists._fields, made.lists, expected.lists, strict=True):
        assert torch.equal(a, b), f"{name}\n{case}"
    assert torch.equal(made.density, expected.density), case
