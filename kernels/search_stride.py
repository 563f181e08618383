"""The distance between the lines of grid heads, found in the attention of a few queries."""

from functools import lru_cache

import torch
from torch import Tensor

from mmcompile.kernels.last_queries import last_queries

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
    scale = width**-0.5 if scale is None else scale
    by_distance, by_key = _profiles(query, key, last_queries(modality), rows, keys, query_offset, scale)
    least = min(LEAST_STRIDE, max_stride)
    response = _response(by_distance, by_key, least, max_stride).sum(1)  # [B, strides]
    return (response.argmax(-1) + least).to(torch.int32)


def _profiles(
    query: Tensor, key: Tensor, last: Tensor, rows: int, keys: int, offset: int, scale: float
) -> tuple[Tensor, Tensor]:
    """What the `rows` queries up to the last vision one attend to, among the `keys` keys up to it: by distance and key.

    last: int32 [B, MODALITIES], the last query of each modality, -1 where there is none; of a batch row without vision
    all counts as vision. Returns float [B, H, keys + 1], summed over the queries, 0 at distances below `NEAR`; and
    float [B, H, keys], averaged over them.
    """
    if query.device.type == "cuda":
        # Triton is imported for a GPU only.
        from mmcompile.kernels import search_stride_kernel

        return search_stride_kernel.profiles(query, key, last, rows, keys, offset, NEAR, scale)
    return _profiles_cpu(query, key, last, rows, keys, offset, scale)


def _profiles_cpu(
    query: Tensor, key: Tensor, last: Tensor, rows: int, keys: int, offset: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, query_length, width = query.shape
    copies = key.shape[1]
    vision = last[:, 1:].amax(-1, True)  # [B, 1]
    vision = torch.where(vision < 0, query_length - 1, vision)
    row = (vision - torch.arange(rows - 1, -1, -1, device=query.device)).clamp(min=0)  # [B, R]
    end = (vision + offset).clamp(0, key.shape[2] - 1)
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


def _response(by_distance: Tensor, by_key: Tensor, least: int, max_stride: int) -> Tensor:
    """How each head answers to the strides from `least` to `max_stride`: float [B, H, strides].

    Slash lines: the weight at the stride's multiples beyond an even spread. Vertical lines: how alike the weight of
    keys is to itself one stride on. by_distance: [B, H, K + 1], by_key: [B, H, K].
    """
    if by_key.device.type == "cuda":
        from mmcompile.kernels import search_stride_kernel

        return search_stride_kernel.response(by_distance, by_key, least, max_stride, 2 * LAST_QUERIES)
    return _response_cpu(by_distance, by_key, least, max_stride)


def _response_cpu(by_distance: Tensor, by_key: Tensor, least: int, max_stride: int) -> Tensor:
    return (_slash_response(by_distance, max_stride) + _vertical_response(by_key, max_stride))[:, :, least:]


def _slash_response(by_distance: Tensor, max_stride: int) -> Tensor:
    """By stride, [B, H, max_stride + 1]."""
    stride, multiple = _multiples(by_distance.shape[2] - 1, max_stride, by_distance.device)
    held = by_distance.new_zeros(*by_distance.shape[:2], max_stride + 1)
    held.index_add_(2, stride, by_distance.index_select(2, multiple))
    even = by_distance.sum(2, keepdim=True) / torch.arange(max_stride + 1, device=held.device).clamp(min=1)
    return (held - even).clamp(min=0.0)


def _vertical_response(by_key: Tensor, max_stride: int) -> Tensor:
    """By stride, [B, H, max_stride + 1]."""
    keys = by_key.shape[2]
    columns = (by_key - by_key.mean(2, keepdim=True)).clamp(min=0.0)
    # The latest keys hold what local heads look at.
    columns[:, :, -min(keys, 2 * LAST_QUERIES) :] = 0.0
    size = 2 * keys
    spectrum = torch.fft.rfft(columns, size)
    # Not times its `conj()`: that is a view with a mark, which goes unseen where a traced graph calls the op.
    alike = torch.fft.irfft(spectrum.abs().square(), size)[:, :, : min(max_stride + 1, keys)]
    # No keys are further apart than there are keys: what follows is the same again, backwards.
    alike = torch.nn.functional.pad(alike, (0, max_stride + 1 - alike.shape[2]))
    return columns.sum(2, keepdim=True) * alike / alike[:, :, :1].clamp(min=1e-12)


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
