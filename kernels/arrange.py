"""Orders of queries and keys, and their tags in them: what of a plan depends on boundaries and mask alone.

One arrangement serves every layer with the same mask, except where an order's stride is searched in the data.
"""

from typing import NamedTuple

import torch
from torch import SymInt, Tensor

from mmcompile.kernels.orders import NO_SITE, RASTER, Keys, Sorted, TokenSites, sort_tokens
from mmcompile.kernels.patterns import Order, decode_orders
from mmcompile.kernels.search_stride import search_stride
from mmcompile.kernels.tags import TokenMask, token_tags


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
    shapes = arrangement_shapes(batch, query_length, key_length, orders)
    result = Arrangement(*(torch.empty(shape, dtype=torch.int32, device=offsets.device) for shape in shapes))
    of_query = TokenMask(query_offset, None, query_segment, query_span)
    of_key = TokenMask(0, key_valid, key_segment, key_span)
    named = {*query_orders, *key_orders}
    if all(order.is_raster for order in named):  # nobody asks what tokens are
        in_query_order = in_key_order = dict.fromkeys(named, RASTER)
    else:
        tokens = TokenSites.of(offsets, modality, grid, batch, query_length)
        strides = _searched_strides(query, key, tokens, query_offset, scale, named)
        keys = Keys(key_length, query_offset, key_valid)
        in_query_order, in_key_order = (
            {order: sort_tokens(tokens, order, strides.get(order.max_stride), of) for order in orders_of}
            for orders_of, of in ((query_orders, None), (key_orders, keys))
        )
    for index, order in enumerate(query_orders):
        parts = result.query_order, result.query_tags, result.query_site
        fill(in_query_order[order], of_query, *(part[:, index] for part in parts))
    for index, order in enumerate(key_orders):
        parts = result.key_order, result.key_tags, result.key_site
        fill(in_key_order[order], of_key, *(part[:, index] for part in parts))
    return result


def fill(tokens: Sorted, mask: TokenMask, order: Tensor, tags: Tensor, site: Tensor) -> None:
    """Write one order of an arrangement, [B, S], [B, 3, S] and [B, S], views."""
    if order.device.type == "cuda":
        # Triton is imported for a GPU only.
        from mmcompile.kernels import orders_kernel

        orders_kernel.fill(tokens, mask, order, tags, site)
    else:
        fill_cpu(tokens, mask, order, tags, site)


def fill_cpu(tokens: Sorted, mask: TokenMask, order: Tensor, tags: Tensor, site: Tensor) -> None:
    """`fill` in torch operations."""
    if tokens.order is None:
        order.copy_(torch.arange(order.shape[1], device=order.device))
    else:
        order.copy_(tokens.order)
    token = order.long()
    in_tokens = token_tags(mask, order.shape[0], order.shape[1], order.device)
    tags.copy_(in_tokens.gather(-1, token.unsqueeze(1).expand_as(tags)))
    if tokens.site is None:
        site.fill_(NO_SITE)
    else:
        site.copy_(tokens.site.gather(-1, token))


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
