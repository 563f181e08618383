"""Row gather and scatter on the CPU, in torch operations."""

from collections.abc import Sequence

import torch
from torch import Tensor


def permute(x: Tensor, order: Tensor, rows: Tensor | None, source_head: Sequence[int], row: Sequence[int]) -> Tensor:
    """The op of that name for CPU tensors; arguments as there."""
    batch, _, length, width = x.shape
    output = x.new_empty(batch, len(row), length, width)  # [B, J, S, D]
    for b in range(batch):
        of_copy = row if rows is None else rows[b, list(row)].tolist()
        for copy, (head, order_row) in enumerate(zip(source_head, of_copy, strict=True)):
            torch.index_select(x[b, head], 0, order[b, order_row], out=output[b, copy])
    return output


def unpermute(x: Tensor, order: Tensor, rows: Tensor | None, row: Sequence[int]) -> Tensor:
    """The op of that name for CPU tensors; arguments as there."""
    batch, heads, length, width = x.shape
    output = x.new_empty(batch, length, heads, width).transpose(1, 2)  # [B, H, S, D]
    of_batch = torch.arange(batch).view(-1, 1, 1)
    of_head = torch.arange(heads).view(1, -1, 1)
    order_row = torch.tensor(row).expand(batch, -1) if rows is None else rows[:, list(row)]
    output[of_batch, of_head, order[of_batch.view(-1, 1), order_row].long()] = x
    return output
