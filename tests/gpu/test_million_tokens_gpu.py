"""One attention over a million tokens, planned online: right in sampled rows, and planned in little memory."""

import pytest
import torch
from torch import Tensor

from mmcompile.kernels import reference
from mmcompile.kernels.attend import Planned, plan_attention
from mmcompile.kernels.patterns import TILE, HeadPattern

TOKENS, FRAME = 1_048_576 + 5, 256
HEADS, KV_HEADS, WIDTH = 28, 4, 128
TEXT = 300
pytestmark = pytest.mark.gpu


def boundaries() -> tuple[Tensor, ...]:
    """Text, one video of 16 x 16 tokens a frame, text."""
    frames = (TOKENS - 2 * TEXT) // FRAME
    parts = [0, TEXT, TEXT + frames * FRAME, TOKENS], [0, 2, 0], [[0, 0, 0], [frames, 16, 16], [0, 0, 0]]
    return tuple(torch.tensor(part, dtype=torch.int32, device="cuda") for part in parts)


def keys_of_row(planned: Planned, head: int, token: int) -> Tensor:
    """The keys that a query attends to by its plan, int64, in token order."""
    row = planned.rows.of_head[head]
    arrangement, lists = planned.arrangement, planned.lists
    query_order = arrangement.query_order[0, lists.query_row[0, row]]
    key_order = arrangement.key_order[0, lists.key_row[0, row]].long()
    slot = int((query_order == token).nonzero())
    first, full, partial, column, columns = lists.counts[0, row, slot // TILE].tolist()
    tiles = lists.tiles[0, row, first : first + full + partial].long()
    in_tiles = (tiles[:, None] * TILE + torch.arange(TILE, device="cuda")).flatten()
    in_tiles = in_tiles[in_tiles < TOKENS]
    in_tiles = in_tiles[lists.cold[0, row, in_tiles]]
    single = lists.columns[0, row, column : column + columns].long()
    keys = key_order[torch.cat([in_tiles, single])]
    assert keys.unique().numel() == keys.numel()
    return keys[keys <= token]


def test_sampled_rows_are_exact_and_the_plan_is_small():
    torch.manual_seed(0)
    query = torch.empty(1, HEADS, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16).normal_()
    key, value = (torch.empty(1, KV_HEADS, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16).normal_() for _ in "kv")
    # Some keys that every query looks at, so that there are columns, and sites that differ, so that orders do.
    key[:, :, 1000::50_000] += query.mean() + 2.0
    query += 0.5
    key += torch.randn(FRAME, WIDTH, device="cuda", dtype=torch.bfloat16).repeat(TOKENS // FRAME + 1, 1)[:TOKENS]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pattern = HeadPattern("top_p", order="auto", columns=1 / 64)
    planned = plan_attention(query, key, pattern, boundaries(), density=0.2, recall=1.0)
    copies = planned.key.numel() * planned.key.element_size()
    extra = torch.cuda.max_memory_allocated() - before - copies
    print(f"planning took {extra / 2**30:.2f} GiB besides {copies / 2**30:.2f} GiB of keys in their orders")
    output = planned.attend(query, value)
    for head in (0, HEADS - 1):
        for token in (0, 299, 70_001, 599_190, TOKENS // 2, TOKENS - 129, TOKENS - 1):
            keys = keys_of_row(planned, head, token)
            of_head = head // (HEADS // KV_HEADS)
            exact = reference.attention(
                query[:, head : head + 1, token : token + 1],
                key[:, of_head : of_head + 1, keys],
                value[:, of_head : of_head + 1, keys],
                torch.ones(1, 1, 1, keys.numel(), dtype=torch.bool, device="cuda"),
            )
            error = (output[:, head : head + 1, token : token + 1].double() - exact).norm() / exact.norm()
            assert error < 1e-2, (head, token, keys.numel(), float(error))
    assert extra < 2 * 2**30
