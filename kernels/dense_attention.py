"""Dense attention with the element mask of the tags, for prefills too short to gain from tiles."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.tile_walk import TileWalk


def dense_attention(query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float) -> Tensor:
    """`block_sparse_attention` as if every tile were listed, by torch's own attention; any device.

    Holds a mask of queries x keys elements while it runs. Returns [B, H, Sq, D] in [B, Sq, H, D] memory.
    """
    batch, heads, query_length, width = query.shape
    output = query.new_empty(batch, query_length, heads, width)  # [B, Sq, H, D]
    for plan in sorted(set(walk.head_plan)):
        chosen = tuple(head for head in range(heads) if walk.head_plan[head] == plan)
        copies = tuple(walk.key_head[head] for head in chosen)
        allowed = walk.allowed(walk.query_tags[:, plan], walk.key_tags[:, plan]).unsqueeze(1)  # [B, 1, Sq, Sk]
        part = scaled_dot_product_attention(
            _heads(query, chosen), _heads(key, copies), _heads(value, copies), attn_mask=allowed, scale=scale
        )
        # A row without a key is 0 in one of torch's backends, a mean of values or NaN in another.
        part = part.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        output.index_copy_(2, head_indices(chosen, query.device).long(), part.transpose(1, 2))
    return output.transpose(1, 2)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float) -> Tensor:
    """`dense_attention` where the mask is key <= query and nothing else: no mask is made, and torch's fastest kernel
    takes it. Key heads are repeated, which cuDNN's kernel needs and flash attention does not mind."""
    key, value = _heads(key, walk.key_head), _heads(value, walk.key_head)
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _heads(tensor: Tensor, chosen: tuple[int, ...]) -> Tensor:
    if chosen == tuple(range(tensor.shape[1])):
        return tensor
    return tensor.index_select(1, head_indices(chosen, tensor.device))
