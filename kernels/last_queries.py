"""The last query of each modality: what is asked where the prompt's end alone would mislead."""

import torch
from torch import Tensor

from mmcompile.kernels.patterns import MODALITIES


def last_queries(modality: Tensor) -> Tensor:
    """modality: int32 [B, S], below `MODALITIES`. Returns int32 [B, MODALITIES], -1 for a modality that is absent."""
    if modality.device.type == "cuda":
        # Triton is imported for a GPU only.
        from mmcompile.kernels import last_queries_kernel

        return last_queries_kernel.last_queries(modality)
    return last_queries_cpu(modality)


def last_queries_cpu(modality: Tensor) -> Tensor:
    """`last_queries` in torch operations."""
    token = torch.arange(modality.shape[1], dtype=torch.int32, device=modality.device)
    each = torch.arange(MODALITIES, device=token.device).view(1, -1, 1)
    return torch.where(modality.unsqueeze(1) == each, token, -1).amax(-1)
