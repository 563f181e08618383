"""What was decided for every attention of a model, without running one: `explain` and its report."""

import copy
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only
from transformers import Cache

from mmcompile.architecture import Architecture
from mmcompile.encode_first import EncodeFirst, encodes_first
from mmcompile.errors import MMCompileError
from mmcompile.memory import MemoryUse, PrefillGraph, predict_memory
from mmcompile.options import Options
from mmcompile.passes.cuda_graphs import why_no_cuda_graph
from mmcompile.passes.decide import SiteRecord
from mmcompile.passes.find_attention import find_attention, stack_of
from mmcompile.passes.graph import copy_graph
from mmcompile.passes.pipeline import run_passes
from mmcompile.prefill import tells_boundaries
from mmcompile.prefill_steps import by_name, is_decode_step, tracing
from mmcompile.reference_runs import copy_sharing_weights
from mmcompile.tables import PatternTable

SITE_COLUMNS = ("site", "layer", "phase", "heads", "tokens", "mask", "decision", "reason", "pattern")


@dataclass(frozen=True)
class Report:
    """The attention sites of one call of a model, in execution order, and the graphs they were found in.

    sites: one record an attention. graph_count: graphs that Dynamo made of the call. breaks: why it broke.
    no_cuda_graph: of each graph that is left out of CUDA graphs, should a mode turn them on, the reason.
    chunks: of each graph with sparse sites, how many tokens run at a time between attentions.
    memory: what a prefill of the `tokens` that `explain` was asked for will take; None where it was not asked, or where
    `memory_unknown` says why nothing is known.
    """

    sites: tuple[SiteRecord, ...]
    graph_count: int
    breaks: tuple[str, ...]
    no_cuda_graph: tuple[str, ...]
    chunks: tuple[str, ...]
    memory: MemoryUse | None = None
    memory_unknown: str = ""

    @property
    def sparse_count(self) -> int:
        """How many sites become sparse."""
        return sum(site.sparse for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "graph_count": self.graph_count,
            "breaks": list(self.breaks),
            "no_cuda_graph": list(self.no_cuda_graph),
            "chunks": list(self.chunks),
            "sparse": self.sparse_count,
            "dense": len(self.sites) - self.sparse_count,
            "sites": [site.to_dict() for site in self.sites],
            "memory": None if self.memory is None else self.memory.to_dict(),
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> Table:
        """One row a run of like sites, as a rich table."""
        return sites_table(self.sites)

    def __rich__(self) -> Table:
        table = self.table()
        table.caption = self.summary()
        return table

    def summary(self) -> str:
        """Totals in one line."""
        dense = len(self.sites) - self.sparse_count
        kernels = dict.fromkeys(site.kernel for site in self.sites if site.sparse)
        return (
            f"{self.sparse_count} sparse, {dense} dense, in {self.graph_count} graphs "
            f"with {len(self.breaks)} graph breaks"
            + "".join(f"; sparse ones run on {kernel}" for kernel in kernels)
            + "".join(f"; between attentions {how}" for how in dict.fromkeys(self.chunks))
            + "".join(f"; left out of CUDA graphs: {why}" for why in dict.fromkeys(self.no_cuda_graph))
        )

    def __str__(self) -> str:
        if self.memory is None:
            return _plain(self)
        return "\n".join([_plain(self), _plain(self.memory), *self.memory.traps])


def sites_table(sites: Sequence[SiteRecord]) -> Table:
    """One row a run of sites that differ in nothing but their layer."""
    table = Table(*SITE_COLUMNS, title="Attention sites", show_lines=False)
    for row in site_rows(sites):
        table.add_row(*row)
    return table


def site_rows(sites: Sequence[SiteRecord]) -> list[tuple[str, ...]]:
    """The rows of that table, a text for each of `SITE_COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for like in _runs(sites):
        first, last = like[0], like[-1]
        layers = "-" if first.layer is None else str(first.layer)
        if last.layer != first.layer:
            layers += f" to {last.layer}"
        same = first.query_length == first.key_length
        row = (
            (f"{len(like)} x " if len(like) > 1 else "") + (first.module_path or "(unnamed)"),
            layers,
            first.phase,
            f"{first.heads}/{first.kv_heads} x {first.head_dim}" if first.heads else "?",
            first.query_length if same else f"{first.query_length} of {first.key_length}",
            first.mask,
            "sparse" if first.sparse else "dense",
            f"{first.reason}: {first.detail}" if first.detail else str(first.reason),
            ", ".join(first.patterns) or "-",
        )
        rows.append(row)
    return rows


def describe_records(sites: Sequence[SiteRecord]) -> str:
    """The same table as plain text, for logs and errors."""
    return _plain(sites_table(sites))


def _plain(renderable: Any) -> str:
    console = Console(width=200, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().rstrip()


def _runs(sites: Sequence[SiteRecord]) -> list[list[SiteRecord]]:
    runs: list[list[SiteRecord]] = []
    for site in sites:
        if runs and _likeness(runs[-1][-1]) == _likeness(site):
            runs[-1].append(site)
        else:
            runs.append([site])
    return runs


def _likeness(site: SiteRecord) -> dict[str, Any]:
    values = site.to_dict()
    values["module_path"] = stack_of(site.module_path)
    del values["layer"]
    return values


def explain(model: Callable[..., Any] | ExportedProgram, *args: Any, **kwargs: Any) -> Report:
    """Say for every attention of `model(*args, **kwargs)` whether the backend would make it sparse, and why.

    The call is traced as `mmcompile.compile(model)` traces it: encoders run first, where it runs them, and are no part
    of the graphs; plain `torch.compile` may break the same call into more. It runs under no_grad with every attention
    replaced by an empty result, so no attention kernel runs and what the call returns means nothing.
    `options=Options(...)` or a mapping among the keyword arguments is taken as the backend's options. Dynamo's caches
    are reset before and after, so compiled models compile again at their next call. Raises TableError for a pattern
    table of another architecture.

    `tokens=N` among them predicts the memory of a prefill of that length too, of a prompt like the call's in everything
    else; nothing of that size runs, so that a short prompt tells of a million tokens.
    Of an exported program it says what `transform` decided, or would decide with these options.
    """
    if isinstance(model, ExportedProgram):
        options = kwargs.pop("options", None)
        if args or kwargs:
            raise TypeError(f"explain: a program is told nothing but options, and got {', '.join(kwargs) or 'inputs'}")
        return _of_program(model, options)
    tokens: int | None = kwargs.pop("tokens", None)
    options = Options.parse(kwargs.pop("options", None))
    if isinstance(options.patterns, PatternTable) and isinstance(model, nn.Module):
        options.patterns.require(Architecture.of(model))
    other_length = tokens is not None and tokens != _prompt_length(kwargs)
    recorder = trace_call(model, args, kwargs, options, any_length=other_length)
    memory, unknown = None, ""
    if tokens is not None:
        try:
            memory = recorder.memory(tokens, model)
        except RuntimeError as error:  # what depends on data has no size before it runs
            unknown = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return Report(
        tuple(recorder.records),
        recorder.graph_count,
        tuple(recorder.breaks),
        tuple(recorder.no_cuda_graph),
        tuple(recorder.chunks),
        memory,
        unknown,
    )


def trace_call(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    *,
    any_length: bool = False,
) -> "TracedCall":
    """The graphs of a call, with what `explain` says of them. any_length: the prompt's length stays a symbol."""
    recorder = TracedCall(options)
    torch.compiler.reset()
    try:
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1024):
            # The call would go on filling a cache of the caller's, and with attention left out, with nothing.
            args, kwargs = tree_map(_own_copy, (args, kwargs), is_leaf=lambda value: isinstance(value, Cache))
            checks, positions = True, kwargs.get("position_ids") is None
            if isinstance(model, nn.Module) and encodes_first(model):
                positions = False
                model = copy_sharing_weights(model)  # running encoders first leaves traces on a model
                args, kwargs, checks = _with_encoders_run(model, args, kwargs)
            if any_length:
                recorder.traced = _prompt_length(kwargs)
                args, kwargs = tree_map_only(Tensor, recorder.with_any_length, (args, kwargs))
            with tracing(checks=checks, positions=positions):
                torch.compile(model, backend=recorder)(*args, **kwargs)
    finally:
        torch.compiler.reset()
    return recorder


def _prompt_length(inputs: Mapping[str, Any]) -> int:
    for name in ("inputs_embeds", "input_ids"):
        if isinstance(inputs.get(name), Tensor):
            return int(inputs[name].shape[1])
    raise MMCompileError("the memory of another length needs input_ids or inputs_embeds among the keyword arguments")


def _of_program(program: ExportedProgram, options: Any) -> Report:
    from mmcompile.transform_program import record_program  # here, because what it imports imports this file

    return Report(record_program(program, Options.parse(options)).sites, 1, (), (), ())


def _with_encoders_run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """The arguments that `mmcompile.compile` traces the call with, and whether with transformers' checks."""
    inputs = by_name(inspect.signature(model.forward), args, kwargs)
    if inputs is None or is_decode_step(inputs):
        return args, kwargs, True
    with _WithoutAttention():
        encoded = EncodeFirst(model)(inputs)
    return (args, kwargs, True) if encoded.fits is False else ((), encoded.inputs, not encoded.fits)


class _WithoutAttention(TorchFunctionMode):
    """Attention returns zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return torch.zeros_like(args[0] if args else kwargs["query"])


def _own_copy(argument: Any) -> Any:
    return copy.deepcopy(argument) if isinstance(argument, Cache) else argument


class TracedCall:
    """A backend that records graphs and decisions, and runs each graph with its attentions left out.

    traced: the prompt's length, where sizes of it stay symbols.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.traced: int | None = None
        self.graphs: list[PrefillGraph] = []
        self.records: list[SiteRecord] = []
        self.breaks: list[str] = []
        self.no_cuda_graph: list[str] = []
        self.chunks: list[str] = []
        self.graph_count = 0

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graph_count += 1
        reason = getattr(module, "compile_subgraph_reason", None)
        if reason is not None and reason.graph_break:
            self.breaks.append(_describe_break(reason))
        rewritten = run_passes(module, **self.options.for_passes, search_strides=not tells_boundaries(module))
        self.records += rewritten.records
        self.graphs.append(PrefillGraph(rewritten, self.traced))
        if rewritten.chunks:
            self.chunks.append(rewritten.chunks)
        why = why_no_cuda_graph(rewritten)
        if why is not None:
            self.no_cuda_graph.append(why)
        return without_attention(module)

    def with_any_length(self, tensor: Tensor) -> Tensor:
        """The tensor, marked so that a size of the prompt's length becomes a symbol."""
        same = tensor.view_as(tensor)  # the caller's own stays as it is
        for dim in [dim for dim, size in enumerate(tensor.shape) if size == self.traced]:
            torch._dynamo.maybe_mark_dynamic(same, dim)
        return same

    def memory(self, tokens: int, model: Callable[..., Any]) -> MemoryUse | None:
        """What a prefill of so many tokens takes, under the inner backend of the options."""
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return predict_memory(
            self.graphs,
            tokens,
            fused=self.options.inner == "inductor",
            model=model if isinstance(model, nn.Module) else None,
            vocabulary=getattr(text, "vocab_size", 0),
        )


def without_attention(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph in which every attention returns zeros of the right shape."""
    without = copy_graph(module)
    for site in find_attention(without):
        with without.graph.inserting_before(site.node):
            zeros = without.graph.call_function(torch.zeros_like, (site.query,))
        zeros.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(zeros)
        without.graph.erase_node(site.node)
    without.recompile()
    return without


def _describe_break(reason: Any) -> str:
    frames = [frame for frame in reason.user_stack if frame.line]
    text = str(reason.reason).strip().splitlines()[0]
    if not frames:
        return text
    where = frames[-1]
    return f"{text} at {where.filename}:{where.lineno} in {where.name}: {where.line}"
