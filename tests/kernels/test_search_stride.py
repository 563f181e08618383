"""Strides of planted heads, found again."""

import pytest
import torch

from benchmarks.planted_heads import TEXT, VIDEO, Head, Look, Plant, Planted, Segment, plant_heads, random_plant
from mmcompile.kernels import last_queries_kernel, search_stride_kernel
from mmcompile.kernels.last_queries import last_queries_cpu
from mmcompile.kernels.orders import token_modality
from mmcompile.kernels.search_stride import (
    LAST_QUERIES,
    LEAST_STRIDE,
    NEAR,
    _profiles_cpu,
    _response_cpu,
    search_stride,
)

TOKENS = 4096
SITE = Head("site", (Look("site"),))


def found(planted: Planted, max_stride: int = 1024, told: bool = True) -> int:
    tokens = planted.plant.tokens
    modality = token_modality(planted.boundaries.offsets, planted.boundaries.modality, 1, tokens)
    if not told:
        modality = torch.zeros_like(modality)
    (stride,) = search_stride(planted.query, planted.key, modality, 0, max_stride).tolist()
    return stride


# Vertical lines alone are few, and may pair up by chance.
@pytest.mark.parametrize(
    ("kind", "seeds", "least"),
    [
        ("grid s", 40, 40),
        ("grid v+s", 20, 20),
        ("grid h+v+s", 20, 20),
        ("grid and columns", 20, 20),
        ("grid v", 40, 36),
    ],
)
def test_planted_strides_are_found(kind: str, seeds: int, least: int) -> None:
    plants = [random_plant(kind, TOKENS, seed) for seed in range(seeds)]
    assert {plant.segments[1].grid == (0, 0, 0) for plant in plants} == {True, False}
    wrong = []
    for plant in plants:
        stride = found(plant_heads(plant))
        if stride != plant.stride:
            wrong.append((plant.stride, stride))
    assert len(plants) - len(wrong) >= least, wrong
    # A part of the stride holds as much on its lines, but never more beyond its share.
    parts = [(planted, stride) for planted, stride in wrong if planted % stride == 0]
    assert len(parts) <= 0.05 * seeds, parts


@pytest.mark.parametrize("seed", range(4))
def test_without_modalities_all_tokens_are_vision(seed: int) -> None:
    plant = random_plant("grid s", TOKENS, seed)
    assert found(plant_heads(plant), told=False) == plant.stride


@pytest.mark.parametrize("stride", [8, 9, 60, 64, 128, 255, 256, 720])
def test_ties_do_not_give_a_part_of_the_stride(stride: int) -> None:
    frames = (TOKENS - 50) // stride
    segments = (Segment(TEXT, 20), Segment(VIDEO, frames * stride), Segment(TEXT, TOKENS - 20 - frames * stride))
    for heads in ((SITE,), (SITE, Head("local", (Look("local"),)))):
        assert found(plant_heads(Plant(segments, heads, 1, stride))) == stride


def exact_lines(stride: int, length: int = 2000, heads: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys whose scores are the same for all keys of the query's site, and the same for all others."""
    site = torch.nn.functional.one_hot(torch.arange(length) % stride, stride).float()
    return 40.0 * stride**0.5 * site.expand(1, heads, -1, -1), site.expand(1, 1, -1, -1)


@pytest.mark.parametrize("stride", [8, 10, 48, 100, 101, 400])
def test_lines_without_any_noise_give_neither_half_nor_twice_the_stride(stride: int) -> None:
    modality = torch.ones(1, 2000, dtype=torch.int32)
    assert search_stride(*exact_lines(stride), modality, 0, 1024).tolist() == [stride]


def test_each_batch_row_has_its_own_stride_and_heads_share_it() -> None:
    one, other = (exact_lines(stride, heads=4) for stride in (30, 50))
    pad = [torch.nn.functional.pad(part, (0, 20)) for part in one]
    # Zeros for the channels that the first row lacks; its gain is for 30 channels.
    pad[0] = pad[0] * (50 / 30) ** 0.5
    query, key = (torch.cat(parts) for parts in zip(pad, other, strict=True))
    modality = torch.ones(2, 2000, dtype=torch.int32)
    assert search_stride(query, key, modality, 0, 1024).tolist() == [30, 50]
    grouped = key.repeat(1, 2, 1, 1)
    assert search_stride(query, grouped, modality, 0, 1024).tolist() == [30, 50]


def test_the_last_vision_queries_tell_not_the_text_behind_them() -> None:
    (vision, keys), (text, other_keys) = exact_lines(50), exact_lines(30)
    is_text = (torch.arange(2000) >= 1800).unsqueeze(-1)
    query = torch.cat([vision * ~is_text, text * is_text], -1)
    key = torch.cat([keys, other_keys], -1)
    for modality, stride in ((~is_text.T, 50), (torch.ones(1, 2000), 30), (torch.zeros(1, 2000), 30)):
        assert search_stride(query, key, modality.int(), 0, 1024).tolist() == [stride]


def test_a_cached_prefix_counts_as_keys() -> None:
    query, key = exact_lines(60)
    modality = torch.ones(1, 300, dtype=torch.int32)
    assert search_stride(query[:, :, 1700:], key, modality, 1700, 1024).tolist() == [60]


def test_the_stride_stays_within_its_limits() -> None:
    query, key = exact_lines(100)
    modality = torch.ones(1, 2000, dtype=torch.int32)
    for limit in (1, 7, 8, 50, 99):
        (stride,) = search_stride(query, key, modality, 0, limit).tolist()
        assert min(LEAST_STRIDE, limit) <= stride <= limit
    assert search_stride(query, key, modality, 0, 100).tolist() == [100]


@pytest.mark.parametrize(("queries", "keys", "offset"), [(1, 1, 0), (1, 5, 4), (5, 5, 0), (70, 40, 0), (70, 40, -40)])
def test_few_tokens_are_no_error(queries: int, keys: int, offset: int) -> None:
    query, key = torch.randn(2, 4, queries, 16), torch.randn(2, 2, keys, 16)
    stride = search_stride(query, key, torch.zeros(2, queries, dtype=torch.int32), offset, 64)
    assert stride.dtype == torch.int32 and stride.shape == (2,)
    assert ((stride >= LEAST_STRIDE) & (stride <= 64)).all()


@pytest.mark.gpu
def test_the_search_never_waits_for_the_device() -> None:
    query, key = (part.cuda() for part in exact_lines(60))
    modality = torch.ones(1, 2000, dtype=torch.int32, device="cuda")
    search_stride(query, key, modality, 0, 1024)  # the table of multiples is made once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stride = search_stride(query, key, modality, 0, 1024)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stride.tolist() == [60]


def test_the_scale_of_the_model_counts() -> None:
    """Queries that are normalised come with a scale of their own, under which a flat softmax would tell nothing."""
    plant = random_plant("grid s", TOKENS, 1)
    planted = plant_heads(plant)
    factor = 1000.0
    modality = torch.zeros(1, TOKENS, dtype=torch.int32)
    scale = planted.query.shape[3] ** -0.5
    as_is = search_stride(planted.query, planted.key, modality, 0, 1024)
    scaled = search_stride(planted.query / factor, planted.key, modality, 0, 1024, scale * factor)
    assert as_is.tolist() == scaled.tolist() == [plant.stride]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "offset", "width"), [(300, 300, 0, 32), (40, 333, 293, 80), (130, 200, -3, 16), (1, 1, 0, 64)]
)
def test_kernels_against_torch(queries, keys, offset, width, dtype, poisoned_memory):
    batch, heads, copies = 2, 4, 2
    query = torch.randn(batch, queries, heads, width).to(dtype).transpose(1, 2)
    key = torch.randn(batch, copies, keys, width).to(dtype)
    rows, looked_at = min(64, queries), min(256, keys)
    last = torch.full((batch, 8), -1, dtype=torch.int32)
    last[0, 0], last[1, 2] = queries - 1, queries // 2
    found = search_stride_kernel.profiles(query, key, last, rows, looked_at, offset, NEAR, 0.3)
    expected = _profiles_cpu(query, key, last, rows, looked_at, offset, 0.3)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
    for max_stride in (5, 8, 100, 1024):
        least = min(LEAST_STRIDE, max_stride)
        response = search_stride_kernel.response(*found, least, max_stride, 2 * LAST_QUERIES)
        torch.testing.assert_close(response, _response_cpu(*found, least, max_stride), atol=2e-5, rtol=2e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("keys", [64, 65, 1000, 2500])
def test_responses_to_any_profile(keys, poisoned_memory):
    by_distance, by_key = torch.rand(2, 3, keys + 1) ** 8, torch.rand(2, 3, keys) ** 8
    by_distance[..., 0] = 0.0
    for max_stride in (63, 64, 200, 3000):
        response = search_stride_kernel.response(by_distance, by_key, 8, max_stride, 2 * LAST_QUERIES)
        torch.testing.assert_close(response, _response_cpu(by_distance, by_key, 8, max_stride), atol=1e-3, rtol=1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize("length", [1, 100, 5000, 9000])
def test_last_queries(length, poisoned_memory):
    modality = torch.randint(0, 4, (2, length), dtype=torch.int32) * 2
    assert torch.equal(last_queries_kernel.last_queries(modality), last_queries_cpu(modality))
