"""Tensors for the bulk copy engine (TMA) of Hopper and later GPUs: which it can read, and how it is told of them."""

from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmcompile.kernels.attention_config import padded_head_dim


def takes_descriptors(tensor: Tensor) -> bool:
    """Whether the bulk copy engine can read [B, C, S, D] as it lies, and the device has one."""
    aligned = tensor.data_ptr() % 16 == 0
    for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True):
        aligned &= size == 1 or (stride > 0 and stride * tensor.element_size() % 16 == 0)
    return aligned and tensor.element_size() == 2 and _has_bulk_copies(tensor.device)


def key_descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """[B, C, S, D] for the bulk copy engine, a block of so many rows of one head at a time."""
    block = [1, 1, rows, padded_head_dim(tensor.shape[3])]
    return TensorDescriptor(tensor, list(tensor.shape), bulk_copy_strides(tensor), block)


def bulk_copy_strides(tensor: Tensor) -> list[int]:
    """Strides of [B, C, S, D] as the bulk copy engine wants them: it minds that of a dimension of size 1 too."""
    row = triton.cdiv(tensor.shape[3], 16) * 16
    sizes = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    return [*(row if size == 1 else stride for size, stride in sizes), 1]


@lru_cache
def _has_bulk_copies(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)
