"""An attention for transformers' `attn_implementation` that is sparse in eager mode, for models that do not trace.

    mmcompile.register_attention(density=0.1)
    model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="mminference")

transformers hands a mask entry the callables that say which key a query may see. They are read here by what they are,
never by trial: causal, sliding window, padding. Whatever else they hold becomes a mask of queries x keys for torch's
attention, as with `attn_implementation="sdpa"`, and the log says why, once for each reason.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mmcompile.check_bound import send, warn_of_arrived
from mmcompile.errors import OptionError
from mmcompile.kernels.attend import plan_attention
from mmcompile.kernels.check_inputs import DTYPES, MAX_HEAD_DIM
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.kernels.which_kernel import SPARSE_FROM
from mmcompile.modality import bound_tensors, unknown_boundaries
from mmcompile.options import Options
from mmcompile.prefill import DenseSite, SparseSite, bound_of, keep_site, next_seed
from mmcompile.tables import PatternTable

log = logging.getLogger(__name__)

_OPTIONS = ("patterns", "density", "recall", "min_tokens", "check", "check_bound")
# Arguments of an attention that change what it computes, and that the kernels do not have.
_UNKNOWN_HERE = ("softcap", "s_aux", "position_bias", "cache")


def register_attention(name: str = "mminference", **options: Any) -> None:
    """Register an attention with transformers, for `attn_implementation=name` and `set_attn_implementation(name)`.

    options: `patterns`, `density`, `recall`, `min_tokens`, `check` and `check_bound`, as in `Options`. They belong to
    the name: others go under another name, and registering a name again replaces them for every model that uses it.

    A causal prefill of at least `min_tokens` keys, 32768 by default, runs sparse; decode steps, towers, training,
    dropout and masks that are more than causal, sliding window and padding run as transformers' own "sdpa". Boundaries
    are those of `mmcompile.bind`, else one segment of unknown kind. `mmcompile.stats` tells of each attention of the
    last prefill, and why it ran as "sdpa" if it did. Under `torch.compile` it is "sdpa", which the backend rewrites.

    Raises OptionError for an option that is unknown or out of range, ValueError for a name that means something to
    transformers.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if not name or name in ("eager", "sdpa") or any(mark in name for mark in ("flash", "flex", "|", "/")):
        raise ValueError(f"name={name!r}: transformers gives it a meaning of its own; try 'mminference'")
    parsed = Options.parse(options)
    for option in options:
        if option not in _OPTIONS:
            raise OptionError(f"{option}={options[option]!r}: an attention has the options {', '.join(_OPTIONS)}")
    attention = _Attention(parsed)
    AttentionInterface.register(name, attention.attend)
    AttentionMaskInterface.register(name, attention.mask)


@dataclass(frozen=True)
class _CausalMask:
    """A causal mask that nobody built: what transformers' layers hand on to their attention.

    key <= query + offset, key > query + offset - window, and `key_valid` [B, Sk]. built: the same as transformers
    builds it for SDPA.
    """

    query_length: int
    key_length: int
    offset: int
    window: int | None
    key_valid: Tensor | None
    built: Callable[[], Tensor | None]

    def contiguous(self) -> Tensor | None:
        """The mask itself: `generate` asks for it where it makes masks before the forward, for a static cache."""
        return self.built()


class _Unread(Exception):
    """A mask that is not read, and what it holds."""


class _Attention:
    """The mask entry and the attention of one registered name."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._min_tokens = SPARSE_FROM if options.min_tokens is None else options.min_tokens

    def mask(self, **arguments: Any) -> Tensor | _CausalMask | None:
        """transformers' mask entry: see `transformers.masking_utils.sdpa_mask`, whose arguments it takes."""
        from transformers.masking_utils import sdpa_mask

        lengths = [arguments[name] for name in ("q_length", "kv_length")]
        if (
            torch.compiler.is_compiling()
            or not all(isinstance(length, int) for length in lengths)
            or lengths[0] == 1
            or lengths[1] < self._min_tokens
        ):
            return sdpa_mask(**arguments)
        try:
            return _read(arguments, lambda: sdpa_mask(**arguments))
        except _Unread as unread:
            _say_once(f"the mask holds {unread}")
            return sdpa_mask(**arguments)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | _CausalMask | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention function.

        query: [B, H, Sq, D], key, value: [B, KV, Sk, D]. Returns [B, Sq, H, D] and None.
        """
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        mask = attention_mask
        reason: str | None
        if isinstance(mask, _CausalMask):
            reason = _why_dense(mask, query, key, value, dropout, arguments)
            if reason is None:
                return self._sparse(module, query, key, value, mask, scaling), None
            _say_once(reason)
            mask = mask.built()
        else:
            reason = "its mask is more than causal, window and padding" if mask is not None else "too short"
        self._keep_dense(module, query, reason, arguments)
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **arguments)

    def _sparse(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: _CausalMask, scaling: float | None
    ) -> Tensor:
        chosen = self._options.for_passes
        if isinstance(self._options.patterns, PatternTable):
            self._options.patterns.require_geometry(query.shape[1], key.shape[1], query.shape[3])
        patterns = _patterns_of(module, chosen["patterns"])
        boundaries = bound_tensors(query.device, query.shape[0], query.shape[2])
        planned = plan_attention(
            query,
            key,
            patterns,
            unknown_boundaries(query.device) if boundaries is None else boundaries,
            scale=scaling,
            density=chosen["density"],
            recall=chosen["recall"],
            key_valid=mask.key_valid,
            window=mask.window,
            query_offset=mask.offset,
        )
        of_head = (patterns,) * query.shape[1] if isinstance(patterns, HeadPattern) else patterns
        rows = tuple(range(len(of_head)))
        site = SparseSite(type(module).__name__, _layer(module), of_head, rows, chosen["recall"])
        output = planned.attend(query, value)
        figures: tuple[Tensor, ...] = (planned.of_heads(planned.density), planned.of_heads(planned.recall))
        warn_of_arrived()
        if self._options.check is not None:
            seed = next_seed(query.device)
            figures += planned.compare(query, value, output, seed, self._options.check)
        if self._options.check_bound is not None:
            send(bound_of(self._options.check_bound, [site]), figures[2:3])
        keep_site(module, site, *figures)
        return output.transpose(1, 2)

    def _keep_dense(self, module: nn.Module, query: Tensor, why: str, arguments: Mapping[str, Any]) -> None:
        """Say in `stats` that a prefill's attention ran on torch's; towers and decode steps are not its business."""
        causal = arguments.get("is_causal")
        causal = getattr(module, "is_causal", False) if causal is None else causal
        if causal and query.shape[2] > 1 and not torch.compiler.is_compiling():
            keep_site(module, DenseSite(type(module).__name__, _layer(module), why))


def _layer(module: nn.Module) -> int | None:
    layer = getattr(module, "layer_idx", None)
    return layer if isinstance(layer, int) else None


def _patterns_of(module: nn.Module, patterns: Any) -> Any:
    """The pattern of every head, or of a table those of the module's layer."""
    if isinstance(patterns, HeadPattern):
        return patterns
    layer = _layer(module)
    if layer is None or layer >= len(patterns):
        raise ValueError(f"the table has {len(patterns)} layers, and this attention is of layer {layer}")
    return tuple(patterns[layer])


def _why_dense(
    mask: _CausalMask, query: Tensor, key: Tensor, value: Tensor, dropout: float, arguments: Mapping[str, Any]
) -> str | None:
    """Why this attention cannot be sparse; None where it can."""
    if dropout:
        return "dropout; call model.eval()"
    if torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value)):
        return "gradients are needed; call the model under torch.no_grad() or torch.inference_mode()"
    for name in _UNKNOWN_HERE:
        if arguments.get(name) is not None:
            return f"{name} is given"
    if arguments.get("is_causal") is False:
        return "is_causal=False"
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}"
    if not query.shape[3] == key.shape[3] == value.shape[3] <= MAX_HEAD_DIM:
        return f"head dims {query.shape[3]}, {key.shape[3]}, {value.shape[3]}; must be one, of at most {MAX_HEAD_DIM}"
    if (query.shape[2], key.shape[2]) != (mask.query_length, mask.key_length):
        return "queries or keys are not as many as the mask was made for"
    return None


def _read(arguments: Mapping[str, Any], built: Callable[[], Tensor | None]) -> _CausalMask:
    """Read what transformers hands a mask entry. Raises _Unread for what is more than `_CausalMask` says."""
    queries, keys = arguments["q_length"], arguments["kv_length"]
    offset = arguments.get("q_offset", 0) - arguments.get("kv_offset", 0)
    if not isinstance(offset, int) or offset + queries != keys:
        raise _Unread("more keys than tokens until now (a static cache)")
    is_causal, windows, paddings = _Callables().read(arguments["mask_function"])
    if not is_causal:
        raise _Unread("no causal condition")
    padding = arguments.get("attention_mask")
    if padding is not None:
        paddings = [*paddings, padding]
    valid: Tensor | None = None
    first = arguments.get("kv_offset", 0)
    for one in paddings:
        if one.dim() != 2 or one.shape[1] < first + keys:
            raise _Unread("padding that is not [batch, keys], or is shorter than the keys")
        here = one[:, first : first + keys].to(torch.bool)
        valid = here if valid is None else valid & here
    return _CausalMask(queries, keys, offset, min(windows, default=None), valid, built)


class _Callables:
    """Reads the callables of `transformers.masking_utils` by their code and what they close over."""

    def __init__(self) -> None:
        from transformers import masking_utils as masks

        self._causal = masks.causal_mask_function
        self._and = masks.and_masks(masks.causal_mask_function).__code__
        self._window = masks.sliding_window_overlay(1).__code__
        self._padding = masks.padding_mask_function(torch.ones(1, 1)).__code__

    def read(self, function: Callable[..., Any]) -> tuple[bool, list[int], list[Tensor]]:
        """Whether causal, the windows, and the padding masks [B, Sk] that a mask function joins by "and"."""
        if function is self._causal:
            return True, [], []
        code = getattr(function, "__code__", None)
        closed = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        if code is self._window and len(closed) == 1 and isinstance(closed[0], int):
            return False, [closed[0]], []
        if code is self._padding and len(closed) == 1 and isinstance(closed[0], Tensor):
            return False, [], [closed[0]]
        if code is not self._and or len(closed) != 1:
            raise _Unread(f"{getattr(function, '__qualname__', function)}")
        parts = [self.read(part) for part in closed[0]]
        return (
            any(causal for causal, _, _ in parts),
            [window for _, windows, _ in parts for window in windows],
            [padding for _, _, paddings in parts for padding in paddings],
        )


@cache
def _say_once(reason: str) -> None:
    """reason: without lengths, so that prompts of many lengths say it once."""
    log.warning("attention stays dense: %s", reason)
