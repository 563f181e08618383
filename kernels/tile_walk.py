"""What an executor of attention is given besides queries, keys and values: tiles, columns, tags and head maps."""

from typing import NamedTuple

from torch import Tensor

from mmcompile.kernels.tags import element_mask

MAX_WINDOW = 2**30  # a position less this still fits 32 bits


class TileWalk(NamedTuple):
    """Which tiles and single keys each head attends to, and the element mask inside them.

    Head h of batch row b has plan row p = head_plan[h]. Its queries lie in query order query_row[b, p]; it reads key
    copy key_head[h] + key_row[b, p], whose rows lie in key order key_row[b, p]. With first, full, partial, start,
    single = counts[b, p, i], query tile i attends, in one softmax, to

        every element of the tiles from `first` on, `full` of them: all are allowed, and all are cold;
        the allowed and cold elements of the next `partial` tiles;
        the allowed elements of the columns from `start` on, `single` of them: key slots, cold or not.

    No key comes twice to one query. Tensors are as `plan` returns them; `kernels/tags.py` defines what is allowed.
    """

    query_tags: Tensor  # int32 [B, Oq, 3, Sq], in the slots of each query order
    key_tags: Tensor  # int32 [B, Ok, 3, Sk], in the slots of each key order
    query_row: Tensor  # int32 [B, P], the query order of each plan row
    key_row: Tensor  # int32 [B, P], the key order of each plan row
    counts: Tensor  # int32 [B, P, nQ, 5]: first tile entry, full tiles, partial tiles, first column entry, columns
    tiles: Tensor  # int32 [B, P, T], key tiles; entries outside every query tile's list are never read
    columns: Tensor  # int32 [B, P, C], key slots, likewise; lists of several query tiles may overlap. C may be 0
    cold: Tensor  # bool [B, P, Sk], False where no tile attends to the key; [B, P, 0] where C is 0
    head_plan: tuple[int, ...]  # plan row of each query head
    key_head: tuple[int, ...]  # first key copy of each query head; its copies in other key orders follow
    window: int | None
    segments: bool
    spans: bool

    def allowed(self, query_tags: Tensor, key_tags: Tensor) -> Tensor:
        """The element mask of some queries and keys: [..., 3, Q] and [..., 3, K] to bool [..., Q, K]."""
        return element_mask(query_tags, key_tags, self.window, self.segments, self.spans)
