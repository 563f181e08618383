"""Small attentions with every kind of mask, and what a dense implementation says of them."""

import torch

from mmcompile.kernels import reference
from mmcompile.passes.record_attention import SeenAttention

BATCH, HEADS, KV_HEADS, LENGTH, WIDTH = 2, 4, 2, 700, 16


def boundaries(length=LENGTH, batch=BATCH):
    """Text, a video of 4 x 5 frames, text: in each sequence."""
    frames = (length - 100) // 20
    offsets, video = [0], frames * 20
    for start in range(0, batch * length, length):
        offsets += [start + 40, start + 40 + video, start + length]
    grid = [[0, 0, 0], [frames, 4, 5], [0, 0, 0]] * batch
    parts = (offsets, [0, 2, 0] * batch, grid)
    return tuple(torch.tensor(part, dtype=torch.int32) for part in parts)


def seen_attention(mask="causal", length=LENGTH, batch=BATCH, heads=HEADS, kv_heads=KV_HEADS):
    """Random queries, keys and values; mask: "causal", "padding", "window", "segments" or "spans"."""
    position = torch.arange(length).expand(batch, -1)
    segment, span = (position >= 300).int(), torch.where((position >= 100) & (position < 180), 0, -1)
    return SeenAttention(
        2 * torch.randn(batch, heads, length, WIDTH),
        torch.randn(batch, kv_heads, length, WIDTH),
        torch.randn(batch, kv_heads, length, WIDTH),
        boundaries(length, batch),
        WIDTH**-0.5,
        150 if mask == "window" else None,
        0,
        position >= 37 if mask == "padding" else None,
        (segment, segment) if mask == "segments" else None,
        (span, span) if mask == "spans" else None,
        "layers.0",
    )


def dense_weights(seen, planned, head, batch):
    """In token order, [S, S] each: the softmax in float64, what the mask allows, and what the plan computes of it."""
    arrangement, lists, row = planned.arrangement, planned.lists, planned.rows.of_head[head]
    tags = (arrangement.query_tags, arrangement.key_tags)
    of_row = [reference.by_plan_row(tag, which) for tag, which in zip(tags, lists[:2], strict=True)]
    orders = [
        reference.by_plan_row(order, which)
        for order, which in zip((arrangement.query_order, arrangement.key_order), lists[:2], strict=True)
    ]
    masks = (reference.element_mask(*of_row, seen.window), reference.plan_mask(*tags, *lists, seen.window))
    allowed, computed = (reference.in_positions(mask, *orders)[batch, row] for mask in masks)
    group = seen.query.shape[1] // seen.key.shape[1]
    scores = seen.query[batch, head].double() @ seen.key[batch, head // group].double().T * seen.scale
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    return weights, allowed, computed
