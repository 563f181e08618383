"""The torch ops `mminference::{plan, permute, unpermute, block_sparse_attention}`.

Importing this module registers schema, fake, CPU and CUDA. Arguments are checked before anything runs; the
work is in the files by idea.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.library import custom_op

from mmcompile.kernels import block_sparse_cpu, permute_cpu
from mmcompile.kernels import plan as planning
from mmcompile.kernels.check_inputs import check_attention, check_permute, check_unpermute
from mmcompile.kernels.dense_attention import causal_attention, dense_attention
from mmcompile.kernels.tile_bounds import tile_count
from mmcompile.kernels.tile_walk import TileWalk

_PLAN = (
    "(Tensor? query, Tensor? key, Tensor offsets, Tensor modality, Tensor grid, Tensor? key_valid, "
    "Tensor? query_segment, Tensor? key_segment, Tensor? query_span, Tensor? key_span, SymInt batch, "
    "SymInt query_length, SymInt key_length, SymInt query_offset, int? window, str patterns, float? density, "
    "SymInt min_tokens) -> (Tensor query_order, Tensor key_order, Tensor query_tags, Tensor key_tags, "
    "Tensor counts, Tensor tiles, Tensor density)"
)
_PERMUTE = "(Tensor x, Tensor order, int[] source_head, int[] row) -> Tensor"
_UNPERMUTE = "(Tensor x, Tensor order, int[] row) -> Tensor"
_ATTENTION = (
    "(Tensor query, Tensor key, Tensor value, Tensor query_tags, Tensor key_tags, Tensor counts, "
    "Tensor tiles, int[] head_plan, int[] key_head, float scale, int? window, bool segments, bool spans, "
    "SymInt min_tokens, bool only_causal=False) -> Tensor"
)

_DEVICES = ("cpu", "cuda")


@custom_op("mminference::plan", mutates_args=(), schema=_PLAN)
def plan(
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
    window: int | None,
    patterns: str,
    density: float | None,
    min_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`kernels/plan.py`'s plan with tiles as [B, P, nQ * nK], and the density of each row, float32 [B, P].

    Tiles have three dimensions here because torch asks of every tensor with four whether it is channels-last, and
    for this one the answer would be a guard on the length: prefills on either side of one tile would recompile.
    """
    result = planning.plan(
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
        window,
        patterns,
        density,
        min_tokens,
    )
    return *result._replace(tiles=result.tiles.flatten(2)), planning.density(result, window, min_tokens)


@plan.register_fake
def _(
    query, key, offsets, modality, grid, key_valid, query_segment, key_segment, query_span, key_span,
    batch, query_length, key_length, query_offset, window, patterns, density, min_tokens,
):  # fmt: skip
    *shapes, tiles = planning.plan_shapes(batch, query_length, key_length, patterns)
    shapes.append((*tiles[:2], tiles[2] * tiles[3]))
    density = offsets.new_empty(tiles[:2], dtype=torch.float32)
    return *(offsets.new_empty(shape, dtype=torch.int32) for shape in shapes), density


@custom_op("mminference::permute", mutates_args=(), device_types=_DEVICES, schema=_PERMUTE)
def permute(x: Tensor, order: Tensor, source_head: Sequence[int], row: Sequence[int]) -> Tensor:
    """Copies of heads of x with their rows in the plan's order.

    x: [B, H, S, D], any strides. order: int32 [B, P, S], slot -> position, each row a permutation.
    source_head, row: for each of the J copies, its head of x and its row of order.
    Returns contiguous [B, J, S, D]: `out[b, j, i] = x[b, source_head[j], order[b, row[j], i]]`.
    Raises ValueError naming the argument, its value, and what would be right.
    """
    check_permute(x, order, source_head, row)
    return _row_copies(x.device).permute(x, order, source_head, row)


@permute.register_fake
def _(x, order, source_head, row):
    return x.new_empty(x.shape[0], len(source_head), x.shape[2], x.shape[3])


@custom_op("mminference::unpermute", mutates_args=(), device_types=_DEVICES, schema=_UNPERMUTE)
def unpermute(x: Tensor, order: Tensor, row: Sequence[int]) -> Tensor:
    """The inverse of `permute`: rows back from slots to positions.

    x: [B, H, S, D], any strides. order: int32 [B, P, S], as in `permute`. row: the row of order of each head.
    Returns [B, H, S, D] in [B, S, H, D] memory, where a model merges its heads without a copy:
    `out[b, h, order[b, row[h], i]] = x[b, h, i]`.
    Raises ValueError naming the argument, its value, and what would be right.
    """
    check_unpermute(x, order, row)
    return _row_copies(x.device).unpermute(x, order, row)


@unpermute.register_fake
def _(x, order, row):
    return _merged_heads(x)


@custom_op("mminference::block_sparse_attention", mutates_args=(), device_types=_DEVICES, schema=_ATTENTION)
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tags: Tensor,
    key_tags: Tensor,
    counts: Tensor,
    tiles: Tensor,
    head_plan: Sequence[int],
    key_head: Sequence[int],
    scale: float,
    window: int | None,
    segments: bool,
    spans: bool,
    min_tokens: int,
    only_causal: bool = False,
) -> Tensor:
    """softmax(query key^T * scale) value over the tiles that a plan lists; 0 where a row has no key.

    query: [B, H, Sq, D], key and value: [B, C, Sk, D], bfloat16, float16 or float32, any strides, in the slot
        order of their plan rows. Products accumulate in float32.
    query_tags, key_tags, counts, tiles: from `plan`, the op. window, segments, spans: the parts of the element mask.
    head_plan, key_head: plan row and key copy of each of the H heads.
    min_tokens: as given to `plan`; a shorter key length runs dense, with the element mask.
    only_causal: the element mask is known to be key <= query and nothing else, so that dense needs no mask.
    Returns [B, H, Sq, D] in [B, Sq, H, D] memory.
    Raises ValueError naming the argument, its value, and what would be right.
    """
    rows = _rows(tiles, query_tags, key_tags)
    walk = TileWalk(query_tags, key_tags, counts, rows, tuple(head_plan), tuple(key_head), window, segments, spans)
    check_attention(query, key, value, walk, scale)
    if key.shape[2] < min_tokens:
        dense = causal_attention if only_causal else dense_attention
        return dense(query, key, value, walk, scale)
    return _executor(query.device).block_sparse_attention(query, key, value, walk, scale)


@block_sparse_attention.register_fake
def _(query, *_rest):
    return _merged_heads(query)


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


def _rows(tiles: Tensor, query_tags: Tensor, key_tags: Tensor) -> Tensor:
    """The op's tiles, [B, P, nQ * nK], as the executors read them, [B, P, nQ, nK]."""
    rows = [tile_count(tags.shape[-1]) for tags in (query_tags, key_tags)]
    if tiles.dim() != 3 or tiles.shape[2] != rows[0] * rows[1]:
        raise ValueError(f"tiles has shape {list(tiles.shape)}; [B, P, {rows[0]} * {rows[1]}] fits, as plan returns it")
    return tiles.unflatten(2, rows)


def _merged_heads(x: Tensor) -> Tensor:
    """[B, H, S, D] in [B, S, H, D] memory, as `unpermute` and the attention return it."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)
