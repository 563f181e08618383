"""Where the Hopper kernels run. Imports no Gluon, which changes from one version of Triton to the next."""

from functools import lru_cache

import torch
import triton
from torch import Tensor

from mmcompile.kernels.attention_config import padded_head_dim
from mmcompile.kernels.bulk_copies import takes_descriptors
from mmcompile.kernels.patterns import TILE

MEASURED_ON = ("3.6",)  # versions of Triton
HEAD_DIMS = (64, 128, 256)  # padded ones
# Query tokens from which the kernel itself gathers and scatters rows. Measured on an H200: 128K tokens take 5.12 ms
# where permute, kernel and unpermute take 6.04; at 32K one warp's gathering costs what the two copies do.
FOLDS_FROM = 65536
# Tiles of 128 samples and 128 keys from which the estimate's kernel runs. Measured on an H200: 3,584 take 0.08 ms where
# the portable kernel takes 0.10, and 728 take 0.04 where it takes 0.025.
LEAST_MASSES = 3072
LEAST_SCALE = 1e-30  # all scores alike, in float32
# Single keys of a plan row, or as a share of the keys where that is more: they are gathered for each head, which for
# many more would take the keys' own room.
MOST_COLUMNS, COLUMNS_SHARE = 8192, 1 / 32


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel does not run there; None where it does."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if padded_head_dim(head_dim) not in HEAD_DIMS or head_dim % 8:
        return f"it takes head dims from 40 to 256 that 8 divides, not {head_dim}"
    return _why_not_there(device)


@lru_cache
def _why_not_there(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return "not a Hopper GPU"
    version = ".".join(triton.__version__.split(".")[:2])
    return None if version in MEASURED_ON else f"not measured on Triton {version}"


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels take these queries or keys or values, [B, C, S, D] each."""
    return all(
        tensor.numel() > 0
        and why_not(tensor.device, tensor.dtype, tensor.shape[3]) is None
        and takes_descriptors(tensor)
        for tensor in tensors
    )


def runs(query: Tensor, key: Tensor, value: Tensor, columns: int) -> bool:
    """Whether the attention kernel takes these tensors. columns: the most that a plan row may list."""
    most = max(MOST_COLUMNS, key.shape[2] * COLUMNS_SHARE)
    return columns <= most and takes(query, key, value)


def estimates(query: Tensor, key: Tensor, samples: int) -> bool:
    """Whether the estimate's kernel takes these tensors. samples: of all rows and batch rows."""
    return samples * key.shape[2] >= LEAST_MASSES * TILE * TILE and takes(query, key)
