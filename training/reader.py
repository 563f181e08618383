"""The model on batches: what it answers, and what it sees on cards."""

import numpy as np
import torch
from batches import Batch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from mmcompile.needle.haystack import CARD
from mmcompile.needle.layout import Layout
from mmcompile.needle.task import draw, pixel_values
from mmcompile.needle.vocabulary import COLOURS, NUMBERS, WORD_NUMBER


class Reader:
    """The model on batches: hidden states where answers are due."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, layout: Layout, seed: int) -> None:
        self.model, self.layout = model, layout
        self.device, self.dtype = model.device, model.dtype
        self.rng = np.random.default_rng(seed)
        words = layout.words.encode(np.array([WORD_NUMBER[COLOURS[0]], WORD_NUMBER[NUMBERS[0]]]))
        self.first_colour, self.first_number = words.tolist()

    def answers(self, batch: Batch, *, see: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[questions, vocabulary]` where answers are due, the answers' ids, and the loss of naming cards."""
        features = self._look(batch, see=see)
        language = self.model.model.language_model
        ids = torch.as_tensor(batch.ids, device=self.device)
        embedded = language.embed_tokens(ids)
        embedded = embedded.masked_scatter((ids == self.layout.video)[..., None], features)
        positions = torch.as_tensor(batch.positions, device=self.device)
        hidden = language(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        row, position, answer = torch.as_tensor(batch.questions, device=self.device).T
        naming = self._naming_loss(features, batch) if see else features.new_zeros(())
        return self.model.lm_head(hidden[row, position]).float(), answer, naming

    def _look(self, batch: Batch, *, see: bool) -> Tensor:
        """The vision tower's tokens of all prompts, `[tokens, hidden]`."""
        frames = draw(batch.haystacks, self.layout, self.rng, self.device)
        patches = pixel_values(frames, self.layout).to(self.dtype)
        grid = self.layout.grid([len(frames) // self.layout.temporal_patch_size])
        with torch.set_grad_enabled(see and torch.is_grad_enabled()):
            grid_thw = torch.as_tensor(grid, device=self.device)
            return self.model.model.visual(patches, grid_thw=grid_thw).pooler_output

    def _naming_loss(self, features: Tensor, batch: Batch) -> Tensor:
        """Every token of a card, read by the output embeddings, shall name the card's number and its colour."""
        first, cards = 0, []
        for haystack in batch.haystacks:
            cards += [(first + one.frame, one.colour, one.number) for one in haystack.needles if one.modality == CARD]
            first += sum(haystack.clips)
        frame, colour, number = torch.tensor(cards, device=self.device).T
        tokens = features.unflatten(0, (-1, self.layout.frame_tokens))[frame]  # [cards, frame tokens, hidden]
        logits = self.model.lm_head(F.rms_norm(tokens, tokens.shape[-1:])).float().transpose(1, 2)
        seen = tokens.shape[1]
        colours = logits[:, self.first_colour : self.first_colour + len(COLOURS)]
        numbers = logits[:, self.first_number : self.first_number + len(NUMBERS)]
        return F.cross_entropy(colours, colour[:, None].expand(-1, seen)) + F.cross_entropy(
            numbers, number[:, None].expand(-1, seen)
        )
