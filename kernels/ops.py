"""The torch ops `mminference::{arrange, plan, permute, unpermute, block_sparse_attention, compare_with_dense}`.

Importing this module registers schema, fake, CPU and CUDA. Arguments are checked before anything runs; the
work is in the files by idea.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.library import custom_op

from mmcompile.kernels import arrange as arranging
from mmcompile.kernels import block_sparse_cpu, permute_cpu
from mmcompile.kernels import compare_with_dense as comparing
from mmcompile.kernels import plan as planning
from mmcompile.kernels.check_inputs import check_attention, check_comparison, check_permute, check_unpermute
from mmcompile.kernels.tile_walk import TileWalk

_ARRANGE = (
    "(Tensor? query, Tensor? key, Tensor offsets, Tensor modality, Tensor grid, Tensor? key_valid, "
    "Tensor? query_segment, Tensor? key_segment, Tensor? query_span, Tensor? key_span, SymInt batch, "
    "SymInt query_length, SymInt key_length, SymInt query_offset, str orders, float? scale=None) -> "
    "(Tensor query_order, Tensor key_order, Tensor query_tags, Tensor key_tags, Tensor query_site, Tensor key_site)"
)
_PLAN = (
    "(Tensor? query, Tensor? key, Tensor query_order, Tensor key_order, Tensor query_tags, Tensor key_tags, "
    "Tensor query_site, Tensor key_site, Tensor offsets, Tensor modality, Tensor grid, SymInt query_offset, "
    "float scale, int? window, bool segments, bool spans, str patterns, int[] heads, float? density, float? recall) "
    "-> (Tensor query_row, Tensor key_row, Tensor counts, Tensor tiles, Tensor columns, "
    "Tensor cold, Tensor density, Tensor recall)"
)
_PERMUTE = "(Tensor x, Tensor order, Tensor? rows, int[] source_head, int[] row) -> Tensor"
_UNPERMUTE = "(Tensor x, Tensor order, Tensor? rows, int[] row) -> Tensor"
_ATTENTION = (
    "(Tensor query, Tensor key, Tensor value, Tensor query_tags, Tensor key_tags, Tensor query_row, Tensor key_row, "
    "Tensor counts, Tensor tiles, Tensor columns, Tensor cold, int[] head_plan, int[] key_head, float scale, "
    "int? window, bool segments, bool spans, Tensor? query_order=None) -> Tensor"
)
_COMPARE = (
    "(Tensor query, Tensor key, Tensor value, Tensor output, Tensor query_order, Tensor query_tags, Tensor key_tags, "
    "Tensor query_row, Tensor key_row, Tensor counts, Tensor tiles, Tensor columns, Tensor cold, int[] head_plan, "
    "int[] key_head, float scale, int? window, bool segments, bool spans, Tensor seed, int site, float share) -> "
    "(Tensor error, Tensor recall)"
)

_DEVICES = ("cpu", "cuda")


@custom_op("mminference::arrange", mutates_args=(), schema=_ARRANGE)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`kernels/arrange.py`'s arrangement: orders of queries and keys, and their tags and sites in them."""
    return arranging.arrange(
        query,
        key,
        offsets,
        modality,
        grid,
        key_valid,
        query_segment,
        key_segment,
        query_span,
        key_span,
        batch,
        query_length,
        key_length,
        query_offset,
        orders,
        scale,
    )


@arrange.register_fake
def _(
    query, key, offsets, modality, grid, key_valid, query_segment, key_segment, query_span, key_span,
    batch, query_length, key_length, query_offset, orders, scale=None,
):  # fmt: skip
    shapes = arranging.arrangement_shapes(batch, query_length, key_length, orders)
    return tuple(offsets.new_empty(shape, dtype=torch.int32) for shape in shapes)


@custom_op("mminference::plan", mutates_args=(), schema=_PLAN)
def plan(
    query: Tensor | None,
    key: Tensor | None,
    query_order: Tensor,
    key_order: Tensor,
    query_tags: Tensor,
    key_tags: Tensor,
    query_site: Tensor,
    key_site: Tensor,
    offsets: Tensor,
    modality: Tensor,
    grid: Tensor,
    query_offset: int,
    scale: float,
    window: int | None,
    segments: bool,
    spans: bool,
    patterns: str,
    heads: Sequence[int],
    density: float | None,
    recall: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`kernels/plan.py`'s plan of an arrangement, and its density and estimated recall, float32 [B, P] each."""
    arrangement = arranging.Arrangement(query_order, key_order, query_tags, key_tags, query_site, key_site)
    result, stats = planning.plan(
        query,
        key,
        arrangement,
        offsets,
        modality,
        grid,
        query_offset,
        scale,
        window,
        segments,
        spans,
        patterns,
        heads,
        density,
        recall,
    )
    return *result, *stats


@plan.register_fake
def _(
    query, key, query_order, key_order, query_tags, key_tags, query_site, key_site, offsets, modality, grid,
    query_offset, scale, window, segments, spans, patterns, heads, density, recall,
):  # fmt: skip
    batch, _, query_length = query_order.shape
    shapes = planning.plan_shapes(
        batch, query_length, key_order.shape[2], query_offset, segments, spans, patterns, density
    )
    *lists, cold = shapes
    lists = [query_order.new_empty(shape) for shape in lists]
    stats = [query_order.new_empty(shapes[0], dtype=torch.float32) for _ in range(2)]
    return *lists, query_order.new_empty(cold, dtype=torch.bool), *stats


@custom_op("mminference::permute", mutates_args=(), device_types=_DEVICES, schema=_PERMUTE)
def permute(x: Tensor, order: Tensor, rows: Tensor | None, source_head: Sequence[int], row: Sequence[int]) -> Tensor:
    """Copies of heads of x with their rows in an arrangement's orders.

    x: [B, H, S, D], any strides. order: int32 [B, O, S], slot -> position, each row a permutation.
    rows: int32 [B, P], the order of each plan row, or None where `row` names orders itself.
    source_head, row: for each of the J copies, its head of x and its plan row.
    Returns contiguous [B, J, S, D]: `out[b, j, i] = x[b, source_head[j], order[b, rows[b, row[j]], i]]`.
    Raises ValueError naming the argument, its value, and what would be right.
    """
    check_permute(x, order, rows, source_head, row)
    return _row_copies(x.device).permute(x, order, rows, source_head, row)


@permute.register_fake
def _(x, order, rows, source_head, row):
    return x.new_empty(x.shape[0], len(source_head), x.shape[2], x.shape[3])


@custom_op("mminference::unpermute", mutates_args=(), device_types=_DEVICES, schema=_UNPERMUTE)
def unpermute(x: Tensor, order: Tensor, rows: Tensor | None, row: Sequence[int]) -> Tensor:
    """The inverse of `permute`: rows back from slots to positions.

    x: [B, H, S, D], any strides. order, rows: as in `permute`. row: the plan row of each head.
    Returns [B, H, S, D] in [B, S, H, D] memory, where a model merges its heads without a copy:
    `out[b, h, order[b, rows[b, row[h]], i]] = x[b, h, i]`.
    Raises ValueError naming the argument, its value, and what would be right.
    """
    check_unpermute(x, order, rows, row)
    return _row_copies(x.device).unpermute(x, order, rows, row)


@unpermute.register_fake
def _(x, order, rows, row):
    return _merged_heads(x)


@custom_op("mminference::block_sparse_attention", mutates_args=(), device_types=_DEVICES, schema=_ATTENTION)
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tags: Tensor,
    key_tags: Tensor,
    query_row: Tensor,
    key_row: Tensor,
    counts: Tensor,
    tiles: Tensor,
    columns: Tensor,
    cold: Tensor,
    head_plan: Sequence[int],
    key_head: Sequence[int],
    scale: float,
    window: int | None,
    segments: bool,
    spans: bool,
    query_order: Tensor | None = None,
) -> Tensor:
    """softmax(query key^T * scale) value over the tiles and single keys that a plan lists; 0 where a row has no key.

    query: [B, H, Sq, D], key and value: [B, C, Sk, D], bfloat16, float16 or float32, any strides, in the slot
        order of their plan rows. Products accumulate in float32.
    query_order: None, or int32 [B, Oq, Sq] from `arrange`: then queries and result lie in
        token order instead, as `permute` before and `unpermute` after would have it.
    query_tags, key_tags: from `arrange`. query_row, key_row, counts, tiles, columns, cold: from `plan`, the op.
    window, segments, spans: the parts of the element mask.
    head_plan: the plan row of each of the H heads. key_head: the copy of its keys in the first key order; the others
        follow it.
    Returns [B, H, Sq, D] in [B, Sq, H, D] memory.
    Raises ValueError naming the argument, its value, and what would be right.
    """
    lists = (query_tags, key_tags, query_row, key_row, counts, tiles, columns, cold)
    walk = TileWalk(*lists, tuple(head_plan), tuple(key_head), window, segments, spans)
    check_attention(query, key, value, walk, scale, query_order)
    return _executor(query.device).block_sparse_attention(query, key, value, walk, scale, query_order)


@block_sparse_attention.register_fake
def _(query, *_rest):
    return _merged_heads(query)


@custom_op("mminference::compare_with_dense", mutates_args=(), schema=_COMPARE)
def compare_with_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    query_order: Tensor,
    query_tags: Tensor,
    key_tags: Tensor,
    query_row: Tensor,
    key_row: Tensor,
    counts: Tensor,
    tiles: Tensor,
    columns: Tensor,
    cold: Tensor,
    head_plan: Sequence[int],
    key_head: Sequence[int],
    scale: float,
    window: int | None,
    segments: bool,
    spans: bool,
    seed: Tensor,
    site: int,
    share: float,
) -> tuple[Tensor, Tensor]:
    """What a plan and the attention over it lack of dense attention, in some query tiles of each head.

    query, output: [B, H, Sq, D], of `block_sparse_attention`, in token order. query_order: int32 [B, Oq, Sq], from
        `arrange`. The rest, as there: key and value in the slot order of their plan rows.
    seed: int64 [1], from 0 on: other query tiles for each. site: the same, for the attentions of one model.
    share: of the query tiles of all heads and sequences that are drawn, in (0, 1]; at least one is.
    Returns error, float32 [H]: ||output - dense|| / ||dense|| over a head's drawn queries; and recall, float32 [H]: the
    mean share of their attention that the plan's tiles and single keys hold, of those that have a key. NaN for a head
    of which nothing was drawn.
    Raises ValueError naming the argument, its value, and what would be right.
    """
    lists = (query_tags, key_tags, query_row, key_row, counts, tiles, columns, cold)
    walk = TileWalk(*lists, tuple(head_plan), tuple(key_head), window, segments, spans)
    check_attention(query, key, value, walk, scale, query_order)
    check_comparison(query, output, seed, share)
    return comparing.compare_with_dense(query, key, value, output, query_order, walk, scale, seed, site, share)


@compare_with_dense.register_fake
def _(query, *_rest):
    heads = query.shape[1]
    return query.new_empty(heads, dtype=torch.float32), query.new_empty(heads, dtype=torch.float32)


def _row_copies(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        return permute_cpu
    from mmcompile.kernels import permute  # here, because Triton is absent where there is no GPU

    return permute


def _executor(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        return block_sparse_cpu
    from mmcompile.kernels import block_sparse

    return block_sparse


def _merged_heads(x: Tensor) -> Tensor:
    """[B, H, S, D] in [B, S, H, D] memory, as `unpermute` and the attention return it."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)
