"""The Triton kernels on a real GPU: exactness against float64, long lengths, strides, no waiting for the host."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

import mmcompile.kernels.ops  # noqa: F401  registers torch.ops.mminference
from mmcompile.kernels import block_sparse, hopper_support, reference
from mmcompile.kernels.attend import plan_attention, sparse_attention
from mmcompile.kernels.attention_config import LARGE, SMALL, table_config
from mmcompile.kernels.bulk_copies import takes_descriptors
from mmcompile.kernels.flex import block_mask, flex_attention_on_plan
from mmcompile.kernels.patterns import TILE, HeadPattern
from mmcompile.kernels.tile_walk import TileWalk
from tests.kernels.tile_walks import MASKS, WalkCase, assert_as_exact_as_torch, mask_of, unread

OPS = torch.ops.mminference
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = [32, 64, 80, 96, 128, 256]
CASE = WalkCase(batch=2, query_length=700, key_length=900, query_offset=200, heads=6, copies=2, plans=2, density=0.6)
AUTO = HeadPattern("top_p", order="auto", columns=64)
GRID = HeadPattern("grid", lines="hvs")
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic.*")]


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, or the largest integer, so that an element that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(walk: TileWalk) -> TileWalk:
    return TileWalk(*(part.cuda() if isinstance(part, Tensor) else part for part in walk))


def op_arguments(walk: TileWalk, scale: float) -> list:
    """What the op takes after query, key and value."""
    maps = [list(walk.head_plan), list(walk.key_head), scale]
    return [*walk[:8], *maps, *walk[10:]]


def attend(inputs: list[Tensor], walk: TileWalk, scale: float) -> Tensor:
    return OPS.block_sparse_attention(*inputs, *op_arguments(walk, scale))


def assert_exact(output: Tensor, inputs: list[Tensor], walk: TileWalk) -> None:
    # The fast kernel that takes a mask, where it takes the head dim: torch's slow path upcasts, and few run it.
    backend = SDPBackend.MATH if output.shape[3] % 8 else SDPBackend.EFFICIENT_ATTENTION
    with sdpa_kernel(backend):
        assert_as_exact_as_torch(output, inputs, mask_of(walk), walk)


def causal_walk(length: int, pattern: HeadPattern, heads: int, copies: int, density: float | None = None) -> TileWalk:
    """One pattern for all heads, over one sequence on the GPU."""
    query, key = (torch.empty(1, count, length, 0, device="cuda") for count in (heads, copies))
    planned = plan_attention(query, key, pattern, one_segment(length), scale=1.0, density=density)
    arrangement, lists = planned.arrangement, planned.lists
    key_head = planned.copies.of_head(heads)
    return TileWalk(*arrangement[2:4], *lists, planned.rows.of_head, key_head, None, False, False)


def one_segment(length: int) -> tuple[Tensor, Tensor, Tensor]:
    boundaries = torch.tensor([0, length]), torch.tensor([0]), torch.zeros(1, 3)
    return tuple(part.to("cuda", torch.int32) for part in boundaries)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_head_dim_and_dtype(width, dtype, poisoned_memory):
    case = replace(CASE, width=width)
    walk, inputs = on_gpu(case.walk()), case.inputs(dtype, "cuda")
    assert_exact(attend(inputs, walk, width**-0.5), inputs, walk)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("width", [64, 128])
def test_every_part_of_the_mask(mask, width, poisoned_memory):
    case = replace(MASKS[mask], width=width)
    walk, inputs = on_gpu(case.walk()), case.inputs(torch.bfloat16, "cuda")
    assert_exact(attend(inputs, walk, width**-0.5), inputs, walk)


@pytest.mark.parametrize("seed", range(30))
def test_random_walks(seed, poisoned_memory):
    generator = torch.Generator().manual_seed(seed)

    def choose(values: list):
        return values[int(torch.randint(len(values), (), generator=generator))]

    query_length, copies = choose([1, 64, 127, 128, 129, 300, 513]), choose([1, 2, 3])
    key_length = query_length + choose([0, 0, 1, 127, 500])
    case = WalkCase(
        batch=choose([1, 2]),
        query_length=query_length,
        key_length=key_length,
        query_offset=choose([key_length - query_length, 0, -3]),
        plans=choose([1, 3]),
        heads=copies * choose([1, 2, 7]),
        copies=copies,
        width=choose([64, 80]),  # each width is compiled anew for every part of the mask
        density=choose([0.0, 0.3, 1.0]),
        window=choose([None, None, 1, 100]),
        segments=choose([False, True]),
        spans=choose([False, True]),
        padding=choose(["none", "left", "right", "holes", "empty"]),
        permuted=choose([False, True]),
        seed=seed,
    )
    walk, inputs = on_gpu(case.walk()), case.inputs(torch.bfloat16, "cuda")
    assert_exact(attend(inputs, walk, case.width**-0.5), inputs, walk)


@pytest.mark.parametrize("config", sorted({*LARGE.values(), *SMALL.values()}), ids=str)
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_every_launch_shape_agrees(config, descriptors):
    case = replace(CASE, width=64)
    walk, inputs = on_gpu(case.walk()), case.inputs(torch.bfloat16, "cuda")
    if descriptors and not takes_descriptors(inputs[1]):
        pytest.skip("this device has no bulk copies")
    assert_exact(block_sparse.launch(*inputs, walk, 0.125, config, descriptors), inputs, walk)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("length", [4096, 4001])
def test_every_tile_is_dense_attention(length, width, dtype):
    """Law 1: error against float64 at most 1.5 times that of torch's flash attention."""
    shapes = [(1, heads, length, width) for heads in (28, 4, 4)]
    query, key, value = (torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes)
    walk = causal_walk(length, HeadPattern("dense"), 28, 4, density=1.0)
    ours = attend([query, key, value], walk, width**-0.5)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    errors = {"ours": 0.0, "flash": 0.0}
    for head in range(28):
        one = slice(head, head + 1), slice(head // 7, head // 7 + 1)
        exact = reference.attention(query[:, one[0]], key[:, one[1]], value[:, one[1]], mask)
        for name, output in (("ours", ours), ("flash", flash)):
            errors[name] += ((output[:, one[0]].double() - exact).norm() ** 2).item()
    assert errors["ours"] ** 0.5 <= 1.5 * errors["flash"] ** 0.5, errors


@pytest.mark.parametrize("mask", ["causal", "spans", "everything"])
def test_flex_attention_runs_the_same_plan(mask):
    case = replace(MASKS[mask], width=64, heads=4)
    walk, inputs = on_gpu(case.walk()), case.inputs(torch.bfloat16, "cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    flex = flex_attention_on_plan(*inputs, walk, 0.125, block_mask(walk), compiled)
    assert_exact(flex, inputs, walk)
    torch.testing.assert_close(flex, attend(inputs, walk, 0.125), atol=2e-2, rtol=2e-2)


def test_the_hopper_kernel_runs_where_it_was_measured():
    inputs = replace(CASE, width=64).inputs(torch.bfloat16, "cuda")
    if torch.cuda.get_device_capability() != (9, 0) or not triton.__version__.startswith(hopper_support.MEASURED_ON):
        pytest.skip("not a GPU and a Triton that it was measured on")
    assert hopper_support.runs(*inputs, columns=0)
    assert not hopper_support.runs(*inputs, columns=hopper_support.MOST_COLUMNS + 1)
    assert not hopper_support.runs(*(x.float() for x in inputs), columns=0)
    assert not hopper_support.runs(*CASE.inputs(torch.bfloat16, "cuda"), columns=0)  # head dim 32


@pytest.mark.parametrize("density", [0.0, 0.3])
@pytest.mark.parametrize("columns", ["none", "shared", "each"])
@pytest.mark.parametrize("seed", [0, 2, 3])  # of which some keys are in no list
def test_keys_that_are_not_listed_are_not_read(seed, columns, density):
    """On the kernel that runs here; an item without tiles and the end of a column list take zeros in their place."""
    case = WalkCase(query_length=100, key_length=700, query_offset=600, copies=1, width=64)
    case = replace(case, density=density, columns=columns, seed=seed)
    walk, (query, key, value) = on_gpu(case.walk()), case.inputs(torch.bfloat16, "cuda")
    expected = attend([query, key, value], walk, 0.2)
    for keys in (key, value):
        keys[:, :, unread(walk)] = float("nan")
    output = attend([query, key, value], walk, 0.2)
    assert not output.isnan().any()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("mask", MASKS)
def test_every_part_of_the_mask_on_the_portable_kernel(mask, poisoned_memory):
    case = replace(MASKS[mask], width=64)
    walk, inputs = on_gpu(case.walk()), case.inputs(torch.bfloat16, "cuda")
    assert_exact(block_sparse.portable_attention(*inputs, walk, 0.125), inputs, walk)


def test_scale_0_is_the_mean_of_the_values():
    walk, (query, key, value) = on_gpu(CASE.walk()), CASE.inputs(torch.bfloat16, "cuda")
    expected = attend([torch.zeros_like(query), key, value], walk, 1.0)
    assert torch.equal(attend([query, key, value], walk, 0.0), expected)


@pytest.mark.parametrize("width", [36, 40])
def test_head_dims_in_wider_rows(width):
    walk, inputs = on_gpu(replace(CASE, width=width).walk()), replace(CASE, width=width).inputs(torch.bfloat16, "cuda")
    padded = [torch.nn.functional.pad(x, (0, 48 - width))[..., :width] for x in inputs]
    assert_exact(attend(padded, walk, width**-0.5), inputs, walk)


@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("length", [1, 700, 66_000])
def test_queries_in_token_order(width, length, poisoned_memory):
    """As permute, attention and unpermute give it; from 65,536 tokens on the Hopper kernel gathers and scatters."""
    batch, heads = (2, 6) if length < 1000 else (1, 2)
    query, key, value = (
        torch.randn(batch, count, length, width, device="cuda", dtype=torch.bfloat16) for count in (heads, 2, 2)
    )
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    segment = torch.tensor([0, length // 3, length]), torch.tensor([0, 2]), torch.tensor([[0, 0, 0], [0, 0, 16]])
    boundaries = tuple(part.to("cuda", torch.int32) for part in segment)
    pattern = HeadPattern("a_shape", sink=64, local=512, boundary="q")
    planned = plan_attention(query, key, pattern, boundaries)
    order, rows, row = planned.arrangement.query_order, planned.lists.query_row, planned.rows.of_head
    there = OPS.permute(query, order, rows, range(heads), row)
    walk = TileWalk(*planned.arrangement[2:4], *planned.lists, row, planned.copies.of_head(heads), None, False, False)
    expected = OPS.unpermute(attend([there, planned.key, value], walk, planned.scale), order, rows, row)
    assert torch.equal(planned.attend(query, value), expected)


def test_strides_that_no_bulk_copy_takes():
    case = replace(CASE, width=64)
    walk, (query, key, value) = on_gpu(case.walk()), case.inputs(torch.bfloat16, "cuda")
    expected = attend([query, key, value], walk, 0.125)
    shifted = [torch.nn.functional.pad(x, (1, 4))[..., 1:65] for x in (key, value)]
    assert not any(takes_descriptors(x) for x in shifted)
    merged = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value)]
    for keys in (shifted, merged):
        torch.testing.assert_close(attend([query, *keys], walk, 0.125), expected, atol=1e-2, rtol=1e-2)
    one = [x[:, :1].expand(-1, 2, -1, -1) for x in (key, value)]
    expected = attend([query, *(x.contiguous() for x in one)], walk, 0.125)
    torch.testing.assert_close(attend([query, *one], walk, 0.125), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_row_offsets_past_32_bits(descriptors):
    """Rows 2^17 elements apart: the last ones lie 2.7e9 elements into one 5.4 GB buffer."""
    length, stride = 20480, 2**17
    buffer = torch.empty(length, stride, device="cuda", dtype=torch.bfloat16)
    query, key, value = (buffer[:, i * 128 : (i + 1) * 128].view(1, 1, length, 128).normal_() for i in range(3))
    assert (length - 1) * query.stride(2) > 2**31
    if descriptors and not takes_descriptors(key):
        pytest.skip("this device has no bulk copies")
    walk = causal_walk(length, HeadPattern("a_shape", local=1024), 1, 1)
    config = table_config(query.device, query.dtype, query.shape[3])
    far = block_sparse.launch(query, key, value, walk, 128**-0.5, config, descriptors)
    near = [x.contiguous() for x in (query, key, value)]
    assert torch.equal(far, block_sparse.launch(*near, walk, 128**-0.5, config, descriptors))


def test_attention_and_copies_past_32_bits():
    """28 heads x 128 wrap 32-bit offsets at 599,186 tokens; needs 25 GB."""
    length, heads = 600_064 + 5, 28
    query = torch.empty(1, heads, length, 128, device="cuda", dtype=torch.bfloat16).normal_()
    assert query.numel() > 2**31
    key, value = (torch.empty(1, 4, length, 128, device="cuda", dtype=torch.bfloat16).normal_() for _ in "kv")
    walk = causal_walk(length, HeadPattern("a_shape", local=256), heads, 4)
    output = attend([query, key, value], walk, 128**-0.5)
    start = (length - 1) // TILE * TILE - TILE  # the last two query tiles alone, one of them a tail
    last = walk._replace(query_tags=walk.query_tags[..., start:], counts=walk.counts[:, :, -2:])
    alone = attend([query[:, :, start:], key, value], last, 128**-0.5)
    assert torch.equal(alone, output[:, :, start:])
    mask = mask_of(last._replace(head_plan=(0,)))[:, 0]  # [1, rows, Sk]
    seen = mask.any(1)[0].nonzero().flatten()  # the few keys that the last rows see
    exact = reference.attention(
        query[:, -1:, start:], key[:, -1:, seen], value[:, -1:, seen], mask[..., seen], key_head=[0]
    )
    error = (output[:, -1:, start:].double() - exact).norm() / exact.norm()
    assert error < 5e-3
    del output, exact, mask
    order = torch.randperm(length, device="cuda").int().view(1, 1, -1)
    there = OPS.permute(query, order, None, list(range(heads)), [0] * heads)
    for head in (0, heads - 1):
        assert torch.equal(there[0, head], query[0, head].index_select(0, order[0, 0]))
    assert torch.equal(OPS.unpermute(there, order, None, [0] * heads), query)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.float64], ids=str)
@pytest.mark.parametrize("width", [*WIDTHS, 17])
def test_permute_is_exact(width, dtype, poisoned_memory):
    batch, heads, length, rows = 2, 3, 777, 2
    x = torch.randint(-100, 100, (batch, length, heads, width), device="cuda").to(dtype).transpose(1, 2)
    order = torch.rand(batch, rows, length, device="cuda").argsort(-1).int()
    source_head, row = [2, 0, 0, 1, 1], [1, 0, 1, 0, 1]
    output = OPS.permute(x, order, None, source_head, row)
    assert output.is_contiguous()
    expected = [
        torch.stack([x[b, h, order[b, r].long()] for h, r in zip(source_head, row, strict=True)]) for b in range(batch)
    ]
    assert torch.equal(output, torch.stack(expected))
    back = OPS.unpermute(output, order, None, row)
    assert back.transpose(1, 2).is_contiguous()
    assert torch.equal(back, x[:, source_head])


def test_nothing_waits_for_the_host():
    """Law 3. A first call may: it makes the head maps and compiles."""
    case = replace(CASE, width=64)
    walk, inputs = on_gpu(case.walk()), case.inputs(torch.bfloat16, "cuda")
    order = torch.rand(2, 1, case.query_length, device="cuda").argsort(-1).int()
    heads, rows = list(range(6)), [0] * 6

    def prefill() -> None:
        for pattern in (HeadPattern("a_shape", boundary="2d"), AUTO, HeadPattern("vertical_slash"), GRID):
            sparse_attention(*long, pattern, segment, density=0.5)
        query = OPS.permute(inputs[0], order, None, heads, rows)
        output = OPS.block_sparse_attention(query, *inputs[1:], *op_arguments(walk, 0.125))
        OPS.unpermute(output, order, None, rows)

    long = [torch.randn(1, count, 4096, 64, device="cuda", dtype=torch.bfloat16) for count in (4, 2, 2)]
    segment = one_segment(4096)
    prefill()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefill()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["permute", "unpermute", "block_sparse_attention"])
def test_opcheck(name):
    case = replace(CASE, query_length=150, key_length=260, query_offset=110)
    walk, inputs = on_gpu(case.walk()), case.inputs(torch.bfloat16, "cuda")
    order = torch.rand(2, 1, 150, device="cuda").argsort(-1).int()
    arguments = {
        "permute": (inputs[0], order, None, [0, 5], [0, 0]),
        "unpermute": (inputs[0], order, None, [0] * 6),
        "block_sparse_attention": (*inputs, *op_arguments(walk, 0.2)),
    }[name]
    torch.library.opcheck(getattr(OPS, name).default, arguments)


def test_another_device_is_named():
    order = torch.zeros(1, 1, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match="order is on cpu; cuda:0, the device of x"):
        OPS.permute(torch.zeros(1, 1, 8, 16, device="cuda"), order, None, [0], [0])
    case = replace(CASE, batch=1)
    walk, (query, key, value) = on_gpu(case.walk()), case.inputs(torch.bfloat16, "cuda")
    with pytest.raises(ValueError, match="key is on cpu; cuda:0, the device of query"):
        attend([query, key.cpu(), value], walk, 1.0)
