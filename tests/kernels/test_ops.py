"""The registered ops: schema, fake, strides, dynamic shapes, both attention paths, and bad input."""

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import scaled_dot_product_attention

import mmcompile.kernels.ops  # noqa: F401  registers torch.ops.mminference
from mmcompile.kernels.check_inputs import check_attention, check_permute
from mmcompile.kernels.patterns import HeadPattern, KeyCopies, distinct_orders, encode, encode_orders, plan_rows
from tests.kernels.tile_walks import WalkCase, assert_as_exact_as_torch, mask_of

OPS = torch.ops.mminference
CASE = WalkCase(batch=2, query_length=150, key_length=260, query_offset=110, heads=4, copies=2, plans=2)
MASKED = replace(CASE, window=100, segments=True, spans=True, padding="left", permuted=True)
COLUMNS = replace(MASKED, columns="each", plans=3, query_orders=2, key_orders=2)

BATCH, LENGTH = 2, 300
STATIC = (
    HeadPattern("a_shape", local=64),
    HeadPattern("tri_shape", boundary="2d"),
    HeadPattern("sf_fixed"),
    HeadPattern("sf_strided", boundary="q"),
    HeadPattern(order="column"),
    HeadPattern("a_shape", local=64),
)
ESTIMATED = (
    HeadPattern("grid", stride=20),
    HeadPattern("top_p", columns=8, order="auto"),
    HeadPattern("a_shape", local=64),
    HeadPattern("vertical_slash", vertical=10, slash=128, boundary="2d"),
    HeadPattern("top_p", scores="antidiagonal"),
    HeadPattern("columns", columns=5),
)


def attention_arguments(case: WalkCase, dtype: torch.dtype = torch.float32) -> list:
    walk = case.walk()
    maps = [list(walk.head_plan), list(walk.key_head), case.width**-0.5]
    return [*case.inputs(dtype), *walk[:8], *maps, *walk[10:], None]


def comparison_arguments(case: WalkCase, dtype: torch.dtype = torch.float32) -> list:
    query, key, value, *rest, _ = attention_arguments(case, dtype)
    order = random_orders(case.batch, rest[0].shape[1], case.query_length)
    return [query, key, value, torch.randn_like(query), order, *rest, torch.tensor([7]), 3, 1.0]


def random_orders(batch: int, rows: int, length: int) -> torch.Tensor:
    return torch.rand(batch, rows, length).argsort(-1).int()


def permute_arguments(rows: torch.Tensor | None = None) -> list:
    x = torch.randn(2, 37, 3, 16).transpose(1, 2)
    return [x, random_orders(2, 2, 37), rows, [2, 0, 0, 1], [1, 0, 1, 1]]


def unpermute_arguments(rows: torch.Tensor | None = None) -> list:
    return [torch.randn(2, 3, 37, 16), random_orders(2, 2, 37), rows, [1, 0, 1]]


def plan_row_orders() -> torch.Tensor:
    return torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.int32)


def boundaries() -> list[torch.Tensor]:
    offsets, modality, grid = [0, 20, 300, 600], [0, 1, 1], [[0, 0, 0], [4, 7, 10], [0, 0, 0]]
    return [torch.tensor(part, dtype=torch.int32) for part in (offsets, modality, grid)]


def masks(masked: bool) -> list:
    """Validity of the keys, and segments and spans of queries and keys."""
    if not masked:
        return [None] * 5
    token = torch.arange(LENGTH).expand(BATCH, -1)
    span = torch.where(token // 50 % 2 == 1, token // 50, -1)
    return [torch.rand(BATCH, LENGTH) < 0.9, token // 100, token // 100, span, span]


def head_inputs(patterns: Sequence[HeadPattern], copies: int) -> list[torch.Tensor]:
    heads = len(patterns)
    return [torch.randn(BATCH, heads, LENGTH, 16), torch.randn(BATCH, copies, LENGTH, 16)]


def arrange_arguments(patterns: Sequence[HeadPattern], masked: bool = False) -> list:
    queries, keys = distinct_orders(plan_rows(patterns).patterns)
    searches = any(order.searches for order in (*queries, *keys))
    inputs = head_inputs(patterns, 2) if searches else [None, None]
    orders = encode_orders(queries, keys)
    return [*inputs, *boundaries(), *masks(masked), BATCH, LENGTH, LENGTH, 0, orders]


def plan_arguments(
    patterns: Sequence[HeadPattern],
    masked: bool = False,
    density: float | None = 0.5,
    recall: float | None = None,
) -> list:
    rows = plan_rows(patterns)
    arrangement = OPS.arrange(*arrange_arguments(patterns, masked))
    inputs = [None, None]
    if any(pattern.needs_data for pattern in patterns):
        inputs = head_inputs(patterns, 2 * arrangement[1].shape[1])
    mask = [200, True, True] if masked else [None, False, False]
    how = [encode(rows.patterns), rows.heads, density, recall]
    return [*inputs, *arrangement, *boundaries(), 0, 0.25, *mask, *how]


ARGUMENTS = {
    "arrange": lambda: arrange_arguments(STATIC),
    "arrange with a mask": lambda: arrange_arguments(STATIC, masked=True),
    "arrange by data": lambda: arrange_arguments(ESTIMATED),
    "plan": lambda: plan_arguments(STATIC),
    "plan with a mask": lambda: plan_arguments(STATIC, masked=True, density=None),
    "plan by data": lambda: plan_arguments(ESTIMATED, recall=0.9),
    "plan by data with a mask": lambda: plan_arguments(ESTIMATED, masked=True, density=None),
    "plan by data, of everything": lambda: plan_arguments(ESTIMATED, density=1.0),
    "permute": permute_arguments,
    "permute by plan rows": lambda: permute_arguments(plan_row_orders()),
    "unpermute": unpermute_arguments,
    "unpermute by plan rows": lambda: unpermute_arguments(plan_row_orders()),
    "block_sparse_attention": lambda: attention_arguments(CASE),
    "block_sparse_attention with a mask": lambda: attention_arguments(MASKED, torch.bfloat16),
    "block_sparse_attention with columns": lambda: attention_arguments(COLUMNS),
    "compare_with_dense": lambda: comparison_arguments(CASE),
    "compare_with_dense with columns": lambda: comparison_arguments(COLUMNS, torch.bfloat16),
}


def op_of(name: str):
    return getattr(OPS, name.split(" ")[0].rstrip(","))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name):
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if op_of(name) is OPS.plan:
        tests.pop()  # NaN is not NaN there, as the recall of what is not estimated is; the next test has that part
    torch.library.opcheck(op_of(name).default, tuple(ARGUMENTS[name]()), test_utils=tests)


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name.startswith(("arrange", "plan"))])
def test_a_compiled_graph_returns_what_eager_does(name):
    op, arguments = op_of(name), ARGUMENTS[name]()
    compiled = torch.compile(lambda *arguments: op(*arguments), backend="aot_eager", dynamic=True, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), op(*arguments), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_fake_has_the_shapes_strides_and_dtypes_of_the_real(name):
    op, arguments = op_of(name), ARGUMENTS[name]()
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
    for one, other in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (real, fake)), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if not name.startswith(("arrange", "plan", "compare"))])
def test_a_symbolic_length_stays_symbolic(name):
    """No guard on a length: one graph serves every length."""
    arguments, environment = ARGUMENTS[name](), ShapeEnv()
    with FakeTensorMode(shape_env=environment) as mode:
        symbolic = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        output = op_of(name)(*symbolic)
    assert isinstance(output.shape[2], torch.SymInt)
    assert not environment.guards


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name.startswith(("arrange", "plan"))])
def test_symbolic_lengths_of_a_plan_stand_for_the_real_ones(name):
    """The sizes that depend on lengths are symbolic, and whatever they are at this length is right, without a guard."""
    op, arguments = op_of(name), ARGUMENTS[name]()
    real, environment = op(*arguments), ShapeEnv()
    token = torch.empty(BATCH, LENGTH)
    with FakeTensorMode(shape_env=environment) as mode:
        batch, length = mode.from_tensor(token).shape
        symbolic = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        if op is OPS.arrange:  # of the numbers, only the lengths
            symbolic[10:13] = batch, length, length
        fake = op(*symbolic)
    assert not environment.guards
    for one, other in zip(real, fake, strict=True):
        assert (tuple(one.shape), one.dtype) == (tuple(map(int, other.shape)), other.dtype)
    sized = fake if op is OPS.arrange else (fake[2], fake[3])
    assert all(any(isinstance(size, torch.SymInt) for size in part.shape[2:]) for part in sized)


@pytest.mark.parametrize("name", ["arrange", "plan", "permute", "unpermute", "block_sparse_attention"])
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
    assert any(2**20 in part.shape for part in ([output] if isinstance(output, torch.Tensor) else output))


@pytest.mark.parametrize("case", [CASE, MASKED], ids=["causal", "masked"])
def test_attention_over_the_tiles_of_a_plan(case):
    walk, inputs = case.walk(), case.inputs()
    output = OPS.block_sparse_attention(*attention_arguments(case))
    assert_as_exact_as_torch(output, inputs, mask_of(walk), walk)


def test_arranged_planned_and_attended_at_density_one_is_dense():
    """Five ops, one after the other, with every kind of order, and no tile left out."""
    patterns, heads = STATIC + ESTIMATED, len(STATIC + ESTIMATED)
    query, key, value = torch.randn(3, BATCH, heads, LENGTH, 32)
    rows, arguments = plan_rows(patterns), plan_arguments(patterns, density=1.0)
    query_order, key_order, *tags = arguments[2:6]
    query_row, *lists, density, _ = OPS.plan(*arguments)
    copies = KeyCopies.of(heads, key_order.shape[1])
    assert query_order.shape[1] > 2 and key_order.shape[1] > 2
    there = OPS.permute(query, query_order, query_row, range(heads), rows.of_head)
    keys, values = (OPS.permute(x, key_order, None, copies.sources, copies.rows) for x in (key, value))
    maps = [rows.of_head, copies.of_head(heads), 32**-0.5, None, False, False]
    output = OPS.block_sparse_attention(there, keys, values, *tags, query_row, *lists, *maps)
    back = OPS.unpermute(output, query_order, query_row, rows.of_head)
    torch.testing.assert_close(back, scaled_dot_product_attention(query, key, value, is_causal=True))
    assert (density >= 1).all()
    in_token_order = OPS.block_sparse_attention(query, keys, values, *tags, query_row, *lists, *maps, query_order)
    assert torch.equal(in_token_order, back)
    assert in_token_order.stride() == back.stride()


def test_density_is_the_computed_share_of_the_tiles():
    *_, counts, _, _, _, density, _ = OPS.plan(*plan_arguments(STATIC, density=None))
    computed = counts[..., 1:3].sum((2, 3)) + counts[..., 4].sum(2) / 128
    torch.testing.assert_close(density, computed / 6)  # 3 x 3 tiles under a causal mask


def test_a_compiled_graph_serves_every_length():
    @torch.compile(backend="aot_eager", dynamic=True)
    def run(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        there = OPS.permute(x, order, None, [0, 1], [0, 0])
        return OPS.unpermute(there * 2, order, None, [0, 0])

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
        ("tiles", torch.zeros(2, 2), "tiles has shape [2, 2]; 3 dimensions [B, P, T]"),
        ("tiles", torch.zeros(1, 1, 4).long(), "tiles has dtype torch.int64; torch.int32, what"),
        ("counts", torch.zeros(1, 1, 2, 1).int(), "counts has shape [1, 1, 2, 1]; [1, 1, 2, 5] fits"),
        ("counts", torch.zeros(1, 1, 2, 5), "counts has dtype torch.float32; torch.int32, what plan returns"),
        ("query_tags", torch.zeros(1, 0, 3, 200).int(), "query_tags has shape [1, 0, 3, 200]; [1, 1, 3, 200]"),
        ("key_tags", torch.zeros(1, 1, 3, 201).int(), "key_tags has shape [1, 1, 3, 201]; [1, 1, 3, 200] fits"),
        ("key_tags", torch.zeros(1, 2, 3, 200).int(), "key_head[0]=0 is not the first of 2 heads of key, one for"),
        ("query_row", torch.zeros(1, 2).int(), "query_row has shape [1, 2]; [1, 1] fits"),
        ("key_row", torch.zeros(1, 1).long(), "key_row has dtype torch.int64; torch.int32, what"),
        ("columns", torch.zeros(1, 1).int(), "columns has shape [1, 1]; 3 dimensions [B, P, C]"),
        ("columns", torch.zeros(1, 1, 4).int(), "cold has shape [1, 1, 0]; [1, 1, 200] fits"),
        ("cold", torch.ones(1, 1, 200).bool(), "cold has shape [1, 1, 200]; [1, 1, 0] fits"),
        ("cold", torch.ones(1, 1, 0), "cold has dtype torch.float32; torch.bool, what plan returns"),
        ("query_order", torch.zeros(1, 1, 201).int(), "query_order has shape [1, 1, 201]; [1, 1, 200] fits"),
        ("query_order", torch.zeros(1, 1, 200), "query_order has dtype torch.float32; torch.int32, slot -> token"),
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


@pytest.mark.parametrize(
    ("op", "name", "value", "message"),
    [
        ("arrange", "batch", 0, "batch=0 has nothing to attend; at least 1"),
        ("arrange", "orders", "raster", "orders: 'raster' was not written by encode_orders()"),
        ("arrange", "key_span", torch.zeros(2, 300), "query_span=None while its pair is given"),
        ("plan", "window", 0, "window=0 allows no key; at least 1, or None for no window"),
        ("plan", "density", 0.0, "density=0.0 is not a fraction; in (0, 1], or None"),
        ("plan", "recall", 2.0, "recall=2.0 is not a fraction; in (0, 1], or None"),
        ("plan", "patterns", "[]", "patterns: '[]' is not a non-empty JSON list"),
        ("plan", "heads", [0], "heads has 1 entries; 5, one for each of the patterns"),
    ],
)
def test_bad_input_of_a_plan_is_named(op, name, value, message):
    names = [argument.name for argument in getattr(OPS, op).default._schema.arguments]
    arguments = dict(zip(names, ARGUMENTS[op](), strict=False))  # the last has a default
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(OPS, op)(**arguments | {name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("share", 0.0, "share=0.0 draws no query tiles; in (0, 1]"),
        ("seed", torch.tensor([1, 2]), "seed has shape [2]; [1] fits"),
        ("seed", torch.tensor([1.0]), "seed has dtype torch.float32; torch.int64, a count from 0 on"),
        ("output", torch.zeros(2, 4, 150, 8), "output has shape [2, 4, 150, 8]; [2, 4, 150, "),
        ("query_order", torch.zeros(2, 1, 150), "query_order has dtype torch.float32; torch.int32"),
    ],
)
def test_bad_input_of_a_comparison_is_named(name, value, message):
    names = [argument.name for argument in OPS.compare_with_dense.default._schema.arguments]
    arguments = dict(zip(names, comparison_arguments(CASE), strict=True))
    with pytest.raises(ValueError, match=re.escape(message)):
        OPS.compare_with_dense(**arguments | {name: value})


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
        check_permute(query, torch.zeros(1, 1, 200, dtype=torch.int32, device="meta"), None, [0], [0])
    order, rows = torch.zeros(1, 1, 200, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="rows is on meta; cpu, the device of x"):
        check_permute(query, order, rows, [0], [0])


def test_the_ops_need_no_triton_on_the_cpu():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mmcompile.kernels.ops\n"
        "x, order = torch.zeros(1, 1, 4, 8), torch.arange(4, dtype=torch.int32).view(1, 1, 4)\n"
        "torch.ops.mminference.permute(x, order, None, [0], [0])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
