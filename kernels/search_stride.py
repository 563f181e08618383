"""The distance between the lines of grid heads, found in the attention of a few queries."""

from functools import lru_cache

import torch
from torch import Tensor

LAST_QUERIES = 64
KEYS = 2**14  # latest keys before the last query that are looked at
NEAR = 16  # distances that any local head attends to, and that say nothing of a grid
LEAST_STRIDE = 8


def search_stride(
    query: Tensor, key: Tensor, modality: Tensor, query_offset: int, max_stride: int, scale: float | None = None
) -> Tensor:
    """The stride at which the last vision queries attend most, over all heads, int32 [B].

    The paper views the estimate by (position // stride, position % stride) and keeps the stride with the highest
    response (arXiv 2504.16083, section 3.1). Here a stride's response is what attention holds at its multiples, beyond
    what an even spread would put there, so that half of a stride, whose lines hold as much, loses to it.

    query: [B, H, Sq, D], key: [B, C, Sk, D] in token order. modality: int32 [B, Sq] of the queries.
    max_stride: the largest stride to try; the same for all heads, because frames are a property of the input.
    scale: of the scores; 1/sqrt(D) when None.
    """
    batch, heads, query_length, width = query.shape
    rows = min(LAST_QUERIES, query_length)
    keys = min(KEYS, key.shape[2])
    vision = (modality > 0) | ~(modality > 0).any(-1, keepdim=True)
    token = torch.arange(query_length, device=query.device)
    last = torch.where(vision, token, 0).amax(-1)  # [B]
    row = (last.unsqueeze(-1) - torch.arange(rows - 1, -1, -1, device=query.device)).clamp(min=0)  # [B, R]
    end = (row[:, -1:] + query_offset).clamp(0, key.shape[2] - 1)
    column = end - torch.arange(keys - 1, -1, -1, device=query.device)  # [B, K], may start before the first key
    distance = (row + query_offset).unsqueeze(-1) - column.unsqueeze(1)  # [B, R, K]
    usable = (distance >= 0) & (column >= 0).unsqueeze(1)
    response = torch.zeros(batch, max_stride + 1, device=query.device)
    copies = key.shape[1]
    group = heads // copies
    # One batch row and one key head at a time, so that the weights of a row of keys stay small.
    for b in range(batch):
        of_rows = query[b].index_select(1, row[b]).float().view(copies, group * rows, width)
        of_keys = key[b].index_select(1, column[b].clamp(min=0)).float()
        scores = torch.baddbmm(
            of_rows.new_zeros(()),
            of_rows,
            of_keys.transpose(1, 2),
            beta=0,
            alpha=width**-0.5 if scale is None else scale,
        )
        scores = scores.view(heads, rows, keys).masked_fill_(~usable[b], float("-inf"))
        weights = torch.softmax(scores, -1).nan_to_num_(0.0)
        response[b] = _slash_response(weights, distance[b], max_stride) + _vertical_response(weights, max_stride)
    least = min(LEAST_STRIDE, max_stride)
    return (response[:, least:].argmax(-1) + least).to(torch.int32)


def _slash_response(weights: Tensor, distance: Tensor, max_stride: int) -> Tensor:
    """For each stride, the weight at its multiples beyond an even spread, summed over heads.

    weights: [H, R, K], distance: [R, K] of each key from its row. Returns [max_stride + 1].
    """
    heads, _, keys = weights.shape
    far = distance >= NEAR
    profile = weights.new_zeros(heads, keys + 1)  # by distance
    index = torch.where(far & (distance <= keys), distance, 0).flatten().expand(heads, -1)
    profile.scatter_add_(1, index, (weights * far).flatten(1))
    profile[:, 0] = 0.0
    stride, multiple = _multiples(keys, max_stride, weights.device)
    held = weights.new_zeros(heads, max_stride + 1).index_add_(1, stride, profile.index_select(1, multiple))
    even = profile.sum(1, keepdim=True) / torch.arange(max_stride + 1, device=weights.device).clamp(min=1)
    return (held - even).clamp(min=0.0).sum(0)


def _vertical_response(weights: Tensor, max_stride: int) -> Tensor:
    """For each stride, how alike the weight of keys is to itself one stride on. [max_stride + 1]."""
    keys = weights.shape[2]
    columns = weights.mean(1)
    columns = (columns - columns.mean(1, keepdim=True)).clamp(min=0.0)
    # The latest keys hold what local heads look at.
    columns[:, -min(keys, 2 * LAST_QUERIES) :] = 0.0
    size = 2 * keys
    spectrum = torch.fft.rfft(columns, size)
    # Not times its `conj()`: that is a view with a mark, which goes unseen where a traced graph calls the op.
    alike = torch.fft.irfft(spectrum.abs().square(), size)[:, : max_stride + 1]
    if alike.shape[1] <= max_stride:
        alike = torch.nn.functional.pad(alike, (0, max_stride + 1 - alike.shape[1]))
    share = columns.sum(1, keepdim=True) * alike / alike[:, :1].clamp(min=1e-12)
    return share.sum(0)


# Kept, because a copy from the host in every call would wait for the device.
@lru_cache(maxsize=64)
def _multiples(keys: int, max_stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every (stride, multiple of it) up to `keys`, each int64 [N]: N is about keys * log(max_stride)."""
    counts = [0] + [keys // stride for stride in range(1, max_stride + 1)]
    strides: list[int] = []
    multiples: list[int] = []
    for stride, count in enumerate(counts):
        strides += [stride] * count
        multiples += range(stride, stride * count + 1, stride) if count else []
    return torch.tensor(strides, device=device), torch.tensor(multiples, device=device)
