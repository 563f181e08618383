"""The runs of a model that the doctor compares: a prefill, decode steps on its cache, greedy generation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

DECODE_STEPS = 4
NEW_TOKENS = 8

Inputs = Mapping[str, Any]


def copy_sharing_weights(model: nn.Module) -> nn.Module:
    """A copy with the same weights in memory: models keep state from one call to the next, weights do not change."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def prefill(model: Any, inputs: Inputs) -> torch.Tensor:
    """Logits [B, S, vocabulary] without a cache."""
    return model(**dict(inputs), use_cache=False).logits


def rollout(model: Any, inputs: Inputs, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a prefill's last token and of decode steps on its cache, [B, steps + 1, vocabulary].

    tokens: [B, steps] what is fed to the steps; None feeds each the likeliest token of the step before.
    """
    out = model(**dict(inputs), use_cache=True)
    logits = [out.logits[:, -1]]
    for step in range(DECODE_STEPS):
        token = logits[-1].argmax(-1, keepdim=True) if tokens is None else tokens[:, step : step + 1]
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def generate(model: Any, inputs: Inputs) -> Any:
    """Greedy tokens and the logits of each."""
    count = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(**dict(inputs), **count, do_sample=False, output_logits=True, return_dict_in_generate=True)
