"""Running a compiled prefill: supply the boundaries of this very call, keep what the plans report."""

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from mmcompile.check_bound import Bound, send, warn_of_arrived
from mmcompile.input_boundaries import BoundaryTensors, boundaries_from_positions, is_multimodal_positions
from mmcompile.kernels.patterns import HeadPattern, plan_rows
from mmcompile.modality import ModalityBoundaries, bound_boundaries, bound_tensors, unknown_boundaries
from mmcompile.passes.decide import CAUSAL_PREFILL, Reason, SiteRecord
from mmcompile.passes.find_attention import AttentionSite
from mmcompile.passes.graph import Size, expression, fake_value, placeholders, same_size
from mmcompile.passes.pipeline import Rewritten


@dataclass(frozen=True)
class HeadStats:
    """What one head did in the last prefill, the mean over the batch.

    density: computed tiles as a fraction of those that dense attention computes, 128 single keys counted as a tile.
    Some tiles are always computed (the diagonal, the first keys), and an order other than the tokens' own may need more
    of them: in a prompt of a few tiles density can be above the cap, and above 1. recall: estimated share of the
    attention that they hold; None where the pattern is known beforehand, so that nothing was estimated. target: the
    share that was asked for; None where none was.
    With the option `check`, of the head's query tiles that were compared with dense attention: error is
    ||output - dense|| / ||dense||, true_recall the share of the attention that was computed. None where no tile of the
    head was drawn.
    """

    pattern: str
    density: float
    recall: float | None
    target: float | None
    error: float | None = None
    true_recall: float | None = None

    @property
    def falls_short(self) -> bool:
        """Whether the estimate missed what was asked for: the cap on the tiles left no room for it."""
        return self.recall is not None and self.target is not None and self.recall < self.target


@dataclass(frozen=True)
class SiteStats:
    """What one attention site did in the last prefill of its model.

    density: the mean over its heads; 1.0 where it ran dense. dense: why it ran on torch's own attention, "too short"
    where it had fewer keys than `min_tokens`; it has no heads then.
    """

    module_path: str
    layer: int | None
    density: float
    patterns: tuple[str, ...]
    heads: tuple[HeadStats, ...]
    dense: str = ""

    @property
    def recall(self) -> float | None:
        """The mean estimated recall of the heads that have one."""
        return _mean(head.recall for head in self.heads)

    @property
    def error(self) -> float | None:
        """The mean error of the heads that were checked."""
        return _mean(head.error for head in self.heads)

    @property
    def true_recall(self) -> float | None:
        """The mean true recall of the heads that were checked."""
        return _mean(head.true_recall for head in self.heads)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        means = {"recall": self.recall, "error": self.error, "true_recall": self.true_recall}
        return asdict(self) | {"patterns": list(self.patterns)} | means


@dataclass(frozen=True)
class SparseSite:
    """What turns a plan's figures into stats.

    patterns: of each head. rows: the row of the figures that each head follows. recall: the option.
    """

    module_path: str
    layer: int | None
    patterns: tuple[HeadPattern, ...]
    rows: tuple[int, ...]
    recall: float | None

    def stats(self, density: torch.Tensor, recall: torch.Tensor, *checked: torch.Tensor) -> SiteStats:
        """density, recall: float [B, P]. checked: error and true recall, float [H] each, or nothing."""
        densities, recalls = (figure.float().mean(0).tolist() for figure in (density, recall))
        of_heads = [[*map(_known, figure.tolist())] for figure in checked] or [[None] * len(self.rows)] * 2
        heads = [
            HeadStats(str(pattern), densities[row], _known(recalls[row]), self._target(pattern), *found)
            for pattern, row, *found in zip(self.patterns, self.rows, *of_heads, strict=True)
        ]
        mean = sum(head.density for head in heads) / len(heads)
        names = tuple(dict.fromkeys(str(pattern) for pattern in self.patterns))
        return SiteStats(self.module_path, self.layer, mean, names, tuple(heads))

    def head_names(self) -> tuple[str, ...]:
        """How a warning names each head."""
        where = self.module_path if self.layer is None else f"layer {self.layer}"
        return tuple(f"{where} head {head}" for head in range(len(self.rows)))

    def _target(self, pattern: HeadPattern) -> float | None:
        if pattern.kind != "top_p":
            return None
        return pattern.mass if self.recall is None else self.recall


@dataclass(frozen=True)
class DenseSite:
    """A prefill's attention that ran on torch's, and why."""

    module_path: str
    layer: int | None
    why: str

    def stats(self, *_: torch.Tensor) -> SiteStats:
        """There are no figures."""
        return SiteStats(self.module_path, self.layer, 1.0, (), (), self.why)


def _known(figure: float) -> float | None:
    return None if math.isnan(figure) else figure


def _mean(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return sum(known) / len(known) if known else None


_prefilling: ContextVar[bool] = ContextVar("prefilling", default=False)


@contextmanager
def prefilling() -> Iterator[None]:
    """What is compiled inside the `with` block belongs to a prefill."""
    token = _prefilling.set(True)
    try:
        yield
    finally:
        _prefilling.reset(token)


def is_prefilling() -> bool:
    """Whether a prefill is known to run now: plain `torch.compile` tells nobody."""
    return _prefilling.get()


class CallBoundaries:
    """Where the boundaries of each call of one graph come from: first found first used, from `bind`, from multimodal
    rotary positions among the call's own inputs, or they are unknown. Nothing is kept from one call to the next, so
    none can be stale.
    """

    def __init__(self, inputs: Sequence[fx.Node], site: AttentionSite) -> None:
        """inputs: the graph's own placeholders. site: an attention of it that takes boundaries."""
        self._device = fake_value(site.query).device
        self._positions = _find_positions(inputs, site.batch, site.query_length)
        self._batch = _find_size(inputs, site.batch)
        self.length = _find_size(inputs, site.query_length)

    def of(self, inputs: Sequence[Any]) -> BoundaryTensors:
        """Of a call with these inputs."""
        batch, length = (None if read is None else read(inputs) for read in (self._batch, self.length))
        bound = bound_tensors(self._device, batch, length)
        if bound is not None:
            return bound
        if self._positions is not None:
            return boundaries_from_positions(inputs[self._positions])
        return unknown_boundaries(self._device)


class CompiledPrefill:
    """A compiled graph whose last inputs are the boundaries and whose last outputs are the sites' figures: density and
    recall of each, and with a check, whose seed is one more input, error and true recall.

    Where fewer keys come than `min_tokens`, the graph's short form serves, and none of this runs. Where many tokens
    come, its long form serves.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        rewritten: Rewritten,
        short: Callable[..., Any] | None = None,
        long: Callable[..., Any] | None = None,
        check_bound: float | None = None,
    ) -> None:
        """compiled: of `rewritten.module`. short, long: of the modules in its `short` and `long`, if it has them.
        check_bound: the option."""
        site = rewritten.sparse[0].site
        own = placeholders(rewritten.module.graph)[: -len(rewritten.added)]
        self._compiled, self._short, self._long = compiled, short, long
        self._chunks = rewritten.long  # what it runs in chunks is known as long as it is kept
        self._key_length = _find_size(own, site.key_length)
        self._min_tokens = 0 if rewritten.short is None else rewritten.short.min_tokens
        self._dense_sites = _dense_sites(one for one in rewritten.records if one.reason in CAUSAL_PREFILL)
        self._sites = tuple(
            SparseSite(
                one.record.module_path,
                one.record.layer,
                one.patterns,
                plan_rows(one.patterns).of_head,
                rewritten.recall,
            )
            for one in rewritten.sparse
        )
        self._boundaries = CallBoundaries(own, site)
        self._parameter = _find_parameter(own)
        self._seed_device = None if rewritten.check is None else fake_value(site.query).device
        self._bound = None if check_bound is None else bound_of(check_bound, self._sites)

    def __call__(self, *inputs: Any) -> Any:
        if self._short is not None and self._key_length is not None and self._key_length(inputs) < self._min_tokens:
            if self._parameter is not None:
                _last_prefills.keep(inputs[self._parameter], self._dense_sites, ())
            return self._short(*inputs)
        warn_of_arrived()
        seed = () if self._seed_device is None else (next_seed(self._seed_device),)
        compiled = self._long if self._long is not None and self._is_long(inputs) else self._compiled
        outputs = compiled(*inputs, *self._boundaries.of(inputs), *seed)
        of_site = 2 if self._seed_device is None else 4
        own = len(outputs) - of_site * len(self._sites)
        if self._parameter is not None:
            _last_prefills.keep(inputs[self._parameter], self._sites, outputs[own:])
        if self._bound is not None:
            send(self._bound, outputs[own + 2 :: of_site])
        return outputs[:own]

    def _is_long(self, inputs: Sequence[Any]) -> bool:
        length = self._boundaries.length
        return self._chunks is not None and length is not None and length(inputs) > self._chunks.tokens


_prefills = count()


def next_seed(device: torch.device) -> torch.Tensor:
    """Which query tiles the next prefill compares with dense attention: int64 [1]."""
    # Filled on the device: a copy from the host would wait for what the device is doing.
    return torch.full((1,), next(_prefills), dtype=torch.int64, device=device)


def bound_of(error: float, sites: Iterable[SparseSite]) -> Bound:
    """The bound on the errors of some sites, in their order."""
    return Bound(error, tuple(name for site in sites for name in site.head_names()))


def dense_prefill(
    compiled: Callable[..., Any], module: fx.GraphModule, records: Sequence[SiteRecord]
) -> Callable[..., Any]:
    """A compiled graph of a prefill in which nothing is sparse: `stats` has of this model what was too short for it."""
    parameters = [index for index, node in enumerate(placeholders(module.graph)) if _is_parameter(node)]
    sites = _dense_sites(record for record in records if record.reason is Reason.TOO_SHORT)

    def run(*inputs: Any) -> Any:
        _last_prefills.forget(inputs[index] for index in parameters)
        if sites and parameters:
            _last_prefills.keep(inputs[parameters[0]], sites, ())
        return compiled(*inputs)

    return run


def _dense_sites(records: Iterable[SiteRecord]) -> tuple[DenseSite, ...]:
    return tuple(DenseSite(record.module_path, record.layer, str(Reason.TOO_SHORT)) for record in records)


def tells_boundaries(module: fx.GraphModule) -> bool:
    """Whether the call that is being compiled tells its grids: bound now, or among the graph's inputs.

    Later calls of the graph are taken to be alike. One that tells nothing keeps its video tokens in raster order.
    """
    bound = bound_boundaries()
    if isinstance(bound, ModalityBoundaries):
        assert bound.grid is not None
        return bool(bound.grid.gt(0).any())
    values = (fake_value(node) for node in placeholders(module.graph))
    positions = (isinstance(value, torch.Tensor) and is_multimodal_positions(value) for value in values)
    return bound is not None or any(positions)


def _find_positions(inputs: Sequence[fx.Node], batch: Size, length: Size) -> int | None:
    """The input that holds multimodal rotary positions, known by its type and shape."""
    for index, node in enumerate(inputs):
        value = fake_value(node)
        if isinstance(value, torch.Tensor) and is_multimodal_positions(value) and same_size(value.shape[1], batch):
            # Dynamo may give each input its own symbol for one and the same length.
            static = isinstance(value.shape[2], int) and isinstance(length, int)
            if not static or value.shape[2] == length:
                return index
    return None


def _find_size(inputs: Sequence[fx.Node], size: Size) -> Callable[[Sequence[Any]], int] | None:
    """How to read a size from the graph's inputs at run time; None when they do not tell it."""
    if isinstance(size, int):
        return lambda _: size
    whole = expression(size)
    read = _find_expression(inputs, whole)
    if read is not None:
        return read
    # A cache and what is added to it, say: the parts are sizes of inputs.
    symbols = sorted(whole.free_symbols, key=str)
    found = [_find_expression(inputs, symbol) for symbol in symbols]
    reads = [part for part in found if part is not None]
    if len(reads) < max(len(found), 1):
        return None

    def evaluate(inputs: Sequence[Any]) -> int:
        values = {symbol: read(inputs) for symbol, read in zip(symbols, reads, strict=True)}
        return int(sympy_interp(PythonReferenceAnalysis, values, whole))

    return evaluate


def _find_expression(inputs: Sequence[fx.Node], wanted: sympy.Expr) -> Callable[[Sequence[Any]], int] | None:
    for index, node in enumerate(inputs):
        value = fake_value(node)
        if isinstance(value, torch.SymInt) and expression(value) == wanted:
            return lambda inputs, index=index: int(inputs[index])  # type: ignore[misc]
        if isinstance(value, torch.Tensor):
            for dim, extent in enumerate(value.shape):
                if expression(extent) == wanted:
                    return lambda inputs, index=index, dim=dim: int(inputs[index].shape[dim])  # type: ignore[misc]
    return None


def _find_parameter(inputs: Sequence[fx.Node]) -> int | None:
    """An input that is a parameter: it tells at run time which model the graph is serving."""
    for index, node in enumerate(inputs):
        if _is_parameter(node):
            return index
    return None


def _is_parameter(node: fx.Node) -> bool:
    return isinstance(fake_value(node), nn.Parameter)


class _LastPrefills:
    """What the plans of each model's last prefill reported, kept by one of the parameters that the graph was given."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[int, tuple[weakref.ref[Any], tuple[SparseSite | DenseSite, ...], Sequence[torch.Tensor]]] = {}

    def keep(
        self, parameter: torch.Tensor, sites: tuple[SparseSite | DenseSite, ...], figures: Sequence[torch.Tensor]
    ) -> None:
        """figures: those of each of the sites in turn, if they are sparse, as `SparseSite.stats` takes them."""
        key = id(parameter)

        def forget(_: object) -> None:
            self._kept.pop(key, None)

        with self._lock:
            self._kept[key] = (weakref.ref(parameter, forget), sites, tuple(figures))

    def forget(self, parameters: Iterable[Any]) -> None:
        with self._lock:
            for parameter in parameters:
                self._kept.pop(id(parameter), None)

    def of(self, model: nn.Module) -> list[SiteStats]:
        stats = []
        for parameter in model.parameters():
            kept = self._kept.get(id(parameter))
            if kept is not None and kept[0]() is parameter:
                _, sites, figures = kept
                each = len(figures) // max(1, len(sites))
                stats += [site.stats(*figures[each * i : each * (i + 1)]) for i, site in enumerate(sites)]
        return stats


_last_prefills = _LastPrefills()


def stats(model: nn.Module) -> list[SiteStats]:
    """What each rewritten attention of `model` did in its last prefill, in execution order.

    Empty before the first prefill, and where nothing was rewritten. Waits for the device, and warns of what the option
    `check_bound` does not allow.
    """
    warn_of_arrived(wait=True)
    return _last_prefills.of(model)


def keep_site(module: nn.Module, site: SparseSite | DenseSite, *figures: torch.Tensor) -> None:
    """Keep what one attention module did in a prefill that now runs without a compiler."""
    parameter = next(module.parameters(), None)
    if parameter is not None:
        _last_prefills.keep(parameter, (site,), figures)


def forget_stats(model: nn.Module) -> None:
    """Drop what `stats` has of `model`: another prefill begins."""
    _last_prefills.forget(model.parameters())
