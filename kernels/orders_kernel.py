"""Triton kernels of `kernels/orders.py` and `kernels/arrange.py`, and their launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.orders import MAX_SITES, NO_SITE, Keys, Sorted, TokenSites
from mmcompile.kernels.patterns import MODALITIES, TILE, Order
from mmcompile.kernels.tags import INVALID, INVALID_SPAN, NO_SPAN, TokenMask

TOKENS = 1024  # tokens of one program
# Sums and products apart, as torch has them. Named, because Triton 3.10 changes the default and 3.9 warns of it.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _block(length, TOKENS: tl.constexpr):
    """The row of a program, int64, and its tokens."""
    blocks = tl.cdiv(length, TOKENS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    return row, tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)


@triton.jit
def _segment_of(offsets, token, inside, count, steps):
    """The segment of some tokens: the last one that starts at or before each, and the last of all past the end."""
    low = tl.zeros_like(token)
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        end = tl.load(offsets + 1 + middle, mask=inside & (low < high), other=0).to(tl.int32)
        after = (low < high) & (end <= token)
        high = tl.where(after, high, middle)
        low = tl.where(after, middle + 1, low)
    return tl.minimum(low, count - 1)


@triton.jit
def _modality_of(offsets, modality, token, segment, inside, count, MODALITIES: tl.constexpr):
    """int32; 0 for tokens past the last segment."""
    told = inside & (token < tl.load(offsets + count).to(tl.int32))
    of_segment = tl.load(modality + segment, mask=told, other=0).to(tl.int32)
    return tl.minimum(tl.maximum(of_segment, 0), MODALITIES - 1)


@triton.jit(do_not_specialize=["count", "steps", "batch", "query_length", "key_length", "query_offset"])
def _modalities_kernel(
    offsets, modality, of_query, of_key, count, steps, batch, query_length, key_length, query_offset,
    MODALITIES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Programs of queries first, then those of keys. of_query, of_key: int32 [batch, length]."""
    of_queries = batch * tl.cdiv(query_length, TOKENS)
    program = tl.program_id(0)
    is_key = program >= of_queries
    length = tl.where(is_key, key_length, query_length)
    blocks = tl.cdiv(length, TOKENS)
    program -= tl.where(is_key, of_queries, 0)
    row = program // blocks
    place = program % blocks * TOKENS + tl.arange(0, TOKENS)
    of_row = place - tl.where(is_key, query_offset, 0)
    inside = (place < length) & (of_row >= 0) & (of_row < query_length)
    token = row * query_length + of_row
    segment = _segment_of(offsets, token, inside, count, steps)
    found = _modality_of(offsets, modality, token, segment, inside, count, MODALITIES)
    target = row.to(tl.int64) * length + place
    tl.store(of_query + target, found, mask=place < tl.where(is_key, 0, length))
    tl.store(of_key + target, found, mask=place < tl.where(is_key, length, 0))


def modalities(
    offsets: Tensor, modality: Tensor, batch: int, query_length: int, key_length: int, query_offset: int
) -> tuple[Tensor, Tensor]:
    """`orders.modalities`."""
    of_query, of_key = (
        torch.empty(batch, length, dtype=torch.int32, device=offsets.device) for length in (query_length, key_length)
    )
    count = modality.shape[0]
    if count == 0:
        return of_query.zero_(), of_key.zero_()
    with torch.cuda.device_of(offsets):
        _modalities_kernel[(batch * (triton.cdiv(query_length, TOKENS) + triton.cdiv(key_length, TOKENS)),)](
            offsets.contiguous(), modality.contiguous(), of_query, of_key, count, count.bit_length(),
            batch, query_length, key_length, query_offset, MODALITIES, TOKENS, **OPTIONS,
        )  # fmt: skip
    return of_query, of_key


@triton.jit(do_not_specialize=["count", "steps", "length", "total"])
def _token_sites_kernel(
    offsets, modality, grid, output, count, steps, length, total,
    MODALITIES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """output: int32 [4, total], the fields of `TokenSites`. grid: int32 [count, 3]. count: segments, one at least."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < total
    segment = _segment_of(offsets, token, inside, count, steps)
    start = tl.load(offsets + segment, mask=inside, other=0).to(tl.int32)
    # A segment that no boundary tells (past the last offset) starts with its sequence.
    place = token - tl.maximum(start, token - token % length)
    rows = tl.maximum(tl.load(grid + segment * 3 + 1, mask=inside, other=0).to(tl.int32), 0)
    columns = tl.maximum(tl.load(grid + segment * 3 + 2, mask=inside, other=0).to(tl.int32), 0)
    found = _modality_of(offsets, modality, token, segment, inside, count, MODALITIES)
    output += token
    tl.store(output, found, mask=inside)
    tl.store(output + total, place, mask=inside)
    tl.store(output + 2 * total.to(tl.int64), rows * columns, mask=inside)
    tl.store(output + 3 * total.to(tl.int64), columns, mask=inside)


def token_sites(offsets: Tensor, modality: Tensor, grid: Tensor, batch: int, length: int) -> tuple[Tensor, ...]:
    """`TokenSites.of`."""
    count = modality.shape[0]
    if count == 0:
        return tuple(TokenSites.of_cpu(offsets, modality, grid, batch, length))
    output = torch.empty(4, batch, length, dtype=torch.int32, device=offsets.device)
    with torch.cuda.device_of(offsets):
        _token_sites_kernel[(triton.cdiv(batch * length, TOKENS),)](
            offsets.contiguous(), modality.contiguous(), grid.contiguous(), output, count, count.bit_length(),
            length, batch * length, MODALITIES, TOKENS, **OPTIONS,
        )  # fmt: skip
    return output.unbind(0)


@triton.jit(do_not_specialize=["length", "query_length", "offset", "stride"])
def _sort_by_kernel(
    modality, place, frame, row, searched, vision, rank, by, site, length, query_length, offset, stride,
    COLUMN: tl.constexpr, GROUPED: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr, NO_SITE: tl.constexpr,
    MAX_SITES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """What tokens are sorted by, and their sites: None in a raster order. vision: whether a batch row has any."""
    batch, token = _block(length, TOKENS)
    inside = token < length
    known = inside & (token >= offset) & (token - offset < query_length)
    source = batch * query_length + token - offset
    group = tl.load(modality + source, mask=known, other=0)
    key = group
    if site is not None:
        by_stride = tl.zeros_like(token) + stride
        if stride == 0:
            by_stride = tl.load((row if COLUMN else frame) + source, mask=known, other=0)
            if searched is not None:
                by_stride = tl.where(by_stride > 0, by_stride, tl.load(searched + batch).to(tl.int32))
        # Where a row of the batch holds text alone, nothing told its modalities, and all of it counts as vision.
        text = tl.where(tl.load(vision + batch).to(tl.int32) != 0, 0, -1)
        sees = known & (group > text) & (by_stride > 0)
        of_site = tl.load(place + source, mask=sees, other=0) % tl.maximum(by_stride, 1)
        of_site = tl.where(sees, tl.minimum(of_site, MAX_SITES - 2), NO_SITE)
        if KEYS:  # the first valid ones stand together at the front
            of_rank = token if rank is None else tl.load(rank + batch * length + token, mask=inside, other=0)
            of_site = tl.where(of_rank < TILE, NO_SITE, of_site)
        tl.store(site + batch * length + token, of_site, mask=inside)
        key = of_site + 1
        if GROUPED:
            key += group * MAX_SITES
    tl.store(by + batch * length + token, key.to(by.dtype.element_ty), mask=inside)


def sort_by(
    tokens: TokenSites, order: Order, searched: Tensor | None, keys: Keys | None
) -> tuple[Tensor, Tensor | None]:
    """`orders.sort_by_cpu`."""
    batch, query_length = tokens.modality.shape
    length, offset, valid = (query_length, 0, None) if keys is None else keys
    device, raster = tokens.modality.device, order.base == "raster"
    by = torch.empty(batch, length, dtype=torch.uint8 if raster else torch.int32, device=device)
    site = None if raster else torch.empty_like(by)
    vision = None if raster else (tokens.modality > 0).any(-1)
    rank = None if valid is None or raster else valid.expand(batch, -1).cumsum(-1, dtype=torch.int32) - 1
    with torch.cuda.device_of(by):
        _sort_by_kernel[(batch * triton.cdiv(length, TOKENS),)](
            *(part.contiguous() for part in tokens), searched, vision, rank, by, site,
            length, query_length, offset, order.stride,
            order.base == "column", order.grouped, keys is not None, TILE, NO_SITE, MAX_SITES, TOKENS, **OPTIONS,
        )  # fmt: skip
    return by, site


@triton.jit(do_not_specialize=["length"])
def _slots_kernel(order, output, length, TOKENS: tl.constexpr):
    """output[order[slot]] = slot, of each row [length]."""
    row, slot = _block(length, TOKENS)
    inside = slot < length
    position = tl.load(order + row * length + slot, mask=inside, other=0)
    tl.store(output + row * length + position, slot, mask=inside)


def slots(order: Tensor) -> Tensor:
    """`orders.slots`."""
    order = order.contiguous()
    length = order.shape[-1]
    output = torch.empty_like(order)
    with torch.cuda.device_of(order):
        _slots_kernel[(order.numel() // length * triton.cdiv(length, TOKENS),)](
            order, output, length, TOKENS, **OPTIONS
        )
    return output


@triton.jit(do_not_specialize=["length", "offset", "order_batch_stride", "tags_batch_stride", "site_batch_stride"])
def _fill_kernel(
    sorted_order, sorted_site, valid, segment, span, order, tags, site, length, offset,
    valid_batch_stride, valid_stride, segment_batch_stride, segment_stride, span_batch_stride, span_stride,
    order_batch_stride, tags_batch_stride, site_batch_stride,
    NO_SITE: tl.constexpr, NO_SPAN: tl.constexpr, INVALID: tl.constexpr, INVALID_SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """One order of an arrangement, whose first three tensors and `sorted_site` may be None."""
    row, slot = _block(length, TOKENS)
    inside = slot < length
    token = slot
    if sorted_order is not None:
        token = tl.load(sorted_order + row * length + slot, mask=inside, other=0).to(tl.int32)
    position = token + offset
    of_segment = tl.zeros_like(token)
    if segment is not None:
        source = segment + row * segment_batch_stride + token.to(tl.int64) * segment_stride
        of_segment = tl.load(source, mask=inside, other=0).to(tl.int32)
    of_span = tl.full(token.shape, NO_SPAN, tl.int32)
    if span is not None:
        source = span + row * span_batch_stride + token.to(tl.int64) * span_stride
        of_span = tl.maximum(tl.load(source, mask=inside, other=0).to(tl.int64), NO_SPAN).to(tl.int32)
    if valid is not None:
        usable = tl.load(valid + row * valid_batch_stride + token.to(tl.int64) * valid_stride, mask=inside, other=0)
        position = tl.where(usable != 0, position, INVALID)
        of_span = tl.where(usable != 0, of_span, INVALID_SPAN)
    of_site = tl.full(token.shape, NO_SITE, tl.int32)
    if sorted_site is not None:
        of_site = tl.load(sorted_site + row * length + token, mask=inside, other=0)
    tl.store(order + row * order_batch_stride + slot, token, mask=inside)
    tags += row * tags_batch_stride + slot
    tl.store(tags, position, mask=inside)
    tl.store(tags + length, of_segment, mask=inside)
    tl.store(tags + length + length, of_span, mask=inside)
    tl.store(site + row * site_batch_stride + slot, of_site, mask=inside)


def fill(tokens: Sorted, mask: TokenMask, order: Tensor, tags: Tensor, site: Tensor) -> None:
    """`arrange.fill`."""
    batch, length = order.shape
    parts = [None if part is None else part.expand(batch, length) for part in (mask.valid, mask.segment, mask.span)]
    strides = [stride for part in parts for stride in ((0, 0) if part is None else part.stride())]
    sorted_order = None if tokens.order is None else tokens.order.contiguous()
    sorted_site = None if tokens.site is None else tokens.site.contiguous()
    with torch.cuda.device_of(order):
        _fill_kernel[(batch * triton.cdiv(length, TOKENS),)](
            sorted_order, sorted_site, *parts, order, tags, site, length, mask.offset, *strides,
            order.stride(0), tags.stride(0), site.stride(0),
            NO_SITE, NO_SPAN, INVALID, INVALID_SPAN, TOKENS, **OPTIONS,
        )  # fmt: skip
