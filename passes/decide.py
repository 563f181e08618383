"""Decide for every attention site whether it becomes sparse, and say why not where it does not."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mmcompile.kernels.check_inputs import DTYPES, MAX_HEAD_DIM
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.kernels.which_kernel import sparse_from, which_kernel
from mmcompile.passes.confirm_mask import confirm_mask
from mmcompile.passes.find_attention import AttentionSite, UnreadAttention
from mmcompile.passes.graph import (
    Size,
    expression,
    fake_value,
    has_merged_heads,
    hint,
    is_contiguous,
    same_size,
    settle_equal,
    size_key,
)
from mmcompile.passes.mask_spec import MaskSpec, OpaqueMask
from mmcompile.passes.read_mask import read_mask

Patterns = HeadPattern | Sequence[Sequence[HeadPattern]]  # one for every head, or [layer][head]


class Reason(StrEnum):
    """Why a site got its decision; the values are what `explain` prints."""

    SPARSE = "causal prefill"
    DECODE = "decode step"
    TOO_SHORT = "too short"
    NON_CAUSAL = "non-causal"
    OPAQUE_MASK = "opaque mask"
    DROPOUT = "dropout"
    GRADIENT = "gradient needed"
    UNKNOWN_LAYER = "unknown layer"
    UNSUPPORTED = "unsupported tensors"
    UNREAD = "unread form"

    @property
    def is_refusal(self) -> bool:
        """False where dense is what anybody would choose: decode steps and short prefills."""
        return self not in (Reason.SPARSE, Reason.DECODE, Reason.TOO_SHORT)


CAUSAL_PREFILL = (Reason.SPARSE, Reason.TOO_SHORT)  # what would be sparse if it were long


@dataclass(frozen=True)
class SiteRecord:
    """What was decided for one attention site, as data: `explain`, strict mode and the log are views of it.

    Lengths are numbers where the graph is compiled for one length, else the name of the symbol. Heads and head dim are
    0 where they are not known.
    """

    module_path: str
    layer: int | None
    phase: str  # "prefill" or "decode"
    query_length: str
    key_length: str
    heads: int
    kv_heads: int
    head_dim: int
    mask: str
    sparse: bool
    reason: Reason
    detail: str
    patterns: tuple[str, ...]  # distinct patterns of the site's heads, described; empty where dense
    kernel: str = ""  # what attends to the plan, in words; empty where dense

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self) | {"reason": str(self.reason), "patterns": list(self.patterns)}


@dataclass(frozen=True)
class Decision:
    """A site, its record, and what the rewrite needs where it becomes sparse or is too short for that."""

    site: AttentionSite
    record: SiteRecord
    mask: MaskSpec | None = None  # as read
    sparse_from: int = 0  # keys; with fewer a prefill is too short
    patterns: tuple[HeadPattern, ...] = ()  # one a head; empty where dense


class _Refusal(Exception):
    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def decide(sites: Sequence[AttentionSite], patterns: Patterns, min_tokens: int | None) -> list[Decision]:
    """One decision a site. A mask that several sites share is read once.

    min_tokens: prefills with fewer keys are too short; None for what was measured where each site runs.
    A length that is known only when the graph runs counts as long enough; `shared_length` says whether one number tells
    for the whole graph then.
    """
    masks: dict[Any, MaskSpec | OpaqueMask] = {}
    layers = _trusted_layers(sites, patterns)
    decisions = [_decide_site(site, sites, patterns, min_tokens, masks, layers) for site in sites]
    if shared_length(decisions) is not None:
        return decisions
    return [_settle_length(decision) for decision in decisions]


def shared_length(decisions: Sequence[Decision]) -> Size | None:
    """The number of keys that all sparse attentions of a graph have; None where they differ or none is sparse."""
    lengths = [decision.site.key_length for decision in decisions if decision.record.sparse]
    return lengths[0] if lengths and all(same_size(length, lengths[0]) for length in lengths) else None


def _settle_length(decision: Decision) -> Decision:
    """Decide a symbolic length for good: the tracer is told, and compiles anew for lengths on the other side."""
    length, record, limit = decision.site.key_length, decision.record, decision.sparse_from
    if not record.sparse or limit == 0 or hint(length) is None:
        return decision
    if length >= limit:
        return replace(decision, record=replace(record, detail=f"{size_key(length)} is at least {limit}"))
    detail = f"{size_key(length)} is less than {limit} (option min_tokens)"
    short = replace(record, sparse=False, reason=Reason.TOO_SHORT, detail=detail, patterns=(), kernel="")
    return replace(decision, record=short, patterns=())


def record_unread(attention: UnreadAttention) -> SiteRecord:
    """The record of an attention that is no site: it stays as it is, and no shape of it is known."""
    return SiteRecord(
        module_path=attention.module_path,
        layer=None,
        phase="unknown",
        query_length="?",
        key_length="?",
        heads=0,
        kv_heads=0,
        head_dim=0,
        mask="not read",
        sparse=False,
        reason=Reason.UNREAD,
        detail=attention.why,
        patterns=(),
    )


def _decide_site(
    site: AttentionSite,
    sites: Sequence[AttentionSite],
    patterns: Patterns,
    min_tokens: int | None,
    masks: dict[Any, MaskSpec | OpaqueMask],
    layers: dict[AttentionSite, int],
) -> Decision:
    mask: MaskSpec | OpaqueMask | None = None
    try:
        _require_supported(site)
        _require_device(site, sites)
        _require_layout(site)
        if _is(site.query_length, 1):
            raise _Refusal(Reason.DECODE, "one query token")
        _require_lengths(site)
        mask = _site_mask(site, masks)
        _require_causal(mask)
        limit = _measured_limit(site) if min_tokens is None else min_tokens
        if statically_known_true(site.key_length < limit):
            detail = f"{size_key(site.key_length)} tokens, sparse from {limit} (option min_tokens)"
            raise _Refusal(Reason.TOO_SHORT, detail)
        heads = _head_patterns(site, patterns, layers)
    except _Refusal as refusal:
        record = _record(site, mask, refusal.reason, refusal.detail, ())
        return Decision(site, record, mask if isinstance(mask, MaskSpec) else None)
    assert isinstance(mask, MaskSpec)
    detail = "" if limit == 0 else f"dense below {limit} tokens (option min_tokens)"
    return Decision(site, _record(site, mask, Reason.SPARSE, detail, heads), mask, limit, heads)


def _measured_limit(site: AttentionSite) -> int:
    query = fake_value(site.query)
    return sparse_from(query.device, query.dtype, _number(site.head_dim))


def _require_supported(site: AttentionSite) -> None:
    operands = [fake_value(node) for node in (site.query, site.key, site.value)]
    query, key, value = operands
    if site.mask is None and not site.is_causal:
        raise _Refusal(Reason.NON_CAUSAL, "no mask and is_causal=False")
    if site.dropout_p > 0:
        raise _Refusal(Reason.DROPOUT, f"dropout_p={site.dropout_p}; call model.eval()")
    if any(operand.requires_grad for operand in operands):
        raise _Refusal(Reason.GRADIENT, "call the model under torch.no_grad() or torch.inference_mode()")
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        raise _Refusal(Reason.UNSUPPORTED, f"dtypes {query.dtype}, {key.dtype}, {value.dtype}")
    if not (query.device == key.device == value.device) or query.device.type not in ("cpu", "cuda"):
        raise _Refusal(Reason.UNSUPPORTED, f"devices {query.device}, {key.device}, {value.device}")
    for operand in operands:
        if isinstance(operand.shape[1], torch.SymInt) or isinstance(operand.shape[3], torch.SymInt):
            raise _Refusal(Reason.UNSUPPORTED, "symbolic heads or head dim; only batch and length may be dynamic")
        if 0 in (size for size in operand.shape if isinstance(size, int)):
            raise _Refusal(Reason.UNSUPPORTED, f"empty tensor {list(operand.shape)}")
    if not query.shape[3] == key.shape[3] == value.shape[3]:
        raise _Refusal(Reason.UNSUPPORTED, "query, key and value differ in head dim")
    if site.scale is not None and not site.scale > 0:
        raise _Refusal(Reason.UNSUPPORTED, f"scale={site.scale}, must be above 0")
    if query.shape[3] > MAX_HEAD_DIM:
        raise _Refusal(Reason.UNSUPPORTED, f"head dim {query.shape[3]}, at most {MAX_HEAD_DIM}")
    if not (same_size(query.shape[0], key.shape[0]) and same_size(key.shape[0], value.shape[0])):
        raise _Refusal(Reason.UNSUPPORTED, "query, key and value differ in batch")
    if key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1] != 0:
        raise _Refusal(Reason.UNSUPPORTED, f"{query.shape[1]}, {key.shape[1]}, {value.shape[1]} heads")


def _require_lengths(site: AttentionSite) -> None:
    if not settle_equal(site.key_length, fake_value(site.value).shape[2]):
        raise _Refusal(Reason.UNSUPPORTED, "key and value differ in length")
    of_mask = 1 if site.mask is None else fake_value(site.mask).shape[-1]
    if not _is(of_mask, 1) and not settle_equal(site.key_length, of_mask):
        raise _Refusal(Reason.UNSUPPORTED, "key and mask differ in length")


def _require_layout(site: AttentionSite) -> None:
    # Users were traced with these strides, and views of the output hold with no others.
    output = fake_value(site.node)
    if not (is_contiguous(output) or has_merged_heads(output)):
        raise _Refusal(Reason.UNSUPPORTED, f"output strides {output.stride()}")


def _require_device(site: AttentionSite, sites: Sequence[AttentionSite]) -> None:
    here, first = (fake_value(one.query).device for one in (site, sites[0]))
    if here != first:
        # The boundaries are inputs on one device, and so are the plans made from them.
        raise _Refusal(Reason.UNSUPPORTED, f"on {here}, the graph's first attention is on {first}")


def _site_mask(site: AttentionSite, masks: dict[Any, MaskSpec | OpaqueMask]) -> MaskSpec | OpaqueMask:
    if site.mask is None:
        # torch aligns is_causal with the first key, whatever the lengths: the offset is 0.
        return MaskSpec(expression(site.query_length), expression(site.key_length), causal=True)
    key = (site.mask, size_key(site.query_length), size_key(site.key_length))
    if key not in masks:
        masks[key] = _read_and_confirm(site)
    return masks[key]


def _read_and_confirm(site: AttentionSite) -> MaskSpec | OpaqueMask:
    assert site.mask is not None
    if site.is_causal:
        return OpaqueMask("attn_mask and is_causal=True together")
    mask = read_mask(site.mask, site.query_length, site.key_length)
    if isinstance(mask, OpaqueMask):
        return mask
    disagreement = confirm_mask(site.mask, mask)
    return mask if disagreement is None else OpaqueMask(f"not confirmed: {disagreement}")


def _require_causal(mask: MaskSpec | OpaqueMask) -> None:
    if isinstance(mask, OpaqueMask):
        raise _Refusal(Reason.OPAQUE_MASK, mask.reason)
    if not mask.causal:
        raise _Refusal(Reason.NON_CAUSAL, mask.describe())


def _head_patterns(
    site: AttentionSite, patterns: Patterns, layers: dict[AttentionSite, int]
) -> tuple[HeadPattern, ...]:
    if isinstance(patterns, HeadPattern):
        return (patterns,) * site.heads
    if site not in layers:
        raise _Refusal(
            Reason.UNKNOWN_LAYER,
            f"the table has {len(patterns)} layers, and this graph does not hold exactly layers "
            f"0 to {len(patterns) - 1} of one stack (module path {site.module_path!r})",
        )
    heads = tuple(patterns[layers[site]])
    if len(heads) != site.heads:
        raise _Refusal(Reason.UNKNOWN_LAYER, f"the table has {len(heads)} heads a layer, this site {site.heads}")
    return heads


def _trusted_layers(sites: Sequence[AttentionSite], patterns: Patterns) -> dict[AttentionSite, int]:
    """The sites whose layer is certain.

    A module path is relative to whatever frame was compiled, so a number in it is the model's layer only
    where the graph holds the whole stack: layers 0 to N-1, each once, with the table's N. After a break
    inside the layer loop, or with each layer compiled by itself, one graph serves several layers and no
    name in it can tell which.
    """
    if isinstance(patterns, HeadPattern):
        return {}
    stacks: dict[str, list[AttentionSite]] = defaultdict(list)
    for site in sites:
        if site.layer is not None:
            stacks[site.stack].append(site)
    whole = list(range(len(patterns)))
    return {
        site: site.layer
        for stack in stacks.values()
        if sorted(site.layer for site in stack if site.layer is not None) == whole
        for site in stack
        if site.layer is not None
    }


def _record(
    site: AttentionSite,
    mask: MaskSpec | OpaqueMask | None,
    reason: Reason,
    detail: str,
    heads: Sequence[HeadPattern],
) -> SiteRecord:
    return SiteRecord(
        module_path=site.module_path,
        layer=site.layer,
        phase="decode" if _is(site.query_length, 1) else "prefill",
        query_length=size_key(site.query_length),
        key_length=size_key(site.key_length),
        heads=_number(site.heads),
        kv_heads=_number(site.kv_heads),
        head_dim=_number(site.head_dim),
        mask=_describe(site, mask),
        sparse=reason is Reason.SPARSE,
        reason=reason,
        detail=detail,
        patterns=tuple(dict.fromkeys(str(pattern) for pattern in heads)),
        kernel=_kernel(site) if reason is Reason.SPARSE else "",
    )


def _kernel(site: AttentionSite) -> str:
    query = fake_value(site.query)
    return which_kernel(query.device, query.dtype, _number(site.head_dim))


def _describe(site: AttentionSite, mask: MaskSpec | OpaqueMask | None) -> str:
    if isinstance(mask, MaskSpec):
        return mask.describe()
    if isinstance(mask, OpaqueMask):
        return "opaque"
    if site.mask is not None:
        return "not read"
    return "causal" if site.is_causal else "none"


def _number(size: Size) -> int:
    return size if isinstance(size, int) else 0


def _is(size: Size, number: int) -> bool:
    return isinstance(size, int) and size == number
