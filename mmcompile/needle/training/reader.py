"""The model on batches: what it answers, and what it sees on cards."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from mmcompile.needle.cards import cards
from mmcompile.needle.haystack import CARD
from mmcompile.needle.layout import Layout
from mmcompile.needle.scenes import scenes
from mmcompile.needle.task import draw, pixel_values
from mmcompile.needle.training.batches import Batch
from mmcompile.needle.vocabulary import COLOURS, NUMBERS, SHAPES, WORD_NUMBER


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
        frames = draw(batch.haystacks, self.layout, self.rng, self.device)
        with torch.set_grad_enabled(see and torch.is_grad_enabled()):
            features = self._look(frames)
        language = self.model.model.language_model
        ids = torch.as_tensor(batch.ids, device=self.device)
        embedded = language.embed_tokens(ids)
        embedded = embedded.masked_scatter((ids == self.layout.video)[..., None], features)
        positions = torch.as_tensor(batch.positions, device=self.device)
        hidden = language(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        row, position, answer = torch.as_tensor(batch.questions, device=self.device).T
        naming = self._name_some(features, batch)[0] if see else features.new_zeros(())
        return self.model.lm_head(hidden[row, position]).float(), answer, naming

    def name_cards(self, count: int) -> tuple[Tensor, Tensor]:
        """The loss of naming cards and frames of scenes, half of each, and the share of tokens that name the number."""
        height, width = self.layout.frame_size
        colour, shape, number = (self.rng.integers(len(of), size=count // 2) for of in (COLOURS, SHAPES, NUMBERS))
        shown = cards(colour, shape, number, height, width, self.rng, self.device)
        together = self.layout.temporal_patch_size
        plain = scenes((count - len(shown)) * together, height, width, self.rng, self.device)
        features = self._look(torch.cat((shown.repeat_interleave(together, dim=0), plain)))
        nothing = np.full(count - len(shown), -1)
        return self._naming_loss(features, np.concatenate((colour, nothing)), np.concatenate((number, nothing)))

    def _look(self, frames: Tensor) -> Tensor:
        """The vision tower's tokens of frames of the layout's size, `[tokens, hidden]`."""
        patches = pixel_values(frames, self.layout).to(self.dtype)
        grid = self.layout.grid([len(frames) // self.layout.temporal_patch_size])
        return self.model.model.visual(patches, grid_thw=torch.as_tensor(grid, device=self.device)).pooler_output

    def _name_some(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of naming every card of a batch, and as many frames of its scenes."""
        first, named = 0, []
        for haystack in batch.haystacks:
            shown = [one for one in haystack.needles if one.modality == CARD]
            frames = sum(haystack.clips)
            named += [(first + one.frame, one.colour, one.number) for one in shown]
            plain = np.setdiff1d(self.rng.integers(frames, size=len(shown)), [one.frame for one in shown])
            named += [(first + int(frame), -1, -1) for frame in plain]
            first += frames
        frame, colour, number = np.array(named).T
        tokens = features.unflatten(0, (-1, self.layout.frame_tokens))[torch.as_tensor(frame, device=self.device)]
        return self._naming_loss(tokens.flatten(0, 1), colour, number)

    def _naming_loss(
        self, features: Tensor, colours: NDArray[np.int64], numbers: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """Every token of a card, read by the output embeddings, shall name the card's number and its colour, every
        token of a scene the placeholder of videos. colours, numbers: of each frame, -1 for a scene.

        Returns the loss and the share of tokens that name the right number.
        """
        logits = self.model.lm_head(F.rms_norm(features, features.shape[-1:])).float()
        neither = logits[:, self.layout.video, None]
        losses, right = [], logits.new_zeros(())
        for first, of, named in ((self.first_colour, COLOURS, colours), (self.first_number, NUMBERS, numbers)):
            among = torch.cat((logits[:, first : first + len(of)], neither), dim=1)
            wanted = torch.as_tensor(named % (len(of) + 1), device=self.device)
            wanted = wanted.repeat_interleave(self.layout.frame_tokens)
            losses.append(F.cross_entropy(among, wanted))
            right = (among.argmax(-1) == wanted).float().mean()
        return losses[0] + losses[1], right
