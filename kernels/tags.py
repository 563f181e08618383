"""Token tags: the position, segment and span of each query and key, from which every mask is decided.

The element mask of the whole package, for query q at position q' = q + query_offset and key k:

    valid[k] and (k <= q' or (span[q] == span[k] and span[q] >= 0)) and segment[q] == segment[k]
    and (window is None or k > q' - window)
"""

from typing import NamedTuple

import torch
from torch import Tensor

INVALID = 2**31 - 1  # position of a key that nobody may use; later than every query
NO_SPAN = -1
INVALID_SPAN = -2  # equal to the span of no query


class TokenMask(NamedTuple):
    """What the mask says of some tokens, beside that it is causal."""

    offset: int  # position of the first token
    valid: Tensor | None  # bool [B, S], or broadcasting to it
    segment: Tensor | None  # any integer dtype, likewise
    span: Tensor | None  # likewise; a negative one is none


def token_tags(mask: TokenMask, batch: int, length: int, device: torch.device) -> Tensor:
    """Tags of tokens in token order.

    Returns int32 [B, 3, S]: position (2^31 - 1 where not valid), segment (0 when none), span (-1 when none, -2 where
    not valid).
    """
    tags = torch.empty(batch, 3, length, dtype=torch.int32, device=device)
    tags[:, 0] = torch.arange(length, dtype=torch.int32, device=device) + mask.offset
    tags[:, 1] = 0 if mask.segment is None else mask.segment
    tags[:, 2] = NO_SPAN if mask.span is None else mask.span.clamp(min=NO_SPAN)
    if mask.valid is not None:
        tags[:, 0].masked_fill_(~mask.valid, INVALID)
        tags[:, 2].masked_fill_(~mask.valid, INVALID_SPAN)
    return tags


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
