"""What launches of the Hopper kernels share."""

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mmcompile.kernels.bulk_copies import bulk_copy_strides

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_descriptor(tensor: Tensor, rows: int, width: int) -> TensorDescriptor:
    """[B, C, S, D] for the bulk copy engine, a block of so many rows at a time."""
    block = [1, 1, rows, width]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), bulk_copy_strides(tensor), block, layout)
