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
    query_length, width = query.shape[2:]
    rows = min(LAST_QUERIES, query_length)
    keys = min(KEYS, key.shape[2])
    vision = (modality > 0) | ~(modality > 0).any(-1, keepdim=True)
    token = torch.arange(query_length, device=query.device)
    last = torch.where(vision, token, 0).amax(-1)  # [B]
    row = (last.unsqueeze(-1) - torch.arange(rows - 1, -1, -1, device=query.device)).clamp(min=0)  # [B, R]
    end = (row[:, -1:] + query_offset).clamp(0, key.shape[2] - 1)
    scale = width**-0.5 if scale is None else scale
    by_distance, by_key = _profiles(query, key, row, end, keys, query_offset, scale)
    response = _slash_response(by_distance, max_stride) + _vertical_response(by_key, max_stride)  # [B, max_stride + 1]
    least = min(LEAST_STRIDE, max_stride)
    return (response[:, least:].argmax(-1) + least).to(torch.int32)


def _profiles(
    query: Tensor, key: Tensor, row: Tensor, end: Tensor, keys: int, offset: int, scale: float
) -> tuple[Tensor, Tensor]:
    """What some queries attend to among the `keys` keys up to `end`: by distance, and by key.

    row: int64 [B, R], queries; end: int64 [B, 1]. Returns float [B, H, keys + 1], summed over the queries, 0 at
    distances below `NEAR`; and float [B, H, keys], averaged over them.
    """
    if query.device.type == "cuda":
        # Triton is imported for a GPU only.
        from mmcompile.kernels import search_stride_kernel

        return search_stride_kernel.profiles(query, key, row, end, keys, offset, NEAR, scale)
    return _profiles_cpu(query, key, row, end, keys, offset, scale)


def _profiles_cpu(
    query: Tensor, key: Tensor, row: Tensor, end: Tensor, keys: int, offset: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, _, width = query.shape
    rows, copies = row.shape[1], key.shape[1]
    column = end - torch.arange(keys - 1, -1, -1, device=query.device)  # [B, K], may start before the first key
    distance = (row + offset).unsqueeze(-1) - column.unsqueeze(1)  # [B, R, K]
    usable = (distance >= 0) & (column >= 0).unsqueeze(1)
    by_distance = torch.zeros(batch, heads, keys + 1, device=query.device)
    by_key = torch.zeros(batch, heads, keys, device=query.device)
    # One batch row at a time, so that the weights of a row of keys stay small.
    for b in range(batch):
        of_rows = query[b].index_select(1, row[b]).float().view(copies, heads // copies * rows, width)
        of_keys = key[b].index_select(1, column[b].clamp(min=0)).float()
        scores = torch.baddbmm(of_rows.new_zeros(()), of_rows, of_keys.transpose(1, 2), beta=0, alpha=scale)
        scores = scores.view(heads, rows, keys).masked_fill_(~usable[b], float("-inf"))
        weights = torch.softmax(scores, -1).nan_to_num_(0.0)
        far = (distance[b] >= NEAR) & (distance[b] <= keys)
        index = torch.where(far, distance[b], 0).flatten().expand(heads, -1)
        by_distance[b].scatter_add_(1, index, (weights * far).flatten(1))
        by_key[b] = weights.mean(1)
    return by_distance, by_key


def _slash_response(by_distance: Tensor, max_stride: int) -> Tensor:
    """For each stride, the weight at its multiples beyond an even spread, summed over heads.

    by_distance: [B, H, K + 1]. Returns [B, max_stride + 1].
    """
    held = _at_multiples(by_distance, max_stride)
    stride = torch.arange(max_stride + 1, device=by_distance.device)
    even = by_distance.sum(2, keepdim=True) / stride.clamp(min=1)
    return (held - even).clamp(min=0.0).sum(1)


def _at_multiples(by_distance: Tensor, max_stride: int) -> Tensor:
    """For each stride, the sum at its multiples: [B, H, max_stride + 1], 0 for stride 0."""
    if by_distance.device.type == "cuda":
        from mmcompile.kernels import search_stride_kernel

        return search_stride_kernel.at_multiples(by_distance, max_stride)
    return _at_multiples_cpu(by_distance, max_stride)


def _at_multiples_cpu(by_distance: Tensor, max_stride: int) -> Tensor:
    stride, multiple = _multiples(by_distance.shape[2] - 1, max_stride, by_distance.device)
    held = by_distance.new_zeros(*by_distance.shape[:2], max_stride + 1)
    return held.index_add_(2, stride, by_distance.index_select(2, multiple))


def _vertical_response(columns: Tensor, max_stride: int) -> Tensor:
    """For each stride, how alike the weight of keys is to itself one stride on. columns: [B, H, K]. Returns
    [B, max_stride + 1]."""
    keys = columns.shape[2]
    columns = (columns - columns.mean(2, keepdim=True)).clamp(min=0.0)
    # The latest keys hold what local heads look at.
    columns[:, :, -min(keys, 2 * LAST_QUERIES) :] = 0.0
    size = 2 * keys
    spectrum = torch.fft.rfft(columns, size)
    # Not times its `conj()`: that is a view with a mark, which goes unseen where a traced graph calls the op.
    alike = torch.fft.irfft(spectrum.abs().square(), size)[:, :, : max_stride + 1]
    if alike.shape[2] <= max_stride:
        alike = torch.nn.functional.pad(alike, (0, max_stride + 1 - alike.shape[2]))
    share = columns.sum(2, keepdim=True) * alike / alike[:, :, :1].clamp(min=1e-12)
    return share.sum(1)


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
