"""What an executor of attention is given besides queries, keys and values: tile lists, tags and head maps."""

from typing import NamedTuple

from torch import Tensor


class TileWalk(NamedTuple):
    """Which tiles each head computes, and the element mask inside the partial ones.

    Tensors are int32, as `plan` returns them; `kernels/tags.py` defines the element mask.
    """

    query_tags: Tensor  # [B, P, 3, Sq]
    key_tags: Tensor  # [B, P, 3, Sk]
    counts: Tensor  # [B, P, nQ, 2]
    tiles: Tensor  # [B, P, nQ, nK]
    head_plan: tuple[int, ...]  # plan row of each query head
    key_head: tuple[int, ...]  # key copy of each query head
    window: int | None
    segments: bool
    spans: bool

    def allowed(self, query_tags: Tensor, key_tags: Tensor) -> Tensor:
        """The element mask of some queries and keys, tiles aside.

        query_tags: [..., 3, Q], key_tags: [..., 3, K]. Returns bool [..., Q, K].
        """
        q_position, q_segment, q_span = query_tags.unsqueeze(-1).unbind(-3)
        k_position, k_segment, k_span = key_tags.unsqueeze(-2).unbind(-3)
        allowed = k_position <= q_position
        if self.spans:
            allowed = allowed | ((k_span == q_span) & (q_span >= 0))
        if self.window is not None:
            allowed = allowed & (k_position > q_position - self.window)
        if self.segments:
            allowed = allowed & (k_segment == q_segment)
        return allowed
