"""Bad input to an op gets one error that names the argument, its value, and what would be right."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_walk import TileWalk

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256


def check_permute(x: Tensor, order: Tensor, source_head: Sequence[int], row: Sequence[int]) -> None:
    """Raises ValueError unless `permute` can run. x: [B, H, S, D], order: int32 [B, P, S]."""
    _check_order(x, order)
    if len(source_head) != len(row):
        raise ValueError(f"row has {len(row)} entries, source_head has {len(source_head)}; one each a copy")
    _check_indices("source_head", source_head, x.shape[1], "a head of x")
    _check_indices("row", row, order.shape[1], "a row of order")


def check_unpermute(x: Tensor, order: Tensor, row: Sequence[int]) -> None:
    """Raises ValueError unless `unpermute` can run. x: [B, H, S, D], order: int32 [B, P, S]."""
    _check_order(x, order)
    _check_length("row", row, x.shape[1], "heads of x")
    _check_indices("row", row, order.shape[1], "a row of order")


def check_attention(query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float) -> None:
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
    _check_rank("tiles", walk.tiles, 4, "[B, P, nQ, nK]")
    plans, query_tiles, key_tiles = walk.tiles.shape[1], -(-query_length // TILE), -(-key_length // TILE)
    _check_shape("query_tags", walk.query_tags, (batch, plans, 3, query_length))
    _check_shape("key_tags", walk.key_tags, (batch, plans, 3, key_length))
    _check_shape("counts", walk.counts, (batch, plans, query_tiles, 2))
    _check_shape("tiles", walk.tiles, (batch, plans, query_tiles, key_tiles))
    for name in ("query_tags", "key_tags", "counts", "tiles"):
        _check_dtype(name, getattr(walk, name), torch.int32, "what plan returns")
    for name in ("key", "value"):
        _check_device(name, key if name == "key" else value, query)
    for name in ("query_tags", "key_tags", "counts", "tiles"):
        _check_device(name, getattr(walk, name), query)
    _check_length("head_plan", walk.head_plan, heads, "heads of query")
    _check_indices("head_plan", walk.head_plan, plans, "a row of the plan")
    _check_length("key_head", walk.key_head, heads, "heads of query")
    _check_indices("key_head", walk.key_head, copies, "a head of key")
    if walk.window is not None and walk.window < 1:
        raise ValueError(f"window={walk.window} allows no key; at least 1, or None for no window")
    # The running maximum is taken before scaling, which holds for no negative scale.
    if not (math.isfinite(scale) and scale >= 0.0):
        raise ValueError(f"scale={scale} is not usable; a finite number of at least 0")


def _check_order(x: Tensor, order: Tensor) -> None:
    _check_rank("x", x, 4, "[B, H, S, D]")
    _check_rank("order", order, 3, "[B, P, S]")
    _check_shape("order", order, (x.shape[0], order.shape[1], x.shape[2]))
    _check_dtype("order", order, torch.int32, "slot -> position, as plan returns it")
    _check_device("order", order, x, "x")


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
