"""Memory that each op needs on a GPU while it runs, besides its arguments and what it returns, in bytes.

Formulas of the sizes alone, read off the code that allocates; `tests/gpu` holds them against what is measured. They
predict, and nothing is allocated by them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import mmcompile.kernels.ops  # noqa: F401  registers torch.ops.mminference
from mmcompile.kernels import in_chunks
from mmcompile.kernels.patterns import decode
from mmcompile.kernels.tile_bounds import tile_count

_OPS = torch.ops.mminference
INT32, INT64, FLOAT32 = 4, 8, 4  # bytes
# For each token of an order: what it is sorted by, its site and its frame, and what torch's sort takes.
ARRANGED = 12 * INT32
# For each token of an order: slot and position of a key, the keys of each group sorted with their slots and ranks, and
# of a query the first and last tile that it may and must see.
PLACED = 6 * INT32 + 2 * INT64
SAMPLED = 64 * 3  # queries of a plan row that are looked at, at most, but for those of each tile


def arrange_bytes(*arguments: Any) -> int:
    """The tokens sorted, one order at a time."""
    batch, query_length, key_length = arguments[10:13]
    return ARRANGED * int(batch * max(query_length, key_length))


def plan_bytes(
    query: Tensor | None,
    key: Tensor | None,
    query_order: Tensor,
    key_order: Tensor,
    *arguments: Any,
) -> int:
    """What is known of each token and of each tile of each pattern's orders, and the estimate of one pattern's rows."""
    from mmcompile.kernels.plan import LEVELS_AT_ONCE

    batch, queries, query_length = query_order.shape
    keys, key_length = key_order.shape[1:]
    patterns, _, density, _ = arguments[-4:]
    tiles = tile_count(query_length) * tile_count(key_length)
    rows = decode(patterns)
    of_tokens = PLACED * batch * (queries * query_length + keys * key_length)
    of_tiles = sum(batch * len(pattern.orders) * tiles for pattern in dict.fromkeys(rows))  # a byte each
    most = 0
    for pattern in dict.fromkeys(rows):
        if density == 1.0 or not pattern.needs_data:
            continue
        together = min(batch * rows.count(pattern), max(1, LEVELS_AT_ONCE // tiles))
        # Of each sample on each tile; of each key its weight, as a sum of integers for a site, and whether it is one
        # that is listed.
        estimate = FLOAT32 * SAMPLED * tile_count(key_length) + (FLOAT32 + INT64 + 1) * key_length
        if pattern.kind == "top_p":
            estimate += 2 * tiles  # int16 levels
        most = max(most, together * estimate)
    return int(of_tokens + of_tiles + most)


def attention_bytes(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> int:
    """Single keys gathered for each head; queries in their order, and the output in it, where no kernel folds them."""
    columns, query_order = arguments[6], arguments[14] if len(arguments) > 14 else None
    batch, heads, length, width = query.shape
    gathered = 2 * batch * heads * columns.shape[2] * width * key.element_size()
    copies = 0 if query_order is None or _kernel_folds(query, length) else 2 * query.numel() * query.element_size()
    return int(gathered + copies)


def _kernel_folds(query: Tensor, length: int) -> bool:
    if query.device.type == "cpu":  # where a GPU's memory is asked for: of one whose kernel does
        return True
    # Triton is imported for a GPU only.
    from mmcompile.kernels.hopper_support import FOLDS_FROM, why_not

    return length >= FOLDS_FROM and why_not(query.device, query.dtype, query.shape[3]) is None


WORKSPACE_BYTES: Mapping[Any, Callable[..., int]] = {
    _OPS.arrange.default: arrange_bytes,
    _OPS.plan.default: plan_bytes,
    _OPS.block_sparse_attention.default: attention_bytes,
    _OPS.in_chunks.default: in_chunks.workspace_bytes,
}
"""By op; one that is not here needs nothing."""
