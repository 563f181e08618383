"""Triton kernels of `kernels/scene.py`, and their launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.scene import Rows

SAMPLES = 128  # sampled queries of one program
OPTIONS = {"num_warps": 4}
SIZES = ["plans", "query_orders", "key_orders", "query_length", "key_length", "samples", "slot_stride"]


@triton.jit(do_not_specialize=SIZES)
def _own_tiles_kernel(
    query_tags, key_slots, query_row, key_row, slot, output,
    plans, query_orders, key_orders, query_length, key_length, samples, slot_stride,
    TILE: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """query_tags: int32 [B, Oq, 3, Sq]. key_slots: int32 [B, Ok, Sk]. slot: int64, output: int32 [N, samples]."""
    blocks = tl.cdiv(samples, SAMPLES)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    sample = tl.program_id(0) % blocks * SAMPLES + tl.arange(0, SAMPLES)
    inside = sample < samples
    batch = row // plans
    query_tags += (batch * query_orders + tl.load(query_row + row)) * 3 * query_length
    key_slots += (batch * key_orders + tl.load(key_row + row)) * key_length
    position = tl.load(
        query_tags + tl.load(slot + row * slot_stride + sample, mask=inside, other=0), mask=inside, other=0
    )
    own = tl.load(key_slots + tl.minimum(tl.maximum(position, 0), key_length - 1), mask=inside, other=0)
    tl.store(output + row * samples + sample, own // TILE, mask=inside)


def own_tiles(rows: Rows, slot: Tensor) -> Tensor:
    """`Rows.own_tiles`."""
    tags, key_slots = rows.scene.arrangement.query_tags, rows.scene.key_slots()
    slot = slot if slot.stride(1) == 1 else slot.contiguous()
    count, samples = slot.shape
    output = torch.empty(count, samples, dtype=torch.int32, device=slot.device)
    with torch.cuda.device_of(slot):
        _own_tiles_kernel[(count * triton.cdiv(samples, SAMPLES),)](
            tags.contiguous(), key_slots.contiguous(), rows.query_row.contiguous(), rows.key_row.contiguous(),
            slot, output, len(rows.heads), tags.shape[1], key_slots.shape[1], tags.shape[3], key_slots.shape[2],
            samples, slot.stride(0), TILE, SAMPLES, **OPTIONS,
        )  # fmt: skip
    return output
