"""The warps of the Hopper attention kernel that attend: scores, mask, softmax, products, a half of the rows each."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mmcompile.kernels.hopper_ring import (
    BLOCK_M,
    FIELDS,
    FULL,
    ITEM,
    QUERY_ROW,
    ROWS,
    STEPS,
    get_field,
    place_of,
    wait_full,
)


@gluon.jit
def _scores(
    query, keys, index, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr
):
    tile = keys.index(index % STAGES).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    return hopper.warpgroup_mma(query.reshape([ROWS, BLOCK_D]), tile, zero, use_acc=False, is_async=True)


@gluon.jit
def _products(weights, values, full, index, output, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
    wait_full(full, index, STAGES)
    tile = values.index(index % STAGES).reshape([BLOCK_N, BLOCK_D])
    return hopper.warpgroup_mma(weights, tile, output, is_async=True)


@gluon.jit
def _mask(
    scores,
    half: gl.constexpr,
    turn,
    masked,
    window,
    buffers,
    barriers,
    SLOTS: gl.constexpr,
    QUERIES: gl.constexpr,
    WINDOW: gl.constexpr,
    SEGMENTS: gl.constexpr,
    SPANS: gl.constexpr,
):
    """Scores with -inf where the element mask of `kernels/tags.py` allows nothing."""
    row_tags, slot_tags = buffers
    full, empty = barriers
    TAGS: gl.constexpr = 4 if SEGMENTS or SPANS else 1
    OF_ROW: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    OF_KEY: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    rows = turn % QUERIES * TAGS
    slots = masked % SLOTS * TAGS
    wait_full(full, masked, SLOTS)
    position = row_tags.index(rows).slice(half * ROWS, ROWS).load(OF_ROW)[:, None]
    key_position = slot_tags.index(slots).load(OF_KEY)[None, :]
    allowed = key_position <= position
    if SPANS:
        span = row_tags.index(rows + 2).slice(half * ROWS, ROWS).load(OF_ROW)[:, None]
        allowed |= (slot_tags.index(slots + 2).load(OF_KEY)[None, :] == span) & (span >= 0)
    if WINDOW:
        allowed &= key_position > position - window
    if SEGMENTS:
        segment = row_tags.index(rows + 1).slice(half * ROWS, ROWS).load(OF_ROW)[:, None]
        allowed &= slot_tags.index(slots + 1).load(OF_KEY)[None, :] == segment
    mbarrier.arrive(empty.index(masked % SLOTS))
    return gl.where(allowed, scores, float("-inf"))


@gluon.jit
def _softmax(scores, maximum, total, scale_log2):
    """One step: weights, the decay of what was summed before, new maximum, new total. In base 2."""
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale_log2)
    # Rows that have seen no key yet keep a maximum of -inf; subtracting it would give NaN.
    shift = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = gl.exp2(scores * scale_log2 - shift[:, None])
    decay = gl.exp2(maximum - shift)
    return weights, decay, new_maximum, total * decay + gl.sum(weights, 1)


@gluon.jit
def _step(
    half: gl.constexpr,
    query,
    index,
    turn,
    masked,
    is_masked,
    another,
    state,
    scale_log2,
    window,
    buffers,
    tag_buffers,
    tile_barriers,
    tag_barriers,
    LAYOUT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    QUERIES: gl.constexpr,
    SLOTS: gl.constexpr,
    WINDOW: gl.constexpr,
    SEGMENTS: gl.constexpr,
    SPANS: gl.constexpr,
):
    """Scores and softmax of one tile, while the products with the values of the tile before are made.

    state: weights of the tile before, what its products are added to, and the softmax's maximum and total, which a new
    item begins anew. another: whether the item has a tile after this one. Returns the weights in float32, the sum of
    products without this tile's decay, that decay, the new maximum and total, and the masked tiles so far.
    """
    _, keys, values, _ = buffers
    key_full, key_empty, value_full, value_empty = tile_barriers
    weights, accumulator, maximum, total = state
    scores = _scores(query, keys, index, LAYOUT, BLOCK_N, BLOCK_D, STAGES)
    products = _products(weights, values, value_full, index - 1, accumulator, BLOCK_N, BLOCK_D, STAGES)
    scores = hopper.warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(key_empty.index(index % STAGES))
    if is_masked:
        scores = _mask(
            scores, half, turn, masked, window, tag_buffers, tag_barriers, SLOTS, QUERIES, WINDOW, SEGMENTS, SPANS
        )
        masked += 1
    p, decay, maximum, total = _softmax(scores, maximum, total, scale_log2)
    # This wait is a loop, behind which the assembler moves no exponential: they belong beside the products.
    mbarrier.wait(key_full.index((index + 1) % STAGES), (index + 1) // STAGES & 1, pred=another)
    accumulator, p, weights = hopper.warpgroup_mma_wait(0, deps=[products, p, weights])
    mbarrier.arrive(value_empty.index((index - 1) % STAGES))
    return p, accumulator, decay, maximum, total, masked


@gluon.jit
def _attend(
    half: gl.constexpr,
    output,
    order,
    sizes,
    query_length,
    query_orders,
    scale_log2,
    window,
    buffers,
    tag_buffers,
    query_barriers,
    tile_barriers,
    tag_barriers,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    QUERIES: gl.constexpr,
    SLOTS: gl.constexpr,
    WINDOW: gl.constexpr,
    SEGMENTS: gl.constexpr,
    SPANS: gl.constexpr,
    ORDERED: gl.constexpr,
):
    """Half of the rows of each item."""
    queries, keys, values, info = buffers
    query_full, query_empty = query_barriers
    key_full, key_empty, value_full, _value_empty = tile_barriers
    OF_SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OF_OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    OF_WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OF_OUTPUT, 2)
    SCORE_ROW: gl.constexpr = gl.SliceLayout(1, OF_SCORES)
    OUTPUT_ROW: gl.constexpr = gl.SliceLayout(1, OF_OUTPUT)
    WIDE: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [4], [0])
    dtype: gl.constexpr = output.dtype.element_ty
    entry = gl.arange(0, FIELDS, layout=WIDE)
    lowest = gl.full([ROWS], float("-inf"), gl.float32, SCORE_ROW)
    nothing = gl.zeros([ROWS], gl.float32, SCORE_ROW)
    accumulator = gl.zeros([ROWS, BLOCK_D], gl.float32, OF_OUTPUT)
    index = 0
    masked = 0
    turn = 0
    wait_full(query_full, turn, QUERIES)
    fields = info.index(turn % QUERIES).load(WIDE)
    item = get_field(fields, ITEM, entry)
    query_row = get_field(fields, QUERY_ROW, entry)
    full = get_field(fields, FULL, entry)
    steps = get_field(fields, STEPS, entry)
    # The first step of the first item: nothing goes on meanwhile.
    wait_full(key_full, index, STAGES)
    scores = _scores(queries.index(half), keys, index, OF_SCORES, BLOCK_N, BLOCK_D, STAGES)
    scores = hopper.warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(key_empty.index(index % STAGES))
    if full == 0:
        scores = _mask(
            scores, half, turn, masked, window, tag_buffers, tag_barriers, SLOTS, QUERIES, WINDOW, SEGMENTS, SPANS
        )
        masked += 1
    p, decay, maximum, total = _softmax(scores, lowest, nothing, scale_log2)
    weights = gl.convert_layout(p.to(dtype), OF_WEIGHTS)
    index += 1
    mbarrier.wait(key_full.index(index % STAGES), index // STAGES & 1, pred=steps > 1)
    while item >= 0:
        query = queries.index(turn % QUERIES * 2 + half)
        # One loop for tiles with and without a mask: with a loop each, ptxas of CUDA 12.8 computes the address of the
        # queries in the first alone, which may have no step.
        for step in range(1, steps):
            p, accumulator, decay, maximum, total, masked = _step(
                half, query, index, turn, masked, step >= full, step + 1 < steps,
                (weights, accumulator, maximum, total), scale_log2, window,
                buffers, tag_buffers, tile_barriers, tag_barriers,
                OF_SCORES, BLOCK_N, BLOCK_D, STAGES, QUERIES, SLOTS, WINDOW, SEGMENTS, SPANS,
            )  # fmt: skip
            accumulator = accumulator * gl.convert_layout(decay, OUTPUT_ROW)[:, None]
            weights = gl.convert_layout(p.to(dtype), OF_WEIGHTS)
            index += 1
        block, batch, head = place_of(item, sizes)
        row = block * BLOCK_M + half * ROWS + gl.arange(0, ROWS, layout=OUTPUT_ROW)
        token = row
        if ORDERED:
            its_order = order + (batch.to(gl.int64) * query_orders + query_row) * query_length
            token = gl.load(its_order + row, mask=row < query_length, other=0)
        share = 1.0 / gl.where(total == 0.0, 1.0, total)
        mbarrier.arrive(query_empty.index(turn % QUERIES))
        turn += 1
        wait_full(query_full, turn, QUERIES)
        fields = info.index(turn % QUERIES).load(WIDE)
        item = get_field(fields, ITEM, entry)
        query_row = get_field(fields, QUERY_ROW, entry)
        full = get_field(fields, FULL, entry)
        steps = get_field(fields, STEPS, entry)
        if item >= 0:
            # The first step of the next item, while the last products of this one are made.
            wait_full(key_full, index, STAGES)
            query = queries.index(turn % QUERIES * 2 + half)
            p, accumulator, decay, maximum, total, masked = _step(
                half, query, index, turn, masked, full == 0, steps > 1,
                (weights, accumulator, lowest, nothing), scale_log2, window,
                buffers, tag_buffers, tile_barriers, tag_barriers,
                OF_SCORES, BLOCK_N, BLOCK_D, STAGES, QUERIES, SLOTS, WINDOW, SEGMENTS, SPANS,
            )  # fmt: skip
            weights = gl.convert_layout(p.to(dtype), OF_WEIGHTS)
            index += 1
        else:
            products = _products(weights, values, value_full, index - 1, accumulator, BLOCK_N, BLOCK_D, STAGES)
            accumulator, weights = hopper.warpgroup_mma_wait(0, deps=[products, weights])
        result = accumulator * gl.convert_layout(share, OUTPUT_ROW)[:, None]
        column = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, OF_OUTPUT))
        _, heads, _ = sizes
        its_output = output + (batch.to(gl.int64) * query_length * heads + head) * D
        gl.store(
            its_output + token.to(gl.int64)[:, None] * (heads * D) + column[None, :],
            result.to(dtype),
            mask=(row < query_length)[:, None] & (column < D)[None, :],
        )
        accumulator = gl.zeros([ROWS, BLOCK_D], gl.float32, OF_OUTPUT)


@gluon.jit
def attend_first(
    output, order, sizes, query_length, query_orders, scale_log2, window,
    buffers, tag_buffers, query_barriers, tile_barriers, tag_barriers,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr,
    SLOTS: gl.constexpr, WINDOW: gl.constexpr, SEGMENTS: gl.constexpr, SPANS: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    _attend(
        0, output, order, sizes, query_length, query_orders, scale_log2, window,
        buffers, tag_buffers, query_barriers, tile_barriers, tag_barriers,
        D, BLOCK_D, BLOCK_N, STAGES, QUERIES, SLOTS, WINDOW, SEGMENTS, SPANS, ORDERED,
    )  # fmt: skip


@gluon.jit
def attend_second(
    output, order, sizes, query_length, query_orders, scale_log2, window,
    buffers, tag_buffers, query_barriers, tile_barriers, tag_barriers,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr,
    SLOTS: gl.constexpr, WINDOW: gl.constexpr, SEGMENTS: gl.constexpr, SPANS: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    _attend(
        1, output, order, sizes, query_length, query_orders, scale_log2, window,
        buffers, tag_buffers, query_barriers, tile_barriers, tag_barriers,
        D, BLOCK_D, BLOCK_N, STAGES, QUERIES, SLOTS, WINDOW, SEGMENTS, SPANS, ORDERED,
    )  # fmt: skip
