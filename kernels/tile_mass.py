"""Exact softmax mass of sampled query rows, on every tile of keys and on single keys.

What a planner looks at to choose tiles and columns. Nothing here holds sampled rows x keys on a GPU: the work is in
`kernels/tile_mass_kernel.py` there, and in blocks of torch operations on the CPU. Nothing waits for the host on a
GPU, and no shape depends on data.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.patterns import MAX_TOKENS, TILE
from mmcompile.kernels.tags import element_mask
from mmcompile.kernels.tile_bounds import tile_count

# One block of scores on the CPU: 16 MiB in float32, and a few temporaries as large.
BLOCK_ROWS = 2048
BLOCK_TILES = 16

MINUS_INFINITY = float("-inf")


class SampledRows(NamedTuple):
    """The sampled query rows with their tags, gathered, and the keys that they are multiplied with."""

    query: Tensor  # [B, P, R, D], contiguous
    query_tags: Tensor  # int32 [B, P, 3, R], contiguous
    key: Tensor  # [B, C, Sk, D]
    key_tags: Tensor  # int32 [B, Ok, 3, Sk]
    key_row: Tensor  # int32 [B, P]
    key_head: tuple[int, ...]  # first key copy of each row
    scale: float
    window: int | None  # at most MAX_TOKENS
    segments: bool
    spans: bool

    @classmethod
    def gather(
        cls,
        query: Tensor,
        key: Tensor,
        query_order: Tensor,
        query_tags: Tensor,
        key_tags: Tensor,
        slots: Tensor,
        query_row: Tensor,
        key_row: Tensor,
        heads: tuple[int, ...],
        key_head: tuple[int, ...],
        scale: float,
        window: int | None,
        segments: bool,
        spans: bool,
    ) -> "SampledRows":
        """
        query: [B, H, Sq, D] in token order. key: [B, C, Sk, D], copies in slot order, as `block_sparse_attention`
            reads them. Both bfloat16, float16 or float32, any strides.
        query_order: int32 [B, Oq, Sq], slot -> token. query_tags: int32 [B, Oq, 3, Sq], key_tags: int32
            [B, Ok, 3, Sk], in slot order.
        slots: int32 [B, P, R], the query slots that each of the P rows samples, in query order `query_row[b, p]`.
            They may repeat.
        query_row, key_row: int32 [B, P], the orders of each row.
        heads, key_head: P numbers each: the query head of each row, and its first key copy; the row reads copy
            `key_head[p] + key_row[b, p]`.
        scale: of query * key. window (keys), segments, spans: the parts of the element mask, `kernels/tags.py`.
        """
        # The sample is small beside the keys: copied once, it is read in blocks with no more indirection.
        batch = torch.arange(query.shape[0], device=query.device).view(-1, 1, 1)
        order, slot = query_row.long().unsqueeze(2), slots.long()  # [B, P, 1], [B, P, R]
        head = head_indices(heads, query.device).long().view(1, -1, 1)
        token = query_order[batch, order, slot].long()  # [B, P, R]
        tag = torch.arange(3, device=query.device).view(1, 1, 3, 1)
        tags = query_tags[batch.unsqueeze(2), order.unsqueeze(2), tag, slot.unsqueeze(2)]  # [B, P, 3, R]
        window = None if window is None else min(window, MAX_TOKENS)
        return cls(
            query[batch, head, token].contiguous(),
            tags.contiguous(),
            key,
            key_tags,
            key_row,
            key_head,
            scale,
            window,
            segments,
            spans,
        )

    def allowed(self, query_tags: Tensor, key_tags: Tensor) -> Tensor:
        """The element mask of some queries and keys: [..., 3, Q] and [..., 3, K] to bool [..., Q, K]."""
        return element_mask(query_tags, key_tags, self.window, self.segments, self.spans)


def tile_log_mass(sampled: SampledRows, cold: Tensor | None = None) -> Tensor:
    """Natural logarithm of the sum of exp(score) of each sampled query row over each tile of keys.

    cold: bool [B, P, Sk] in the slots of the row's keys; keys that are False count for nothing.
    Returns float32 [B, P, R, nK], -inf where the row may see no key of the tile.
    """
    if sampled.query.device.type == "cuda":
        # Triton is imported for a GPU only.
        from mmcompile.kernels import tile_mass_kernel

        return tile_mass_kernel.tile_log_mass(sampled, cold)
    return tile_log_mass_cpu(sampled, cold)


def column_mass(sampled: SampledRows, log_total: Tensor, own_tile: Tensor, skip_tiles: int) -> Tensor:
    """Mean softmax weight of each key over the sampled query rows that may see it, those close to it left out.

    log_total: float32 [B, P, R], the logarithm of each row's softmax denominator: logsumexp of its
        `tile_log_mass` without `cold`. A row where it is -inf counts for nothing.
    own_tile: int32 [B, P, R], the tile of the row's own key.
    skip_tiles: a row counts for nothing, neither in the sum nor in the number of rows, at the keys of tiles
        `own_tile - skip_tiles + 1` to `own_tile`. 0 leaves nothing out.

    Returns float32 [B, P, Sk] in the slots of the row's keys, 0 where no row counts.
    """
    if sampled.query.device.type == "cuda":
        from mmcompile.kernels import tile_mass_kernel

        return tile_mass_kernel.column_mass(sampled, log_total, own_tile, skip_tiles)
    return column_mass_cpu(sampled, log_total, own_tile, skip_tiles)


def tile_log_mass_cpu(sampled: SampledRows, cold: Tensor | None) -> Tensor:
    """`tile_log_mass` in float32 torch operations."""
    batch, rows, samples = sampled.query.shape[:3]
    key_length = sampled.key.shape[2]
    shape = (batch, rows, samples, tile_count(key_length))
    result = torch.full(shape, MINUS_INFINITY, dtype=torch.float32, device=sampled.query.device)
    for b in range(batch):
        for p in range(rows):
            for block in _blocks(sampled, b, p):
                allowed = block.allowed if cold is None else block.allowed & cold[b, p, block.keys]
                scores = block.scores.masked_fill_(~allowed, MINUS_INFINITY)
                whole = pad(scores, (0, -scores.shape[1] % TILE), value=MINUS_INFINITY)
                tiles = slice(block.keys.start // TILE, tile_count(block.keys.stop))
                result[b, p, block.samples, tiles] = whole.unflatten(1, (-1, TILE)).logsumexp(2)
    return result


def column_mass_cpu(sampled: SampledRows, log_total: Tensor, own_tile: Tensor, skip_tiles: int) -> Tensor:
    """`column_mass` in float32 torch operations."""
    batch, rows = sampled.query.shape[:2]
    shape = (batch, rows, sampled.key.shape[2])
    total, count = torch.zeros(2, *shape, dtype=torch.float32, device=sampled.query.device)
    for b in range(batch):
        for p in range(rows):
            for block in _blocks(sampled, b, p):
                tile = torch.arange(block.keys.start, block.keys.stop, device=total.device) // TILE
                own, log = own_tile[b, p, block.samples, None], log_total[b, p, block.samples, None]
                close = (tile > own - skip_tiles) & (tile <= own)
                counted = block.allowed & ~close & (log > MINUS_INFINITY)
                weights = block.scores.sub_(log).exp_().masked_fill_(~counted, 0.0)
                total[b, p, block.keys] += weights.sum(0)
                count[b, p, block.keys] += counted.sum(0)
    return total.div_(count.clamp_(min=1))


class _Block(NamedTuple):
    """Scores of some samples and some whole tiles of keys."""

    samples: slice
    keys: slice
    scores: Tensor  # float32 [samples, keys]
    allowed: Tensor  # bool [samples, keys]


def _blocks(sampled: SampledRows, b: int, p: int) -> Iterator[_Block]:
    """The blocks of one row that may hold an allowed element."""
    order = int(sampled.key_row[b, p])
    key, key_tags = sampled.key[b, sampled.key_head[p] + order], sampled.key_tags[b, order]
    query, query_tags = sampled.query[b, p].float() * sampled.scale, sampled.query_tags[b, p]
    for first_key in range(0, key.shape[0], BLOCK_TILES * TILE):
        keys = slice(first_key, min(first_key + BLOCK_TILES * TILE, key.shape[0]))
        some_keys = key[keys].float()
        for first in range(0, query.shape[0], BLOCK_ROWS):
            samples = slice(first, min(first + BLOCK_ROWS, query.shape[0]))
            allowed = sampled.allowed(query_tags[:, samples], key_tags[:, keys])
            if allowed.any():
                yield _Block(samples, keys, query[samples] @ some_keys.T, allowed)
