"""The warps of the Hopper attention kernel that feed the others: one schedules, one fetches."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from mmcompile.kernels.hopper_ring import (
    BLOCK_M,
    COPY,
    FIELDS,
    FIRST_COLUMN,
    FIRST_TILE,
    FULL,
    ITEM,
    PLAN,
    QUERY_ROW,
    ROWS,
    STEPS,
    TILE_STEPS,
    copy_rows,
    get_field,
    place_of,
    put_field,
    wait_empty,
    wait_full,
)

COPIED = gl.constexpr(16)  # query rows whose addresses a warp holds at once
NEVER = gl.constexpr(2**31 - 1)  # a position that no query sees
NOWHERE = gl.constexpr(2**30)  # a row past the end of every tensor, from where copies bring zeros


@gluon.jit
def _gather_queries(source, row_stride, order, first, length, buffers, slot, D: gl.constexpr, BLOCK_D: gl.constexpr):
    """The queries of an item, row by row from where their tokens stand."""
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [1, 1], [1, 0])  # 16 bytes each
    for half in gl.static_range(2):
        for part in gl.static_range(ROWS // COPIED):
            row = first + half * ROWS + part * COPIED + gl.arange(0, COPIED, layout=gl.SliceLayout(1, COPY))
            token = gl.load(order + row, mask=row < length, other=-1)
            into = buffers.index(slot * 2 + half).reshape([ROWS, BLOCK_D]).slice(part * COPIED, COPIED)
            copy_rows(source, row_stride, token, into, D, BLOCK_D)
    async_copy.commit_group()
    async_copy.wait_group(0)
    # The matrix units read shared memory by another way than these copies write it.
    hopper.fence_async_shared()


@gluon.jit
def schedule(
    query,
    source,
    source_strides,
    order,
    lists,
    tags,
    counter,
    sizes,
    lengths,
    entries,
    programs,
    buffers,
    barriers,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SLOTS: gl.constexpr,
    QUERIES: gl.constexpr,
    COLUMNS: gl.constexpr,
    SEGMENTS: gl.constexpr,
    SPANS: gl.constexpr,
    ORDERED: gl.constexpr,
):
    """Items in turn: where their lists are, their queries, and the tags of the queries and of the keys to be masked."""
    query_row, key_row, counts, tiles, columns, cold, head_plan, key_head = lists
    query_tags, key_tags = tags
    batches, heads, blocks = sizes
    query_length, key_length = lengths
    plans, query_orders, key_orders, tile_entries, column_entries = entries
    queries, info, row_tags, slot_tags = buffers
    query_full, query_empty, tags_full, tags_empty = barriers
    SPLIT: gl.constexpr = BLOCK_M // BLOCK_N
    TAGS: gl.constexpr = 4 if SEGMENTS or SPANS else 1
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    entry = gl.arange(0, FIELDS, layout=LANES)
    key_entry = gl.arange(0, BLOCK_N, layout=LANES)
    row_entry = gl.arange(0, BLOCK_M, layout=LANES)
    items = batches * heads * blocks
    turn = 0
    masked = 0
    item = gl.program_id(0)
    while item < items:
        block, batch, head = place_of(item, sizes)
        plan_row = gl.load(head_plan + head)
        first_copy = gl.load(key_head + head)
        plan = batch.to(gl.int64) * plans + plan_row
        query_order = gl.load(query_row + plan)
        key_order = gl.load(key_row + plan)
        counted = counts + (plan * blocks + block) * 5
        first_tile = gl.load(counted)
        full = gl.load(counted + 1) * SPLIT
        tile_steps = full + gl.load(counted + 2) * SPLIT
        first_column = gl.load(counted + 3)
        single = gl.load(counted + 4)
        steps = tile_steps
        if COLUMNS:
            steps += gl.cdiv(single, BLOCK_N)
        # An empty list is one step of zeros of which nothing is seen, so that every item is alike.
        steps = gl.maximum(steps, 1)
        fields = gl.full([FIELDS], 0, gl.int32, LANES)
        fields = put_field(fields, ITEM, item, entry)
        fields = put_field(fields, PLAN, plan.to(gl.int32), entry)
        fields = put_field(fields, QUERY_ROW, query_order, entry)
        fields = put_field(fields, COPY, first_copy + key_order, entry)
        fields = put_field(fields, FIRST_TILE, first_tile, entry)
        fields = put_field(fields, FULL, full, entry)
        fields = put_field(fields, TILE_STEPS, tile_steps, entry)
        fields = put_field(fields, STEPS, steps, entry)
        if COLUMNS:
            fields = put_field(fields, FIRST_COLUMN, gl.where(single > 0, first_column, NOWHERE), entry)
        turn_slot = turn % QUERIES
        wait_empty(query_empty, turn, QUERIES)
        if ORDERED:
            batch_stride, head_stride, row_stride = source_strides
            its_source = source + batch.to(gl.int64) * batch_stride + head.to(gl.int64) * head_stride
            its_order = order + (batch.to(gl.int64) * query_orders + query_order) * query_length
            _gather_queries(
                its_source, row_stride, its_order, block * BLOCK_M, query_length, queries, turn_slot, D, BLOCK_D
            )
            mbarrier.arrive(query_full.index(turn_slot))
        else:
            mbarrier.expect(query_full.index(turn_slot), 2 * query.block_type.nbytes)
            for half in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    query,
                    [batch, head, block * BLOCK_M + half * ROWS, 0],
                    query_full.index(turn_slot),
                    queries.index(turn_slot * 2 + half),
                )
        its_query_tags = query_tags + (batch.to(gl.int64) * query_orders + query_order) * 3 * query_length
        row = block * BLOCK_M + row_entry
        # A row past the end sees nothing: no key lies at or before position -1.
        position = gl.load(its_query_tags + row, mask=row < query_length, other=-1)
        row_tags.index(turn_slot * TAGS).store(position)
        if SEGMENTS:
            segment = gl.load(its_query_tags + query_length + row, mask=row < query_length, other=0)
            row_tags.index(turn_slot * TAGS + 1).store(segment)
        if SPANS:
            span = gl.load(its_query_tags + 2 * query_length + row, mask=row < query_length, other=-1)
            row_tags.index(turn_slot * TAGS + 2).store(span)
        info.index(turn_slot).store(fields)
        mbarrier.arrive(query_full.index(turn_slot))
        turn += 1
        its_tags = key_tags + (batch.to(gl.int64) * key_orders + key_order) * 3 * key_length
        its_tiles = tiles + plan * tile_entries + first_tile
        its_columns = columns + plan * column_entries + first_column
        its_cold = cold + plan * key_length
        for step in range(full, steps):
            of_tile = step < tile_steps
            tile = gl.load(its_tiles + step // SPLIT, mask=of_tile, other=0)
            key_slot = tile * BLOCK_M + step % SPLIT * BLOCK_N + key_entry
            seen = (key_slot < key_length) & of_tile
            if COLUMNS:
                listed = (step - tile_steps) * BLOCK_N + key_entry
                in_list = (listed >= 0) & (listed < single)
                key_slot = gl.where(of_tile, key_slot, gl.load(its_columns + listed, mask=in_list, other=0))
                is_cold = gl.load(its_cold + key_slot, mask=seen, other=0)
                seen = (seen & (is_cold != 0)) | in_list
            key_position = gl.load(its_tags + key_slot, mask=seen, other=NEVER)
            wait_empty(tags_empty, masked, SLOTS)
            slot_tags.index(masked % SLOTS * TAGS).store(key_position)
            if SEGMENTS:
                key_segment = gl.load(its_tags + key_length + key_slot, mask=seen, other=-1)
                slot_tags.index(masked % SLOTS * TAGS + 1).store(key_segment)
            if SPANS:
                key_span = gl.load(its_tags + 2 * key_length + key_slot, mask=seen, other=-2)
                slot_tags.index(masked % SLOTS * TAGS + 2).store(key_span)
            mbarrier.arrive(tags_full.index(masked % SLOTS))
            masked += 1
        item = programs + gl.atomic_add(counter, 1, sem="relaxed")
    wait_empty(query_empty, turn, QUERIES)
    info.index(turn % QUERIES).store(gl.full([FIELDS], -1, gl.int32, LANES))
    mbarrier.arrive(query_full.index(turn % QUERIES), count=2)


@gluon.jit
def _copy_tile(descriptor, batch, copy, start, tiles, full, empty, index, STAGES: gl.constexpr):
    wait_empty(empty, index, STAGES)
    mbarrier.expect(full.index(index % STAGES), descriptor.block_type.nbytes)
    tma.async_copy_global_to_shared(
        descriptor, [batch, copy, start, 0], full.index(index % STAGES), tiles.index(index % STAGES)
    )


@gluon.jit
def fetch(
    tile_sources,
    column_sources,
    tiles,
    tile_entries,
    sizes,
    buffers,
    query_barriers,
    tile_barriers,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    QUERIES: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """The keys and values of each item, a step at a time: its tiles, then its gathered columns."""
    key, value = tile_sources
    column_key, column_value = column_sources
    keys, values, info = buffers
    query_full, query_empty = query_barriers
    key_full, key_empty, value_full, value_empty = tile_barriers
    SPLIT: gl.constexpr = BLOCK_M // BLOCK_N
    WIDE: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [1], [0])
    entry = gl.arange(0, FIELDS, layout=WIDE)
    index = 0
    turn = 0
    wait_full(query_full, turn, QUERIES)
    fields = info.index(turn % QUERIES).load(WIDE)
    item = get_field(fields, ITEM, entry)
    while item >= 0:
        copy = get_field(fields, COPY, entry)
        tile_steps = get_field(fields, TILE_STEPS, entry)
        steps = get_field(fields, STEPS, entry)
        its_tiles = (
            tiles + get_field(fields, PLAN, entry).to(gl.int64) * tile_entries + get_field(fields, FIRST_TILE, entry)
        )
        first_column = get_field(fields, FIRST_COLUMN, entry)
        mbarrier.arrive(query_empty.index(turn % QUERIES))
        _, batch, head = place_of(item, sizes)
        next_tile = gl.load(its_tiles, mask=tile_steps > 0, other=NOWHERE // BLOCK_M)
        of_tiles = tile_steps if COLUMNS else steps
        for step in range(of_tiles):
            start = next_tile * BLOCK_M + step % SPLIT * BLOCK_N
            # The next tile's number is on its way while this step waits for room.
            next_tile = gl.load(its_tiles + (step + 1) // SPLIT, mask=step + 1 < tile_steps, other=0)
            _copy_tile(key, batch, copy, start, keys, key_full, key_empty, index, STAGES)
            _copy_tile(value, batch, copy, start, values, value_full, value_empty, index, STAGES)
            index += 1
        if COLUMNS:
            for step in range(of_tiles, steps):
                start = first_column + (step - tile_steps) * BLOCK_N
                _copy_tile(column_key, batch, head, start, keys, key_full, key_empty, index, STAGES)
                _copy_tile(column_value, batch, head, start, values, value_full, value_empty, index, STAGES)
                index += 1
        turn += 1
        wait_full(query_full, turn, QUERIES)
        fields = info.index(turn % QUERIES).load(WIDE)
        item = get_field(fields, ITEM, entry)
