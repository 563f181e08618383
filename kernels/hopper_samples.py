"""The warps of the Hopper kernel of `tile_log_mass` that feed the others: one schedules, one fetches."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from mmcompile.kernels.hopper_ring import FIELDS, copy_rows, get_field, put_field, wait_empty, wait_full
from mmcompile.kernels.patterns import TILE as TILE_KEYS
from mmcompile.kernels.sample_mask import classify_tiles, lowest_bit

TILE = gl.constexpr(TILE_KEYS)
RUN = gl.constexpr(32)  # most key tiles of an item, a bit each
GROUPS = gl.constexpr(4)  # of four warps, that sum: two for each tile
GROUP = gl.constexpr(64)  # query rows of one of them
BLOCK_M = gl.constexpr(128)  # of an item
# Items of which the rows' tags and targets are kept: they are read after the queries, of one or two items, have gone.
ROW_SLOTS = gl.constexpr(4)
PART = gl.constexpr(16)  # rows whose addresses a warp holds at once
LATEST = gl.constexpr(2**31 - 1)  # a position after every query's
# What the scheduling warp tells the fetching one of an item: a block of samples, and a run of key tiles.
TODO, COMPARED, FIRST_TILE, BATCH, COPY, ROW, KEY_ORDER_ROW = [gl.constexpr(i) for i in range(7)]
# What the fetching warp tells the summing ones of a tile: these bits, and its number above them; negative at the end.
MASKED, LAST, SLOT_SHIFT, ROWS_SHIFT, TILE_SHIFT = [gl.constexpr(i) for i in (1, 2, 2, 3, 5)]
NO_TILE = gl.constexpr(-(2**31))


@gluon.jit
def _mark_unseen(output, targets, unseen, first_tile, key_tiles):
    """-inf for the tiles of an item that none of its queries may see. unseen: their bits."""
    ACROSS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 1], [1, 0])
    index = gl.arange(0, RUN, layout=gl.SliceLayout(0, ACROSS))
    nothing = gl.full([PART, RUN], float("-inf"), gl.float32, ACROSS)
    for part in gl.static_range(BLOCK_M // PART):
        target = targets.slice(part * PART, PART).load(gl.SliceLayout(1, ACROSS))
        pointers = (output + target.to(gl.int64) * key_tiles + first_tile)[:, None] + index[None, :]
        gl.store(pointers, nothing, mask=(target >= 0)[:, None] & (((unseen >> index) & 1) != 0)[None, :])


@gluon.jit
def schedule(
    query,
    sources,
    output,
    counter,
    sizes,
    lengths,
    strides,
    run,
    window,
    programs,
    buffers,
    barriers,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    QUERIES: gl.constexpr,
    WALK: gl.constexpr,
    WINDOW: gl.constexpr,
    SEGMENTS: gl.constexpr,
    SPANS: gl.constexpr,
):
    """Items in turn: which tiles their queries may see, the queries, and the tags of these."""
    query_order, query_tags, slots, walk, query_row, key_row, head, key_head, bounds = sources
    batches, plans, query_orders, key_orders = sizes
    samples, query_length, key_length = lengths
    batch_stride, head_stride, row_stride = strides
    queries, info, row_tags, row_targets, targets, tokens = buffers
    query_full, query_empty = barriers
    TAGS: gl.constexpr = 4 if SEGMENTS or SPANS else 1
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    OF_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [1, 1], [1, 0])  # 16 bytes each
    entry = gl.arange(0, FIELDS, layout=LANES)
    index = gl.arange(0, RUN, layout=LANES)
    in_block = gl.arange(0, BLOCK_M, layout=LANES)
    blocks = gl.cdiv(samples, BLOCK_M)
    key_tiles = gl.cdiv(key_length, TILE)
    runs = gl.cdiv(key_tiles, run)
    items = batches * plans * blocks * runs
    turn = 0
    item = gl.program_id(0)
    while item < items:
        next_item = programs + gl.atomic_add(counter, 1, sem="relaxed")  # on its way meanwhile
        # Neighbouring items read the same run of tiles, so that those with one key copy meet in the L2 cache.
        plan = item % plans
        block = item // plans % blocks
        first_tile = item // plans // blocks % runs * run
        batch = item // plans // blocks // runs
        row = batch.to(gl.int64) * plans + plan
        query_order_row = batch.to(gl.int64) * query_orders + gl.load(query_row + row)
        key_order = gl.load(key_row + row)
        key_order_row = batch.to(gl.int64) * key_orders + key_order
        copy = gl.load(key_head + plan) + key_order
        its_head = gl.load(head + plan)

        sample = block * BLOCK_M + in_block
        if WALK:
            sample = gl.load(walk + row * samples + sample, mask=sample < samples, other=samples).to(gl.int32)
        inside = sample < samples
        slot = gl.load(slots + row * samples + sample, mask=inside, other=0)
        its_tags = query_tags + query_order_row * 3 * query_length
        # A sample past the end sees nothing: no key lies at or before position -1.
        position = gl.load(its_tags + slot, mask=inside, other=-1)
        token = gl.load(query_order + query_order_row * query_length + slot, mask=inside, other=-1)
        tile = first_tile + index
        in_run = (index < run) & (tile < key_tiles)
        may, whole = classify_tiles(
            bounds + key_order_row * 3 * key_tiles,
            tile,
            in_run,
            key_tiles,
            gl.min(gl.where(inside, position, LATEST), 0),
            gl.max(position, 0),
            window,
            WINDOW,
            SEGMENTS,
            SPANS,
        )
        bit = gl.full([RUN], 1, gl.int32, LANES) << index
        todo = gl.sum(gl.where(may, bit, 0), 0)
        compared = gl.sum(gl.where(may & ~whole, bit, 0), 0)
        unseen = gl.sum(gl.where(in_run & ~may, bit, 0), 0)
        target = gl.where(inside, (row * samples).to(gl.int32) + sample, -1)
        targets.store(target)
        if unseen != 0:
            _mark_unseen(output, targets, unseen, first_tile, key_tiles)
        if todo != 0:
            tokens.store(token)
            fields = gl.full([FIELDS], 0, gl.int32, LANES)
            fields = put_field(fields, TODO, todo, entry)
            fields = put_field(fields, COMPARED, compared, entry)
            fields = put_field(fields, FIRST_TILE, first_tile, entry)
            fields = put_field(fields, BATCH, batch, entry)
            fields = put_field(fields, COPY, copy, entry)
            fields = put_field(fields, ROW, row.to(gl.int32), entry)
            fields = put_field(fields, KEY_ORDER_ROW, key_order_row.to(gl.int32), entry)
            turn_slot = turn % QUERIES
            wait_empty(query_empty, turn, QUERIES)
            its_query = query + batch.to(gl.int64) * batch_stride + its_head.to(gl.int64) * head_stride
            for part in gl.static_range(BLOCK_M // PART):
                into = queries.index(turn_slot * 2 + part * PART // GROUP).reshape([GROUP, BLOCK_D])
                its_token = tokens.slice(part * PART, PART).load(gl.SliceLayout(1, OF_COPY))
                copy_rows(its_query, row_stride, its_token, into.slice(part * PART % GROUP, PART), D, BLOCK_D)
            async_copy.commit_group()
            rows = turn % ROW_SLOTS
            row_tags.index(rows * TAGS).store(position)
            if SEGMENTS:
                segment = gl.load(its_tags + query_length + slot, mask=inside, other=0)
                row_tags.index(rows * TAGS + 1).store(segment)
            if SPANS:
                span = gl.load(its_tags + query_length + query_length + slot, mask=inside, other=-1)
                row_tags.index(rows * TAGS + 2).store(span)
            row_targets.index(rows).store(target)
            info.index(turn_slot).store(fields)
            async_copy.wait_group(0)
            # The matrix units read shared memory by another way than these copies write it.
            hopper.fence_async_shared()
            mbarrier.arrive(query_full.index(turn_slot))
            turn += 1
        item = next_item
    wait_empty(query_empty, turn, QUERIES)
    info.index(turn % QUERIES).store(gl.full([FIELDS], 0, gl.int32, LANES))
    mbarrier.arrive(query_full.index(turn % QUERIES))


@gluon.jit
def fetch(
    key,
    bias,
    key_positions,
    key_tags,
    buffers,
    query_barriers,
    tile_barriers,
    STAGES: gl.constexpr,
    QUERIES: gl.constexpr,
    COLD: gl.constexpr,
    SEGMENTS: gl.constexpr,
    SPANS: gl.constexpr,
):
    """The keys of each tile that an item's queries may see; their bias; and their tags where elements are compared."""
    keys, biases, slot_tags, steps, info = buffers
    query_full, query_empty = query_barriers
    key_full, key_empty = tile_barriers
    TAGS: gl.constexpr = 4 if SEGMENTS or SPANS else 1
    WIDE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    ROW_BYTES: gl.constexpr = TILE * 4
    PLAIN: gl.constexpr = key.block_type.nbytes + (ROW_BYTES if COLD else 0)
    WITH_TAGS: gl.constexpr = PLAIN + ROW_BYTES * (1 + (1 if SEGMENTS else 0) + (1 if SPANS else 0))
    entry = gl.arange(0, FIELDS, layout=WIDE)
    index = 0
    turn = 0
    wait_full(query_full, turn, QUERIES)
    fields = info.index(turn % QUERIES).load(WIDE)
    todo = get_field(fields, TODO, entry)
    while todo != 0:
        compared = get_field(fields, COMPARED, entry)
        first_tile = get_field(fields, FIRST_TILE, entry)
        batch = get_field(fields, BATCH, entry)
        copy = get_field(fields, COPY, entry)
        row = get_field(fields, ROW, entry)
        key_order_row = get_field(fields, KEY_ORDER_ROW, entry)
        slot = turn % QUERIES
        mbarrier.arrive(query_empty.index(slot))
        # A single tile is for both pairs of groups: each has a tile of every item, so that none is left behind.
        twice = gl.where((todo & (todo - 1)) == 0, 1, 0)
        while todo != 0:
            next_tile, bit = lowest_bit(todo.to(gl.int64) & 0xFFFFFFFF)
            masked = (compared & bit.to(gl.int32)) != 0
            todo ^= gl.where(twice != 0, 0, bit.to(gl.int32))
            twice = 0
            # Nothing is left for the pair of groups that takes this tile.
            last = (todo & (todo - 1)) == 0
            tile = first_tile + next_tile
            flags = gl.where(last, LAST, 0) | gl.where(masked, MASKED, 0)
            word = tile << TILE_SHIFT | turn % ROW_SLOTS << ROWS_SHIFT | slot << SLOT_SHIFT | flags
            stage = index % STAGES
            wait_empty(key_empty, index, STAGES)
            steps.index(stage).store(gl.full([1], word, gl.int32, WIDE))
            full = key_full.index(stage)
            mbarrier.expect(full, PLAIN, pred=masked == 0)
            mbarrier.expect(full, WITH_TAGS, pred=masked)
            tma.async_copy_global_to_shared(key, [batch, copy, tile * TILE, 0], full, keys.index(stage))
            if COLD:
                tma.async_copy_global_to_shared(bias, [row, tile * TILE], full, biases.index(stage))
            tma.async_copy_global_to_shared(
                key_positions, [key_order_row, tile * TILE], full, slot_tags.index(stage * TAGS), pred=masked
            )
            if SEGMENTS:
                tma.async_copy_global_to_shared(
                    key_tags, [key_order_row * 3 + 1, tile * TILE], full, slot_tags.index(stage * TAGS + 1), pred=masked
                )
            if SPANS:
                tma.async_copy_global_to_shared(
                    key_tags, [key_order_row * 3 + 2, tile * TILE], full, slot_tags.index(stage * TAGS + 2), pred=masked
                )
            index += 1
        turn += 1
        wait_full(query_full, turn, QUERIES)
        fields = info.index(turn % QUERIES).load(WIDE)
        todo = get_field(fields, TODO, entry)
    for _ in gl.static_range(2):
        wait_empty(key_empty, index, STAGES)
        steps.index(index % STAGES).store(gl.full([1], NO_TILE, gl.int32, WIDE))
        mbarrier.arrive(key_full.index(index % STAGES))
        index += 1
