"""LongVILA (arXiv 2408.10188) from transformers' parts: SigLIP, a two-layer projector, Qwen2, tokens of each frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel, Qwen2Config, SiglipVisionConfig
from transformers.modeling_outputs import CausalLMOutputWithPast


class FrameConfig(PreTrainedConfig):
    """A frame encoder and a text decoder, joined by a projector.

    video_token_id: the token that stands for each of a video's features. tokens_per_frame: how many features a model
    that merges them leaves of each frame.
    """

    model_type = "tests_frames"

    def __init__(
        self,
        text_config: Mapping[str, Any] | None = None,
        vision_config: Mapping[str, Any] | None = None,
        video_token_id: int = 0,
        tokens_per_frame: int = 16,
        **kwargs: Any,
    ) -> None:
        self.text_config = Qwen2Config(**dict(text_config or {}))
        self.vision_config = SiglipVisionConfig(**dict(vision_config or {}))
        self.video_token_id = video_token_id
        self.tokens_per_frame = tokens_per_frame
        super().__init__(**kwargs)

    def get_text_config(self, *_: Any, **__: Any) -> Qwen2Config:
        """The decoder's config, which caches and `generate` ask for."""
        return self.text_config


class FrameModel(PreTrainedModel, GenerationMixin):
    """Frames through SigLIP, each on its own, their features through a projector, and into Qwen2's embeddings."""

    config_class = FrameConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ("SiglipEncoderLayer", "Qwen2DecoderLayer")

    def __init__(self, config: FrameConfig) -> None:
        super().__init__(config)
        vision, words = config.vision_config.hidden_size, config.text_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.projector = nn.Sequential(nn.Linear(vision, words), nn.GELU(), nn.Linear(words, words))
        self.language_model = AutoModel.from_config(config.text_config)
        self.lm_head = nn.Linear(words, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's word embeddings."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The language head."""
        return self.lm_head

    def frame_features(self, frames: torch.Tensor) -> torch.Tensor:
        """[F, 3, H, W] to [F, tokens, vision width]: what stands for each frame."""
        return self.vision_tower(frames).last_hidden_state

    def get_video_features(self, pixel_values_videos: torch.Tensor, **_: Any) -> torch.Tensor:
        """[B, F, 3, H, W] to [B * F, tokens, text width]."""
        return self.projector(self.frame_features(pixel_values_videos.flatten(0, 1)))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, vocabulary]; videos [B, F, 3, H, W] fill the places of `video_token_id`."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values_videos is not None:
            features = self.get_video_features(pixel_values_videos).to(inputs_embeds)
            places = (input_ids == self.config.video_token_id).unsqueeze(-1).expand_as(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(places, features)
        out = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """The videos go with the prompt alone: later steps have their features in the cache."""
        first = kwargs.get("is_first_iteration", False)
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if not first and kwargs.get("use_cache", True):
            inputs.pop("pixel_values_videos", None)
        return inputs


class LongVila(FrameModel):
    """LongVILA: every frame keeps all of its tokens."""
