"""The keys with the most weight, in a list by position."""

from typing import NamedTuple

import torch
from torch import Tensor


class KeyList(NamedTuple):
    """Single keys of N plan rows."""

    slots: Tensor  # int32 [N, C], ascending positions, unused entries 0 and last
    positions: Tensor  # int32 [N, C], theirs; unused entries 2^31 - 1
    listed: Tensor  # int32 [N], how many there are
    cold: Tensor  # bool [N, Sk] in key slots: False for the keys above


def list_top_keys(weight: Tensor, key_slots: Tensor, key_row: Tensor, room: int) -> KeyList:
    """The keys with the greatest weights above 0, the earlier of equals.

    weight: float32 [N, Sk] in key slots. key_slots: int32 [B, Ok, Sk], position -> slot. key_row: int32 [B, N / B], the
    key order of each row. room: entries of a list, C.
    """
    if weight.device.type == "cuda":
        # Triton is imported for a GPU only.
        from mmcompile.kernels import top_keys_kernel

        return top_keys_kernel.list_top_keys(weight, key_slots, key_row, room)
    return list_top_keys_cpu(weight, key_slots, key_row, room)


def list_top_keys_cpu(weight: Tensor, key_slots: Tensor, key_row: Tensor, room: int) -> KeyList:
    """`list_top_keys` in torch operations."""
    rows, keys = weight.shape
    batch = torch.arange(key_row.shape[0], device=weight.device).unsqueeze(1)
    slot = key_slots[batch, key_row.long()].flatten(0, 1).long()  # [N, Sk], by position
    of_position = weight.gather(-1, slot)
    best = of_position.argsort(dim=-1, descending=True, stable=True)[:, :room]
    chosen = (of_position > 0.0) & torch.zeros_like(slot, dtype=torch.bool).scatter_(-1, best, True)
    entry = torch.where(chosen, chosen.cumsum(-1) - 1, room)  # what is not chosen lands behind the list
    slots = weight.new_zeros(rows, room + 1, dtype=torch.int32).scatter_(-1, entry, slot.int())
    position = torch.arange(keys, dtype=torch.int32, device=weight.device).expand(rows, -1)
    positions = torch.full_like(slots, 2**31 - 1).scatter_(-1, entry, position)
    cold = torch.empty_like(chosen).scatter_(-1, slot, ~chosen)
    listed = chosen.sum(-1, dtype=torch.int32)
    return KeyList(slots[:, :room], positions[:, :room], listed, cold)


def reached(keys: KeyList, last: Tensor) -> Tensor:
    """How many listed keys lie at or before some positions. last: int32 [N, R]. Returns int32 [N, R]."""
    if last.device.type == "cuda":
        from mmcompile.kernels import top_keys_kernel

        return top_keys_kernel.reached(keys, last)
    return reached_cpu(keys, last)


def reached_cpu(keys: KeyList, last: Tensor) -> Tensor:
    """`reached` in torch operations."""
    return torch.searchsorted(keys.positions.contiguous(), last.contiguous(), right=True, out_int32=True)
