"""Slot orders: which token stands in which slot of the permuted queries or keys.

Boundaries reach this file padded: `offsets` may repeat its last value (empty segments), or end past the
tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmcompile.kernels.patterns import MODALITIES, TILE, Order

NO_SITE = -1
MAX_SITES = 2**24  # with three bits of modality a sort key fits int32


def modalities(
    offsets: Tensor, modality: Tensor, batch: int, query_length: int, key_length: int, query_offset: int
) -> tuple[Tensor, Tensor]:
    """The modality of each query token and of each key, int32 [B, Sq] and [B, Sk]."""
    if offsets.device.type == "cuda":
        # Triton is imported for a GPU only.
        from mmcompile.kernels import orders_kernel

        return orders_kernel.modalities(offsets, modality, batch, query_length, key_length, query_offset)
    return modalities_cpu(offsets, modality, batch, query_length, key_length, query_offset)


def modalities_cpu(
    offsets: Tensor, modality: Tensor, batch: int, query_length: int, key_length: int, query_offset: int
) -> tuple[Tensor, Tensor]:
    """`modalities` in torch operations."""
    of_query = token_modality(offsets, modality, batch, query_length)
    return of_query, of_keys(of_query, key_length, query_offset, 0)


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


class TokenSites(NamedTuple):
    """What tells a token's site, for each query token: int32 [B, S] each."""

    modality: Tensor
    place: Tensor  # tokens since the segment's first
    frame: Tensor  # tokens of the segment's frames, 0 where unknown
    row: Tensor  # tokens of its rows, 0 where unknown

    @classmethod
    def of(cls, offsets: Tensor, modality: Tensor, grid: Tensor, batch: int, length: int) -> "TokenSites":
        """offsets: int32 [M + 1], modality: int32 [M], grid: int32 [M, 3] (frames, rows, columns)."""
        if offsets.device.type == "cuda":
            # Triton is imported for a GPU only.
            from mmcompile.kernels import orders_kernel

            return cls(*orders_kernel.token_sites(offsets, modality, grid, batch, length))
        return cls.of_cpu(offsets, modality, grid, batch, length)

    @classmethod
    def of_cpu(cls, offsets: Tensor, modality: Tensor, grid: Tensor, batch: int, length: int) -> "TokenSites":
        """`of` in torch operations."""
        of_token = token_modality(offsets, modality, batch, length)
        token = torch.arange(batch * length, dtype=torch.int32, device=offsets.device)
        if modality.shape[0] == 0:
            none = torch.zeros_like(of_token)
            return cls(
                of_token, torch.arange(length, dtype=torch.int32, device=offsets.device).expand_as(none), none, none
            )
        ends = offsets[1:].to(torch.int32).contiguous()
        segment = torch.searchsorted(ends, token, right=True).clamp_(max=modality.shape[0] - 1)
        # A segment that no boundary tells (past the last offset) starts with its sequence.
        start = torch.maximum(offsets[:-1].to(torch.int32)[segment], token - token % length)
        rows, columns = grid[:, 1].to(torch.int32).clamp(min=0), grid[:, 2].to(torch.int32).clamp(min=0)
        parts = (token - start, (rows * columns)[segment], columns[segment])
        return cls(of_token, *(part.view(batch, length) for part in parts))

    def sites(self, order: Order, searched: Tensor | None) -> Tensor:
        """The site of each token, int32 [B, S]; `NO_SITE` for text and where nothing tells a stride.

        searched: int32 [B], the stride found in the data, or None. Where a row of the batch holds text alone, nothing
        told its modalities, and all of it counts as vision.
        """
        vision = (self.modality > 0) | ~(self.modality > 0).any(-1, keepdim=True)
        if order.stride:
            stride = torch.full_like(self.frame, order.stride)
        elif order.base == "column":
            stride = self.row
        elif searched is None:
            stride = self.frame
        else:
            stride = torch.where(self.frame > 0, self.frame, searched.to(torch.int32).unsqueeze(-1))
        site = (self.place % stride.clamp(min=1)).clamp(max=MAX_SITES - 2)
        return torch.where(vision & (stride > 0), site, NO_SITE)


class Sorted(NamedTuple):
    """How tokens stand in one order."""

    order: Tensor | None  # integer [B, S], slot -> position, or None where slots are positions
    site: Tensor | None  # int32 [B, S] in token order, or None where no token has one


RASTER = Sorted(None, None)


class Keys(NamedTuple):
    """What tells keys from queries: key k is query token k - offset."""

    length: int
    offset: int
    valid: Tensor | None  # bool [B, Sk]


def sort_tokens(tokens: TokenSites, order: Order, searched: Tensor | None, keys: Keys | None) -> Sorted:
    """The queries in an order; or, given `keys`, these. searched: int32 [B], the stride found in the data, or None."""
    if order.is_raster:
        return RASTER
    searched = searched if order.searches else None
    if tokens.modality.device.type == "cuda":
        # Triton is imported for a GPU only.
        from mmcompile.kernels import orders_kernel

        by, site = orders_kernel.sort_by(tokens, order, searched, keys)
    else:
        by, site = sort_by_cpu(tokens, order, searched, keys)
    # Equals keep their order: they are sorted by position as well (section 3).
    return Sorted(torch.argsort(by, dim=-1, stable=True), site)


def sort_by_cpu(
    tokens: TokenSites, order: Order, searched: Tensor | None, keys: Keys | None
) -> tuple[Tensor, Tensor | None]:
    """What tokens are sorted by, uint8 or int32 [B, S], and their sites, int32, or None in a raster order."""
    modality, site = tokens.modality, None if order.base == "raster" else tokens.sites(order, searched)
    if keys is not None:
        modality = of_keys(modality, keys.length, keys.offset, 0)
        if site is not None:
            site = without_sink(of_keys(site, keys.length, keys.offset, NO_SITE), keys.valid)
    return sort_key(order, modality, site), site


def sort_key(order: Order, modality: Tensor, site: Tensor | None) -> Tensor:
    """(modality if the order is grouped, site) as one number: uint8 [B, S] in a raster order, else int32.

    modality, site: int32 [B, S], site None in a raster order.
    """
    if site is None:
        return modality.to(torch.uint8)
    return site + 1 + modality * MAX_SITES if order.grouped else site + 1


def of_keys(of_query: Tensor, key_length: int, query_offset: int, outside: int) -> Tensor:
    """What is known of query tokens, for the keys: key k is query token k - query_offset, other keys get `outside`.

    of_query: int32 [B, Sq]. Returns int32 [B, Sk].
    """
    query_length = of_query.shape[-1]
    token = torch.arange(key_length, device=of_query.device) - query_offset
    inside = (token >= 0) & (token < query_length)
    return torch.where(inside, of_query[:, token.clamp(0, query_length - 1)], outside)


def without_sink(site: Tensor, key_valid: Tensor | None) -> Tensor:
    """Sites of keys with `NO_SITE` for the first valid keys, so that these stand together at the front.

    site: int32 [B, Sk]. key_valid: bool [B, Sk] or None.
    """
    if key_valid is None:
        rank = torch.arange(site.shape[1], device=site.device).expand_as(site)
    else:
        rank = key_valid.expand_as(site).cumsum(-1, dtype=torch.int32) - 1
    return site.masked_fill(rank < TILE, NO_SITE)


def slots(order: Tensor) -> Tensor:
    """The inverse of an order. order: int32 [..., S], slot -> position. Returns int32 [..., S], the other way."""
    if order.device.type == "cuda":
        from mmcompile.kernels import orders_kernel

        return orders_kernel.slots(order)
    return slots_cpu(order)


def slots_cpu(order: Tensor) -> Tensor:
    """`slots` in torch operations."""
    slot = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device).expand_as(order)
    return torch.empty_like(slot, memory_format=torch.contiguous_format).scatter_(-1, order.long(), slot)


def in_tokens(in_slots: Tensor, order: Tensor) -> Tensor:
    """What stands in the slots of an order, back in token order. in_slots: [B, ..., S], order: int32 [B, S]."""
    slot = slots(order).long()
    return in_slots.gather(-1, slot.view(slot.shape[0], *[1] * (in_slots.dim() - 2), -1).expand_as(in_slots))
