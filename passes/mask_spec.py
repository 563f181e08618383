"""What an attention mask says, in the terms that the sparse plan takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx


@dataclass(frozen=True)
class MaskSpec:
    """A mask read exactly: element (batch, query, key) is allowed where all of these hold.

    - `key_valid` (a condition over batch and key), where given;
    - causal: key <= query + offset, or `query_span == key_span` and `query_span >= 0` where spans are given;
      not causal: nothing in their place;
    - key > query + offset - window, where a window is given;
    - `query_segment == key_segment`, where given.

    `offset` is an int or an expression of sizes: the number of keys before the first query. Expressions are
    over BATCH and QUERY, or BATCH and KEY; `Element(Str(name), ...)` in them reads the node `tensors[name]`.
    `query_length` and `key_length` are the mask's own lengths, as expressions.
    """

    query_length: sympy.Expr
    key_length: sympy.Expr
    causal: bool
    offset: int | sympy.Expr = 0
    window: int | None = None
    key_valid: Boolean | None = None
    query_segment: sympy.Expr | None = None
    key_segment: sympy.Expr | None = None
    query_span: sympy.Expr | None = None
    key_span: sympy.Expr | None = None
    tensors: Mapping[str, fx.Node] = field(default_factory=dict, compare=False)
    device: torch.device | None = field(default=None, compare=False)  # the mask's

    @property
    def is_only_causal(self) -> bool:
        """Whether the mask is key <= query and nothing else, which is what torch's `is_causal` means."""
        parts = (self.window, self.key_valid, self.query_segment, self.query_span)
        return self.causal and self.offset == 0 and all(part is None for part in parts)

    def describe(self) -> str:
        """A short name: "causal+padding", "causal|spans, window 4096", "packed causal (offset 8)"."""
        name = "causal" if self.causal else "bidirectional"
        name = f"packed {name}" if self.query_segment is not None else name
        name += "|spans" if self.query_span is not None else ""
        name += "+padding" if self.key_valid is not None else ""
        name += f", window {self.window}" if self.window is not None else ""
        return name + (f" (offset {self.offset})" if self.offset != 0 else "")


@dataclass(frozen=True)
class OpaqueMask:
    """A mask that was not understood, and why; its attention stays dense."""

    reason: str
