"""Orders of queries and keys, and their tags in them: what of a plan depends on boundaries and mask alone.

One arrangement serves every layer with the same mask, except where an order's stride is searched in the data.
"""

from typing import NamedTuple

import torch
from torch import SymInt, Tensor

from mmcompile.kernels.orders import NO_SITE, TokenSites, of_keys, token_order, without_sink
from mmcompile.kernels.patterns import Order, decode_orders
from mmcompile.kernels.search_stride import search_stride
from mmcompile.kernels.tags import in_slots, key_tags, query_tags


class Arrangement(NamedTuple):
    """Oq orders of the queries and Ok orders of the keys; all int32."""

    query_order: Tensor  # [B, Oq, Sq], slot -> query
    key_order: Tensor  # [B, Ok, Sk], slot -> key
    query_tags: Tensor  # [B, Oq, 3, Sq] in slot order: position (query + query_offset), segment, span
    key_tags: Tensor  # [B, Ok, 3, Sk] in slot order: position (2^31 - 1 where not valid), segment, span
    query_site: Tensor  # [B, Oq, Sq] in slot order: place within the frame or row, -1 for text and raster orders
    key_site: Tensor  # [B, Ok, Sk]


def arrangement_shapes(
    batch: int | SymInt, query_length: int | SymInt, key_length: int | SymInt, orders: str
) -> tuple[tuple[int | SymInt, ...], ...]:
    """The shapes of an `Arrangement`, in its order. Lengths may be symbolic."""
    queries, keys = decode_orders(orders)
    of_query, of_key = (batch, len(queries)), (batch, len(keys))
    return (
        (*of_query, query_length),
        (*of_key, key_length),
        (*of_query, 3, query_length),
        (*of_key, 3, key_length),
        (*of_query, query_length),
        (*of_key, key_length),
    )


def arrange(
    query: Tensor | None,
    key: Tensor | None,
    offsets: Tensor,
    modality: Tensor,
    grid: Tensor,
    key_valid: Tensor | None,
    query_segment: Tensor | None,
    key_segment: Tensor | None,
    query_span: Tensor | None,
    key_span: Tensor | None,
    batch: int,
    query_length: int,
    key_length: int,
    query_offset: int,
    orders: str,
    scale: float | None = None,
) -> Arrangement:
    """The orders that `orders` (from `encode_orders`) names.

    query: [B, H, Sq, D], key: [B, C, Sk, D] in token order, where a stride is searched; None leaves tokens without a
        known stride in raster order.
    offsets: int32 [M + 1], modality: int32 [M], grid: int32 [M, 3]: segments of the query tokens, laid end to
        end over the batch (`batch * query_length`). Key k is query token `k - query_offset`; other keys, such
        as a cached prefix, are modality 0. Segments may be empty, and may end past the tokens.
    key_valid: bool [B, Sk]. query_segment, query_span: integer [B, Sq]; key_segment, key_span: [B, Sk]. None
        where the mask has no such part. With tags.py's element mask they say what is allowed. A span is
        contiguous.
    query_offset: position of the first query among the keys.
    scale: of the scores in which a stride is searched; 1/sqrt(D) when None.

    Raises ValueError naming the argument, its value, and what would be right.
    """
    for name, size in (("batch", batch), ("query_length", query_length), ("key_length", key_length)):
        if size < 1:
            raise ValueError(f"{name}={size} has nothing to attend; at least 1")
    _require_pair("segment", query_segment, key_segment)
    _require_pair("span", query_span, key_span)
    query_orders, key_orders = decode_orders(orders)
    device = offsets.device
    tokens = TokenSites.of(offsets, modality, grid, batch, query_length)
    strides = _searched_strides(query, key, tokens, query_offset, scale, {*query_orders, *key_orders})
    of_query, of_key = [], []
    for order in query_orders:
        site = _sites(tokens, order, strides)
        of_query.append((token_order(order, tokens.modality, site), site))
    key_modality = of_keys(tokens.modality, key_length, query_offset, 0)
    for order in key_orders:
        site = of_keys(_sites(tokens, order, strides), key_length, query_offset, NO_SITE)
        site = without_sink(site, key_valid)
        of_key.append((token_order(order, key_modality, site), site))
    tags_of_query = query_tags(batch, query_length, query_offset, query_segment, query_span, device)
    tags_of_key = key_tags(batch, key_length, key_valid, key_segment, key_span, device)
    return Arrangement(
        torch.stack([order for order, _ in of_query], 1),
        torch.stack([order for order, _ in of_key], 1),
        torch.stack([in_slots(tags_of_query, order) for order, _ in of_query], 1),
        torch.stack([in_slots(tags_of_key, order) for order, _ in of_key], 1),
        torch.stack([site.gather(-1, order.long()) for order, site in of_query], 1),
        torch.stack([site.gather(-1, order.long()) for order, site in of_key], 1),
    )


def _sites(tokens: TokenSites, order: Order, strides: dict[int, Tensor]) -> Tensor:
    if order.base == "raster":
        return torch.full_like(tokens.modality, NO_SITE)
    return tokens.sites(order, strides.get(order.max_stride) if order.searches else None)


def _searched_strides(
    query: Tensor | None,
    key: Tensor | None,
    tokens: TokenSites,
    query_offset: int,
    scale: float | None,
    orders: set[Order],
) -> dict[int, Tensor]:
    """The stride found for each limit that the orders name, int32 [B] each."""
    limits = {order.max_stride for order in orders if order.searches}
    if query is None or key is None:
        return {}
    return {limit: search_stride(query, key, tokens.modality, query_offset, limit, scale) for limit in sorted(limits)}


def _require_pair(name: str, of_query: Tensor | None, of_key: Tensor | None) -> None:
    if (of_query is None) != (of_key is None):
        missing = f"query_{name}" if of_query is None else f"key_{name}"
        raise ValueError(f"{missing}=None while its pair is given; pass query_{name} and key_{name}, or neither")
