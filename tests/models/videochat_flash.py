"""VideoChat-Flash (arXiv 2501.00574) from transformers' parts: frames merged to 16 tokens each before the decoder."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.models.longvila import FrameModel


class VideoChatFlash(FrameModel):
    """A frame's features merge, most alike pairs first, until `tokens_per_frame` are left."""

    def frame_features(self, frames: torch.Tensor) -> torch.Tensor:
        """[F, 3, H, W] to [F, tokens_per_frame, vision width]."""
        features = super().frame_features(frames)
        while features.shape[1] > self.config.tokens_per_frame:
            features = merge_alike(
                features, min(features.shape[1] // 2, features.shape[1] - self.config.tokens_per_frame)
            )
        return features


def merge_alike(features: torch.Tensor, pairs: int) -> torch.Tensor:
    """Token merging (arXiv 2210.09461): the `pairs` even tokens most alike an odd one become their mean.

    features: [F, N, D]. Returns [F, N - pairs, D], the even tokens that are left and then the odd ones.
    """
    even, odd = features[:, ::2], features[:, 1::2]
    likeness = F.normalize(even, dim=-1) @ F.normalize(odd, dim=-1).transpose(1, 2)  # [F, even, odd]
    best, partner = likeness.max(-1)
    order = best.argsort(-1, descending=True)
    merged, kept = order[:, :pairs], order[:, pairs:].sort(-1).values
    width = features.shape[-1]
    sources = even.gather(1, merged.unsqueeze(-1).expand(-1, -1, width))
    targets = partner.gather(1, merged).unsqueeze(-1).expand(-1, -1, width)
    odd = odd.scatter_reduce(1, targets, sources, "mean", include_self=True)
    return torch.cat([even.gather(1, kept.unsqueeze(-1).expand(-1, -1, width)), odd], 1)
