"""The model of the task: a Qwen2.5-VL of four million parameters, and where its trained checkpoint is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Qwen2_5_VLConfig

from mmcompile.needle.layout import FRAME_COLUMNS, FRAME_ROWS
from mmcompile.needle.vocabulary import END, IMAGE, SPECIAL, VIDEO, VISION_END, VISION_START

KEPT_MODEL = Path(__file__).parents[2] / "examples" / "needle_model"  # in the repository
PATCH = 8  # pixels
VOCABULARY = 512


def needle_config() -> Qwen2_5_VLConfig:
    """The config of the model; `word_tokenizer` gives its token ids."""
    hidden, head_dim = 256, 64
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": hidden,
            "intermediate_size": 640,
            "num_hidden_layers": 4,
            "num_attention_heads": hidden // head_dim,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2**20,
            "initializer_range": 0.03,
            # So slow at the end that content is found at any distance.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [8, 12, 12]},
            "bos_token_id": None,
            "eos_token_id": SPECIAL.index(END),
            "pad_token_id": SPECIAL.index(END),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": PATCH,
            "window_size": PATCH * FRAME_ROWS,  # four windows a frame
            "tokens_per_second": 1,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1, 3],
            "initializer_range": 0.03,
        },
        image_token_id=SPECIAL.index(IMAGE),
        video_token_id=SPECIAL.index(VIDEO),
        vision_start_token_id=SPECIAL.index(VISION_START),
        vision_end_token_id=SPECIAL.index(VISION_END),
        tie_word_embeddings=True,
    )


def preprocessing() -> dict[str, Any]:
    """The model's `preprocessor_config.json`, as Qwen2-VL's; `mmcompile.video_patches` does what it says."""
    from mmcompile.video_patches import CLIP_MEAN, CLIP_STD

    side = 2 * PATCH
    area = FRAME_ROWS * side * FRAME_COLUMNS * side
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": area, "longest_edge": area},
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
