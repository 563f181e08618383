"""One table of vision-language families: a tiny model of each, with fixed random weights, and prompts for it.

The models are transformers' own classes, two text and two vision layers wide enough to show every structure. They have
learned nothing: they show what compiles and how exact it is. `FAMILIES` is the table; a line says what is particular
to a family, the functions below what families share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Qwen2_5OmniThinker

from mmcompile.doctor import Prompts
from tests.models.longvila import FrameConfig, FrameModel, LongVila
from tests.models.videochat_flash import VideoChatFlash

SEED = 2504
# Standard deviation of the weights: at the usual 0.02 attention is all but uniform in so narrow a model.
SPREAD = 0.1
WORDS, IMAGE, VIDEO, START, END = 490, 500, 501, 502, 503  # words are the ids from 3 on
PAD, BOS, EOS = 0, 1, 2

# Known limits, by (way, check), each until what it names is put right.
_MASK_FROM_PARENT = "the mask is made outside of the decoder and arrives ready-made, one value for each query and key"
_DEEPSTACK = (
    "transformers indexes by a boolean mask inside the layer loop; after that break the mask arrives ready-made. "
    "torch._dynamo.config.capture_dynamic_output_shape_ops, which mmcompile.compile sets, keeps the graph whole"
)
_WITH_MASK = ("no cache", "cache + decode", "padded batch", "second length", "sparse")  # generate passes none
MASK_FROM_PARENT = {("text model", "*"): _MASK_FROM_PARENT}
DEEPSTACK = {(way, check): _DEEPSTACK for way in ("torch.compile", "text model") for check in _WITH_MASK}

# Tokens of text before and after the picture: some tiles of 128, so that a wrong tile would show.
LENGTHS = ((120, 50), (130, 141), (250, 162))
PADDED = ((160, 9), (7, 134))

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """How to build one family and how its prompts look.

    config: fields of its config. pictures: so many images or videos of one shape, as the model's keyword arguments.
    placeholder: the token that stands for each of a picture's features; around: tokens before and after each run.
    types: the input that tells modalities apart, and what it says of a picture; None for a model that has none.
    build: makes the model from the family's name and config. known: (way, check) to why it fails today; a way or a
    check may be "*".
    """

    name: str
    config: Mapping[str, Any]
    pictures: Callable[[int], Inputs]
    placeholder: int = IMAGE
    around: tuple[Sequence[int], Sequence[int]] = ((), ())
    types: tuple[str, int] | None = None
    build: Callable[[str, Mapping[str, Any]], nn.Module] = field(default=lambda name, config: _from_auto(name, config))
    known: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def model(self) -> Any:
        """The tiny model, float32, in eval mode, on the CPU, its weights the same at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = self.build(self.name, self.config)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=SPREAD)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
        return model.eval()

    def why_not(self, way: str, check: str) -> str | None:
        """Why a check is known to fail, or to leave attention dense; None where it works."""
        keys = ((way, check), (way, "*"), ("*", check), ("*", "*"))
        return next((self.known[key] for key in keys if key in self.known), None)

    def prompts(self, model: Any) -> Prompts:
        """Three lengths of one layout, and a batch of two, padded on the left."""
        first, second, third = (self._batch(model, [texts]) for texts in LENGTHS)
        return Prompts(first, second, third, self._batch(model, PADDED))

    @torch.no_grad()
    def _batch(self, model: Any, rows: Sequence[tuple[int, int]]) -> Inputs:
        generator = torch.Generator().manual_seed(SEED)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            pictures = self.pictures(len(rows))
        run = [*self.around[0], *[self.placeholder] * (feature_count(model, pictures) // len(rows)), *self.around[1]]
        ids = []
        for before, after in rows:
            words = torch.randint(3, WORDS, (before + after,), generator=generator).tolist()
            ids.append([*words[:before], *run, *words[before:]])
        longest = max(map(len, ids))
        tokens = torch.tensor([[PAD] * (longest - len(row)) + row for row in ids])
        inputs = {"input_ids": tokens, "attention_mask": tokens.ne(PAD).long()} | pictures
        if self.types is not None:
            name, kind = self.types
            inputs[name] = torch.where(tokens == self.placeholder, kind, 0).int()
        return inputs


def feature_count(model: Any, pictures: Inputs) -> int:
    """How many tokens the encoder makes of the pictures: each takes one placeholder."""
    name = "get_video_features" if any("video" in name for name in pictures) else "get_image_features"
    encode = getattr(model, name, None) or getattr(model.model, name)
    features = encode(**pictures, return_dict=True)
    features = getattr(features, "pooler_output", features)
    parts = features if isinstance(features, list | tuple) else [features]
    return sum(part.numel() for part in parts) // model.config.get_text_config().hidden_size


def _from_auto(name: str, config: Mapping[str, Any]) -> nn.Module:
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **config))


def _omni_thinker(name: str, config: Mapping[str, Any]) -> nn.Module:
    return Qwen2_5OmniThinker._from_config(AutoConfig.for_model(name, **config))


def _perception_lm(name: str, config: Mapping[str, Any]) -> nn.Module:
    """PerceptionLM with CLIP's tower in place of timm's, so that no test needs timm."""
    vision = CLIPVisionConfig(**CLIP, model_args={"embed_dim": CLIP["hidden_size"]})
    return _from_auto(name, {**config, "vision_config": vision})


def _frames(kind: type[FrameModel]) -> Callable[[str, Mapping[str, Any]], nn.Module]:
    return lambda name, config: kind._from_config(FrameConfig(**config, video_token_id=VIDEO))


def text(model_type: str, **fields: Any) -> dict[str, Any]:
    """Config of a text decoder: two layers, four heads over two key-value heads, head dim 16."""
    shared = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return {"model_type": model_type} | shared | fields


def mrope(sections: Sequence[int], **fields: Any) -> dict[str, Any]:
    """Multimodal rotary positions: how many of the head dim's 8 pairs follow time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)} | fields}


VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14} | VIT
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, "vision_use_head": False} | VIT
QWEN_VIT = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
GRID_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
LLAVA_IDS = {"image_token_index": IMAGE, "video_token_index": VIDEO}
OMNI_IDS = LLAVA_IDS | {
    "vision_start_token_id": START,
    "audio_token_index": 504,
    "audio_start_token_id": 505,
    "audio_end_token_id": 506,
}
GLM_IDS = {"image_token_id": IMAGE, "image_start_token_id": START, "image_end_token_id": END} | {
    "video_token_id": VIDEO,
    "video_start_token_id": 504,
    "video_end_token_id": 505,
}
GEMMA_IDS = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
OVIS_IDS = {"visual_indicator_token_ids": [505, 506, 507, 508, 509]}
WIDE = {"hidden_size": 64, "vocab_size": 512}  # models that repeat the decoder's sizes
TILED = {"image_grid_pinpoints": [[56, 112]]}
QWEN3_TEXT = {"head_dim": 16} | mrope((4, 2, 2), mrope_interleaved=True)
QWEN2_VIT = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
WINDOW_VIT = QWEN_VIT | {"window_size": 112, "fullatt_block_indexes": [1]}
GLM_VIT = QWEN_VIT | {"image_size": 56}
SQUARE_VIT = VIT | {"image_size": 56, "patch_size": 14}
INTERN_VIT = VIT | {"image_size": [56, 56], "patch_size": [14, 14]}
PIXTRAL = VIT | {"model_type": "pixtral", "head_dim": 16, "patch_size": 14}
QWEN3_VIT = QWEN_VIT | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}


def images(side: int) -> Callable[[int], Inputs]:
    """`pixel_values` `[count, 3, side, side]`."""
    return lambda count: {"pixel_values": torch.randn(count, 3, side, side)}


def tiled_images(tiles: int, side: int, *, sizes: bool = True) -> Callable[[int], Inputs]:
    """`pixel_values` `[count, tiles, 3, side, side]`, and with `sizes` the `image_sizes` before they were tiled."""

    def make(count: int) -> Inputs:
        pixels = {"pixel_values": torch.randn(count, tiles, 3, side, side)}
        return pixels | ({"image_sizes": torch.tensor([[side, side]] * count)} if sizes else {})

    return make


def sized_images(side: int) -> Callable[[int], Inputs]:
    """`pixel_values` `[count, 3, side, side]` and `image_sizes`."""
    return lambda count: images(side)(count) | {"image_sizes": torch.tensor([[side, side]] * count)}


def videos(frames: int, side: int) -> Callable[[int], Inputs]:
    """`pixel_values_videos` `[count, frames, 3, side, side]`."""
    return lambda count: {"pixel_values_videos": torch.randn(count, frames, 3, side, side)}


def grid_videos(patch: int, t: int, h: int, w: int, **each: Any) -> Callable[[int], Inputs]:
    """Patches of videos as `pixel_values_videos` `[count * t * h * w, 3 * frames * patch**2]` and `video_grid_thw`.

    each: more inputs, with one entry a video. A patch has two frames, or one where `each` names merge sizes.
    """

    def make(count: int) -> Inputs:
        width = 3 * (1 if each else 2) * patch**2
        grids = {"video_grid_thw": torch.tensor([[t, h, w]] * count)}
        extras = {name: torch.tensor([value] * count) for name, value in each.items()}
        return {"pixel_values_videos": torch.randn(count * t * h * w, width)} | grids | extras

    return make


def grid_images(patch: int, h: int, w: int) -> Callable[[int], Inputs]:
    """Patches of images as `pixel_values` `[count * h * w, 3 * 2 * patch**2]` and `image_grid_thw`."""

    def make(count: int) -> Inputs:
        grids = torch.tensor([[1, h, w]] * count)
        return {"pixel_values": torch.randn(count * h * w, 3 * 2 * patch**2), "image_grid_thw": grids}

    return make


def pooled_images(count: int) -> Inputs:
    """Molmo 2's: patches of one 4 x 4 crop an image, and which four patches each of its 2 x 2 tokens pools."""
    corners = torch.tensor([0, 2, 8, 10])[:, None] + torch.tensor([0, 1, 4, 5])
    pooling = torch.cat([corners + 16 * index for index in range(count)])
    grids = torch.tensor([[2, 2, 0, 0]] * count)
    return {
        "pixel_values": torch.randn(count, 16, 14 * 14 * 3),
        "image_token_pooling": pooling,
        "image_grids": grids,
    }


def flexible_images(count: int) -> Inputs:
    """SigLIP 2's: 4 x 6 patches of 16 x 16 pixels an image."""
    return {
        "pixel_values": torch.randn(count, 24, 16 * 16 * 3),
        "spatial_shapes": torch.tensor([[4, 6]] * count),
        "pixel_attention_mask": torch.ones(count, 24, dtype=torch.int64),
    }


MOLMO_TEXT = text("molmo2_text", head_dim=16, additional_vocab_size=0)
MOLMO_VIT = VIT | {"num_key_value_heads": 2, "head_dim": 16, "image_size": [56, 56], "num_position_embeddings": 16}
MOLMO_ADAPTER = {"vision_feature_layer": [1, 0], "hidden_size": 32, "intermediate_size": 64, "text_hidden_size": 64} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GOT_VIT = {
    "hidden_size": 32,
    "mlp_dim": 64,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
} | {
    "image_size": 128,
    "window_size": 4,
    "global_attn_indexes": [1],
}
AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
SLIDING = {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "num_local_experts": 4}

MARKED = ([START], [END])
IMAGE_TYPES, VIDEO_TYPES = ("mm_token_type_ids", 1), ("mm_token_type_ids", 2)
GEMMA_TYPES = ("token_type_ids", 1)


def vlm(text_config: Mapping[str, Any], vision_config: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """Config of a whole model."""
    return {"text_config": dict(text_config), "vision_config": dict(vision_config)} | others


_ROWS = (
    Family(
        "qwen2_vl",
        vlm(text("qwen2_vl_text", **mrope((2, 3, 3))), QWEN2_VIT, **GRID_IDS),
        grid_videos(14, 2, 4, 4),
        VIDEO,
        MARKED,
        VIDEO_TYPES,
    ),
    Family(
        "qwen2_5_vl",
        vlm(text("qwen2_5_vl_text", **mrope((2, 3, 3))), WINDOW_VIT, **GRID_IDS),
        grid_videos(14, 2, 4, 4),
        VIDEO,
        MARKED,
        VIDEO_TYPES,
    ),
    Family(
        "qwen2_5_omni_thinker",
        vlm(text("qwen2_5_omni_text", **mrope((2, 3, 3))), WINDOW_VIT, audio_config=AUDIO, **OMNI_IDS),
        grid_images(14, 4, 4),
        IMAGE,
        MARKED,
        build=_omni_thinker,
    ),
    Family(
        "qwen3_vl",
        vlm(text("qwen3_vl_text", **QWEN3_TEXT), QWEN3_VIT, **GRID_IDS),
        grid_images(16, 4, 4),
        IMAGE,
        MARKED,
        IMAGE_TYPES,
        known=DEEPSTACK,
    ),
    Family(
        "qwen3_vl_moe",
        vlm(text("qwen3_vl_moe_text", **QWEN3_TEXT, **EXPERTS), QWEN3_VIT, **GRID_IDS),
        grid_images(16, 4, 4),
        IMAGE,
        MARKED,
        IMAGE_TYPES,
        known=DEEPSTACK,
    ),
    Family(
        "glm4v",
        vlm(text("glm4v_text", **mrope((2, 1, 1), partial_rotary_factor=0.5)), GLM_VIT, **GLM_IDS),
        grid_images(14, 4, 4),
        IMAGE,
        MARKED,
        IMAGE_TYPES,
    ),
    Family(
        "video_llama_3",
        vlm(text("qwen2"), VIT, image_token_id=IMAGE, video_token_id=VIDEO),
        grid_videos(16, 2, 4, 4, video_merge_sizes=2),
        VIDEO,
    ),
    Family("llava", vlm(text("llama"), CLIP, **LLAVA_IDS), images(56)),
    Family("llava_next", vlm(text("mistral"), CLIP, **LLAVA_IDS, **TILED), tiled_images(3, 56)),
    Family("llava_onevision", vlm(text("qwen2"), SIGLIP, **LLAVA_IDS, **TILED), videos(2, 56), VIDEO),
    Family("llava_next_video", vlm(text("llama"), CLIP, **LLAVA_IDS, **TILED), videos(2, 56), VIDEO),
    Family("internvl", vlm(text("qwen2"), INTERN_VIT, image_token_id=IMAGE), images(56)),
    Family(
        "gemma3",
        vlm(text("gemma3_text", query_pre_attn_scalar=16, **SLIDING), SIGLIP, mm_tokens_per_image=4, **GEMMA_IDS),
        images(56),
        IMAGE,
        MARKED,
        GEMMA_TYPES,
        known=MASK_FROM_PARENT,
    ),
    Family(
        "paligemma",
        vlm(
            text("gemma", head_dim=16, num_image_tokens=16), SIGLIP, image_token_index=IMAGE, projection_dim=64, **WIDE
        ),
        images(56),
        types=GEMMA_TYPES,
        known=MASK_FROM_PARENT,
    ),
    Family("mistral3", vlm(text("mistral", head_dim=16), PIXTRAL, image_token_index=IMAGE), sized_images(56)),
    Family("idefics3", vlm(text("llama"), SQUARE_VIT, image_token_id=IMAGE), tiled_images(1, 56, sizes=False)),
    Family("smolvlm", vlm(text("llama"), SQUARE_VIT, image_token_id=IMAGE), tiled_images(1, 56, sizes=False)),
    Family(
        "molmo2",
        vlm(MOLMO_TEXT, MOLMO_VIT, adapter_config=MOLMO_ADAPTER, image_patch_id=IMAGE),
        pooled_images,
        types=IMAGE_TYPES,
        known=MASK_FROM_PARENT,
    ),
    Family(
        "ovis2",
        vlm(text("qwen2"), SQUARE_VIT | {"vocab_size": 64}, image_token_id=IMAGE, **WIDE, **OVIS_IDS),
        images(56),
        IMAGE,
        ([505], [509]),
    ),
    Family(
        "perception_lm",
        vlm(text("llama"), {}, image_token_id=IMAGE, video_token_id=VIDEO, projector_pooling_ratio=2),
        tiled_images(1, 56, sizes=False),
        build=_perception_lm,
    ),
    Family("aya_vision", vlm(text("cohere2", **SLIDING), SIGLIP, image_token_index=IMAGE), images(56)),
    Family("got_ocr2", vlm(text("qwen2"), GOT_VIT, image_token_index=IMAGE), images(128)),
    Family(
        "lfm2_vl",
        vlm(
            text("lfm2", block_multiple_of=16, full_attn_idxs=[1]),
            VIT | {"num_patches": 64, "vision_use_head": False},
            image_token_id=IMAGE,
            projector_hidden_size=64,
        ),
        flexible_images,
    ),
    Family("longvila", vlm(text("qwen2"), SIGLIP), videos(3, 56), VIDEO, build=_frames(LongVila)),
    Family(
        "videochat_flash",
        vlm(text("qwen2"), SIGLIP | {"image_size": 112}),
        videos(4, 112),
        VIDEO,
        build=_frames(VideoChatFlash),
    ),
)
FAMILIES = {family.name: family for family in _ROWS}
