"""Bad input to an op gets one error that names the argument, its value, and what would be right."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_walk import TileWalk

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256


def check_permute(
    x: Tensor, order: Tensor, rows: Tensor | None, source_head: Sequence[int], row: Sequence[int]
) -> None:
    """Raises ValueError unless `permute` can run. x: [B, H, S, D], order: int32 [B, O, S], rows: int32 [B, P]."""
    _check_order(x, order, rows)
    if len(source_head) != len(row):
        raise ValueError(f"row has {len(row)} entries, source_head has {len(source_head)}; one each a copy")
    _check_indices("source_head", source_head, x.shape[1], "a head of x")
    _check_row(row, order, rows)


def check_unpermute(x: Tensor, order: Tensor, rows: Tensor | None, row: Sequence[int]) -> None:
    """Raises ValueError unless `unpermute` can run. x: [B, H, S, D], order: int32 [B, O, S], rows: int32 [B, P]."""
    _check_order(x, order, rows)
    _check_length("row", row, x.shape[1], "heads of x")
    _check_row(row, order, rows)


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float, query_order: Tensor | None = None
) -> None:
    """Raises ValueError unless `block_sparse_attention` can run. Shapes as in the op."""
    _check_rank("query", query, 4, "[B, H, Sq, D]")
    _check_rank("key", key, 4, "[B, C, Sk, D]")
    batch, heads, query_length, width = query.shape
    copies, key_length = key.shape[1:3]
    if query.dtype not in DTYPES:
        raise ValueError(f"query has dtype {query.dtype}; one of {', '.join(map(str, DTYPES))}")
    for name, tensor in (("key", key), ("value", value)):
        _check_shape(name, tensor, (batch, copies, key_length, width))
        _check_dtype(name, tensor, query.dtype, "the dtype of query")
    if not 1 <= width <= MAX_HEAD_DIM:
        raise ValueError(f"query has head dim {width}; from 1 to {MAX_HEAD_DIM}")
    key_orders, plans = _check_walk(walk, batch, query_length, key_length)
    for name, tensor in (("key", key), ("value", value), *_tensors(walk)):
        _check_device(name, tensor, query)
    if query_order is not None:
        _check_rank("query_order", query_order, 3, "[B, Oq, Sq]")
        _check_shape("query_order", query_order, (batch, walk.query_tags.shape[1], query_length))
        _check_dtype("query_order", query_order, torch.int32, "slot -> token, as arrange returns it")
        _check_device("query_order", query_order, query)
    _check_length("head_plan", walk.head_plan, heads, "heads of query")
    _check_indices("head_plan", walk.head_plan, plans, "a row of the plan")
    _check_length("key_head", walk.key_head, heads, "heads of query")
    what = "a head of key" if key_orders == 1 else f"the first of {key_orders} heads of key, one for each key order"
    _check_indices("key_head", walk.key_head, copies - key_orders + 1, what)
    if walk.window is not None and walk.window < 1:
        raise ValueError(f"window={walk.window} allows no key; at least 1, or None for no window")
    # The running maximum is taken before scaling, which holds for no negative scale.
    if not (math.isfinite(scale) and scale >= 0.0):
        raise ValueError(f"scale={scale} is not usable; a finite number of at least 0")


def check_comparison(query: Tensor, output: Tensor, seed: Tensor, share: float) -> None:
    """Raises ValueError unless `compare_with_dense` can run, beside what `check_attention` says."""
    _check_shape("output", output, tuple(query.shape))
    _check_device("output", output, query)
    _check_shape("seed", seed, (1,))
    _check_dtype("seed", seed, torch.int64, "a count from 0 on")
    _check_device("seed", seed, query)
    if not 0 < share <= 1:
        raise ValueError(f"share={share} draws no query tiles; in (0, 1]")


def _check_walk(walk: TileWalk, batch: int, query_length: int, key_length: int) -> tuple[int, int]:
    """Key orders and plan rows of a walk, if its tensors fit each other and these sizes."""
    layouts = ("[B, Oq, 3, Sq]", "[B, Ok, 3, Sk]", "[B, P]", "[B, P]", "[B, P, nQ, 5]", "[B, P, T]", "[B, P, C]")
    for (name, tensor), layout in zip(_tensors(walk), (*layouts, "[B, P, Sk]"), strict=True):
        _check_rank(name, tensor, layout.count(",") + 1, layout)
    query_orders, key_orders, plans = (x.shape[1] for x in (walk.query_tags, walk.key_tags, walk.counts))
    entries, columns = walk.tiles.shape[2], walk.columns.shape[2]
    shapes = (
        (batch, max(1, query_orders), 3, query_length),
        (batch, max(1, key_orders), 3, key_length),
        (batch, plans),
        (batch, plans),
        (batch, plans, -(-query_length // TILE), 5),
        (batch, plans, entries),
        (batch, plans, columns),
        (batch, plans, key_length if columns else 0),
    )
    for (name, tensor), shape in zip(_tensors(walk), shapes, strict=True):
        _check_shape(name, tensor, shape)
        _check_dtype(name, tensor, torch.bool if name == "cold" else torch.int32, "what plan returns")
    return key_orders, plans


def _tensors(walk: TileWalk) -> list[tuple[str, Tensor]]:
    return [(name, part) for name, part in walk._asdict().items() if isinstance(part, Tensor)]


def _check_order(x: Tensor, order: Tensor, rows: Tensor | None) -> None:
    _check_rank("x", x, 4, "[B, H, S, D]")
    _check_rank("order", order, 3, "[B, O, S]")
    _check_shape("order", order, (x.shape[0], order.shape[1], x.shape[2]))
    _check_dtype("order", order, torch.int32, "slot -> position, as plan returns it")
    _check_device("order", order, x, "x")
    if rows is not None:
        _check_rank("rows", rows, 2, "[B, P]")
        _check_shape("rows", rows, (x.shape[0], rows.shape[1]))
        _check_dtype("rows", rows, torch.int32, "plan row -> row of order, as plan returns it")
        _check_device("rows", rows, x, "x")


def _check_row(row: Sequence[int], order: Tensor, rows: Tensor | None) -> None:
    if rows is None:
        _check_indices("row", row, order.shape[1], "a row of order")
    else:
        _check_indices("row", row, rows.shape[1], "a plan row of rows")


def _check_rank(name: str, tensor: Tensor, rank: int, layout: str) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; {rank} dimensions {layout}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; {list(shape)} fits the other arguments")


def _check_dtype(name: str, tensor: Tensor, dtype: torch.dtype, why: str) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}; {dtype}, {why}")


def _check_device(name: str, tensor: Tensor, other: Tensor, other_name: str = "query") -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}; {other.device}, the device of {other_name}")


def _check_length(name: str, values: Sequence[int], length: int, of: str) -> None:
    if len(values) != length:
        raise ValueError(f"{name} has {len(values)} entries; {length}, one for each of the {of}")


def _check_indices(name: str, values: Sequence[int], size: int, what: str) -> None:
    for position, value in enumerate(values):
        if not 0 <= value < size:
            raise ValueError(f"{name}[{position}]={value} is not {what}; from 0 to {size - 1}")
