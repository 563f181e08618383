"""The warps of the Hopper kernel of `tile_log_mass` that sum: scores, mask, exponentials, logarithms of sums."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mmcompile.kernels.hopper_ring import wait_full
from mmcompile.kernels.hopper_samples import (
    HALF,
    LAST,
    MASKED,
    ROW_SLOTS,
    ROWS_SHIFT,
    SLOT_SHIFT,
    TILE,
    TILE_SHIFT,
)
from mmcompile.kernels.sample_mask import element_allowed


@gluon.jit
def _product(queries, half, keys, biases, stage, scores, BLOCK_D: gl.constexpr, COLD: gl.constexpr):
    """Starts the scores of half of a group's queries and a tile, where scores that are done with lie."""
    tile = keys.index(stage).reshape([TILE, BLOCK_D]).permute((1, 0))
    query = queries.index(half).reshape([HALF, BLOCK_D])
    if COLD:
        of_key = biases.index(stage).reshape([TILE]).load(gl.SliceLayout(0, scores.type.layout))
        # The product adds to the bias: no addition is left for later.
        of_key, scores = gl.broadcast(of_key[None, :], scores)
        result = hopper.warpgroup_mma(query, tile, of_key, is_async=True)
    else:
        result = hopper.warpgroup_mma(query, tile, scores, use_acc=False, is_async=True)
    return result


@gluon.jit
def _mask(
    scores,
    row_tags,
    slot_tags,
    rows,
    stage,
    first_row: gl.constexpr,
    window,
    WINDOW: gl.constexpr,
    SEGMENTS: gl.constexpr,
    SPANS: gl.constexpr,
):
    """Scores with -inf where the element mask of `kernels/tags.py` allows nothing."""
    TAGS: gl.constexpr = 4 if SEGMENTS or SPANS else 1
    OF_ROW: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    OF_KEY: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    rows = rows * TAGS
    slots = stage * TAGS
    position = row_tags.index(rows).slice(first_row, HALF).load(OF_ROW)[:, None]
    key_position = slot_tags.index(slots).reshape([TILE]).load(OF_KEY)[None, :]
    segment, span, key_segment, key_span = position, position, key_position, key_position
    if SEGMENTS:
        segment = row_tags.index(rows + 1).slice(first_row, HALF).load(OF_ROW)[:, None]
        key_segment = slot_tags.index(slots + 1).reshape([TILE]).load(OF_KEY)[None, :]
    if SPANS:
        span = row_tags.index(rows + 2).slice(first_row, HALF).load(OF_ROW)[:, None]
        key_span = slot_tags.index(slots + 2).reshape([TILE]).load(OF_KEY)[None, :]
    allowed = element_allowed(
        position, segment, span, key_position, key_segment, key_span, window, WINDOW, SEGMENTS, SPANS
    )
    return gl.where(allowed, scores, float("-inf"))


@gluon.jit
def _store(scores, output, targets, tile, key_tiles, scale_log2):
    """The logarithm of the sum of each row, where its tile's belongs."""
    maximum = gl.max(scores, 1) * scale_log2
    # Rows that see no key of the tile have a maximum of -inf; subtracting it would give NaN.
    shift = gl.where(maximum == float("-inf"), 0.0, maximum)
    total = gl.sum(gl.exp2(scores * scale_log2 - shift[:, None]), 1)
    # A total of 0 has no logarithm; every other one is at least 1, its greatest term.
    log2_mass = gl.where(maximum == float("-inf"), maximum, maximum + gl.log2(gl.maximum(total, 1.0)))
    target = targets.load(gl.SliceLayout(1, scores.type.layout))
    gl.store(output + target.to(gl.int64) * key_tiles + tile, log2_mass * 0.6931471805599453, mask=target >= 0)


@gluon.jit
def _sum(
    group: gl.constexpr,
    output,
    key_tiles,
    scale_log2,
    window,
    buffers,
    tag_buffers,
    query_empty,
    key_full,
    key_empty,
    BLOCK_D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    COLD: gl.constexpr,
    WINDOW: gl.constexpr,
    SEGMENTS: gl.constexpr,
    SPANS: gl.constexpr,
):
    """Two halves of 64 query rows and a tile of keys at a time. While the scores of one half are made, those of the
    other are summed."""
    queries, keys, biases, steps = buffers
    row_tags, row_targets, slot_tags = tag_buffers
    SHARED: gl.constexpr = BLOCK_M == 4 * HALF
    STEP: gl.constexpr = 1 if SHARED else 2
    HALVES: gl.constexpr = BLOCK_M // HALF
    FIRST: gl.constexpr = 2 * group if SHARED else 0
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    index = 0 if SHARED else group
    lower = gl.zeros([HALF, TILE], gl.float32, LAYOUT)
    upper = gl.zeros([HALF, TILE], gl.float32, LAYOUT)
    wait_full(key_full, index, STAGES)
    word = gl.max(steps.index(index % STAGES).load(ONE), 0)
    query = (word >> SLOT_SHIFT & 1) * HALVES + FIRST
    lower = _product(queries, query, keys, biases, index % STAGES, lower, BLOCK_D, COLD)
    lower = hopper.warpgroup_mma_wait(0, deps=[lower])
    while word >= 0:
        stage = index % STAGES
        rows = word >> ROWS_SHIFT & (ROW_SLOTS - 1)
        products = _product(queries, query + 1, keys, biases, stage, upper, BLOCK_D, COLD)
        if word & MASKED != 0:
            lower = _mask(lower, row_tags, slot_tags, rows, stage, FIRST * HALF, window, WINDOW, SEGMENTS, SPANS)
        targets = row_targets.index(rows)
        # Its store keeps the exponentials before the wait: they belong beside the product.
        _store(lower, output, targets.slice(FIRST * HALF, HALF), word >> TILE_SHIFT, key_tiles, scale_log2)
        upper = hopper.warpgroup_mma_wait(0, deps=[products])
        # Before the next tile is waited for, which may want the room of these queries.
        mbarrier.arrive(query_empty.index(word >> SLOT_SHIFT & 1), pred=(word & LAST) != 0)
        wait_full(key_full, index + STEP, STAGES)
        next_word = gl.max(steps.index((index + STEP) % STAGES).load(ONE), 0)
        query = (next_word >> SLOT_SHIFT & 1) * HALVES + FIRST
        products = _product(queries, query, keys, biases, (index + STEP) % STAGES, lower, BLOCK_D, COLD)
        if word & MASKED != 0:
            upper = _mask(upper, row_tags, slot_tags, rows, stage, (FIRST + 1) * HALF, window, WINDOW, SEGMENTS, SPANS)
        mbarrier.arrive(key_empty.index(stage))
        _store(upper, output, targets.slice((FIRST + 1) * HALF, HALF), word >> TILE_SHIFT, key_tiles, scale_log2)
        word = next_word
        index += STEP
        lower = hopper.warpgroup_mma_wait(0, deps=[products])


@gluon.jit
def sum_first(
    output, key_tiles, scale_log2, window, buffers, tag_buffers, query_empty, key_full, key_empty,
    BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, COLD: gl.constexpr,
    WINDOW: gl.constexpr, SEGMENTS: gl.constexpr, SPANS: gl.constexpr,
):  # fmt: skip
    _sum(
        0, output, key_tiles, scale_log2, window, buffers, tag_buffers, query_empty, key_full, key_empty,
        BLOCK_D, BLOCK_M, STAGES, COLD, WINDOW, SEGMENTS, SPANS,
    )  # fmt: skip


@gluon.jit
def sum_second(
    output, key_tiles, scale_log2, window, buffers, tag_buffers, query_empty, key_full, key_empty,
    BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, COLD: gl.constexpr,
    WINDOW: gl.constexpr, SEGMENTS: gl.constexpr, SPANS: gl.constexpr,
):  # fmt: skip
    _sum(
        1, output, key_tiles, scale_log2, window, buffers, tag_buffers, query_empty, key_full, key_empty,
        BLOCK_D, BLOCK_M, STAGES, COLD, WINDOW, SEGMENTS, SPANS,
    )  # fmt: skip
