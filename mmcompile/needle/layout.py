"""How a model's prompt is laid out: the size of a frame in tokens, and the ids that mark a video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcompile.huggingface import WHOLE_VIDEO_FAMILIES, ModelError
from mmcompile.needle.vocabulary import Ids, WordTokens

FRAME_ROWS = FRAME_COLUMNS = 6  # tokens


@dataclass(frozen=True)
class Layout:
    """What of a model and its tokenizer decides where the tokens of a prompt stand.

    rows, columns: tokens of a frame. patch_size: pixels of a patch. merge_size: patches along each side of a token.
    temporal_patch_size: frames in a patch. tokens_per_second: temporal positions between two temporal patches.
    """

    rows: int
    columns: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    tokens_per_second: int
    video: int
    vision_start: int
    vision_end: int
    words: WordTokens

    @classmethod
    def of(cls, config: Any, tokenizer: Any, *, rows: int = FRAME_ROWS, columns: int = FRAME_COLUMNS) -> Layout:
        """The layout of a transformers config; ModelError for a family whose videos are not one run of tokens."""
        if config.model_type not in WHOLE_VIDEO_FAMILIES:
            raise ModelError(
                f"{config.model_type}: no video layout is known here for this family, only for "
                f"{' and '.join(WHOLE_VIDEO_FAMILIES)}"
            )
        vision = config.vision_config
        return cls(
            rows=rows,
            columns=columns,
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            tokens_per_second=int(getattr(vision, "tokens_per_second", 1)),
            video=config.video_token_id,
            vision_start=config.vision_start_token_id,
            vision_end=config.vision_end_token_id,
            words=WordTokens(tokenizer),
        )

    @property
    def frame_tokens(self) -> int:
        """Tokens of one temporal patch."""
        return self.rows * self.columns

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of a frame in pixels."""
        side = self.patch_size * self.merge_size
        return self.rows * side, self.columns * side

    def grid(self, temporal_patches: list[int]) -> Ids:
        """`video_grid_thw` of clips of so many temporal patches, int64 `[clips, 3]`."""
        rows, columns = self.rows * self.merge_size, self.columns * self.merge_size
        return np.array([(count, rows, columns) for count in temporal_patches], dtype=np.int64)

    def positions(self, types: NDArray[np.int32], temporal_patches: list[int]) -> Ids:
        """Multimodal rotary positions as the model's own `get_rope_index` gives them, int64 `[3, S]`.

        types: `mm_token_type_ids`, `[S]`, with one run of 2 for each clip. temporal_patches: of each clip.
        """
        is_video = types == 2
        step = np.where(is_video, 0, 1)  # what every token of text adds; a clip adds its longer side at its end
        ends = np.flatnonzero(np.diff(is_video.astype(np.int8), append=0) == -1)
        step[ends] = max(self.rows, self.columns)
        start = np.cumsum(step) - step
        positions = np.broadcast_to(start, (3, len(types))).copy()
        temporal, row, column = np.meshgrid(
            np.arange(max(temporal_patches)), np.arange(self.rows), np.arange(self.columns), indexing="ij"
        )
        within = np.stack((temporal * self.tokens_per_second, row, column)).reshape(3, -1)
        for end, count in zip(ends, temporal_patches, strict=True):
            tokens = count * self.frame_tokens
            positions[:, end + 1 - tokens : end + 1] = start[end] + within[:, :tokens]
        return positions
