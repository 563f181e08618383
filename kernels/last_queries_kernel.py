"""Triton kernel of `kernels/last_queries.py`, and its launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.patterns import MODALITIES

BLOCK = 4096  # tokens of one program


@triton.jit(do_not_specialize=["length"])
def _last_queries_kernel(modality, last, length, MODALITIES: tl.constexpr, BLOCK: tl.constexpr):
    """last: int32 [B, MODALITIES], raised to the last token of each modality among some tokens."""
    blocks = tl.cdiv(length, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(modality + batch * length + token, mask=token < length, other=-1)
    for each in tl.static_range(MODALITIES):
        latest = tl.max(tl.where(found == each, token, -1))
        tl.atomic_max(last + batch * MODALITIES + each, latest, mask=latest >= 0)  # in any order the same


def last_queries(modality: Tensor) -> Tensor:
    """The function of that name of last_queries.py for CUDA tensors."""
    batch, length = modality.shape
    last = torch.full((batch, MODALITIES), -1, dtype=torch.int32, device=modality.device)
    with torch.cuda.device_of(modality):
        _last_queries_kernel[(batch * triton.cdiv(length, BLOCK),)](
            modality.contiguous(), last, length, MODALITIES=MODALITIES, BLOCK=BLOCK, num_warps=8
        )
    return last
