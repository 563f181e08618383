"""The kernels that planners look with, in bfloat16 and float16 on the device, against torch operations there."""

import pytest
import torch
from torch import Tensor

from mmcompile.kernels import (
    column_mass_kernel,
    last_queries_kernel,
    search_stride,
    search_stride_kernel,
    tile_mass,
    tile_mass_kernel,
    tile_shares_kernel,
)
from mmcompile.kernels.last_queries import last_queries_cpu
from mmcompile.kernels.tags import INVALID, INVALID_SPAN
from mmcompile.kernels.tile_mass import KeyPositions, SampledRows
from tests.kernels.probe_checks import check_plan

pytestmark = pytest.mark.gpu
BATCH, HEADS, COPIES, ORDERS = 2, 6, 2, 2
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def sampled_rows(
    length: int,
    samples: int,
    width: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    padded: bool = False,
    window: int | None = None,
    masked: bool = False,
) -> SampledRows:
    """Rows in raster order and by site. masked: with segments and spans."""
    torch.manual_seed(0)
    token = torch.arange(length, dtype=torch.int32, device="cuda")
    order = torch.stack([token, torch.argsort(token % 37, stable=True).int()]).expand(BATCH, -1, -1).contiguous()
    span = torch.where(token // 40 % 2 == 1, token // 40, -1) if masked else torch.full_like(token, -1)
    segment = token // (length // 3) if masked else torch.zeros_like(token)
    tags = torch.stack([token, segment, span]).expand(BATCH, -1, -1).contiguous()
    of_keys = tags.clone()
    if padded:
        of_keys[1, 0, :200], of_keys[1, 2, :200] = INVALID, INVALID_SPAN
    query_tags, key_tags = (
        torch.stack([of[:, :, row.long()] for row in order[0]], 1).contiguous() for of in (tags, of_keys)
    )
    row = torch.randint(ORDERS, (BATCH, HEADS), dtype=torch.int32, device="cuda")
    return SampledRows(
        torch.randn(BATCH, HEADS, length, width, device="cuda").to(dtype),
        torch.randn(BATCH, COPIES * ORDERS, length, width, device="cuda").to(dtype),
        order,
        query_tags,
        key_tags,
        KeyPositions.of(key_tags),
        torch.randint(length, (BATCH, HEADS, samples), device="cuda"),
        row,
        row,
        tuple(range(HEADS)),
        tuple(head // (HEADS // COPIES) * ORDERS for head in range(HEADS)),
        width**-0.5,
        window,
        masked,
        masked,
    )


@pytest.mark.parametrize(
    "case",
    [
        {"length": 1500, "samples": 192},
        {"length": 1500, "samples": 192, "padded": True},
        {"length": 1300, "samples": 192, "padded": True, "window": 400, "masked": True},
        {"length": 900, "samples": 192, "width": 80, "dtype": torch.float16},
        {"length": 900, "samples": 192, "width": 256},
        {"length": 8192, "samples": 960},
    ],
    ids=["causal", "padded", "everything", "width 80", "width 256", "long"],
)
def test_kernels_against_torch(case: dict) -> None:
    rows = sampled_rows(**case)
    cold = torch.rand(BATCH, HEADS, case["length"], device="cuda") < 0.7
    for some in (None, cold):
        expected = tile_mass.tile_log_mass_cpu(rows, some)
        torch.testing.assert_close(tile_mass_kernel.tile_log_mass(rows, some), expected, **CLOSE)
    log_mass = tile_mass.tile_log_mass_cpu(rows, None)
    total = log_mass.logsumexp(-1)
    own = torch.randint(log_mass.shape[3], total.shape, dtype=torch.int32, device="cuda")
    # Halves of the probes, all of a grid's, the last queries of a Vertical-Slash head, and more than are ever taken.
    for samples, groups, skip in ((96, 2, 2), (96, 1, 0), (64, 1, 0), (192, 1, 2)):
        some = rows._replace(slots=rows.slots[:, :, :samples])
        arguments = some, total[:, :, :samples], own[:, :, :samples], skip, groups
        expected = tile_mass.column_mass_cpu(*arguments)
        torch.testing.assert_close(column_mass_kernel.column_mass(*arguments), expected, **CLOSE)
    slots = torch.rand(BATCH, HEADS, case["length"], device="cuda").argsort(-1)[:, :, :300].int()
    listed = torch.randint(301, (BATCH, HEADS), dtype=torch.int32, device="cuda")
    expected = tile_mass.slots_log_mass_cpu(rows, slots, listed)
    torch.testing.assert_close(tile_mass_kernel.slots_log_mass(rows, slots, listed), expected, **CLOSE)
    check_shares(log_mass.flatten(0, 1))


def check_shares(log_mass: Tensor) -> None:
    of_columns = torch.randn(log_mass.shape[:2], device="cuda")
    found, expected = tile_shares_kernel.tile_shares(log_mass), tile_mass.tile_shares_cpu(log_mass)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    found = tile_shares_kernel.spread_out_share(log_mass, of_columns, 4.0)
    torch.testing.assert_close(found, tile_mass.spread_out_share_cpu(log_mass, of_columns, 4.0), **CLOSE)


@pytest.mark.parametrize("density", [None, 0.1, 0.3])
@pytest.mark.parametrize(("kind", "tokens"), [("grid and columns", 9000), ("columns", 6000), ("grid h+v+s", 20000)])
def test_what_probes_find(kind: str, tokens: int, density: float | None) -> None:
    calls = check_plan(kind, tokens, 3, density, "cuda")
    assert min(calls.values()) > 0, calls


@pytest.mark.parametrize("keys", [700, 16384])
def test_responses_to_strides(keys: int) -> None:
    by_distance, by_key = torch.rand(2, 3, keys + 1, device="cuda") ** 8, torch.rand(2, 3, keys, device="cuda") ** 8
    by_distance[..., 0] = 0.0
    for max_stride in (63, 1024, 3000):
        found = search_stride_kernel.response(by_distance, by_key, 8, max_stride, 128)
        expected = search_stride._response_cpu(by_distance, by_key, 8, max_stride)
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("offset", [0, -300])
def test_profiles_of_queries(offset: int) -> None:
    query = torch.randn(2, 8, 9000, 128, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(2, 2, 9000, 128, device="cuda", dtype=torch.bfloat16)
    modality = torch.zeros(2, 9000, dtype=torch.int32, device="cuda")
    modality[1, 100:5000] = 2
    last = last_queries_kernel.last_queries(modality)
    assert torch.equal(last, last_queries_cpu(modality))
    found = search_stride_kernel.profiles(query, key, last, 64, 9000, offset, search_stride.NEAR, 0.1)
    for one, other in zip(found, search_stride._profiles_cpu(query, key, last, 64, 9000, offset, 0.1), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
