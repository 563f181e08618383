"""The mass of sampled rows on tiles and keys, on the CPU and by the interpreted kernels, against float64."""

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmcompile.kernels import attention_config, column_mass_kernel, tile_mass, tile_mass_kernel, tile_shares_kernel
from mmcompile.kernels.attention_config import Config, padded_head_dim
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tags import INVALID, INVALID_SPAN
from mmcompile.kernels.tile_mass import KeyPositions, SampledRows

pytestmark = pytest.mark.usefixtures("poisoned_memory")
MINUS_INFINITY = float("-inf")
# Scores are sums of products in float32, some units large.
EXACT = {"atol": 2e-5, "rtol": 2e-5}


@dataclass(frozen=True)
class MassCase:
    """Shapes and mask of one sample; `seed` draws the rest."""

    batch: int = 1
    query_length: int = 200
    key_length: int = 200
    query_offset: int = 0
    rows: int = 2
    samples: int = 40
    heads: int = 2
    copies: int = 1  # for each key order
    query_orders: int = 1
    key_orders: int = 1
    width: int = 32
    window: int | None = None
    segments: bool = False
    spans: bool = False
    padding: str = "none"
    permuted: bool = False
    ascending: bool = False
    cold: bool = False
    skip_tiles: int = 0
    listed: int = 50
    groups: int = 1
    seed: int = 0

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict:
        """The arguments that both functions share. What nobody may read is NaN."""
        torch.manual_seed(self.seed)
        query = torch.randn(self.batch, self.query_length, self.heads, self.width).transpose(1, 2)
        key = torch.randn(self.batch, self.copies * self.key_orders, self.key_length, self.width)
        query_order, query_tags = self._in_orders(self._tags(self.query_length, self.query_offset), self.query_orders)
        _, key_tags = self._in_orders(self._key_tags(), self.key_orders)
        key_row = torch.randint(self.key_orders, (self.batch, self.rows), dtype=torch.int32)
        slots = torch.randint(self.query_length, (self.batch, self.rows, self.samples))
        arguments = {
            "query": query.to(dtype),
            "key": key.to(dtype),
            "query_order": query_order,
            "query_tags": query_tags,
            "key_tags": key_tags,
            "slots": slots.sort(2).values if self.ascending else slots,
            "query_row": torch.randint(self.query_orders, (self.batch, self.rows), dtype=torch.int32),
            "key_row": key_row,
            "heads": tuple(torch.randint(self.heads, (self.rows,)).tolist()),
            "key_head": tuple((torch.randint(self.copies, (self.rows,)) * self.key_orders).tolist()),
            "scale": self.width**-0.5,
            "window": self.window,
            "segments": self.segments,
            "spans": self.spans,
        }
        self._poison(arguments)
        return arguments

    def cold_keys(self) -> Tensor | None:
        torch.manual_seed(self.seed + 1)
        return torch.rand(self.batch, self.rows, self.key_length) < 0.6 if self.cold else None

    def key_list(self) -> tuple[Tensor, Tensor]:
        """Key slots [B, P, C] and how many of them count."""
        torch.manual_seed(self.seed + 3)
        slots = torch.rand(self.batch, self.rows, self.key_length).argsort(2)[:, :, : self.listed]
        return slots.int(), torch.randint(slots.shape[2] + 1, (self.batch, self.rows), dtype=torch.int32)

    def own_tiles(self) -> Tensor:
        torch.manual_seed(self.seed + 2)
        return torch.randint(-(-self.key_length // TILE), (self.batch, self.rows, self.samples), dtype=torch.int32)

    def _tags(self, length: int, offset: int) -> Tensor:
        """[B, 3, S] in token order: equal positions of queries and keys have equal segments and spans."""
        position = torch.arange(length) + offset
        third = max(1, self.key_length // 3)
        span = torch.where(position // 40 % 2 == 1, position // 40, -1)
        rows = [position, position // third * self.segments, span if self.spans else torch.full_like(span, -1)]
        return torch.stack(rows).int().expand(self.batch, 3, -1).clone()

    def _key_tags(self) -> Tensor:
        tags = self._tags(self.key_length, 0)
        position, cut = torch.arange(self.key_length), torch.randint(self.key_length, (self.batch, 1))
        valid = {
            "none": position >= torch.zeros(self.batch, 1),
            "left": position >= cut,
            "right": position <= cut,
            "holes": torch.rand(self.batch, self.key_length) < 0.7,
            "empty": position < torch.zeros(self.batch, 1),
        }[self.padding]
        tags[:, 0].masked_fill_(~valid, INVALID)
        tags[:, 2].masked_fill_(~valid, INVALID_SPAN)
        return tags

    def _in_orders(self, tags: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Orders [B, O, S], and the tags [B, O, 3, S] in their slots."""
        length = tags.shape[2]
        order = torch.arange(length).expand(self.batch, count, length)
        if self.permuted:
            order = torch.rand(self.batch, count, length).argsort(-1)
        rows = tags.unsqueeze(1).expand(-1, count, -1, -1)
        return order.int().contiguous(), rows.gather(-1, order.unsqueeze(2).expand_as(rows)).contiguous()

    def _poison(self, arguments: dict) -> None:
        """Queries that are not sampled, copies that no row uses and keys that are not valid."""
        query, key = (torch.full_like(arguments[name], float("nan")) for name in ("query", "key"))
        for b, p in product(range(self.batch), range(self.rows)):
            token, copy, order = sampled_of(arguments, b, p)
            query[b, arguments["heads"][p], token] = arguments["query"][b, arguments["heads"][p], token]
            valid = arguments["key_tags"][b, order, 0] != INVALID
            key[b, copy, valid] = arguments["key"][b, copy, valid]
        arguments |= {"query": query, "key": key}


def sampled_rows(arguments: dict) -> SampledRows:
    return SampledRows(**arguments, key_positions=KeyPositions.of(arguments["key_tags"]))


def sampled_of(arguments: dict, b: int, p: int) -> tuple[Tensor, int, int]:
    """Query tokens, key copy and key order of one row."""
    order = int(arguments["key_row"][b, p])
    token = arguments["query_order"][b, arguments["query_row"][b, p], arguments["slots"][b, p].long()].long()
    return token, arguments["key_head"][p] + order, order


def exact_scores(arguments: dict) -> Tensor:
    """Scores in float64, -inf where the element mask forbids, [B, P, R, Sk]."""
    batch, rows = arguments["key_row"].shape
    result = []
    for b, p in product(range(batch), range(rows)):
        token, copy, order = sampled_of(arguments, b, p)
        query_tags = arguments["query_tags"][b, arguments["query_row"][b, p]][:, arguments["slots"][b, p].long()]
        q_position, q_segment, q_span = query_tags.long().unsqueeze(2)
        k_position, k_segment, k_span = arguments["key_tags"][b, order].long().unsqueeze(1)
        allowed = k_position <= q_position
        if arguments["spans"]:
            allowed |= (k_span == q_span) & (q_span >= 0)
        allowed &= k_position != INVALID
        if arguments["segments"]:
            allowed &= q_segment == k_segment
        if arguments["window"] is not None:
            allowed &= k_position > q_position - arguments["window"]
        queries = arguments["query"][b, arguments["heads"][p], token].double()
        scores = queries @ arguments["key"][b, copy].double().T * arguments["scale"]
        result.append(scores.masked_fill(~allowed, MINUS_INFINITY))
    return torch.stack(result).unflatten(0, (batch, rows))


def exact_tile_log_mass(arguments: dict, cold: Tensor | None) -> Tensor:
    scores = exact_scores(arguments)
    if cold is not None:
        scores = scores.masked_fill(~cold.unsqueeze(2), MINUS_INFINITY)
    return torch.stack([tile.logsumexp(3) for tile in scores.split(TILE, 3)], 3)


def exact_slots_log_mass(arguments: dict, key_slots: Tensor, listed: Tensor) -> Tensor:
    scores = exact_scores(arguments).gather(
        3, key_slots.long().unsqueeze(2).expand(-1, -1, arguments["slots"].shape[2], -1)
    )
    unlisted = torch.arange(key_slots.shape[2]) >= listed.unsqueeze(2)
    return scores.masked_fill_(unlisted.unsqueeze(2), MINUS_INFINITY).logsumexp(3)


def exact_column_mass(arguments: dict, own_tile: Tensor, skip_tiles: int, groups: int) -> Tensor:
    scores = exact_scores(arguments)
    tile = torch.arange(scores.shape[3]) // TILE
    skipped = torch.zeros_like(scores, dtype=torch.bool)
    for back in range(skip_tiles):
        skipped |= tile == own_tile.unsqueeze(3) - back
    counted = (scores > MINUS_INFINITY) & ~skipped
    weights = scores.softmax(3).masked_fill(~counted, 0.0)
    total, count = (each.unflatten(2, (groups, -1)).sum(3) for each in (weights, counted))
    return total / count.clamp(min=1)


def check(case: MassCase, dtype: torch.dtype = torch.float32, config: Config | None = None) -> None:
    """Each function; by the kernels where a launch shape is given."""
    arguments, cold, own_tile, listed = case.arguments(dtype), case.cold_keys(), case.own_tiles(), case.key_list()
    log_mass = exact_tile_log_mass(arguments, None)
    sampled, of_columns = (
        sampled_rows(arguments),
        (log_mass.logsumexp(3).float(), own_tile, case.skip_tiles, case.groups),
    )
    if config is None:
        masses = [tile_mass.tile_log_mass(sampled, some) for some in (None, cold)]
        of_slots = tile_mass.slots_log_mass(sampled, *listed)
        columns = tile_mass.column_mass(sampled, *of_columns)
    else:
        masses = [tile_mass_kernel.tile_log_mass(sampled, some, config) for some in (None, cold)]
        of_slots = tile_mass_kernel.slots_log_mass(sampled, *listed, config)
        columns = column_mass_kernel.column_mass(sampled, *of_columns, config)
    for mass, expected in zip(masses, (log_mass, exact_tile_log_mass(arguments, cold)), strict=True):
        assert mass.dtype == torch.float32
        torch.testing.assert_close(mass, expected.float(), **EXACT)
    torch.testing.assert_close(of_slots, exact_slots_log_mass(arguments, *listed).float(), **EXACT)
    assert columns.dtype == torch.float32
    expected = exact_column_mass(arguments, own_tile, case.skip_tiles, case.groups)
    torch.testing.assert_close(columns, expected.float(), **EXACT)


lengths = st.one_of(st.integers(1, 400), st.sampled_from([1, 127, 128, 129, 256, 384]))


@st.composite
def mass_cases(draw: st.DrawFn, max_length: int = 400) -> MassCase:
    query_length = min(draw(lengths), max_length)
    key_length = query_length + draw(st.sampled_from([0, 0, 1, 100]))
    groups = draw(st.integers(1, 3))
    return MassCase(
        batch=draw(st.integers(1, 2)),
        query_length=query_length,
        key_length=key_length,
        query_offset=draw(st.sampled_from([key_length - query_length, 0, -3])),
        rows=draw(st.integers(1, 3)),
        samples=groups * draw(st.one_of(st.integers(1, 70), st.sampled_from([1, 64, 128, 200]))),
        groups=groups,
        listed=draw(st.sampled_from([1, 40, 128, 400])),
        heads=draw(st.integers(1, 3)),
        copies=draw(st.integers(1, 2)),
        query_orders=draw(st.integers(1, 2)),
        key_orders=draw(st.integers(1, 2)),
        width=draw(st.sampled_from([16, 32, 80, 128])),
        window=draw(st.sampled_from([None, None, 1, 100, 2**40])),
        segments=draw(st.booleans()),
        spans=draw(st.booleans()),
        padding=draw(st.sampled_from(["none", "none", "left", "right", "holes", "empty"])),
        permuted=draw(st.booleans()),
        ascending=draw(st.booleans()),
        cold=draw(st.booleans()),
        skip_tiles=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**20)),
    )


# One case for each part of an element mask, with tails in queries and keys.
_BASE = MassCase(batch=2, query_length=150, key_length=330, query_offset=180, rows=3, copies=2, ascending=True)
MASKS = {
    "causal": _BASE,
    "permuted": replace(_BASE, permuted=True, query_orders=2, key_orders=3),
    "window": replace(_BASE, window=90),
    "segments": replace(_BASE, segments=True, permuted=True),
    "spans": replace(_BASE, spans=True, query_offset=-3),
    "left padding": replace(_BASE, padding="left"),
    "holes": replace(_BASE, padding="holes", permuted=True),
    "no key": replace(_BASE, padding="empty"),
    "cold": replace(_BASE, cold=True, skip_tiles=1),
    "groups": replace(_BASE, groups=2, permuted=True, skip_tiles=2),
    "everything": replace(_BASE, window=150, segments=True, spans=True, padding="right", cold=True, skip_tiles=2),
}


@pytest.mark.parametrize("mask", MASKS)
def test_every_part_of_the_mask(mask):
    check(MASKS[mask])


@given(mass_cases())
def test_any_sample(case):
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=20)
@given(case=mass_cases())
def test_any_sample_in_half_precision(dtype, case):
    check(case, dtype)


@pytest.mark.parametrize("mask", MASKS)
def test_blocks_on_the_cpu(mask, monkeypatch):
    monkeypatch.setattr(tile_mass, "BLOCK_ROWS", 17)
    monkeypatch.setattr(tile_mass, "BLOCK_TILES", 1)
    check(MASKS[mask])


def test_rows_without_a_key():
    """The three first queries lie before every key."""
    case = MassCase(query_offset=-3, samples=200, ascending=True, rows=1)
    arguments = case.arguments()
    arguments["slots"] = torch.arange(200).view(1, 1, -1)
    arguments["query"] = torch.randn(1, 2, 200, 32)
    log_mass = tile_mass.tile_log_mass(sampled_rows(arguments))
    assert (log_mass[:, :, :3] == MINUS_INFINITY).all()
    assert (log_mass[:, :, 3:, 0] > MINUS_INFINITY).all()
    own_tile = torch.zeros(1, 1, 200, dtype=torch.int32)
    total = log_mass.logsumexp(3)
    columns = tile_mass.column_mass(sampled_rows(arguments), log_total=total, own_tile=own_tile, skip_tiles=0)
    assert columns.isfinite().all()
    # Without spans, segments and windows the weights of 197 rows add up to as many.
    seen = 197 - torch.arange(200).clamp(max=197)
    torch.testing.assert_close((columns.squeeze(2) * seen).sum(), torch.tensor(197.0))


def test_a_row_without_a_total_counts_for_nothing():
    arguments = MassCase(samples=2).arguments()
    total = tile_mass.tile_log_mass(sampled_rows(arguments)).logsumexp(3)
    own_tile = torch.zeros(1, 2, 2, dtype=torch.int32)
    arguments["slots"][:, :, 1] = 199
    arguments["query"] = arguments["query"].nan_to_num(nan=1.0)
    total[:, :, 1] = MINUS_INFINITY
    both = tile_mass.column_mass(sampled_rows(arguments), log_total=total, own_tile=own_tile, skip_tiles=0)
    arguments["slots"] = arguments["slots"][:, :, :1]
    one = tile_mass.column_mass(
        sampled_rows(arguments), log_total=total[:, :, :1], own_tile=own_tile[:, :, :1], skip_tiles=0
    )
    torch.testing.assert_close(both, one)


def test_large_scores_do_not_overflow():
    arguments = MassCase(width=64).arguments()
    arguments["scale"] = 1000.0
    log_mass = tile_mass.tile_log_mass(sampled_rows(arguments))
    torch.testing.assert_close(log_mass, exact_tile_log_mass(arguments, None).float())


@pytest.mark.parametrize("empty", ["rows", "samples"])
def test_nothing_sampled(empty):
    case = replace(_BASE, **{empty: 0})
    arguments, own_tile = case.arguments(), case.own_tiles()
    log_mass = tile_mass.tile_log_mass(sampled_rows(arguments))
    assert log_mass.shape == (2, case.rows, case.samples, 3)
    columns = tile_mass.column_mass(
        sampled_rows(arguments), log_total=log_mass.logsumexp(3), own_tile=own_tile, skip_tiles=1
    )
    assert torch.equal(columns, torch.zeros(2, case.rows, 1, 330))


def launch_shape(
    choose: Callable[[Tensor], Config], width: int, dtype: torch.dtype, large: bool, monkeypatch: pytest.MonkeyPatch
) -> Config:
    """What a kernel chooses on a device with much shared memory, or little."""
    monkeypatch.setattr(attention_config, "_large_shared_memory", lambda device: large)
    return choose(torch.empty(1, 1, 1, width, dtype=dtype))


CONFIGS = [Config(128, 128, 4, 1), Config(64, 64, 4, 1), Config(128, 32, 4, 1), Config(16, 32, 4, 1)]


@pytest.mark.interpreter
@pytest.mark.parametrize("programs", [1, 1024])
@pytest.mark.parametrize("mask", MASKS)
def test_kernels_on_every_part_of_the_mask(mask, programs, monkeypatch):
    monkeypatch.setattr(tile_mass_kernel, "ENOUGH_PROGRAMS", programs)  # long runs of tiles, and short ones
    check(MASKS[mask], config=CONFIGS[0])


@pytest.mark.interpreter
@pytest.mark.parametrize("large", [True, False], ids=["hopper", "other"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [32, 80, 128, 256])
def test_kernels_in_every_launch_shape(width, dtype, large, monkeypatch):
    case = MassCase(query_length=100, key_length=150, query_offset=50, width=width)
    check(case, dtype, launch_shape(tile_mass_kernel.launch_config, width, dtype, large, monkeypatch))


@pytest.mark.interpreter
@settings(max_examples=10)
@given(
    mass_cases(max_length=200),
    st.sampled_from([torch.float16, torch.float32]),
    st.sampled_from(CONFIGS),
)
def test_kernels_on_any_sample(case, dtype, config):
    check(case, dtype, config)


@pytest.mark.interpreter
def test_kernels_on_more_blocks_than_they_look_at_together(monkeypatch):
    """More tiles than a run, and more blocks of samples than one look takes."""
    monkeypatch.setattr(tile_mass_kernel, "ENOUGH_PROGRAMS", 1)
    case = MassCase(query_length=2200, key_length=2200, samples=540, rows=1, heads=1, width=16, ascending=True)
    check(case, config=Config(128, 32, 4, 1))


@pytest.mark.interpreter
def test_kernels_read_any_strides():
    arguments = replace(_BASE, batch=2).arguments()
    expected = tile_mass_kernel.tile_log_mass(sampled_rows(arguments), None)
    for name in ("query", "key"):
        arguments[name] = arguments[name].transpose(1, 3).contiguous().transpose(1, 3)
    strided = tile_mass_kernel.tile_log_mass(sampled_rows(arguments), None)
    assert torch.equal(strided, expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("mask", ["causal", "cold", "everything"])
def test_kernels_load_keys_through_descriptors(mask, monkeypatch):
    for module in (tile_mass_kernel, column_mass_kernel):
        monkeypatch.setattr(module, "takes_descriptors", lambda key: True)
    check(MASKS[mask], torch.float16, CONFIGS[1])


def log_masses(seed: int, samples: int = 1, tiles: int = 7, key_tiles: int = 1100) -> tuple[Tensor, Tensor]:
    """As the kernels leave them: some samples see no tile, some no column, some neither."""
    torch.manual_seed(seed)
    log_mass = torch.randn(3, samples * tiles, key_tiles) * 20
    log_mass.masked_fill_(torch.rand(log_mass.shape) < 0.3, MINUS_INFINITY)
    log_mass[:, ::3] = MINUS_INFINITY
    of_columns = torch.randn(3, samples * tiles) * 20
    return log_mass, of_columns.masked_fill_(torch.rand(of_columns.shape) < 0.4, MINUS_INFINITY)


@pytest.mark.interpreter
@pytest.mark.parametrize("key_tiles", [1, 5, 128, 1100])
def test_kernels_of_shares(key_tiles):
    log_mass, of_columns = log_masses(key_tiles, 3, key_tiles=key_tiles)
    found, expected = tile_shares_kernel.tile_shares(log_mass), tile_mass.tile_shares_cpu(log_mass)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    found = tile_shares_kernel.spread_out_share(log_mass, of_columns, 4.0)
    torch.testing.assert_close(found, tile_mass.spread_out_share_cpu(log_mass, of_columns, 4.0), **EXACT)


def test_shares_of_tiles_and_columns_add_up_to_one():
    log_mass, of_columns = log_masses(0, 3)
    shares, held = tile_mass.mean_shares(log_mass, of_columns, 3)
    sees = ((log_mass > MINUS_INFINITY).any(2) | (of_columns > MINUS_INFINITY)).unflatten(1, (3, -1)).float().mean(1)
    torch.testing.assert_close(shares.sum(2) + held, sees)


INTEGERS = (
    "query_order",
    "query_tags",
    "key_tags",
    "query_row",
    "key_row",
    "head",
    "key_head",
    "key_positions",
    "bounds",
    "own_tile",
)
LISTS = ("key_slots", "listed")
FLOATS = ("output", "log_total")


def compiled(kernel, width: int, dtype: str, config: Config, capability: int):
    """The kernel as its launch specialises it for aligned, contiguous inputs and a causal mask."""
    padded = padded_head_dim(width)
    constants = {"D": width, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": padded, "TILE": TILE}
    constants |= {"RUN": tile_mass_kernel.RUN, "COLD": True, "WALK": True, "ONE_BLOCK": True}
    constants |= {"WINDOW": False, "SEGMENTS": False, "SPANS": False}
    constants["DESCRIPTOR"] = descriptor = capability == 90 and dtype != "fp32"
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    rows = config.block_m if "own_tile" in kernel.arg_names else config.block_n
    descriptors = {"key": f"tensordesc<{dtype}[1, 1, {rows}, {padded}]>", "bias": f"tensordesc<fp32[1, {rows}]>"}
    pointers = dict.fromkeys(("query", "key"), dtype) | dict.fromkeys((*FLOATS, "bias"), "fp32")
    pointers |= dict.fromkeys((*INTEGERS, *LISTS), "i32") | dict.fromkeys(("slots", "walk"), "i64")
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in descriptors and descriptor and "DESCRIPTOR" in constants:
            signature[name] = descriptors[name]
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale_log2" else "i32"
            if name.endswith("stride"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(kernel, folder: Path) -> int:
    """Bytes of local memory a thread, which is where spilled registers go."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes the compiler's place")
@pytest.mark.parametrize("name", ["tile_log_mass", "slots_log_mass", "column_mass"])
@pytest.mark.parametrize(
    ("width", "dtype", "capability", "instruction"),
    [
        (64, "bf16", 90, "wgmma.mma_async"),
        (80, "bf16", 90, "wgmma.mma_async"),
        (128, "bf16", 90, "wgmma.mma_async"),
        (256, "fp16", 90, "wgmma.mma_async"),
        (128, "bf16", 80, "mma.sync"),
        (256, "bf16", 80, "mma.sync"),
        (128, "fp32", 80, "fma.rn"),
    ],
)
def test_kernels_compile_without_spilling(name, width, dtype, capability, instruction, tmp_path, monkeypatch):
    choose, module = {
        "tile_log_mass": (tile_mass_kernel.launch_config, tile_mass_kernel),
        "slots_log_mass": (tile_mass_kernel.gather_config, tile_mass_kernel),
        "column_mass": (lambda query: column_mass_kernel.column_config(query, 64), column_mass_kernel),
    }[name]
    config = launch_shape(choose, width, DTYPES[dtype], capability == 90, monkeypatch)
    kernel = compiled(getattr(module, f"_{name}_kernel"), width, dtype, config, capability)
    assert instruction in kernel.asm["ptx"]
    assert kernel.metadata.shared <= (227 if capability == 90 else 64) * 1024
    # Triton 3.9 holds both operands of a float32 product in registers, which the samples' totals then leave few of.
    assert stack_bytes(kernel, tmp_path) <= (320 if (name, dtype) == ("column_mass", "fp32") else 64)
