"""The keys with the most weight, in a list by position."""

from typing import NamedTuple

import torch
from torch import Tensor

# The kernel walks a row in one program, 6 ns a key; torch sorts a row by many, and takes longer for many rows.
LONG, FEW = 2**18, 12


class KeyList(NamedTuple):
    """Single keys of N plan rows."""

    slots: Tensor  # int32 [N, C], ascending positions, unused entries 0 and last
    listed: Tensor  # int32 [N], how many there are
    counts: Tensor  # int32 [N, R], how many lie at or before each of some positions
    cold: Tensor  # bool [N, Sk] in key slots: False for the keys above


def list_top_keys(weight: Tensor, key_slots: Tensor | None, key_row: Tensor, room: int, last: Tensor) -> KeyList:
    """The keys with the greatest weights above 0, the earlier of equals.

    weight: float32 [N, Sk] in key slots, less than 2. key_slots: int32 [B, Ok, Sk], position -> slot, None where slots
    are positions. key_row: int32 [B, N / B], the key order of each row. room: entries of a list, C. last: int32 [N, R],
    positions.
    """
    rows, length = weight.shape
    if weight.device.type == "cuda" and (length < LONG or rows >= FEW):
        # Triton is imported for a GPU only.
        from mmcompile.kernels import top_keys_kernel

        return top_keys_kernel.list_top_keys(weight, key_slots, key_row, room, last)
    return sort_top_keys(weight, key_slots, key_row, room, last)


def sort_top_keys(weight: Tensor, key_slots: Tensor | None, key_row: Tensor, room: int, last: Tensor) -> KeyList:
    """`list_top_keys` in torch operations."""
    if key_slots is None:
        slot = torch.arange(weight.shape[1], device=weight.device).expand_as(weight)
    else:
        batch = torch.arange(key_row.shape[0], device=weight.device).unsqueeze(1)
        slot = key_slots[batch, key_row.long()].flatten(0, 1).long()  # [N, Sk], by position
    of_position = weight.gather(-1, slot)
    best = of_position.argsort(dim=-1, descending=True, stable=True)[:, :room]
    chosen = (of_position > 0.0) & torch.zeros_like(slot, dtype=torch.bool).scatter_(-1, best, True)
    up_to = chosen.cumsum(-1, dtype=torch.int32)
    entry = torch.where(chosen, up_to.long() - 1, room)  # what is not chosen lands behind the list
    slots = weight.new_zeros(weight.shape[0], room + 1, dtype=torch.int32).scatter_(-1, entry, slot.int())
    counts = up_to.gather(-1, last.long().clamp(0, up_to.shape[1] - 1)).masked_fill_(last < 0, 0)
    return KeyList(slots[:, :room], up_to[:, -1], counts, torch.empty_like(chosen).scatter_(-1, slot, ~chosen))
