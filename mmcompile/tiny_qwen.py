"""A tiny Qwen2.5-VL with fixed random weights: the real classes and code paths, in a model that loads fast.

The demo and the tests use it. It has learned nothing: it shows what runs and how exact it is, never quality.
"""

from __future__ import annotations

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SEED = 2504


def tiny_qwen2_5_vl(
    *,
    layers: int = 2,
    hidden_size: int = 64,
    heads: int = 4,
    key_value_heads: int = 2,
    vision_depth: int = 2,
    window_size: int = 56,
    initializer_range: float = 0.05,
) -> Qwen2_5_VLForConditionalGeneration:
    """Build the model from a config, in eval mode, float32, on the CPU.

    Args:
        layers: of the text decoder.
        hidden_size: of the text decoder; `hidden_size / heads`, the head dim, must divide by 4.
        heads: query heads.
        key_value_heads: key and value heads.
        vision_depth: layers of the vision tower; the last one attends to whole frames, the others to windows.
        window_size: side of a vision window in pixels. The tower runs one attention for each window.
        initializer_range: standard deviation of the weights; at the usual 0.02 attention is all but uniform.

    Raises:
        ValueError: the head dim does not divide by 4 (M-RoPE needs three parts of half of it).
    """
    head_dim = hidden_size // heads
    if hidden_size % heads or head_dim % 4:
        raise ValueError(f"hidden_size={hidden_size} over heads={heads} must give a head dim that divides by 4")
    quarter = head_dim // 4
    spatial = (head_dim // 2 - quarter + 1) // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "max_position_embeddings": 131072,
            "initializer_range": initializer_range,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head_dim // 2 - 2 * spatial, spatial, spatial],
            },
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "window_size": window_size,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": [vision_depth - 1],
            "initializer_range": initializer_range,
        },
        image_token_id=500,
        video_token_id=501,
        vision_start_token_id=502,
        vision_end_token_id=503,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Qwen2_5_VLForConditionalGeneration(config).eval()
