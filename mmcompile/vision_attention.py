"""One attention for all windows or frames of a vision tower, where transformers would call one for each.

Towers that pack their windows (Qwen2.5-VL's) or frames (Qwen's and GLM's) into one sequence call SDPA for each of them,
unless the name of the attention holds "flash": then they hand over the whole sequence, and where each window ends.
"""

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# "flash" in the name is what makes the towers hand over the packed sequence.
PACKED_ATTENTION = "mmcompile_flash_packed"

_MOST_PADDING = 2  # elements computed for each one needed; past it, windows of one length go together
_MORE_THAN_WINDOWS = ("is_causal", "sliding_window", "softcap", "s_aux")  # one window at a time
_FLASH_DTYPES = (torch.float16, torch.bfloat16)


def pack_vision_attention(model: nn.Module) -> None:
    """Give the vision towers of `model` that call "sdpa" for each window one attention for all of them.

    Found by their attentions' code, which tells a packed sequence apart; a tower that was given another attention keeps
    it. `model.set_attn_implementation("sdpa")` restores it. Copies and pickles keep it: loading one imports mmcompile.
    """
    packed = [module for module in model.modules() if _takes_packed(module)]
    if not packed:
        return
    model.packed_vision_attention = _register()  # type: ignore[assignment]  # no module, nor a tensor
    for module in packed:
        config: Any = module.config
        if config._attn_implementation == "sdpa":
            config._attn_implementation = PACKED_ATTENTION


class _Registration:
    """Registers the attention again where a pickle of it is loaded: transformers there may not know the name."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _register, ()


def _register() -> _Registration:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    return _Registration()


def _takes_packed(module: nn.Module) -> bool:
    """Whether a module is an attention that hands over a packed sequence when its attention's name says "flash"."""
    if not hasattr(getattr(module, "config", None), "_attn_implementation"):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "cu_seqlens" in code.co_varnames and "is_flash_attention_requested" in code.co_names


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for windows packed into one sequence, each of which attends to itself alone.

    query: [1, H, T, D], key, value: [1, KV, T, D]. cu_seq_lens_q: integer [N + 1], where each window starts, and T.
    max_length_q: tokens of the longest. Without them it is transformers' "sdpa". Returns [1, T, H, D] and None.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        return _by_transformers(module, query, key, value, attention_mask, dropout, scaling, arguments)
    if query.shape[0] != 1 or any(arguments.get(name) for name in _MORE_THAN_WINDOWS):
        lengths = [length for length in (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist() if length > 0]
        parts = zip(*(one.split(lengths, dim=2) for one in (query, key, value)), strict=True)
        outputs = [_by_transformers(module, q, k, v, None, dropout, scaling, arguments)[0] for q, k, v in parts]
        return torch.cat(outputs, dim=1), None
    longest = int((cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).max()) if max_length_q is None else int(max_length_q)
    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))  # [T, H, D]
    if dropout == 0 and _has_kernel(q, scaling):
        return _by_kernel(q, k, v, cu_seq_lens_q, longest, scaling)[None], None
    windows = cu_seq_lens_q.shape[0] - 1
    settings = {"dropout_p": dropout, "scale": scaling, "enable_gqa": q.shape[1] != k.shape[1]}
    if windows * longest == q.shape[0]:
        output = _alike(q, k, v, longest, settings)
    elif windows * longest <= _MOST_PADDING * q.shape[0]:
        output = _padded(q, k, v, cu_seq_lens_q, longest, settings)
    else:
        output = _by_length(q, k, v, cu_seq_lens_q, settings)
    return output[None], None


def _by_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    arguments: dict[str, Any],
) -> tuple[Tensor, None]:
    """transformers' "sdpa"."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **arguments
    )
    return output, None


def _has_kernel(query: Tensor, scaling: float | None) -> bool:
    """Whether torch has a kernel for packed sequences that takes these tensors."""
    if not query.is_cuda or torch.version.hip is not None or query.dtype not in _FLASH_DTYPES:
        return False
    if query.shape[2] > 256 or query.shape[2] % 8 != 0 or torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return scaling is None or "scale" in inspect.signature(varlen_attn).parameters


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts = starts.to(torch.int32)
    settings: dict[str, Any] = {} if scaling is None else {"scale": scaling}
    if q.shape[1] != k.shape[1]:
        k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for one in (k, v))
    output = varlen_attn(q, k.contiguous(), v.contiguous(), starts, starts, longest, longest, **settings)
    assert isinstance(output, Tensor)
    return output


def _alike(q: Tensor, k: Tensor, v: Tensor, length: int, settings: dict[str, Any]) -> Tensor:
    """Windows of one length side by side, [N * length, H, D]: a batch of N."""
    q, k, v = (one.unflatten(0, (-1, length)).transpose(1, 2) for one in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **settings).transpose(1, 2).flatten(0, 1)


def _padded(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, settings: dict[str, Any]) -> Tensor:
    """Windows of any lengths, each filled up to the longest."""
    starts = starts.long()
    token = torch.arange(q.shape[0], device=q.device)
    window = torch.searchsorted(starts[1:].contiguous(), token, right=True)
    place = torch.arange(longest, device=q.device)
    index = (starts[:-1, None] + place).clamp(max=q.shape[0] - 1)  # [N, longest]
    inside = place < (starts[1:] - starts[:-1])[:, None]
    inside |= place == 0  # a window without tokens must have a key, or it is NaN
    q, k, v = (one[index].transpose(1, 2) for one in (q, k, v))
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=inside[:, None, None], **settings)
    return output.transpose(1, 2)[window, token - starts[window]]


def _by_length(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, settings: dict[str, Any]) -> Tensor:
    """Windows of very different lengths: one batch for each length. Reads the lengths on the host, as transformers."""
    bounds = starts.tolist()
    groups: dict[int, list[int]] = {}
    for start, end in pairwise(bounds):
        groups.setdefault(end - start, []).append(start)
    indices, outputs = [], []
    for length, begins in groups.items():
        if length == 0:
            continue
        index = (torch.tensor(begins)[:, None] + torch.arange(length)).flatten().to(q.device)
        indices.append(index)
        chosen = [one.index_select(0, index) for one in (q, k, v)]
        outputs.append(_alike(chosen[0], chosen[1], chosen[2], length, settings))
    return torch.cat(outputs).index_select(0, torch.cat(indices).argsort())
