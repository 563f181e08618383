"""Compile a model in place, with its encoders run first and the boundaries of every call taken from its own inputs."""

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import fx, nn

from mmcompile.architecture import Architecture
from mmcompile.backend import mminference
from mmcompile.errors import OptionError
from mmcompile.options import Options
from mmcompile.prefill_steps import with_prefill_steps
from mmcompile.tables import PatternTable
from mmcompile.vision_attention import pack_vision_attention

_TORCH_NAMES = ("fullgraph", "dynamic", "mode")


def compile(
    model: nn.Module,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    **options: Any,
) -> nn.Module:
    """Compile `model` in place with the "mminference" backend and return it.

    Does what `model.compile(backend="mminference", options=options)` does, and for each prefill two things before it:

    - The encoders of images and videos run, and multimodal rotary positions are made, as `generate` of transformers
      does it. The rest then traces as one graph in nearly every family. The encoders themselves run as they are;
      they may be compiled by themselves. Where a model has no such way, its forward is compiled as it stands.
    - The prompt's modality boundaries are read from its inputs (`mm_token_type_ids`, or `input_ids` and the config's
      placeholder ids, or multimodal `position_ids`, with the grids of images and videos). Those given through
      `mmcompile.bind` come first.

    Vision towers that call SDPA once for each window or frame call one attention for all of them from now on, in eager
    mode too; `model.set_attn_implementation("sdpa")` takes that back.

    A prompt whose placeholder tokens and features differ in number runs uncompiled: the model's own error says so.
    Hooks on the model itself see what its forward is then given: arguments by name, and features in place of pixels.
    `model.generate(...)` prefills through what is compiled. Compiling again replaces the options. `copy.deepcopy` and
    pickling take the model without what was compiled: compile the copy. Training runs, with dense attention.

    Args:
        model: compiled in place.
        fullgraph: raise where Dynamo would break the graph, as in `torch.compile`.
        dynamic: whether sizes are symbols from the first call on, as in `torch.compile`.
        mode: Inductor's mode, as in `torch.compile`.
        options: the fields of `Options`.

    Raises:
        OptionError: at once, for a name that is unknown (with the nearest known one) or a value out of range.
        TableError: at once, for a pattern table that was searched for another architecture, saying what differs.
        TypeError: `model` is no `torch.nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}: must be a torch.nn.Module")
    parsed = _parse(options)
    if isinstance(parsed.patterns, PatternTable):
        parsed.patterns.require(Architecture.of(model))
    _check_mode(mode, parsed.inner)
    return compile_with(model, _Backend(parsed, mode), fullgraph=fullgraph, dynamic=dynamic)


def compile_with(
    model: nn.Module,
    backend: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
) -> nn.Module:
    """What `compile` does, with another backend behind it. Returns `model`."""
    model.compile(backend=backend, fullgraph=fullgraph, dynamic=dynamic)
    pack_vision_attention(model)
    if hasattr(model, "generate"):
        model.create_masks_for_generate = MasksForGenerate.of(model)  # type: ignore[assignment]
    compiled: Callable[..., Any] = model._compiled_call_impl  # type: ignore[assignment]  # set by the line above
    model._compiled_call_impl = with_prefill_steps(model, compiled)
    return model


@dataclass(frozen=True)
class MasksForGenerate:
    """What `generate` calls to make masks in advance where a cache has room for all tokens (a StaticCache).

    A prefill's mask stays 2-D: its forward builds the 4-D one in the graph, where it can be read and is never made.
    original: the model's own, for decode steps.
    """

    original: Callable[..., Any]

    @classmethod
    def of(cls, model: nn.Module) -> "MasksForGenerate":
        """For a model that may have been given one before."""
        from transformers.masking_utils import create_masks_for_generate

        found: Any = getattr(model, "create_masks_for_generate", create_masks_for_generate)
        return found if isinstance(found, cls) else cls(found)

    def __call__(self, *args: Any, inputs_embeds: torch.Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        if inputs_embeds.shape[1] > 1 and (attention_mask is None or attention_mask.dim() == 2):
            return attention_mask
        return self.original(*args, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


@dataclass(frozen=True)
class _Backend:
    """The backend with its options. Equal ones are one to Dynamo, so that compiling twice compiles nothing again."""

    options: Options
    mode: str | None
    __name__ = "mminference"  # what Dynamo calls it

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return mminference(module, example_inputs, options=self.options, mode=self.mode)


def _parse(options: Mapping[str, Any]) -> Options:
    if "backend" in options or "options" in options:
        raise OptionError(
            'the backend is always "mminference"; its options are keyword arguments of their own, and inner="..." '
            "names the backend that compiles the rewritten graph"
        )
    known = [*(field.name for field in fields(Options)), *_TORCH_NAMES]
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise OptionError(f"unknown option {name!r}; did you mean {nearest!r}? Options are: {', '.join(known)}")
    return Options.parse(options)


def _check_mode(mode: str | None, inner: str) -> None:
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise OptionError(f"mode={mode!r}: must be one of {', '.join(modes)}, or None")
    if mode not in (None, "default") and inner != "inductor":
        raise OptionError(f'mode={mode!r}: only inner="inductor" has modes, not {inner!r}')


class _NoMetricsErrors(logging.Filter):
    """Drops what torch before 2.13 logs at every compilation: that it cannot write a set of functions as JSON."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "logging compilation metrics" not in record.getMessage()


if torch.__version__ < "2.13":
    logging.getLogger("torch._dynamo.metrics_context").addFilter(_NoMetricsErrors())
