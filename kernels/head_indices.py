"""Head maps as tensors on the device, made once."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def head_indices(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [len(values)]. Kept, because a copy from the host in every call would wait for the device."""
    return torch.tensor(values, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def batch_rows(batch: int, heads: int, device: torch.device) -> Tensor:
    """The batch row of each plan row, int64 [batch * heads]. Kept, because it depends on sizes alone."""
    return torch.arange(batch, device=device).repeat_interleave(heads)
