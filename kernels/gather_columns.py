"""Single keys and their values copied together, so that an attention kernel reads them as it reads tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.tile_walk import TileWalk

ROWS = 32  # of one program: 16-byte accesses, four in flight in each of 128 threads at head dim 128
LISTS = 128  # query tiles whose lists a program looks at together


@triton.jit(do_not_specialize=["heads", "plans", "entries", "query_tiles"])
def _gather_kernel(
    key,
    value,
    counts,
    columns,
    key_row,
    head_plan,
    key_head,
    gathered_key,
    gathered_value,
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    value_batch_stride,
    value_head_stride,
    value_row_stride,
    heads,
    plans,
    entries,
    query_tiles,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    LISTS: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(entries, ROWS)
    row = (program // blocks).to(tl.int64)
    batch, head = row // heads, row % heads
    plan = batch * plans + tl.load(head_plan + head)
    copy = (tl.load(key_head + head) + tl.load(key_row + plan)).to(tl.int64)
    entry = program % blocks * ROWS + tl.arange(0, ROWS)
    # Entries outside every list hold anything. They become zeros: a list's last tile reaches beyond it, and what lies
    # there is multiplied by 0, which of a NaN makes a NaN.
    listed = tl.zeros([ROWS], tl.int32)
    for first in range(0, query_tiles, LISTS):
        tile = first + tl.arange(0, LISTS)
        its_list = counts + (plan * query_tiles + tile) * 5 + 3
        start = tl.load(its_list, mask=tile < query_tiles, other=0)[:, None]
        single = tl.load(its_list + 1, mask=tile < query_tiles, other=0)[:, None]
        listed |= tl.max(((entry[None, :] >= start) & (entry[None, :] < start + single)).to(tl.int32), 0)
    slot = tl.load(columns + plan * entries + entry, mask=listed > 0, other=0).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (entry < entries)[:, None] & (column < D)
    copied = (listed > 0)[:, None] & (column < D)
    target = (row * entries + entry[:, None]) * D + column
    key += batch * key_batch_stride + copy * key_head_stride
    value += batch * value_batch_stride + copy * value_head_stride
    its_key = tl.load(key + slot * key_row_stride + column, mask=copied, other=0.0)
    its_value = tl.load(value + slot * value_row_stride + column, mask=copied, other=0.0)
    tl.store(gathered_key + target, its_key, mask=inside)
    tl.store(gathered_value + target, its_value, mask=inside)


def gather_columns(key: Tensor, value: Tensor, walk: TileWalk) -> tuple[Tensor, Tensor]:
    """The keys and values that a plan's columns name, for each head: [B, H, C, D] each, contiguous; zeros for
    entries in no query tile's list.

    key, value: [B, copies, Sk, D], the last dimension contiguous.
    """
    batch, heads, entries, width = key.shape[0], len(walk.head_plan), walk.columns.shape[2], key.shape[3]
    gathered = [x.new_empty(batch, heads, entries, width) for x in (key, value)]
    with torch.cuda.device_of(key):
        _gather_kernel[(batch * heads * triton.cdiv(entries, ROWS),)](
            key,
            value,
            walk.counts.contiguous(),
            walk.columns.contiguous(),
            walk.key_row.contiguous(),
            head_indices(walk.head_plan, key.device),
            head_indices(walk.key_head, key.device),
            *gathered,
            *key.stride()[:3],
            *value.stride()[:3],
            heads,
            walk.columns.shape[1],
            entries,
            walk.counts.shape[2],
            D=width,
            BLOCK_D=triton.next_power_of_2(width),
            ROWS=ROWS,
            LISTS=LISTS,
            enable_fp_fusion=False,  # nothing to fuse; left out, Triton 3.9 warns that its default will change
        )
    return gathered[0], gathered[1]
