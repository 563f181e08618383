"""The registered ops: schema, fake, strides, dynamic shapes, both attention paths, and bad input."""

import re
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import mmcompile.kernels.ops  # noqa: F401  registers torch.ops.mminference
from mmcompile.kernels.patterns import HeadPattern, encode
from tests.kernels.tile_walks import WalkCase, assert_as_exact_as_torch, mask_of

OPS = torch.ops.mminference
CASE = WalkCase(batch=2, query_length=150, key_length=260, query_offset=110, heads=4, copies=2, plans=2)
MASKED = replace(CASE, window=100, segments=True, spans=True, padding="left", permuted=True)


def attention_arguments(case: WalkCase, dtype: torch.dtype = torch.float32, min_tokens: int = 0) -> list:
    walk = case.walk()
    maps = [list(walk.head_plan), list(walk.key_head), case.width**-0.5]
    return [*case.inputs(dtype), *walk[:4], *maps, *walk[6:], min_tokens]


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
