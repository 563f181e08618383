"""The kernels that look at what probes attend to, run by Triton's interpreter, find what torch operations find."""

import pytest
import torch

from mmcompile.kernels import lines, lines_kernel, probes, probes_kernel
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.probes import PROBED, SAMPLES, Measured
from tests.kernels.pattern_cases import PatternCase, combinations
from tests.kernels.probe_checks import both_ways, check_plan

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.mark.parametrize(
    ("kind", "tokens", "density"),
    [("grid and columns", 1100, 0.6), ("columns", 1300, 0.6), ("grid h+v+s", 700, None), ("local", 130, 0.02)],
)
def test_plans_of_planted_heads(kind: str, tokens: int, density: float | None) -> None:
    calls = check_plan(kind, tokens, 3, density, "cpu")
    if density != 0.6:  # a cap leaves no room for single keys where tiles are few
        assert calls.pop("hot weight") == 0
    assert min(calls.values()) > 0, calls


@pytest.mark.parametrize("seed", range(1, len(combinations()), 4))
def test_plans_of_any_pattern(seed: int) -> None:
    case = PatternCase.of(seed).shortened(300, 130)
    query, key, _ = case.inputs()
    with both_ways(on_gpu=False):
        case.plan(query, key)


def log_masses(rows: int, key_tiles: int) -> torch.Tensor:
    """Of all samples of the probes; some see no tile."""
    log_mass = torch.randn(rows, (SAMPLES + 1) * PROBED, key_tiles) * 3
    log_mass[torch.rand(log_mass.shape) < 0.3] = float("-inf")
    log_mass[torch.rand(log_mass.shape[:2]) < 0.1] = float("-inf")
    return log_mass


@pytest.mark.parametrize("key_tiles", [1, 40, 600])
def test_totals_and_agreement(key_tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes_kernel, "BLOCK", 512)
    log_mass, weight = log_masses(2, key_tiles), (torch.rand(2, PROBED) < 0.8).float()
    found, expected = probes_kernel.totals(log_mass, weight), probes._totals_cpu(log_mass, weight)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    for wanted in {1, min(7, key_tiles), key_tiles}:
        some = torch.where(torch.rand(log_mass.shape) < 0.9, log_mass, float("-inf"))
        found = probes_kernel.agreement(some, expected[0], weight, wanted)
        for one, other in zip(found, probes._agreement_cpu(some, expected[0], weight, wanted), strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("batch", [1, 2])
def test_choice(batch: int) -> None:
    heads, searched, length = 5, 32, 3 * TILE
    pairs = ((0, 0), (2, 1))
    held, outside, weight = torch.rand(3, batch * len(pairs) * heads, PROBED)
    weight[0] = 0.0
    for least in (0.0, 0.4):  # many queries that spread out, and all
        spread_out = torch.rand(batch * heads, searched).clamp(min=least)
        site = torch.randint(-1, 9, (batch, 3, length), dtype=torch.int32)
        for most in (0.3, 1.0):
            parts = held, outside, weight, spread_out, torch.randint(length, (searched,)), site, pairs, 1, most
            found, expected = probes_kernel.choose(*parts), probes._choose_cpu(*parts)
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("key_tiles", [1, 40, 300])
def test_recall(key_tiles: int) -> None:
    query_tiles, rows = 6, 3
    log_mass = log_masses(4, key_tiles)[:, -PROBED:]
    full, partial = torch.randint(key_tiles // 2 + 1, (2, rows, query_tiles), dtype=torch.int32)
    listed = full + partial
    counts = torch.stack([listed.cumsum(1) - listed, full, partial, full, full], 2).int()
    tiles = torch.full((rows, int(listed.sum(1).max()) + 1), -1, dtype=torch.int32)
    for row in range(rows):
        chosen = [torch.randperm(key_tiles)[:count] for count in listed[row].tolist()]
        tiles[row, : int(listed[row].sum())] = torch.cat(chosen)
    slot = torch.randint(query_tiles * TILE, (4, PROBED))
    outside, weight = torch.rand(2, 4, PROBED)
    measured = Measured(slot, log_mass, log_mass.logsumexp(-1), outside, weight, torch.tensor([3, 0, 3]))
    torch.testing.assert_close(measured.recall(counts, tiles), probes_kernel.recall(measured, counts, tiles), **CLOSE)


@pytest.mark.parametrize("keys", [1, 50, 700])
def test_totals_of_sites(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_kernel, "KEYS", 32)
    weight, pair = torch.rand(3, keys), torch.tensor([1, 0, 1])
    for site in (torch.randint(-1, 6, (2, keys)).sort(1).values, torch.randint(-1, 60, (2, keys))):
        parts = weight, site.int(), pair, 64
        assert torch.equal(lines_kernel.site_totals(*parts), lines.site_totals_cpu(*parts))
