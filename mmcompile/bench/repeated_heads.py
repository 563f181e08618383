"""Causal attention with KV heads repeated, as "repeated" in transformers: held to one backend, torch refuses grouped
heads."""

from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface


def repeated_heads(module, query, key, value, attention_mask, scaling=None, **_unused):
    """query: [B, H, S, D], key and value: [B, KV, S, D]. Returns [B, S, H, D] and None, as transformers asks."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


REPEATED_HEADS = "repeated"
AttentionInterface.register(REPEATED_HEADS, repeated_heads)
