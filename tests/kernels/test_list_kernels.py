"""The kernels of the list side of planning, run by Triton's interpreter, make the plans that torch operations make."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmcompile.kernels import (
    a_shape,
    a_shape_kernel,
    arrange,
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
from mmcompile.kernels import plan as planning
from mmcompile.kernels.a_shape import Intervals
from mmcompile.kernels.levels import MASS_LEVELS, MassLevels, Rings
from mmcompile.kernels.lines import Diagonals, GridLines
from mmcompile.kernels.orders import TokenSites
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.scene import Rows
from mmcompile.kernels.single_keys import Columns
from mmcompile.kernels.tile_bounds import TileBounds
from mmcompile.kernels.tile_classes import MANDATORY, NON_EMPTY
from mmcompile.kernels.tile_list import Layout, Levels, Limits, Places
from mmcompile.kernels.tile_list_kernel import Steps
from mmcompile.kernels.tile_mass import KeyPositions
from tests.kernels.pattern_cases import PatternCase, combinations
from tests.kernels.plan_cases import Made, PlanCase, plan_cases, site_cases

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
]
few = settings(deadline=None, max_examples=max(10, settings().max_examples // 4))
every_kind = st.one_of(plan_cases(), site_cases())
some_density = st.sampled_from([None, 0.01, 0.1, 0.29, 0.5, 0.75, 0.95, 1.0])


@contextmanager
def by_triton(key_tiles: int = 4) -> Iterator[pytest.MonkeyPatch]:
    """Plans run the kernels for tensors of the CPU too, in steps of so few key tiles that a case takes several.

    All but `MassLevels.put`, of which the logarithms may round another way.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_bounds, "tag_bounds_cpu", tile_bounds_kernel.tag_bounds)
        patch.setattr(tile_bounds, "site_bounds_cpu", tile_bounds_kernel.site_bounds)
        patch.setattr(tile_bounds, "count_non_empty_cpu", tile_bounds_kernel.count_non_empty)
        patch.setattr(tile_classes, "classify_cpu", tile_bounds_kernel.classify)
        patch.setattr(a_shape, "sort_keys_cpu", a_shape_kernel.sort_keys)
        patch.setattr(a_shape, "rank_valid_keys_cpu", a_shape_kernel.rank_valid_keys)
        patch.setattr(a_shape, "runs_cpu", a_shape_kernel.runs)
        patch.setattr(tile_list, "find_cut_cpu", tile_list_kernel.find_cut)
        patch.setattr(tile_list, "list_tiles_cpu", tile_list_kernel.list_tiles)
        patch.setattr(tile_list, "density_cpu", tile_list_kernel.density)
        patch.setattr(lines, "rank_diagonals_cpu", lines_kernel.rank_diagonals)
        patch.setattr(top_keys, "sort_top_keys", top_keys_kernel.list_top_keys)
        patch.setattr(Columns, "hot_tiles_cpu", lambda columns: top_keys_kernel.hot_tiles(columns.cold))
        patch.setattr(Rows, "own_tiles_cpu", scene_kernel.own_tiles)
        patch.setattr(orders, "modalities_cpu", orders_kernel.modalities)
        patch.setattr(orders, "slots_cpu", orders_kernel.slots)
        patch.setattr(orders, "sort_by_cpu", orders_kernel.sort_by)
        patch.setattr(KeyPositions, "of_cpu", lambda tags: KeyPositions(*tile_bounds_kernel.key_positions(tags)))
        patch.setattr(arrange, "fill_cpu", orders_kernel.fill)
        patch.setattr(tile_bounds_kernel, "KEY_TILES", key_tiles)
        for kernel in (tile_bounds_kernel, tile_list_kernel, a_shape_kernel):
            patch.setattr(kernel, "SUMMED", 2)
        patch.setattr(a_shape_kernel, "KEYS", TILE)
        patch.setattr(orders_kernel, "TOKENS", 64)
        patch.setattr(top_keys_kernel, "KEYS", 64)
        patch.setattr(top_keys_kernel, "ROWS", 4)
        patch.setattr(lines_kernel, "RANKED", 2)
        patch.setattr(lines_kernel, "DISTANCES", key_tiles)
        for module, walk in ((levels_kernel, "PUT"), (tile_list_kernel, "COUNT"), (tile_list_kernel, "LIST")):
            patch.setattr(module, walk, Steps(key_tiles, 1))
        patch.setattr(tile_list_kernel, "QUERY_TILES", 2)
        yield patch


@few
@given(every_kind)
def test_arrangements(case: PlanCase) -> None:
    """The sites of tokens as well, where there are segments."""
    arguments = case.arrange_arguments()
    prompt = *(arguments[name] for name in ("offsets", "modality", "grid")), case.batch, case.query_length
    expected = arrange.arrange(**arguments)
    with by_triton():
        made = arrange.arrange(**arguments)
        sites = orders_kernel.token_sites(*prompt)
    for name, a, b in zip(expected._fields, made, expected, strict=True):
        assert torch.equal(a, b), name
    for name, a, b in zip(TokenSites._fields, sites, TokenSites.of_cpu(*prompt), strict=True):
        assert torch.equal(a, b), name


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


@pytest.mark.parametrize("seed", range(0, len(combinations()), 2))
def test_plans_from_data(seed: int) -> None:
    case = PatternCase.of(seed).shortened(300, 130)
    query, key, _ = case.inputs()
    expected = case.plan(query, key)
    with by_triton():
        made = case.plan(query, key)
    for name, a, b in zip(expected.lists._fields, made.lists, expected.lists, strict=True):
        assert torch.equal(a, b), f"{name}\n{case}"
    for a, b in ((made.density, expected.density), (made.recall, expected.recall)):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)), case


@dataclass(frozen=True)
class ListCase:
    """Tiles of any classes and levels, and any cap: what no prompt may bring, too. `seed` draws the numbers."""

    seed: int
    batch: int
    rows: int  # of a batch row
    orders: int
    query_tiles: int
    key_tiles: int
    kind: str
    density: float | None
    recall: float | None
    columns: bool
    room: float  # of all tiles

    def layout(self, draw: torch.Generator) -> Layout:
        lengths = self.query_tiles * TILE - 5, self.key_tiles * TILE
        tags = [_random_tags(self.orders, length, draw) for length in lengths]
        classes = torch.randint(16, (self.orders, self.query_tiles, self.key_tiles), generator=draw).to(torch.uint8)
        classes &= torch.where(classes & NON_EMPTY != 0, 255, 255 - MANDATORY).to(torch.uint8)
        none = torch.empty(self.orders, 0, lengths[0], dtype=torch.int32)
        places = Places(
            TileBounds(*tile_bounds_kernel.tag_bounds(*tags), None, False, False), Intervals(none, none), classes
        )
        return Layout(places, torch.randint(self.orders, (self.batch * self.rows,), generator=draw))

    def levels(self, layout: Layout, draw: torch.Generator) -> Levels:
        n, query_tiles, key_tiles = layout.shape
        if self.kind == "mass":
            mass = MassLevels(layout, 0.5)
            most = 1 + int(torch.randint(MASS_LEVELS, (), generator=draw))
            mass.levels.random_(most, generator=draw)
            return mass
        if self.kind == "rings":
            return Rings(layout)
        if self.kind == "lines":
            grid = GridLines.__new__(GridLines)
            grid.layout, grid.count = layout, key_tiles + 1
            grid.vertical = torch.rand(n, key_tiles, generator=draw) < 0.3
            grid.horizontal = torch.rand(n, query_tiles, generator=draw) < 0.3
            return grid
        diagonals = Diagonals.__new__(Diagonals)
        diagonals.count = max(1, key_tiles // 2)
        diagonals.levels = torch.randint(diagonals.count + 1, (n, key_tiles + 1), generator=draw).int()
        diagonals.own = torch.randint(key_tiles, (n, 2, query_tiles), generator=draw).int()
        diagonals.key_tiles = key_tiles
        return diagonals


def list_cases() -> st.SearchStrategy[ListCase]:
    return st.builds(
        ListCase,
        seed=st.integers(0, 2**31),
        batch=st.integers(1, 2),
        rows=st.integers(1, 3),
        orders=st.integers(1, 2),
        query_tiles=st.integers(1, 7),
        key_tiles=st.integers(1, 9),
        kind=st.sampled_from(["mass", "mass", "rings", "lines", "diagonals"]),
        density=st.sampled_from([None, 0.0, 0.05, 0.2, 0.5, 1.0]),
        recall=st.sampled_from([None, 0.3, 0.9, 1.0]),
        columns=st.booleans(),
        room=st.sampled_from([0.0, 0.3, 1.0]),
    )


def _random_tags(orders: int, length: int, draw: torch.Generator) -> Tensor:
    position = torch.stack([torch.randperm(length, generator=draw) for _ in range(orders)])
    return torch.stack([position, torch.zeros_like(position), torch.full_like(position, -1)], 1).int()


@settings(few, max_examples=few.max_examples * 2)
@given(list_cases(), st.sampled_from([2, 4, 16]))
def test_any_cut_of_any_tiles(case: ListCase, step: int) -> None:
    draw = torch.Generator().manual_seed(case.seed)
    layout = case.layout(draw)
    levels = case.levels(layout, draw)
    n, query_tiles, key_tiles = layout.shape
    limits = Limits()
    if case.density is not None:
        most = int(case.density * query_tiles * key_tiles) + 1
        limits = limits._replace(budget=torch.randint(-2, most, (case.batch,), generator=draw))
    if case.recall is not None:
        limits = limits._replace(recall=case.recall)
    if case.columns:
        columns = torch.randint(200, (n, query_tiles), generator=draw).int()
        limits = limits._replace(columns=columns, held=torch.rand(n, query_tiles, generator=draw).round(decimals=1))
    hot_tiles = torch.rand(n, key_tiles, generator=draw) < 0.3 if case.seed % 2 else None
    listed = limits.columns
    room = int(case.room * query_tiles * key_tiles)
    # The rows are some of a larger plan's, as those of one pattern are.
    written = []
    for find, write in (
        (tile_list.find_cut_cpu, tile_list.list_tiles_cpu),
        (tile_list_kernel.find_cut, tile_list_kernel.list_tiles),
    ):
        counts = torch.full((case.batch, case.rows + 2, query_tiles, 5), 7, dtype=torch.int32)
        tiles = torch.full((case.batch, case.rows + 2, room), 7, dtype=torch.int32)
        with by_triton(step):
            cut = None if limits.budget is None and limits.recall is None else find(layout, levels, limits)
            write(layout, levels, cut, hot_tiles, listed, counts[:, 1:-1], tiles[:, 1:-1])
        written.append((counts, tiles))
    assert all(torch.equal(one, other) for one, other in zip(*written, strict=True))


@few
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 40), st.sampled_from([None, 0.02, 0.3]))
def test_levels_of_mass_are_those_of_torch_or_next_to_them(
    seed: int, query_tiles: int, key_tiles: int, density: float | None
) -> None:
    """The logarithms of a GPU may round another way; shares between two levels may come out as either."""
    draw = torch.Generator().manual_seed(seed)
    layout = ListCase(seed, 1, 2, 2, query_tiles, key_tiles, "mass", None, None, False, 1.0).layout(draw)
    mass = torch.rand(2, query_tiles, key_tiles, generator=draw).pow_(12)
    mass[torch.rand(mass.shape, generator=draw) < 0.1] = 0.0
    mass[0, 0, 0] = float("nan")
    one, other = MassLevels(layout, density), MassLevels(layout, density)
    for rows in (slice(0, query_tiles // 2), slice(query_tiles // 2, query_tiles)):
        one.put_cpu(rows, mass[:, rows])
        with by_triton():
            levels_kernel.put(other, rows, mass[:, rows])
    some = layout.non_empty(slice(0, query_tiles))
    assert_next_to(one, other, some)


def assert_next_to(one: MassLevels, other: MassLevels, some: Tensor) -> None:
    assert not (((one.levels - other.levels).abs() > 1) & some).any()
    assert not ((other.levels < 0) & some).any() and not ((other.levels >= MASS_LEVELS) & some).any()


@few
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 40), st.sampled_from([None, 0.02]), st.booleans())
def test_levels_of_samples(
    seed: int, query_tiles: int, key_tiles: int, density: float | None, with_columns: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    layout = ListCase(seed, 1, 2, 2, query_tiles, key_tiles, "mass", None, None, False, 1.0).layout(draw)
    log_mass = torch.randn(2, 3, query_tiles, key_tiles, generator=draw) * 9
    log_mass[torch.rand(log_mass.shape, generator=draw) < 0.2] = float("-inf")
    some = layout.non_empty(slice(0, query_tiles))
    log_mass.masked_fill_(~some.unsqueeze(1), float("-inf"))
    of_columns = torch.randn(2, 3, query_tiles, generator=draw) * 9
    of_columns[torch.rand(of_columns.shape, generator=draw) < 0.2] = float("-inf")
    one, other = MassLevels(layout, density), MassLevels(layout, density)
    for rows in (slice(0, query_tiles // 2), slice(query_tiles // 2, query_tiles)):
        parts = log_mass[:, :, rows].flatten(1, 2), of_columns[:, :, rows].flatten(1) if with_columns else None, 3
        expected = one.put_samples_cpu(rows, *parts)
        with by_triton():
            found = levels_kernel.put_samples(other, rows, *parts)
        if with_columns:
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
        else:
            assert found is expected is None
    assert_next_to(one, other, some)


@dataclass(frozen=True)
class KeyCase:
    """Weights of some rows, of few values where `levels` are few, so that many are equal."""

    seed: int
    batch: int
    rows: int  # of a batch row
    orders: int
    keys: int
    levels: int
    room: float  # of all keys


@few
@given(
    st.builds(
        KeyCase,
        seed=st.integers(0, 2**31),
        batch=st.integers(1, 2),
        rows=st.integers(1, 3),
        orders=st.integers(1, 2),
        keys=st.integers(1, 400),
        levels=st.sampled_from([1, 2, 5, 300]),
        room=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0, 1.1]),
    )
)
def test_the_keys_with_the_most_weight_are_listed_by_position(case: KeyCase) -> None:
    draw = torch.Generator().manual_seed(case.seed)
    rows = case.batch * case.rows
    weight = torch.randint(case.levels + 1, (rows, case.keys + 3), generator=draw) / case.levels
    weight = (weight * torch.rand((), generator=draw)).pow(4)[:, : case.keys]
    slots = [torch.randperm(case.keys, generator=draw) for _ in range(case.batch * case.orders)]
    key_slots = torch.stack(slots).view(case.batch, case.orders, -1).int()
    key_row = torch.randint(case.orders, (case.batch, case.rows), generator=draw).int()
    in_raster = case.seed % 3 == 0
    if in_raster:
        key_slots = torch.arange(case.keys).expand_as(key_slots).int()
    room = 1 + int(case.room * case.keys)
    last = torch.randint(-1, case.keys + 9, (rows, 9), generator=draw).int()
    arguments = weight, None if in_raster else key_slots, key_row, room, last
    expected = top_keys.sort_top_keys(*arguments)
    with by_triton():
        made = top_keys_kernel.list_top_keys(*arguments)
        hot_tiles = top_keys_kernel.hot_tiles(made.cold)
    assert torch.equal(hot_tiles, Columns(*expected).hot_tiles_cpu())
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    # And the list is what it says.
    for n in range(rows):
        slots_of_row = key_slots[n // case.rows, key_row.flatten()[n]].long()
        by_position = weight[n, slots_of_row]
        found = slots_of_row.argsort()[expected.slots[n, : expected.listed[n]].long()].tolist()
        assert found == sorted(found) and len(found) <= room
        usable = (by_position > 0).nonzero().flatten().tolist()
        best = sorted(usable, key=lambda position: (-float(by_position[position]), position))[:room]
        assert found == sorted(best)
        assert expected.counts[n].tolist() == [sum(position <= end for position in found) for end in last[n].tolist()]


@few
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.integers(1, 12))
def test_diagonals_are_ranked_by_their_sums(seed: int, rows: int, samples: int, key_tiles: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    mass = torch.rand(rows, samples, key_tiles, generator=draw).mul(4).round() / 4
    own = torch.randint(key_tiles, (rows, samples + 2), generator=draw).int()[:, :samples]
    arguments = mass, own, min(count, key_tiles)
    with by_triton():
        made = lines_kernel.rank_diagonals(*arguments)
    assert torch.equal(made, lines.rank_diagonals_cpu(*arguments))
