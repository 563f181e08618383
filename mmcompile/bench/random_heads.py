"""Random queries, keys and values of one attention."""

import torch
from torch import Tensor

from mmcompile.errors import OptionError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def random_heads(
    heads: int, kv_heads: int, tokens: int, head_dim: int, dtype: str, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [1, H, S, D], key and value [1, KV, S, D], the same in every run. dtype: a name in DTYPES."""
    torch.manual_seed(0)
    shapes = [(1, count, tokens, head_dim) for count in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape, device=device, dtype=DTYPES[dtype]) for shape in shapes)
    return query, key, value


def require_groups(heads: int, kv_heads: int) -> None:
    """Raises OptionError unless each KV head serves as many query heads."""
    if heads % kv_heads:
        raise OptionError(f"--kv-heads {kv_heads}: {heads} query heads cannot share them evenly")
