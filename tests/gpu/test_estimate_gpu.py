"""The kernels that planners look with, in bfloat16 and float16 on the device, against torch operations there."""

import random
from collections.abc import Iterator

import pytest
import torch
import triton
from torch import Tensor

from mmcompile.kernels import (
    column_mass_kernel,
    hopper_support,
    last_queries_kernel,
    search_stride,
    search_stride_kernel,
    tile_mass,
    tile_mass_kernel,
    tile_shares_kernel,
)
from mmcompile.kernels.last_queries import last_queries_cpu
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tags import INVALID, INVALID_SPAN
from mmcompile.kernels.tile_mass import KeyPositions, SampledRows
from tests.kernels.probe_checks import check_plan

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic.*")]
BATCH, HEADS, COPIES, ORDERS = 2, 6, 2, 2
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, or the largest integer, so that an element that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def sampled_rows(
    length: int,
    samples: int,
    width: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    padded: bool = False,
    window: int | None = None,
    segments: bool = False,
    spans: bool = False,
) -> SampledRows:
    """Rows in raster order and by site."""
    torch.manual_seed(0)
    token = torch.arange(length, dtype=torch.int32, device="cuda")
    order = torch.stack([token, torch.argsort(token % 37, stable=True).int()]).expand(BATCH, -1, -1).contiguous()
    span = torch.where(token // 40 % 2 == 1, token // 40, -1) if spans else torch.full_like(token, -1)
    segment = token // (length // 3 + 1) if segments else torch.zeros_like(token)
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
        segments,
        spans,
    )


def check_tile_log_mass(rows: SampledRows, cold: Tensor | None) -> None:
    """The portable kernel, and the Hopper one where it runs."""
    expected = tile_mass.tile_log_mass_cpu(rows, cold)
    config = tile_mass_kernel.launch_config(rows.query)
    torch.testing.assert_close(tile_mass_kernel.tile_log_mass(rows, cold, config), expected, **CLOSE)
    if hopper_support.takes(rows.query, rows.key):
        from mmcompile.kernels import tile_mass_hopper

        torch.testing.assert_close(tile_mass_hopper.launch(rows, cold), expected, **CLOSE)


@pytest.mark.parametrize(
    "case",
    [
        {"length": 1500, "samples": 192},
        {"length": 1500, "samples": 192, "padded": True},
        {"length": 1300, "samples": 192, "padded": True, "window": 400, "segments": True, "spans": True},
        {"length": 900, "samples": 192, "width": 80, "dtype": torch.float16},
        {"length": 900, "samples": 192, "width": 256},
        {"length": 8192, "samples": 960},
    ],
    ids=["causal", "padded", "everything", "width 80", "width 256", "long"],
)
def test_kernels_against_torch(case: dict, poisoned_memory: None) -> None:
    rows = sampled_rows(**case)
    cold = torch.rand(BATCH, HEADS, case["length"], device="cuda") < 0.7
    for some in (None, cold):
        check_tile_log_mass(rows, some)
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


MASKS = {
    "causal": {},
    "window": {"window": 300},
    "segments": {"segments": True},
    "spans": {"spans": True},
    "everything": {"padded": True, "window": 500, "segments": True, "spans": True},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("samples", [96, 300], ids=["few", "many"])
def test_every_launch_shape(samples: int, width: int, dtype: torch.dtype, poisoned_memory: None) -> None:
    rows = sampled_rows(1500, samples, width, dtype)
    check_tile_log_mass(rows, None)
    check_tile_log_mass(rows, torch.rand(BATCH, HEADS, 1500, device="cuda") < 0.7)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("samples", [96, 300], ids=["few", "many"])
def test_every_part_of_the_mask(samples: int, mask: str, poisoned_memory: None) -> None:
    check_tile_log_mass(sampled_rows(1300, samples, **MASKS[mask]), None)


@pytest.mark.parametrize("seed", range(12))
def test_any_lengths(seed: int, poisoned_memory: None) -> None:
    """One key and one sample, ends within a tile, runs of one tile and of 32, more items than programs."""
    draw = random.Random(seed)
    length = draw.choice([1, 127, 128, 129, draw.randint(2, 2000), draw.randint(2000, 12000)])
    rows = sampled_rows(length, draw.choice([1, 64, 128, 129, 256, draw.randint(2, 700)]), padded=length > 300)
    cold = torch.rand(BATCH, HEADS, length, device="cuda") < draw.choice([0.01, 0.9])
    check_tile_log_mass(rows, draw.choice([None, cold]))


def test_far_keys_and_masses(poisoned_memory: None) -> None:
    """Keys and results that lie over 2^31 elements from the first: a million tokens, and copies for many heads."""
    length, copies, samples, heads = 2**20 + 70, 17, 16_400, 16
    torch.manual_seed(0)
    key = torch.full((1, copies, length, 128), float("nan"), dtype=torch.bfloat16, device="cuda")
    key[0, -1] = torch.randn(length, 128, device="cuda").bfloat16()
    token = torch.arange(length, dtype=torch.int32, device="cuda").view(1, 1, -1)
    tags = torch.stack([token, torch.zeros_like(token), torch.full_like(token, -1)], 2)
    # All but the last samples are early, and see little: the most of it is not multiplied.
    slots = torch.randint(300, (1, heads, samples), device="cuda")
    slots[:, :, -20:] = torch.randint(length - 5000, length, (1, heads, 20), device="cuda")
    row = torch.zeros(1, heads, dtype=torch.int32, device="cuda")
    rows = SampledRows(
        torch.randn(1, 1, length, 128, device="cuda").bfloat16(),
        key,
        token,
        tags,
        tags,
        KeyPositions.of(tags),
        slots,
        row,
        row,
        (0,) * heads,
        (copies - 1,) * heads,
        128**-0.5,
        None,
        False,
        False,
    )
    found = tile_mass_kernel.tile_log_mass(rows, None)
    assert found.numel() > 2**31 and key[:, :-1].numel() > 2**31
    some = rows._replace(
        slots=slots[:, -1:, -200:], query_row=row[:, :1], key_row=row[:, :1], heads=(0,), key_head=(copies - 1,)
    )
    torch.testing.assert_close(found[:, -1:, -200:], tile_mass.tile_log_mass_cpu(some, None), **CLOSE)
    unseen = found[:, :, : samples - 20, -(-300 // TILE) :]
    assert unseen.amax() == float("-inf") and not found[:, :, ::100].isnan().any()


def test_the_hopper_kernel_runs_where_it_was_measured() -> None:
    rows = sampled_rows(300, 20)
    if torch.cuda.get_device_capability() != (9, 0) or not triton.__version__.startswith(hopper_support.MEASURED_ON):
        pytest.skip("not a Hopper GPU, or another Triton")
    assert hopper_support.takes(rows.query, rows.key)
    assert not hopper_support.takes(rows.query[:, :, :, 1:], rows.key[:, :, :, 1:])
    assert not hopper_support.takes(rows.query.float(), rows.key.float())
    assert hopper_support.estimates(rows.query, rows.key, samples=2**18)
    assert not hopper_support.estimates(rows.query, rows.key, samples=rows.slots.numel())  # a launch of microseconds


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
