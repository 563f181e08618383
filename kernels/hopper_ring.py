"""What the warps of the Hopper kernels share: rings of buffers, copies of rows, and what is known of an item."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from mmcompile.kernels.patterns import TILE

BLOCK_M = gl.constexpr(TILE)
ROWS = gl.constexpr(TILE // 2)  # query rows of one of the two groups that attend

# What the scheduling warp tells the others of an item, a query tile of a head.
ITEM, PLAN, QUERY_ROW, COPY, FIRST_TILE, FULL, TILE_STEPS, STEPS, FIRST_COLUMN = [gl.constexpr(i) for i in range(9)]
FIELDS = gl.constexpr(16)


@gluon.jit
def make_barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for each in gl.static_range(NUMBER):
        mbarrier.init(made.index(each), count=ARRIVALS)
    return made


@gluon.jit
def wait_full(barriers, index, NUMBER: gl.constexpr):
    mbarrier.wait(barriers.index(index % NUMBER), index // NUMBER & 1)


@gluon.jit
def wait_empty(barriers, index, NUMBER: gl.constexpr):
    mbarrier.wait(barriers.index(index % NUMBER), index // NUMBER & 1 ^ 1)


@gluon.jit
def copy_rows(source, row_stride, token, into, D: gl.constexpr, BLOCK_D: gl.constexpr):
    """Starts the copy of some tokens' rows to shared memory; zeros where a token is negative, and past D."""
    LAYOUT: gl.constexpr = token.type.layout.parent
    column = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, LAYOUT))
    # Rows start at 16 bytes, as the bulk copy engine wants it too.
    pointers = source + (token.to(gl.int64) * row_stride)[:, None] + column[None, :]
    pointers = gl.max_contiguous(gl.multiple_of(pointers, [16, 16]), [1, 8])
    async_copy.async_copy_global_to_shared(into, pointers, (token >= 0)[:, None] & (column < D)[None, :])


@gluon.jit
def put_field(fields, NAME: gl.constexpr, value, entry):
    return gl.where(entry == NAME, value, fields)


@gluon.jit
def get_field(fields, NAME: gl.constexpr, entry):
    return gl.sum(gl.where(entry == NAME, fields, 0), 0)


@gluon.jit
def place_of(item, sizes):
    """Query tile, batch row and head. Heads of one tile follow each other, so that those with one key copy meet in the
    L2 cache; the last tiles come first: under a causal mask they take longest."""
    batches, heads, blocks = sizes
    return blocks - 1 - item // (batches * heads), item // heads % batches, item % heads
