"""The passes in order: a graph goes in, a rewritten copy and the record of what was decided come out."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mmcompile.kernels.in_chunks import CHUNK, CHUNKS_FROM
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.passes.add_boundaries import BoundaryInputs, add_boundaries, add_seed
from mmcompile.passes.chunk_tokens import Chunked, chunk_tokens
from mmcompile.passes.decide import (
    CAUSAL_PREFILL,
    Decision,
    Patterns,
    Reason,
    SiteRecord,
    decide,
    record_unread,
    shared_length,
)
from mmcompile.passes.dense_attention import dense_attention
from mmcompile.passes.find_attention import find_attention, find_unread
from mmcompile.passes.fold_permutations import fold_permutations
from mmcompile.passes.graph import Size, copy_graph, fake_value, hint, output_node
from mmcompile.passes.rewrite_attention import Budget, Check, rewrite_attention

log = logging.getLogger(__name__)

PASS_NAMES = ("fold_permutations", "chunk_tokens")  # the passes that `disable` may name


@dataclass(frozen=True)
class ShortForm:
    """The graph for prefills of fewer keys than `min_tokens`: dense, with the inputs and outputs of the original."""

    module: fx.GraphModule
    min_tokens: int
    now: bool  # whether the call that the graph is compiled for is that short


@dataclass(frozen=True)
class LongForm:
    """The sparse graph for prefills of more than `tokens` tokens a sequence: token-wise stretches run in chunks."""

    module: fx.GraphModule
    length: Size  # tokens of a sequence, as the graph has it
    tokens: int
    now: bool  # whether the call that the graph is compiled for is that long
    chunked: Chunked


@dataclass(frozen=True)
class Rewritten:
    """A graph after the passes.

    `module` is the caller's own module, untouched, where no attention is a causal prefill's. Where nothing became
    sparse it is one with the same inputs and outputs. Otherwise it is a copy with three more inputs (`boundaries`), and
    with two more outputs a rewritten site: the site's realised density and its estimated recall, [B, P] each, in the
    order of `sparse`. With a check, its `seed` is the last input, and each site's outputs are two more: error and true
    recall, [H] each. `short` serves in its place when few keys come; None where the number of keys is known, or none is
    too small. `long` serves where many tokens come; None where what they need is no matter, or nothing can run in
    chunks.
    """

    module: fx.GraphModule
    records: tuple[SiteRecord, ...]
    sparse: tuple[Decision, ...]
    boundaries: BoundaryInputs | None
    recall: float | None = None  # the option, as given to `run_passes`
    short: ShortForm | None = None
    long: LongForm | None = None
    chunks: str = ""  # how many tokens run at a time between attentions, in words; empty where nothing is sparse
    check: Check | None = None

    @property
    def added(self) -> tuple[fx.Node, ...]:
        """The inputs that the graph has besides its own, in order."""
        boundaries = () if self.boundaries is None else self.boundaries.nodes
        return boundaries if self.check is None else (*boundaries, self.check.seed)


def run_passes(
    module: fx.GraphModule,
    patterns: Patterns,
    *,
    density: float | None = None,
    recall: float | None = None,
    min_tokens: int | None = 0,
    disable: Sequence[str] = (),
    search_strides: bool = True,
    check: float | None = None,
    chunk: int | None = None,
    compiler: str = "",
) -> Rewritten:
    """Find, decide, make short prefills dense, add boundaries, rewrite, fold, chunk. `module` itself is never edited.

    check: share of the query tiles to compare with dense attention; None leaves nothing of it in the graph.
    search_strides: look for the frames of video tokens without a known grid in each layer's own queries and keys.
    chunk: tokens that run at a time between attentions; None for what suits the device, 0 for all.
    compiler: names what will compile the graphs.
    """
    # The copy comes first: reading decisions off the graph that will be edited keeps one set of nodes.
    copy = copy_graph(module)
    if density == 1.0:  # every tile: no pattern chooses, and no order helps
        patterns = HeadPattern()
    decisions = decide(find_attention(copy), patterns, min_tokens)
    records = (*(decision.record for decision in decisions), *map(record_unread, find_unread(copy)))
    sparse = tuple(decision for decision in decisions if decision.record.sparse)
    short = _short_form(module, decisions)
    made_dense = dense_attention(copy, [one for one in decisions if one.record.reason is Reason.TOO_SHORT])
    if not sparse:
        copy.recompile()
        return Rewritten(copy if made_dense else module, records, (), None)

    sparse = tuple(decision for decision in _of(copy, decisions) if decision.record.sparse)
    device = fake_value(sparse[0].site.query).device
    boundaries = add_boundaries(copy, device)
    checked = None if check is None else Check(check, add_seed(copy, device))
    result = rewrite_attention(copy, sparse, boundaries, Budget(density, recall, search_strides), checked)
    log.info(
        "rewrite_attention: %d sites on %d plans and %d arrangements", len(sparse), result.plans, result.arrangements
    )
    if "fold_permutations" not in disable:
        log.info("fold_permutations: %d attentions take tokens in their order", fold_permutations(copy))
    _append_outputs(copy, [node for of_site in result.figures for node in of_site])
    copy.graph.lint()
    copy.recompile()
    long, chunks = _long_form(copy, sparse, 0 if "chunk_tokens" in disable else chunk, compiler)
    log.info("chunk_tokens: %s", chunks)
    return Rewritten(copy, records, sparse, boundaries, recall, short, long, chunks, checked)


def _short_form(module: fx.GraphModule, decisions: Sequence[Decision]) -> ShortForm | None:
    length = shared_length(decisions)
    min_tokens = max((decision.sparse_from for decision in decisions if decision.record.sparse), default=0)
    tokens = None if length is None else hint(length)
    if length is None or tokens is None or statically_known_true(length >= min_tokens):
        return None
    dense = copy_graph(module)
    dense_attention(dense, [one for one in _of(dense, decisions) if one.record.reason in CAUSAL_PREFILL])
    dense.graph.lint()
    dense.recompile()
    return ShortForm(dense, min_tokens, now=tokens < min_tokens)


def _long_form(
    module: fx.GraphModule, sparse: Sequence[Decision], chunk: int | None, compiler: str
) -> tuple[LongForm | None, str]:
    """The form, and in words what it is or why there is none."""
    length, limit = sparse[0].site.query_length, chunk or CHUNKS_FROM
    tokens = hint(length)
    if chunk == 0:
        return None, "all tokens at once (option chunk_tokens)"
    if tokens is None:
        return None, "all tokens at once: the data alone tells how many there are"
    device = fake_value(sparse[0].site.query).device.type
    if torch.is_autocast_enabled(device):
        return None, "all tokens at once: under autocast a stretch would be compiled without it"
    if isinstance(length, int) and length <= limit:
        return None, f"all {length} tokens at once: chunks begin above {limit} (option chunk_tokens)"
    long = copy_graph(module)
    chunked = chunk_tokens(long, length, chunk, compiler)
    long.recompile()
    if not chunked.kinds:
        return None, f"all tokens at once: {chunked.describe()}"
    form = LongForm(long, length, limit, tokens > limit, chunked)
    return form, f"above {limit} tokens in chunks of {chunk or f'{CHUNK} or less'}: {chunked.describe()}"


def _of(module: fx.GraphModule, decisions: Sequence[Decision]) -> list[Decision]:
    """Decisions on the sites as they stand in a graph: a copy, or one in which some attentions were replaced."""
    sites = find_attention(module)
    return [replace(decision, site=site) for site, decision in zip(sites, decisions, strict=True)]


def _append_outputs(module: fx.GraphModule, nodes: list[fx.Node]) -> None:
    output = output_node(module.graph)
    (results,) = output.args
    if not isinstance(results, tuple | list):
        raise TypeError(f"a graph whose output is {type(results).__name__}, not a tuple, cannot be extended")
    output.args = ((*results, *nodes),)


def describe_graph(module: fx.GraphModule) -> str:
    """The graph as readable code, for the log and the structured trace."""
    return module.print_readable(print_output=False)
