"""A real transformer whose q and k projections are built, so that it is known what each head looks at.

Every token's embedding carries a code of its spatial site, waves of its position, and whether it is one of a fixed set
of keys; each head's projections look one of them up, with the gain that puts `mass` of the last queries' attention
there. Nothing is added to the residual stream, so that every layer sees the same embeddings: `o_proj` and `down_proj`
are zero. Rotary positions turn one pair of channels (their base is that large), and these are left empty.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from mmcompile import ModalityBoundaries

Kind = Literal["site", "local", "columns"]
TEXT, VIDEO = 0, 2
SITE, WAVES = 20, 16  # channels of a site's code and of a position's waves


@dataclass(frozen=True)
class Planted:
    """A model, a prompt for it, and `kinds[layer][head]`: what each head looks at.

    "site": the keys of the query's own site in every frame. "local": the latest `window` keys. "columns": some fixed
    keys, the same for every query.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    boundaries: ModalityBoundaries
    kinds: tuple[tuple[Kind, ...], ...]


def planted_model(
    kinds: Sequence[Sequence[Kind]],
    *,
    kv_heads: int,
    head_dim: int,
    hidden: int,
    grid: tuple[int, int, int],
    text: int,
    window: int,
    columns: int,
    mass: float = 0.97,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Planted:
    """grid: frames, rows, columns of a video between two runs of `text` tokens. window, columns: keys of such heads."""
    frames, rows, width = grid
    tokens = 2 * text + frames * rows * width
    generator = torch.Generator().manual_seed(seed)
    codes = _Codes(tokens, text, rows * width, window, columns, mass, generator)
    config = Qwen2Config(
        vocab_size=tokens,
        hidden_size=hidden,
        num_hidden_layers=len(kinds),
        num_attention_heads=len(kinds[0]),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=32,
        max_position_embeddings=2 * tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 1e160},
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        embedding = codes.embedding(hidden, generator)
        model.model.embed_tokens.weight.copy_(embedding)
        scale = math.sqrt(hidden) / float(embedding[0].norm())  # what RMSNorm does to every token
        for layer, of_heads in zip(model.model.layers, kinds, strict=True):
            _build(layer, codes, of_heads, kv_heads, head_dim, scale, generator)
    segments = [text, frames * rows * width, text]
    offsets = torch.tensor([0, *segments], dtype=torch.int32).cumsum(0).int()
    told = torch.tensor([[0, 0, 0], list(grid), [0, 0, 0]], dtype=torch.int32)
    boundaries = ModalityBoundaries(offsets, torch.tensor([TEXT, VIDEO, TEXT], dtype=torch.int32), told)
    inputs = {"input_ids": torch.arange(tokens, device=device)[None]}
    return Planted(model, inputs, boundaries, tuple(tuple(row) for row in kinds))


class _Codes:
    """What each token carries, [S, channels], and what a head needs to look it up."""

    def __init__(
        self, tokens: int, text: int, stride: int, window: int, columns: int, mass: float, generator: torch.Generator
    ) -> None:
        position = torch.arange(tokens)
        sites = nn.functional.normalize(torch.randn(stride, SITE, generator=generator), dim=1)
        # Tokens of text have a code each that is no site's.
        site = nn.functional.normalize(torch.randn(tokens, SITE, generator=generator), dim=1)
        video = slice(text, tokens - text)
        site[video] = sites[(position[video] - text) % stride]
        quantile = (torch.arange(WAVES // 2) + torch.rand(WAVES // 2, generator=generator)) / (WAVES // 2)
        angle = position[:, None] * (1.5 * torch.erfinv(quantile.clamp(max=0.99)) / window)
        waves = torch.cat([angle.cos(), angle.sin()], 1) / math.sqrt(WAVES // 2)
        chosen = torch.zeros(tokens, 1)
        chosen[torch.randperm(tokens - 2 * text, generator=generator)[: columns - 1] + text] = 1.0
        chosen[0] = 1.0  # as attention sinks are
        self.site, self.waves, self.chosen = site, waves, chosen
        last = tokens - text - 1
        near = position > last - window
        self.gain: dict[Kind, float] = {
            "site": _gain(site[: last + 1] @ site[last], (position - last)[: last + 1] % stride == 0, mass),
            "local": _gain(waves[: last + 1] @ waves[last], near[: last + 1], mass),
            "columns": _gain(chosen[: last + 1, 0], chosen[: last + 1, 0] > 0, mass),
        }

    def embedding(self, hidden: int, generator: torch.Generator) -> Tensor:
        """[S, hidden]: the codes, a one, what brings all tokens to one length, and noise that values are made of."""
        one = torch.ones_like(self.chosen)
        codes = torch.cat([self.site, self.waves, self.chosen, one, 1 - self.chosen], 1)
        noise = torch.randn(len(codes), hidden - codes.shape[1], generator=generator)
        return torch.cat([codes, nn.functional.normalize(noise, dim=1)], 1)


def _gain(alike: Tensor, planted: Tensor, mass: float) -> float:
    """The factor on the likeness of keys to a query that gives the planted ones the mass."""
    low, high = 0.0, 60.0
    for _ in range(40):
        middle = (low + high) / 2
        held = (middle * alike.double()).softmax(0)[planted].sum()
        low, high = (middle, high) if held < mass else (low, middle)
    return high


def _build(
    layer: nn.Module,
    codes: _Codes,
    kinds: Sequence[Kind],
    kv_heads: int,
    head_dim: int,
    scale: float,
    generator: torch.Generator,
) -> None:
    attention, hidden = layer.self_attn, layer.self_attn.q_proj.weight.shape[1]
    # Rotary positions turn channels 0 and head_dim / 2.
    free = [channel for channel in range(head_dim) if channel not in (0, head_dim // 2)]
    site, waves, chosen = range(SITE), range(SITE, SITE + WAVES), SITE + WAVES
    if len(free) < chosen + 1:
        raise ValueError(f"head_dim={head_dim} has no room for {chosen + 1} channels of codes")
    key = torch.zeros(head_dim, hidden)
    for channel, code in zip(free, range(chosen + 1), strict=False):
        key[channel, code] = 1 / scale
    looked_up: dict[Kind, Callable[[Tensor, float], None]] = {
        "site": lambda query, gain: _copy(query, free, site, gain),
        "local": lambda query, gain: _copy(query, free, waves, gain),
        # The query of every token is the same: the embedding's one looks for the mark of the chosen keys.
        "columns": lambda query, gain: query[free[chosen]].__setitem__(chosen + 1, gain),
    }
    queries = []
    for kind in kinds:
        query = torch.zeros(head_dim, hidden)
        looked_up[kind](query, codes.gain[kind] * math.sqrt(head_dim) / scale)
        queries.append(query)
    noise = torch.randn(kv_heads * head_dim, hidden, generator=generator) / math.sqrt(hidden)
    attention.q_proj.weight.copy_(torch.cat(queries))
    attention.k_proj.weight.copy_(key.repeat(kv_heads, 1))
    attention.v_proj.weight.copy_(noise)
    for bias in (attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias):
        bias.zero_()
    attention.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()


def _copy(query: Tensor, free: Sequence[int], codes: range, gain: float) -> None:
    for code in codes:
        query[free[code], code] = gain
