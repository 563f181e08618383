"""Dense attention with the element mask of the tags, for prefills too short to gain from tiles."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.tile_walk import TileWalk


def dense_attention(query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float) -> Tensor:
    """`block_sparse_attention` as if every tile were listed, by torch's own attention; any device.

    All orders are the same here, so every head takes the tags of the first ones and its first key copy. Holds a mask
    of queries x keys elements while it runs. Returns [B, H, Sq, D] in [B, Sq, H, D] memory.
    """
    key, value = _heads(key, walk.key_head), _heads(value, walk.key_head)
    allowed = walk.allowed(walk.query_tags[:, 0], walk.key_tags[:, 0]).unsqueeze(1)  # [B, 1, Sq, Sk]
    output = scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale)
    # A row without a key is 0 in one of torch's backends, a mean of values or NaN in another.
    output = output.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return output.transpose(1, 2).contiguous().transpose(1, 2)


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
