"""Triton kernels of `kernels/search_stride.py`: what a few queries attend to, by distance and by key, and how that
answers to every stride. No sum is atomic, so that every run gives the same stride."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.attention_config import padded_head_dim, table_config
from mmcompile.kernels.patterns import MODALITIES

BLOCK = 128  # keys, or distances, of one program
PARTS = 32  # blocks of keys whose sums are added up in one step
CENTRED = 4096  # keys of one step
LAGS = 64  # strides of one program
MULTIPLES = 128  # of each of them, in one step
RUNS = 32  # runs of `LAGS` keys that are multiplied in one step


@triton.jit
def _last_vision(last, batch, query_length, MODALITIES: tl.constexpr):
    """The last query that is not text, of a batch row; where all is text, the last one."""
    each = tl.arange(0, MODALITIES)
    vision = tl.max(tl.load(last + batch * MODALITIES + each, mask=each > 0, other=-1))
    return tl.where(vision < 0, query_length - 1, vision)


@triton.jit
def _first_position(vision, keys, key_length, offset):
    """The first of the keys that are looked at; it may lie before all there are."""
    return tl.minimum(tl.maximum(vision + offset, 0), key_length - 1) - (keys - 1)


@triton.jit(do_not_specialize=["rows", "keys", "query_length", "key_length", "offset", "scale_log2"])
def _scores_kernel(
    query,
    key,
    last,
    scores,
    log_sums,
    query_batch_stride,
    query_head_stride,
    query_row_stride,
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    heads,
    group,
    rows,
    keys,
    query_length,
    key_length,
    offset,
    scale_log2,
    D: tl.constexpr,
    MODALITIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Base-2 scores of some rows of one head on one block of keys, and the logarithm of each row's sum there."""
    blocks = tl.cdiv(keys, BLOCK)
    block = tl.program_id(0) % blocks
    parts: tl.constexpr = ROWS // BLOCK_R
    plane = tl.program_id(0) // blocks // parts  # batch row and head
    batch = (plane // heads).to(tl.int64)
    head = (plane % heads).to(tl.int64)
    index = tl.program_id(0) // blocks % parts * BLOCK_R + tl.arange(0, BLOCK_R)
    vision = _last_vision(last, batch, query_length, MODALITIES)
    token = tl.where(index < rows, tl.maximum(vision - (rows - 1) + index, 0), -1).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    q = tl.load(
        query
        + batch * query_batch_stride
        + head * query_head_stride
        + (token[:, None] * query_row_stride + column[None, :]),
        mask=(index < rows)[:, None] & (column < D)[None, :],
        other=0.0,
    )
    entry = block * BLOCK + tl.arange(0, BLOCK)
    position = (_first_position(vision, keys, key_length, offset) + entry).to(tl.int64)
    inside = (entry < keys) & (position >= 0) & (position < key_length)
    k = tl.load(
        key
        + batch * key_batch_stride
        + head // group * key_head_stride
        + (position[:, None] * key_row_stride + column[None, :]),
        mask=inside[:, None] & (column < D)[None, :],
        other=0.0,
    )
    usable = inside[None, :] & (position[None, :] <= token[:, None] + offset) & (index < rows)[:, None]
    found = tl.where(usable, tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2, float("-inf"))
    maximum = tl.max(found, 1)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.math.exp2(found - shift[:, None]), 1)
    log_sum = tl.where(maximum == float("-inf"), maximum, maximum + tl.math.log2(tl.maximum(total, 1.0)))
    tl.store(log_sums + (plane.to(tl.int64) * blocks + block) * ROWS + index, log_sum)
    target = scores + (plane.to(tl.int64) * ROWS + index)[:, None] * keys + entry[None, :]
    tl.store(target, found, mask=(entry < keys)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _log_totals_kernel(log_sums, log_totals, parts, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """The logarithm of each row's sum over all blocks of keys, of one head. log_sums: [planes, parts, ROWS]."""
    plane = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, parts, PARTS):
        source = log_sums + (plane * parts + start + part)[:, None] * ROWS + index[None, :]
        log_sum = tl.load(source, mask=(start + part < parts)[:, None], other=float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(log_sum, 0))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.math.exp2(maximum - shift) + tl.sum(tl.math.exp2(log_sum - shift[None, :]), 0)
        maximum = new_maximum
    # A row that sees no key has no weights.
    log_total = tl.where(maximum == float("-inf"), 0.0, maximum + tl.math.log2(tl.maximum(total, 1.0)))
    tl.store(log_totals + plane * ROWS + index, log_total)


@triton.jit(do_not_specialize=["rows", "keys", "query_length", "key_length", "offset", "near"])
def _profile_kernel(
    scores,
    log_totals,
    last,
    by_distance,
    by_key,
    heads,
    rows,
    keys,
    query_length,
    key_length,
    offset,
    near,
    MODALITIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights of one head, summed over the rows at some distances, and averaged over them at some keys."""
    blocks = tl.cdiv(keys, BLOCK)
    block = tl.program_id(0) % blocks
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.arange(0, ROWS)
    log_total = tl.load(log_totals + plane * ROWS + index)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    scores += plane * ROWS * keys
    inside = (index < rows)[:, None] & (entry < keys)[None, :]
    of_key = tl.load(scores + index[:, None] * keys + entry[None, :], mask=inside, other=float("-inf"))
    mean = tl.sum(tl.math.exp2(of_key - log_total[:, None]), 0) / rows
    tl.store(by_key + plane * keys + entry, mean, mask=entry < keys)

    distance = entry + 1
    vision = _last_vision(last, plane // heads, query_length, MODALITIES)
    position = tl.maximum(vision - (rows - 1) + index, 0) + offset
    at = (position - _first_position(vision, keys, key_length, offset))[:, None] - distance[None, :]
    inside = (index < rows)[:, None] & (at >= 0) & (at < keys) & (distance >= near)[None, :]
    at_distance = tl.load(scores + index[:, None] * keys + at, mask=inside, other=float("-inf"))
    held = tl.sum(tl.math.exp2(at_distance - log_total[:, None]), 0)
    by_distance += plane * (keys + 1)
    tl.store(by_distance + distance, held, mask=entry < keys)
    tl.store(by_distance + entry, tl.zeros([BLOCK], tl.float32), mask=entry == 0)


@triton.jit(do_not_specialize=["keys", "latest"])
def _centre_kernel(by_distance, by_key, columns, totals, keys, latest, BLOCK: tl.constexpr):
    """What keys of one head have beyond the mean, but the `latest`; and the sums of that and of all distances."""
    plane = tl.program_id(0).to(tl.int64)
    by_distance += plane * (keys + 1)
    by_key += plane * keys
    of_distance = tl.zeros([BLOCK], tl.float32)
    of_key = tl.zeros([BLOCK], tl.float32)
    for start in range(0, keys, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        of_distance += tl.load(by_distance + 1 + entry, mask=entry < keys, other=0.0)
        of_key += tl.load(by_key + entry, mask=entry < keys, other=0.0)
    mean = tl.sum(of_key) / keys
    beyond = tl.zeros([BLOCK], tl.float32)
    for start in range(0, keys, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        early = entry < keys - latest
        some = tl.where(early, tl.maximum(tl.load(by_key + entry, mask=early, other=0.0) - mean, 0.0), 0.0)
        tl.store(columns + plane * keys + entry, some, mask=entry < keys)
        beyond += some
    tl.store(totals + plane * 2, tl.sum(of_distance))
    tl.store(totals + plane * 2 + 1, tl.sum(beyond))


@triton.jit(do_not_specialize=["keys", "blocks"])
def _products_kernel(columns, products, keys, blocks, LAGS: tl.constexpr, RUNS: tl.constexpr):
    """products: [planes, blocks, LAGS, LAGS], for block c the sums over i of columns[i * LAGS + a] times
    columns[(i + c) * LAGS + b]: of keys c * LAGS + b - a apart."""
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    columns += plane * keys
    run = tl.arange(0, RUNS)[:, None] * LAGS + tl.arange(0, LAGS)[None, :]
    total = tl.zeros([LAGS, LAGS], tl.float32)
    for start in range(0, keys - block * LAGS, RUNS * LAGS):
        one = tl.load(columns + start + run, mask=start + run < keys, other=0.0)
        later = start + block * LAGS + run
        total = tl.dot(tl.trans(one), tl.load(columns + later, mask=later < keys, other=0.0), total, "ieee")
    products += (plane * blocks + block) * LAGS * LAGS
    lag = tl.arange(0, LAGS)
    tl.store(products + lag[:, None] * LAGS + lag[None, :], total)


@triton.jit(do_not_specialize=["keys", "least", "strides", "blocks"])
def _response_kernel(
    by_distance,
    totals,
    products,
    response,
    keys,
    least,
    strides,
    blocks,
    LAGS: tl.constexpr,
    MULTIPLES: tl.constexpr,
):
    """The response of one head to some strides. response: [planes, strides], from stride `least` on."""
    parts = tl.cdiv(least + strides, LAGS)
    plane = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    lag = tl.arange(0, LAGS)
    stride = part * LAGS + lag
    inside = (stride >= least) & (stride < least + strides)
    held = tl.zeros([LAGS, MULTIPLES], tl.float32)
    for first in range(1, keys // tl.maximum(part * LAGS, least) + 1, MULTIPLES):
        # A stride has at most `keys` multiples there, so that the products stay below 2^31.
        multiple = (first + tl.arange(0, MULTIPLES))[None, :] * stride[:, None]
        some = inside[:, None] & (multiple <= keys)
        held += tl.load(by_distance + plane * (keys + 1) + multiple, mask=some, other=0.0)
    even = tl.load(totals + plane * 2) / tl.maximum(stride, 1)
    slash = tl.maximum(tl.sum(held, 1) - even, 0.0)
    # On a diagonal of a block of products lie those of keys equally far apart; it goes on in the next block.
    products += plane * blocks * LAGS * LAGS
    at = lag[None, :] * LAGS + lag[:, None] + lag[None, :]
    block = part + (lag[:, None] + lag[None, :]) // LAGS
    at += block * (LAGS * LAGS) - tl.where(block > part, LAGS, 0)
    alike = tl.sum(tl.load(products + at, mask=block < blocks, other=0.0), 1)
    same = tl.sum(tl.load(products + lag * LAGS + lag))
    vertical = tl.load(totals + plane * 2 + 1) * alike / tl.maximum(same, 1e-12)
    tl.store(response + plane * strides + stride - least, slash + vertical, mask=inside)


def profiles(
    query: Tensor, key: Tensor, last: Tensor, rows: int, keys: int, offset: int, near: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`_profiles` of search_stride.py for CUDA tensors."""
    batch, heads, query_length, width = query.shape
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    config = table_config(query.device, query.dtype, width)
    padded = max(16, triton.next_power_of_2(rows))
    block_rows, block_keys = min(config.block_m, padded), min(config.block_n, BLOCK)
    blocks = triton.cdiv(keys, block_keys)
    scores = torch.empty(batch * heads, padded, keys, dtype=torch.float32, device=query.device)
    log_sums = scores.new_empty(batch * heads, blocks, padded)
    log_totals = scores.new_empty(batch * heads, padded)
    by_distance = scores.new_empty(batch, heads, keys + 1)
    by_key = scores.new_empty(batch, heads, keys)
    sizes = rows, keys, query_length, key.shape[2], offset
    with torch.cuda.device_of(query):
        _scores_kernel[(batch * heads * (padded // block_rows) * blocks,)](
            query,
            key,
            last,
            scores,
            log_sums,
            *query.stride()[:3],
            *key.stride()[:3],
            heads,
            heads // key.shape[1],
            *sizes,
            scale / math.log(2.0),
            D=width,
            MODALITIES=MODALITIES,
            ROWS=padded,
            BLOCK_R=block_rows,
            BLOCK=block_keys,
            BLOCK_D=padded_head_dim(width),
            num_warps=8,
        )
        _log_totals_kernel[(batch * heads,)](log_sums, log_totals, blocks, ROWS=padded, PARTS=PARTS)
        _profile_kernel[(batch * heads * triton.cdiv(keys, BLOCK),)](
            scores,
            log_totals,
            last,
            by_distance,
            by_key,
            heads,
            *sizes,
            near,
            MODALITIES=MODALITIES,
            ROWS=padded,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return by_distance, by_key


def response(by_distance: Tensor, by_key: Tensor, least: int, max_stride: int, latest: int) -> Tensor:
    """`_response` of search_stride.py for CUDA tensors. latest: keys at the end that say nothing of lines."""
    batch, heads, keys = by_key.shape
    planes, strides = batch * heads, max_stride + 1 - least
    blocks = min(max_stride // LAGS + 2, triton.cdiv(keys, LAGS))  # those after the last are zeros
    columns = torch.empty_like(by_key)
    totals = by_key.new_empty(planes, 2)
    products = by_key.new_empty(planes, blocks, LAGS, LAGS)
    result = by_key.new_empty(batch, heads, strides)
    with torch.cuda.device_of(by_key):
        _centre_kernel[(planes,)](by_distance, by_key, columns, totals, keys, latest, BLOCK=CENTRED, num_warps=8)
        _products_kernel[(planes * blocks,)](columns, products, keys, blocks, LAGS=LAGS, RUNS=RUNS)
        _response_kernel[(planes * triton.cdiv(max_stride + 1, LAGS),)](
            by_distance,
            totals,
            products,
            result,
            keys,
            least,
            strides,
            blocks,
            LAGS=LAGS,
            MULTIPLES=MULTIPLES,
            num_warps=8,
        )
    return result
