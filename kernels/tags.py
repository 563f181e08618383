"""Token tags: the position, segment and span of each query and key, from which every mask is decided.

The element mask of the whole package, for query q at position q' = q + query_offset and key k:

    valid[k] and (k <= q' or (span[q] == span[k] and span[q] >= 0)) and segment[q] == segment[k]
    and (window is None or k > q' - window)
"""

import torch
from torch import Tensor

INVALID = 2**31 - 1  # position of a key that nobody may use; later than every query
NO_SPAN = -1
INVALID_SPAN = -2  # equal to the span of no query


def query_tags(
    batch: int, length: int, offset: int, segment: Tensor | None, span: Tensor | None, device: torch.device
) -> Tensor:
    """Tags of the queries in token order.

    segment, span: any integer dtype, [B, Sq] or broadcasting to it; a negative span is none.
    Returns int32 [B, 3, Sq]: position (q + offset), segment (0 when none), span (-1 when none).
    """
    tags = torch.empty(batch, 3, length, dtype=torch.int32, device=device)
    tags[:, 0] = torch.arange(length, dtype=torch.int32, device=device) + offset
    tags[:, 1] = 0 if segment is None else segment
    tags[:, 2] = NO_SPAN if span is None else span.clamp(min=NO_SPAN)
    return tags


def key_tags(
    batch: int,
    length: int,
    valid: Tensor | None,
    segment: Tensor | None,
    span: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Tags of the keys in token order.

    valid: bool, segment and span: any integer dtype, [B, Sk] or broadcasting to it.
    Returns int32 [B, 3, Sk]: position (2^31 - 1 where not valid), segment, span (-2 where not valid).
    """
    tags = torch.empty(batch, 3, length, dtype=torch.int32, device=device)
    tags[:, 0] = torch.arange(length, dtype=torch.int32, device=device)
    tags[:, 1] = 0 if segment is None else segment
    tags[:, 2] = NO_SPAN if span is None else span.clamp(min=NO_SPAN)
    if valid is not None:
        tags[:, 0].masked_fill_(~valid, INVALID)
        tags[:, 2].masked_fill_(~valid, INVALID_SPAN)
    return tags


def in_slots(tags: Tensor, order: Tensor) -> Tensor:
    """Tags [B, 3, S] in token order, moved to the slots of `order` (int32 [B, S], slot -> position)."""
    return tags.gather(-1, order.long().unsqueeze(1).expand_as(tags))


def element_mask(query_tags: Tensor, key_tags: Tensor, window: int | None, segments: bool, spans: bool) -> Tensor:
    """Which keys queries may use. query_tags: int32 [..., 3, Q], key_tags: int32 [..., 3, K]. bool [..., Q, K].

    window: keys or None. segments, spans: whether the mask has such parts.
    """
    q_position, q_segment, q_span = query_tags.unsqueeze(-1).unbind(-3)
    k_position, k_segment, k_span = key_tags.unsqueeze(-2).unbind(-3)
    allowed = k_position <= q_position
    if spans:
        allowed = allowed | ((k_span == q_span) & (q_span >= 0))
    if window is not None:
        allowed = allowed & (k_position > q_position - window)
    if segments:
        allowed = allowed & (k_segment == q_segment)
    return allowed
