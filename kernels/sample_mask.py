"""What the kernels that multiply sampled query rows with keys share: loads of rows and tags, and the element mask."""

import triton
import triton.language as tl


@triton.jit
def load_samples(
    query,
    order,
    tags,
    slots,
    sample,
    samples,
    row_stride,
    length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Sampled query rows, [sample, BLOCK_D], and their tags. A sample past the end is zeros and sees nothing: no key
    lies at or before position -1."""
    inside = sample < samples
    slot = tl.load(slots + sample, mask=inside, other=0)
    rows = load_rows(query, order, slot, inside, row_stride, D, BLOCK_D)
    position, segment, span = load_tags(tags, slot, inside, length, -1, SEGMENTS, SPANS)
    return rows, position, segment, span


@triton.jit
def load_rows(query, order, slot, inside, row_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Query rows in some slots of an order, [slot, BLOCK_D]; zeros where not inside and past D."""
    token = tl.load(order + slot, mask=inside, other=0)
    column = tl.arange(0, BLOCK_D)
    pointers = query + (token.to(tl.int64)[:, None] * row_stride + column[None, :])
    return tl.load(pointers, mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def load_keys(
    key,
    batch,
    copy,
    start,
    row_stride,
    length,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Keys from `start`, [BLOCK, BLOCK_D]; zeros past the length and past D."""
    if DESCRIPTOR:
        keys = key.load([batch, copy, start, 0]).reshape(BLOCK, BLOCK_D)
    else:
        row = tl.arange(0, BLOCK)
        column = tl.arange(0, BLOCK_D)
        # The tensor of offsets stays the same from step to step; only a scalar moves.
        offsets = row.to(tl.int64)[:, None] * row_stride + column[None, :]
        pointers = (key + start.to(tl.int64) * row_stride) + offsets
        keys = tl.load(pointers, mask=(row < length - start)[:, None] & (column < D)[None, :], other=0.0)
    return keys


@triton.jit
def load_tags(tags, slot, inside, length, ABSENT: tl.constexpr, SEGMENTS: tl.constexpr, SPANS: tl.constexpr):
    """Position, segment and span of some slots. Slots that are not inside have the position ABSENT and no span.

    Tags that the mask does not read are not loaded, and hold anything.
    """
    position = tl.load(tags + slot, mask=inside, other=ABSENT)
    segment, span = load_mask_tags(tags, position, slot, inside, length, SEGMENTS, SPANS)
    return position, segment, span


@triton.jit
def load_mask_tags(tags, position, slot, inside, length, SEGMENTS: tl.constexpr, SPANS: tl.constexpr):
    """Segment and span of some slots."""
    segment = position
    span = position
    # Lengths are added to the pointer one by one: their sum may pass 32 bits.
    if SEGMENTS:
        segment = tl.load(tags + length + slot, mask=inside, other=0)
    if SPANS:
        span = tl.load(tags + length + length + slot, mask=inside, other=-2)
    return segment, span


@triton.jit
def element_allowed(
    q_position,
    q_segment,
    q_span,
    k_position,
    k_segment,
    k_span,
    window,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """The element mask of tags that broadcast against each other."""
    allowed = k_position <= q_position
    if SPANS:
        allowed |= (k_span == q_span) & (q_span >= 0)
    if WINDOW:
        allowed &= k_position > q_position - window
    if SEGMENTS:
        allowed &= k_segment == q_segment
    return allowed


@triton.jit
def classify_tiles(
    bounds,
    tile,
    inside,
    key_tiles,
    q_first,
    q_last,
    window,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Which key tiles may hold an allowed element for queries between two positions, and which hold allowed ones alone.

    bounds: int32 [3, key_tiles], of `KeyPositions`.
    """
    first = tl.load(bounds + tile, mask=inside, other=2147483647)
    last = tl.load(bounds + key_tiles + tile, mask=inside, other=-1)
    greatest = tl.load(bounds + key_tiles + key_tiles + tile, mask=inside, other=2147483647)
    # A key of the query's span may come after it.
    may = inside & (SPANS | (first <= q_last))
    whole = greatest <= q_first
    if WINDOW:
        may &= last > q_first - window
        whole &= first > q_last - window
    if SEGMENTS:
        whole &= tile < 0  # whose segments are not looked at
    return may, may & whole


@triton.jit
def as_bits(flags, index):
    """A mask of at most 32 tiles as the bits of one number, int64."""
    return tl.sum(tl.where(flags, tl.full(index.shape, 1, tl.int64) << index, 0))


@triton.jit
def lowest_bit(bits):
    """The index of the lowest bit that is set, and this bit alone. bits: int64, not 0, below 2^32."""
    bit = bits & -bits
    return (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127, bit
