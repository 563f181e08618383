"""Row gather and scatter on the GPU: each program copies a block of rows of one head."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.unit_columns import unit_columns

# Bytes of one program: 16-byte accesses of 128 threads, eight of them in flight in each thread.
PROGRAM_BYTES = 16 * 1024
UNSPECIALIZED = ["copies", "plans", "orders", "length"]


@triton.jit
def _order_row(rows, row, copy, batch, plans, orders, BY_PLAN: tl.constexpr):
    """The row of order, laid end to end over the batch, that one copy takes."""
    order_row = tl.load(row + copy)
    if BY_PLAN:
        order_row = tl.load(rows + batch * plans + order_row)
    return batch * orders + order_row


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _permute_kernel(
    x,
    order,
    rows,
    source_head,
    row,
    output,
    batch_stride,
    head_stride,
    row_stride,
    copies,
    plans,
    orders,
    length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BY_PLAN: tl.constexpr,
):
    # Neighbouring programs are the heads of one block of rows: in [B, S, H, D] memory they share pages.
    program = tl.program_id(0)
    copy = program % copies
    blocks = tl.cdiv(length, ROWS)
    block = program // copies % blocks
    batch = (program // copies // blocks).to(tl.int64)
    slot = block * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (slot < length)[:, None] & (column < D)[None, :]
    order += _order_row(rows, row, copy, batch, plans, orders, BY_PLAN) * length
    position = tl.load(order + slot, mask=slot < length, other=0).to(tl.int64)
    x += batch * batch_stride + tl.load(source_head + copy).to(tl.int64) * head_stride
    moved = tl.load(x + position[:, None] * row_stride + column[None, :], mask=inside)
    output += (batch * copies + copy) * length * D
    tl.store(output + slot.to(tl.int64)[:, None] * D + column[None, :], moved, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _unpermute_kernel(
    x,
    order,
    rows,
    row,
    output,
    batch_stride,
    head_stride,
    row_stride,
    copies,
    plans,
    orders,
    length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BY_PLAN: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % copies
    blocks = tl.cdiv(length, ROWS)
    block = program // copies % blocks
    batch = (program // copies // blocks).to(tl.int64)
    slot = block * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (slot < length)[:, None] & (column < D)[None, :]
    order += _order_row(rows, row, head, batch, plans, orders, BY_PLAN) * length
    position = tl.load(order + slot, mask=slot < length, other=0).to(tl.int64)
    x += batch * batch_stride + head.to(tl.int64) * head_stride
    moved = tl.load(x + slot.to(tl.int64)[:, None] * row_stride + column[None, :], mask=inside)
    output += (batch * length * copies + head) * D
    tl.store(output + position[:, None] * (copies * D) + column[None, :], moved, mask=inside)


def permute(x: Tensor, order: Tensor, rows: Tensor | None, source_head: Sequence[int], row: Sequence[int]) -> Tensor:
    """The op of that name for CUDA tensors; arguments as there."""
    batch, _, length, width = x.shape
    output = x.new_empty(batch, len(row), length, width)  # [B, J, S, D]
    if output.numel():
        x = unit_columns(x)
        grid, options = _launch_options(output, rows)
        with torch.cuda.device_of(x):
            _permute_kernel[grid](
                x,
                order.contiguous(),
                order if rows is None else rows.contiguous(),
                head_indices(tuple(source_head), x.device),
                head_indices(tuple(row), x.device),
                output,
                *x.stride()[:3],
                len(row),
                0 if rows is None else rows.shape[1],
                order.shape[1],
                length,
                **options,
            )
    return output


def unpermute(x: Tensor, order: Tensor, rows: Tensor | None, row: Sequence[int]) -> Tensor:
    """The op of that name for CUDA tensors; arguments as there."""
    batch, heads, length, width = x.shape
    output = x.new_empty(batch, length, heads, width)  # [B, S, H, D]
    if output.numel():
        x = unit_columns(x)
        grid, options = _launch_options(x, rows)
        with torch.cuda.device_of(x):
            _unpermute_kernel[grid](
                x,
                order.contiguous(),
                order if rows is None else rows.contiguous(),
                head_indices(tuple(row), x.device),
                output,
                *x.stride()[:3],
                heads,
                0 if rows is None else rows.shape[1],
                order.shape[1],
                length,
                **options,
            )
    return output.transpose(1, 2)


def _launch_options(heads: Tensor, rows: Tensor | None) -> tuple[tuple[int], dict[str, int]]:
    """Grid and keyword arguments of a launch that copies every row of [B, H, S, D]."""
    batch, copies, length, width = heads.shape
    padded = triton.next_power_of_2(width)
    block = max(1, PROGRAM_BYTES // (padded * heads.element_size()))
    # Everything on the first grid axis: the others end at 65,535.
    grid = (batch * copies * triton.cdiv(length, block),)
    options = {"D": width, "BLOCK_D": padded, "ROWS": block, "BY_PLAN": rows is not None}
    # Nothing here to fuse; left out, Triton 3.9 warns that its default will change.
    return grid, options | {"enable_fp_fusion": False}
