"""The warps of the Hopper kernel of `tile_log_mass` that sum: scores, mask, exponentials, logarithms of sums."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mmcompile.kernels.hopper_ring import wait_full
from mmcompile.kernels.hopper_samples import (
    GROUP,
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
def _scores(query, tile, bias, LAYOUT: gl.constexpr, COLD: gl.constexpr):
    scores = gl.zeros([GROUP, TILE], gl.float32, LAYOUT)
    if COLD:
        # The product adds to the bias: no addition is left for later.
        scores, _ = gl.broadcast(bias.load(gl.SliceLayout(0, LAYOUT))[None, :], scores)
    scores = hopper.warpgroup_mma(query, tile.permute((1, 0)), scores, use_acc=COLD, is_async=True)
    return hopper.warpgroup_mma_wait(0, deps=[scores])


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
    position = row_tags.index(rows).slice(first_row, GROUP).load(OF_ROW)[:, None]
    key_position = slot_tags.index(slots).reshape([TILE]).load(OF_KEY)[None, :]
    segment, span, key_segment, key_span = position, position, key_position, key_position
    if SEGMENTS:
        segment = row_tags.index(rows + 1).slice(first_row, GROUP).load(OF_ROW)[:, None]
        key_segment = slot_tags.index(slots + 1).reshape([TILE]).load(OF_KEY)[None, :]
    if SPANS:
        span = row_tags.index(rows + 2).slice(first_row, GROUP).load(OF_ROW)[:, None]
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
    STAGES: gl.constexpr,
    COLD: gl.constexpr,
    WINDOW: gl.constexpr,
    SEGMENTS: gl.constexpr,
    SPANS: gl.constexpr,
):
    """Half of the queries, and every other tile. Products of one group are made while others take exponentials."""
    queries, keys, biases, steps = buffers
    row_tags, row_targets, slot_tags = tag_buffers
    half: gl.constexpr = group % 2
    FIRST: gl.constexpr = half * GROUP
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    index = group // 2
    wait_full(key_full, index, STAGES)
    word = gl.max(steps.index(index % STAGES).load(ONE), 0)
    while word >= 0:
        stage = index % STAGES
        query_slot = word >> SLOT_SHIFT & 1
        rows = word >> ROWS_SHIFT & (ROW_SLOTS - 1)
        query = queries.index(query_slot * 2 + half).reshape([GROUP, BLOCK_D])
        tile = keys.index(stage).reshape([TILE, BLOCK_D])
        bias = biases.index(stage if COLD else 0).reshape([TILE])
        scores = _scores(query, tile, bias, LAYOUT, COLD)
        mbarrier.arrive(query_empty.index(query_slot), pred=(word & LAST) != 0)
        if word & MASKED != 0:
            scores = _mask(scores, row_tags, slot_tags, rows, stage, FIRST, window, WINDOW, SEGMENTS, SPANS)
        mbarrier.arrive(key_empty.index(stage))
        targets = row_targets.index(rows).slice(FIRST, GROUP)
        _store(scores, output, targets, word >> TILE_SHIFT, key_tiles, scale_log2)
        index += 2
        # Queries and keys were let go of before: the next tile may want their room.
        wait_full(key_full, index, STAGES)
        word = gl.max(steps.index(index % STAGES).load(ONE), 0)


@gluon.jit
def sum_first(
    output, key_tiles, scale_log2, window, buffers, tag_buffers, query_empty, key_full, key_empty,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, COLD: gl.constexpr,
    WINDOW: gl.constexpr, SEGMENTS: gl.constexpr, SPANS: gl.constexpr,
):  # fmt: skip
    _sum(
        0, output, key_tiles, scale_log2, window, buffers, tag_buffers, query_empty, key_full, key_empty,
        BLOCK_D, STAGES, COLD, WINDOW, SEGMENTS, SPANS,
    )  # fmt: skip


@gluon.jit
def sum_second(
    output, key_tiles, scale_log2, window, buffers, tag_buffers, query_empty, key_full, key_empty,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, COLD: gl.constexpr,
    WINDOW: gl.constexpr, SEGMENTS: gl.constexpr, SPANS: gl.constexpr,
):  # fmt: skip
    _sum(
        1, output, key_tiles, scale_log2, window, buffers, tag_buffers, query_empty, key_full, key_empty,
        BLOCK_D, STAGES, COLD, WINDOW, SEGMENTS, SPANS,
    )  # fmt: skip


@gluon.jit
def sum_third(
    output, key_tiles, scale_log2, window, buffers, tag_buffers, query_empty, key_full, key_empty,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, COLD: gl.constexpr,
    WINDOW: gl.constexpr, SEGMENTS: gl.constexpr, SPANS: gl.constexpr,
):  # fmt: skip
    _sum(
        2, output, key_tiles, scale_log2, window, buffers, tag_buffers, query_empty, key_full, key_empty,
        BLOCK_D, STAGES, COLD, WINDOW, SEGMENTS, SPANS,
    )  # fmt: skip


@gluon.jit
def sum_fourth(
    output, key_tiles, scale_log2, window, buffers, tag_buffers, query_empty, key_full, key_empty,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, COLD: gl.constexpr,
    WINDOW: gl.constexpr, SEGMENTS: gl.constexpr, SPANS: gl.constexpr,
):  # fmt: skip
    _sum(
        3, output, key_tiles, scale_log2, window, buffers, tag_buffers, query_empty, key_full, key_empty,
        BLOCK_D, STAGES, COLD, WINDOW, SEGMENTS, SPANS,
    )  # fmt: skip
