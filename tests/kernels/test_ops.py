"""The registered ops: schema, fake, strides, dynamic shapes, both attention paths, and bad input."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import scaled_dot_product_attention

import mmcompile.kernels.ops  # noqa: F401  registers torch.ops.mminference
from mmcompile.kernels.check_inputs import check_attention, check_permute
from mmcompile.kernels.patterns import HeadPattern, encode
from mmcompile.kernels.reference import element_mask
from tests.kernels.tile_walks import WalkCase, assert_as_exact_as_torch, mask_of

OPS = torch.ops.mminference
CASE = WalkCase(batch=2, query_length=150, key_length=260, query_offset=110, heads=4, copies=2, plans=2)
MASKED = replace(CASE, window=100, segments=True, spans=True, padding="left", permuted=True)


def attention_arguments(case: WalkCase, dtype: torch.dtype = torch.float32, min_tokens: int = 0) -> list:
    walk = case.walk()
    maps = [list(walk.head_plan), list(walk.key_head), case.width**-0.5]
    return [*case.inputs(dtype), *walk[:3], walk.tiles.flatten(2), *maps, *walk[6:], min_tokens, False]


def random_orders(batch: int, rows: int, length: int) -> torch.Tensor:
    return torch.rand(batch, rows, length).argsort(-1).int()


def permute_arguments() -> list:
    x = torch.randn(2, 37, 3, 16).transpose(1, 2)
    return [x, random_orders(2, 2, 37), [2, 0, 0, 1], [1, 0, 1, 1]]


def unpermute_arguments() -> list:
    return [torch.randn(2, 3, 37, 16), random_orders(2, 2, 37), [1, 0, 1]]


def plan_arguments(masked: bool) -> list:
    batch, length = 2, 300
    span = torch.where(torch.arange(length) // 50 % 2 == 1, torch.arange(length) // 50, -1).expand(batch, -1)
    segment = (torch.arange(length) // 100).expand(batch, -1)
    rows = [torch.rand(batch, length) < 0.9, segment, segment, span, span] if masked else [None] * 5
    patterns = [HeadPattern("a_shape", local=64), HeadPattern("tri_shape", boundary="2d")]
    boundaries = [torch.tensor([0, 100, 600]), torch.tensor([0, 1]), torch.zeros(2, 3)]
    sizes = [batch, length, length, 0, 200 if masked else None]
    return [None, None, *(x.int() for x in boundaries), *rows, *sizes, encode(patterns), 0.5, 0]


ARGUMENTS = {
    "plan": lambda: plan_arguments(False),
    "plan with a mask": lambda: plan_arguments(True),
    "permute": permute_arguments,
    "unpermute": unpermute_arguments,
    "block_sparse_attention": lambda: attention_arguments(CASE),
    "block_sparse_attention with a mask": lambda: attention_arguments(MASKED, torch.bfloat16),
    "block_sparse_attention, short": lambda: attention_arguments(MASKED, min_tokens=1000),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name.split(" ")[0].rstrip(",")).default, tuple(ARGUMENTS[name]()))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_fake_has_the_shapes_strides_and_dtypes_of_the_real(name):
    op, arguments = getattr(OPS, name.split(" ")[0].rstrip(",")), ARGUMENTS[name]()
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
    for one, other in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (real, fake)), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("name", ["permute", "unpermute", "block_sparse_attention"])
def test_a_symbolic_length_stays_symbolic(name):
    """No guard on a length: one graph serves every length."""
    arguments, environment = ARGUMENTS[name](), ShapeEnv()
    with FakeTensorMode(shape_env=environment) as mode:
        symbolic = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        output = getattr(OPS, name)(*symbolic)
    assert isinstance(output.shape[2], torch.SymInt)
    assert not environment.guards


@pytest.mark.parametrize("name", ["plan", "permute", "unpermute", "block_sparse_attention"])
def test_a_length_of_a_million_allocates_nothing(name):
    op, arguments = getattr(OPS, name), ARGUMENTS[name]()
    with FakeTensorMode():
        lengths = {37: 2**20, 150: 2**20, 260: 2**20, 300: 2**20}
        large = [
            torch.empty([lengths.get(size, size) for size in x.shape], dtype=x.dtype)
            if isinstance(x, torch.Tensor)
            else lengths.get(x, x)
            if isinstance(x, int)
            else x
            for x in arguments
        ]
        output = op(*large)
    assert 2**20 in (output if isinstance(output, torch.Tensor) else output[0]).shape


@pytest.mark.parametrize("case", [CASE, MASKED], ids=["causal", "masked"])
@pytest.mark.parametrize("min_tokens", [0, 260, 261])
def test_attention_with_and_without_tiles(case, min_tokens):
    walk, inputs = case.walk(), case.inputs()
    output = OPS.block_sparse_attention(*attention_arguments(case, min_tokens=min_tokens))
    mask = mask_of(walk)
    if min_tokens == 261:  # longer than the keys: dense
        mask = element_mask(walk.query_tags, walk.key_tags, walk.window)[:, list(walk.head_plan)]
    assert_as_exact_as_torch(output, inputs, mask, walk)


def test_a_short_plan_runs_dense():
    """plan and attention agree on the length under which there are no tiles."""
    arguments = plan_arguments(masked=False)
    arguments[-1] = 301
    _, _, *walk, density = OPS.plan(*arguments)
    query, key, value = torch.randn(3, 2, 2, 300, 32)
    maps = [[0, 1], [0, 1], 32**-0.5, None, False, False]
    output = OPS.block_sparse_attention(query, key, value, *walk, *maps, 301)
    dense = scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(output, dense)
    assert torch.equal(density, torch.ones(2, 2))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_short_causal_prefill_makes_no_mask_and_is_the_same(heads):
    case = WalkCase(heads=4, copies=heads)
    *arguments, _ = attention_arguments(case, min_tokens=1000)  # all but only_causal
    with_mask, without = (OPS.block_sparse_attention(*arguments, only) for only in (False, True))
    torch.testing.assert_close(without, with_mask)
    assert without.stride() == with_mask.stride()


def test_density_is_the_listed_share_of_the_tiles():
    *_, counts, _, density = OPS.plan(*plan_arguments(masked=False))
    assert torch.equal(density, counts.sum((2, 3)) / 6)  # 3 x 3 tiles under a causal mask


def test_a_compiled_graph_serves_every_length():
    @torch.compile(backend="aot_eager", dynamic=True)
    def run(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        there = OPS.permute(x, order, [0, 1], [0, 0])
        return OPS.unpermute(there * 2, order, [0, 0])

    for length in (10, 37, 128, 300):
        x = torch.randn(1, 2, length, 16)
        assert torch.equal(run(x, random_orders(1, 1, length)), x * 2)
    assert sum(torch._dynamo.utils.counters["frames"].values()) == 2  # one frame, seen and compiled


SMALL = WalkCase(heads=2, copies=1)
ATTENTION = [argument.name for argument in OPS.block_sparse_attention.default._schema.arguments]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", torch.zeros(2, 200, 32), "query has shape [2, 200, 32]; 4 dimensions [B, H, Sq, D]"),
        ("query", torch.zeros(1, 2, 200, 32).double(), "query has dtype torch.float64; one of torch.bf"),
        ("query", torch.zeros(1, 2, 200, 32).half(), "key has dtype torch.float32; torch.float16, the dtype"),
        ("query", torch.zeros(1, 2, 200, 512), "key has shape [1, 1, 200, 32]; [1, 1, 200, 512] fits"),
        ("query", torch.zeros(1, 2, 201, 32), "query_tags has shape [1, 1, 3, 200]; [1, 1, 3, 201] fits"),
        ("value", torch.zeros(1, 1, 200, 64), "value has shape [1, 1, 200, 64]; [1, 1, 200, 32] fits"),
        ("tiles", torch.zeros(2, 2), "tiles has shape [2, 2]; [B, P, 2 * 2] fits, as plan returns it"),
        ("tiles", torch.zeros(1, 1, 4).long(), "tiles has dtype torch.int64; torch.int32, what"),
        ("counts", torch.zeros(1, 1, 2, 1).int(), "counts has shape [1, 1, 2, 1]; [1, 1, 2, 2] fits"),
        ("key_tags", torch.zeros(1, 2, 3, 200).int(), "key_tags has shape [1, 2, 3, 200]; [1, 1, 3, 200]"),
        ("head_plan", [0], "head_plan has 1 entries; 2, one for each of the heads of query"),
        ("head_plan", [0, 1], "head_plan[1]=1 is not a row of the plan; from 0 to 0"),
        ("key_head", [0, 2], "key_head[1]=2 is not a head of key; from 0 to 0"),
        ("window", 0, "window=0 allows no key; at least 1, or None for no window"),
        ("scale", float("nan"), "scale=nan is not usable; a finite number of at least 0"),
        ("scale", -1.0, "scale=-1.0 is not usable"),
    ],
)  # fmt: skip
def test_bad_attention_input_is_named_before_anything_runs(name, value, message):
    arguments = dict(zip(ATTENTION, attention_arguments(SMALL), strict=True))
    with pytest.raises(ValueError, match=re.escape(message)):
        OPS.block_sparse_attention(**arguments | {name: value})


def test_a_head_dim_past_the_largest_is_named():
    case = replace(SMALL, width=257)
    with pytest.raises(ValueError, match="query has head dim 257; from 1 to 256"):
        OPS.block_sparse_attention(*attention_arguments(case))


def test_another_device_is_named():
    """Called directly: the dispatcher has its own opinion of where a mixture runs."""
    walk, (query, key, value) = SMALL.walk(), SMALL.inputs()
    with pytest.raises(ValueError, match="value is on meta; cpu, the device of query"):
        check_attention(query, key, value.to("meta"), walk, 1.0)
    with pytest.raises(ValueError, match="tiles is on meta; cpu, the device of query"):
        check_attention(query, key, value, walk._replace(tiles=walk.tiles.to("meta")), 1.0)
    with pytest.raises(ValueError, match="order is on meta; cpu, the device of x"):
        check_permute(query, torch.zeros(1, 1, 200, dtype=torch.int32, device="meta"), [0], [0])


def test_the_ops_need_no_triton_on_the_cpu():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mmcompile.kernels.ops\n"
        "x, order = torch.zeros(1, 1, 4, 8), torch.arange(4, dtype=torch.int32).view(1, 1, 4)\n"
        "torch.ops.mminference.permute(x, order, [0], [0])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
