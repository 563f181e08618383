"""How far the output of one layer's attention is from dense, for any patterns of its heads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcompile.kernels.attend import Arranged, arrange_attention, plan_attention
from mmcompile.kernels.orders import token_modality
from mmcompile.kernels.patterns import MODALITIES, HeadPattern
from mmcompile.passes.record_attention import SeenAttention

_AT_ONCE = 2**26  # elements of outputs that are compared together: 256 MiB in float32


@dataclass(frozen=True)
class Score:
    """Of each head, on the host.

    error: ||output - dense|| / ||dense|| over all queries. by_modality: the same over the queries of each modality, NaN
    where there are none. density: computed tiles over the causal ones. recall: mean share of a query's attention that
    the computed keys hold.
    """

    error: tuple[float, ...]
    by_modality: tuple[tuple[float, ...], ...]
    density: tuple[float, ...]
    recall: tuple[float, ...]


class LayerAttention:
    """One layer's queries, keys and values with their dense output; scores patterns against it.

    recall comes from attention itself: with values that are 1 at the first key and 0 elsewhere, an output is that key's
    share of the softmax over what was computed. Every pattern computes the first key, so that dense output over sparse
    output is the sum that the sparse softmax lacks. Queries that do not see it (a window) are left out.
    """

    def __init__(self, seen: SeenAttention) -> None:
        self.seen = seen
        query, key = seen.query, seen.key
        self._first = _first_keys(seen)  # values as described above
        dense = plan_attention(query, key, HeadPattern(), seen.boundaries, density=1.0, **seen.mask)
        self.output = dense.attend(query, seen.value)  # [B, H, S, D]
        self._dense_share = dense.attend(query, self._first)[..., 0]  # [B, H, S]
        of_token = token_modality(seen.boundaries[0], seen.boundaries[1], query.shape[0], query.shape[2])
        kinds = torch.arange(MODALITIES, device=query.device)
        self._is_modality = (of_token.unsqueeze(1) == kinds[:, None]).float()  # [B, M, S]
        self._energy = self._by_modality(torch.zeros_like(self.output))  # float [H, M]
        self.tokens_of: list[int] = self._is_modality.sum((0, 2)).long().tolist()  # of each modality
        self.modalities = [kind for kind, tokens in enumerate(self.tokens_of) if tokens]

    @property
    def heads(self) -> int:
        return self.seen.query.shape[1]

    def arrange(self, patterns: HeadPattern | Sequence[HeadPattern]) -> Arranged:
        """The attention in the orders of one pattern for every head, or of one a head."""
        return arrange_attention(self.seen.query, self.seen.key, patterns, self.seen.boundaries, **self.seen.mask)

    def score(self, patterns: HeadPattern | Sequence[HeadPattern]) -> "_Pending":
        """Plan, run and compare. Nothing waits for the device until `Score`s are read, by `read`."""
        planned = self.arrange(patterns).plan()
        output = planned.attend(self.seen.query, self.seen.value)
        share = planned.attend(self.seen.query, self._first)[..., 0].float()
        dense = self._dense_share.float()
        known = (dense > 0) & (share > 0)
        held = torch.where(known, dense / share, 0.0).clamp_(max=1.0).sum((0, 2)) / known.sum((0, 2))
        wrong = self._by_modality(output)
        figures = torch.cat(
            [
                # A head whose values are all 0 is right whatever it computes.
                (wrong.sum(1, keepdim=True) / self._energy.sum(1, keepdim=True).clamp(min=1e-30)).sqrt(),
                (wrong / self._energy).sqrt(),
                planned.of_heads(planned.density).mean(0).unsqueeze(1),
                held.unsqueeze(1),
            ],
            1,
        )
        return _Pending(figures)

    def _by_modality(self, output: Tensor) -> Tensor:
        """Squared difference from the dense output, over the queries of each modality: float [H, M]."""
        parts = []
        for heads in self._chunks():
            # Of dense itself what is wanted is how large it is.
            difference = output[:, heads].float() - self.output[:, heads].float()
            parts.append(torch.einsum("bhs,bms->hm", difference.square().sum(-1), self._is_modality))
        return torch.cat(parts)

    def _chunks(self) -> Iterator[slice]:
        batch, heads, length, width = self.output.shape
        most = max(1, _AT_ONCE // (batch * length * width))
        yield from (slice(first, first + most) for first in range(0, heads, most))


@dataclass(frozen=True, eq=False)
class _Pending:
    """A score on its way: float [H, 1 + M + 2] on the device."""

    figures: Tensor

    def read(self) -> Score:
        """Wait for the device."""
        rows: list[list[float]] = self.figures.double().tolist()
        return Score(
            error=tuple(row[0] for row in rows),
            by_modality=tuple(tuple(row[1:-2]) for row in rows),
            density=tuple(row[-2] for row in rows),
            recall=tuple(row[-1] for row in rows),
        )


def _first_keys(seen: SeenAttention) -> Tensor:
    """Values [B, KV, Sk, D] that are 1 in the first channel of each sequence's first valid key, and 0 elsewhere."""
    values = torch.zeros_like(seen.value)
    first: Any = 0
    if seen.key_valid is not None:
        first = seen.key_valid.expand(values.shape[0], -1).int().argmax(-1)
    values[torch.arange(values.shape[0], device=values.device), :, first, 0] = 1.0
    return values
