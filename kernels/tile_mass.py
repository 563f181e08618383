"""Exact softmax mass of sampled query rows, on every tile of keys and on single keys.

What a planner looks at to choose tiles and columns. Nothing here holds sampled rows x keys on a GPU: the work is in
`kernels/tile_mass_kernel.py`, `column_mass_kernel.py` and `tile_shares_kernel.py` there, and in blocks of torch
operations on the CPU. Nothing waits for the host on a GPU, and no shape depends on data.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.patterns import MAX_TOKENS, TILE
from mmcompile.kernels.tags import INVALID, element_mask
from mmcompile.kernels.tile_bounds import by_tile, tile_count

# One block of scores on the CPU: 16 MiB in float32, and a few temporaries as large.
BLOCK_ROWS = 2048
BLOCK_TILES = 16

MINUS_INFINITY = float("-inf")


class KeyPositions(NamedTuple):
    """The positions of keys by tile, in slot order; 2^31 - 1 where a key is not valid, or missing at the end."""

    every: Tensor  # int32 [B, Ok, nK, TILE]
    bounds: Tensor  # int32 [B, Ok, 3, nK]: the least and greatest of the valid keys (or 2^31 - 1 and -1), and of all

    @classmethod
    def of(cls, key_tags: Tensor) -> "KeyPositions":
        """key_tags: int32 [B, Ok, 3, Sk] in slot order."""
        if key_tags.device.type == "cuda":
            # Triton is imported for a GPU only.
            from mmcompile.kernels import tile_bounds_kernel

            return cls(*tile_bounds_kernel.key_positions(key_tags))
        return cls.of_cpu(key_tags)

    @classmethod
    def of_cpu(cls, key_tags: Tensor) -> "KeyPositions":
        """`of` in torch operations."""
        every = by_tile(key_tags[:, :, 0], INVALID).contiguous()
        last = every.masked_fill(every == INVALID, -1).amax(-1)
        return cls(every, torch.stack([every.amin(-1), last, every.amax(-1)], 2))


class SampledRows(NamedTuple):
    """Which query rows are sampled, and the keys that they are multiplied with. Nothing is gathered.

    Queries and keys are bfloat16, float16 or float32, with any strides. Each of P rows samples R queries.
    """

    query: Tensor  # [B, H, Sq, D] in token order
    key: Tensor  # [B, C, Sk, D], copies in slot order, as `block_sparse_attention` reads them
    query_order: Tensor  # int32 [B, Oq, Sq], slot -> token
    query_tags: Tensor  # int32 [B, Oq, 3, Sq] in slot order
    key_tags: Tensor  # int32 [B, Ok, 3, Sk] in slot order
    key_positions: KeyPositions  # of the same tags
    slots: Tensor  # int64 [B, P, R], query slots in order `query_row[b, p]`; they may repeat
    query_row: Tensor  # int32 [B, P], the query order of each row
    key_row: Tensor  # int32 [B, P], the key order: the row reads key copy `key_head[p] + key_row[b, p]`
    heads: tuple[int, ...]  # the query head of each row
    key_head: tuple[int, ...]  # the first key copy of each row
    scale: float  # of query * key
    window: int | None  # keys
    segments: bool
    spans: bool

    @property
    def length(self) -> int:
        """The window as kernels take it; 0 for none."""
        return 0 if self.window is None else min(self.window, MAX_TOKENS)

    def allowed(self, query_tags: Tensor, key_tags: Tensor) -> Tensor:
        """The element mask of some queries and keys: [..., 3, Q] and [..., 3, K] to bool [..., Q, K]."""
        window = None if self.window is None else min(self.window, MAX_TOKENS)
        return element_mask(query_tags, key_tags, window, self.segments, self.spans)

    def queries(self) -> tuple[Tensor, Tensor]:
        """The sampled queries, [B, P, R, D], and their tags, int32 [B, P, 3, R]."""
        batch = torch.arange(self.query.shape[0], device=self.query.device).view(-1, 1, 1)
        order, slot = self.query_row.long().unsqueeze(2), self.slots  # [B, P, 1], [B, P, R]
        head = head_indices(self.heads, self.query.device).long().view(1, -1, 1)
        token = self.query_order[batch, order, slot].long()
        tag = torch.arange(3, device=self.query.device).view(1, 1, 3, 1)
        tags = self.query_tags[batch.unsqueeze(2), order.unsqueeze(2), tag, slot.unsqueeze(2)]
        return self.query[batch, head, token], tags

    def walk(self) -> Tensor:
        """The samples of each row by position, int64 [B, P, R]: neighbours see much the same keys."""
        batch = torch.arange(self.query.shape[0], device=self.query.device).view(-1, 1, 1)
        position = self.query_tags[batch, self.query_row.long().unsqueeze(2), 0, self.slots]
        return position.argsort(-1)


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


def slots_log_mass(sampled: SampledRows, key_slots: Tensor, listed: Tensor) -> Tensor:
    """Natural logarithm of the sum of exp(score) of each sampled query row over the first keys of a list.

    key_slots: int32 [B, P, C], different slots. listed: int32 [B, P], how many of them count.
    Returns float32 [B, P, R], -inf where the row may see none of them.
    """
    if sampled.query.device.type == "cuda":
        from mmcompile.kernels import tile_mass_kernel

        return tile_mass_kernel.slots_log_mass(sampled, key_slots, listed)
    return slots_log_mass_cpu(sampled, key_slots, listed)


def column_mass(sampled: SampledRows, log_total: Tensor, own_tile: Tensor, skip_tiles: int, groups: int = 1) -> Tensor:
    """Mean softmax weight of each key over the sampled query rows that may see it, those close to it left out.

    log_total: float32 [B, P, R], the logarithm of each row's softmax denominator: logsumexp of its
        `tile_log_mass` without `cold`. A row where it is -inf counts for nothing.
    own_tile: int32 [B, P, R], the tile of the row's own key.
    skip_tiles: a row counts for nothing, neither in the sum nor in the number of rows, at the keys of tiles
        `own_tile - skip_tiles + 1` to `own_tile`. 0 leaves nothing out.
    groups: runs of the samples, as long as each other, that have means of their own.

    Returns float32 [B, P, groups, Sk] in the slots of the row's keys, 0 where no row counts.
    """
    if sampled.query.device.type == "cuda":
        from mmcompile.kernels import column_mass_kernel

        return column_mass_kernel.column_mass(sampled, log_total, own_tile, skip_tiles, groups)
    return column_mass_cpu(sampled, log_total, own_tile, skip_tiles, groups)


def tile_shares(log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over tiles. log_mass: float32 [N, R, nK].

    Returns the shares, float32 [N, R, nK], zeros for a row without a tile, and the logarithm of the total, [N, R].
    """
    if log_mass.device.type == "cuda":
        from mmcompile.kernels import tile_shares_kernel

        return tile_shares_kernel.tile_shares(log_mass)
    return tile_shares_cpu(log_mass)


def spread_out_share(log_mass: Tensor, of_columns: Tensor, times: float) -> Tensor:
    """Share of each sample's attention that lies in tiles with less than `times` an even share of what tiles hold.

    log_mass: float32 [N, R, nK]. of_columns: float32 [N, R], the logarithm of what columns hold. Returns [N, R].
    """
    if log_mass.device.type == "cuda":
        from mmcompile.kernels import tile_shares_kernel

        return tile_shares_kernel.spread_out_share(log_mass, of_columns, times)
    return spread_out_share_cpu(log_mass, of_columns, times)


def tile_shares_cpu(log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """`tile_shares` in torch operations."""
    total = torch.logsumexp(log_mass, -1)
    return (log_mass - total.unsqueeze(-1)).exp_().nan_to_num_(0.0), total


def mean_shares(log_mass: Tensor, of_columns: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Softmax over tiles and columns together, and its mean over the samples of a query tile, in torch operations.

    log_mass: float32 [N, samples * R, nK]. of_columns: float32 [N, samples * R], the logarithm of what columns hold.
    Returns the shares of the tiles, float32 [N, R, nK], and of the columns, [N, R]; zeros for a sample without either.
    """
    shares, total = tile_shares_cpu(log_mass)
    held = torch.sigmoid(of_columns - total).nan_to_num_(0.0)  # both are -inf for a query that sees no key
    shares *= (1.0 - held).unsqueeze(-1)
    return shares.unflatten(1, (samples, -1)).mean(1), held.unflatten(1, (samples, -1)).mean(1)


def tile_log_mass_cpu(sampled: SampledRows, cold: Tensor | None) -> Tensor:
    """`tile_log_mass` in float32 torch operations."""
    batch, rows, samples = sampled.slots.shape
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


def slots_log_mass_cpu(sampled: SampledRows, key_slots: Tensor, listed: Tensor) -> Tensor:
    """`slots_log_mass` in float32 torch operations."""
    result = torch.full(sampled.slots.shape, MINUS_INFINITY, dtype=torch.float32, device=sampled.query.device)
    for b in range(result.shape[0]):
        for p in range(result.shape[1]):
            some = key_slots[b, p, : int(listed[b, p])].long()
            for block in _blocks(sampled, b, p, some):
                scores = block.scores.masked_fill_(~block.allowed, MINUS_INFINITY).logsumexp(1)
                result[b, p, block.samples] = torch.logaddexp(result[b, p, block.samples], scores)
    return result


def column_mass_cpu(sampled: SampledRows, log_total: Tensor, own_tile: Tensor, skip_tiles: int, groups: int) -> Tensor:
    """`column_mass` in float32 torch operations."""
    batch, rows, samples = sampled.slots.shape
    if groups > 1:
        each = [
            column_mass_cpu(
                sampled._replace(slots=sampled.slots[:, :, part]),
                log_total[:, :, part],
                own_tile[:, :, part],
                skip_tiles,
                1,
            )
            for part in _runs(samples, groups)
        ]
        return torch.cat(each, 2)
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
    return total.div_(count.clamp_(min=1)).unsqueeze(2)


def _runs(length: int, count: int) -> list[slice]:
    return [slice(i * (length // count), (i + 1) * (length // count)) for i in range(count)]


def spread_out_share_cpu(log_mass: Tensor, of_columns: Tensor, times: float) -> Tensor:
    """`spread_out_share` in torch operations."""
    shares, total = tile_shares_cpu(log_mass)
    even = times / (shares > 0).sum(-1, keepdim=True).clamp(min=1)
    return (shares * (shares < even)).sum(-1) * torch.sigmoid(total - of_columns).nan_to_num_(0.0)


class _Block(NamedTuple):
    """Scores of some samples and some whole tiles of keys."""

    samples: slice
    keys: slice
    scores: Tensor  # float32 [samples, keys]
    allowed: Tensor  # bool [samples, keys]


def _blocks(sampled: SampledRows, b: int, p: int, some: Tensor | None = None) -> Iterator[_Block]:
    """The blocks of one row that may hold an allowed element. some: int64 [C], key slots that take the place of all."""
    order = int(sampled.key_row[b, p])
    key, key_tags = sampled.key[b, sampled.key_head[p] + order], sampled.key_tags[b, order]
    if some is not None:
        key, key_tags = key[some], key_tags[:, some]
    one = sampled._replace(
        query=sampled.query[b : b + 1],
        query_order=sampled.query_order[b : b + 1],
        query_tags=sampled.query_tags[b : b + 1],
        slots=sampled.slots[b : b + 1, p : p + 1],
        query_row=sampled.query_row[b : b + 1, p : p + 1],
        heads=sampled.heads[p : p + 1],
    )
    query, query_tags = (of_row[0, 0] for of_row in one.queries())
    query = query.float() * sampled.scale
    for first_key in range(0, key.shape[0], BLOCK_TILES * TILE):
        keys = slice(first_key, min(first_key + BLOCK_TILES * TILE, key.shape[0]))
        some_keys = key[keys].float()
        for first in range(0, query.shape[0], BLOCK_ROWS):
            samples = slice(first, min(first + BLOCK_ROWS, query.shape[0]))
            allowed = sampled.allowed(query_tags[:, samples], key_tags[:, keys])
            if allowed.any():
                yield _Block(samples, keys, query[samples] @ some_keys.T, allowed)
