"""Slot orders: which token stands in which slot of the permuted queries or keys.

Boundaries reach this file padded: `offsets` may repeat its last value (empty segments), or end past the
tokens.
"""

import torch
from torch import Tensor

MODALITIES = 8  # ids 0..7: text, image, video, audio, and room


def token_modality(offsets: Tensor, modality: Tensor, batch: int, length: int) -> Tensor:
    """The modality of each query token.

    offsets: int32 [M + 1], modality: int32 [M], over the tokens of the batch laid end to end (`batch *
    length`). Tokens past the last offset are modality 0. Returns int32 [B, S].
    """
    token = torch.arange(batch * length, dtype=torch.int32, device=offsets.device)
    if modality.shape[0] == 0:
        return torch.zeros_like(token).view(batch, length)
    ends = offsets[1:].to(torch.int32).contiguous()
    # right=True skips empty segments: a token belongs to the last segment that starts at or before it.
    segment = torch.searchsorted(ends, token, right=True).clamp_(max=modality.shape[0] - 1)
    known = modality.to(torch.int32).clamp(0, MODALITIES - 1)[segment]
    return known.masked_fill_(token >= ends[-1], 0).view(batch, length)


def key_modality(query_modality: Tensor, key_length: int, query_offset: int) -> Tensor:
    """The modality of each key. Key `k` is query token `k - query_offset`; keys outside the queries are 0.

    query_modality: int32 [B, Sq]. Returns int32 [B, Sk].
    """
    query_length = query_modality.shape[-1]
    token = torch.arange(key_length, device=query_modality.device) - query_offset
    inside = (token >= 0) & (token < query_length)
    known = query_modality[:, token.clamp(0, query_length - 1)]  # [B, Sk]
    return torch.where(inside, known, torch.zeros_like(known))


def raster_order(batch: int, length: int, device: torch.device) -> Tensor:
    """Every token in its own slot. Returns int32 [B, S], slot -> position."""
    return torch.arange(length, dtype=torch.int32, device=device).expand(batch, length)


def modality_order(modality: Tensor) -> Tensor:
    """Tokens grouped by modality id, in their old order within a group (arXiv 2504.16083, section 3.2).

    modality: int32 [B, S]. Returns int32 [B, S], slot -> position.
    """
    return torch.argsort(modality.to(torch.uint8), dim=-1, stable=True).to(torch.int32)


def slots(order: Tensor) -> Tensor:
    """The inverse of an order. order: int32 [B, S], slot -> position. Returns int32 [B, S], the other way."""
    slot = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device).expand_as(order)
    return torch.empty_like(slot, memory_format=torch.contiguous_format).scatter_(-1, order.long(), slot)
