"""The `torch.compile` backend "mminference": capture, passes, inner compiler."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from hashlib import sha256
from importlib.resources import files
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import dynamo_timed
from torch._logging import trace_structured

from mmcompile import kernels
from mmcompile.compile_later import CompiledLater, compile_stretches_later
from mmcompile.errors import UnsupportedSitesError
from mmcompile.options import Options
from mmcompile.passes.cuda_graphs import why_no_cuda_graph
from mmcompile.passes.decide import SiteRecord
from mmcompile.passes.graph import fake_value
from mmcompile.passes.pipeline import describe_graph, run_passes
from mmcompile.prefill import CompiledPrefill, dense_prefill, is_prefilling, tells_boundaries
from mmcompile.report import describe_records
from mmcompile.tables import PatternTable

log = logging.getLogger(__name__)

CompiledFunction = Callable[..., Any]

PASSES_PHASE = "mminference_passes"  # in torch's compile times, `torch._dynamo.utils.compile_times()`


def mminference(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> CompiledFunction:
    """Compile one graph: rewrite the causal attentions of a prefill, hand the rest to the inner backend.

    `torch.compile(model, backend="mminference", options={...})` calls it, or the same with `mode=...`; options are the
    fields of `Options`, and mode goes to Inductor, whose CUDA graphs leave out what `why_no_cuda_graph` names. A graph
    with nothing to rewrite reaches the inner backend untouched.
    """
    parsed = Options.parse(options)
    # Where the prompt's grids are told, no stride is searched, and one arrangement of the tokens serves all layers.
    with dynamo_timed(PASSES_PHASE):
        rewritten = run_passes(
            module,
            **parsed.for_passes,
            search_strides=not tells_boundaries(module),
            compiler=f"{parsed.inner}, mode={mode}",
        )
    _log(rewritten.records, rewritten.module)
    if isinstance(parsed.patterns, PatternTable):
        parsed.patterns.require_sites(rewritten.records)
    if parsed.strict:
        require_sparse(rewritten.records)
    why = "it is part of a prefill" if is_prefilling() else why_no_cuda_graph(rewritten)
    inner = _inner_compiler(parsed.inner, mode, why)
    if rewritten.boundaries is None:
        compiled = inner(rewritten.module, list(example_inputs))
        is_prefill = any(record.phase == "prefill" for record in rewritten.records)
        return dense_prefill(compiled, module, rewritten.records) if is_prefill else compiled
    inputs = [*example_inputs, *map(fake_value, rewritten.added)]
    sparse, short, long = partial(_compile_sparse, inner), rewritten.short, rewritten.long
    # Whoever runs short prompts alone, or long ones, or very long ones, waits for one compilation.
    is_short = short is not None and short.now
    is_long = not is_short and long is not None and long.now
    compiled = _form(sparse, rewritten.module, inputs, now=not is_short and not is_long)
    dense = None if short is None else _form(inner, short.module, list(example_inputs), now=is_short)
    chunked = None if long is None else _form(sparse, long.module, inputs, now=is_long)
    if long is not None:
        compile_stretches_later(inner, long.chunked)
    return CompiledPrefill(compiled, rewritten, dense, chunked, parsed.check_bound)


def _form(compiler: CompiledFunction, module: fx.GraphModule, inputs: list[Any], *, now: bool) -> CompiledFunction:
    compiled: CompiledFunction = compiler(module, inputs) if now else CompiledLater(compiler, module)
    return compiled


def _compile_sparse(inner: CompiledFunction, module: fx.GraphModule, inputs: list[Any]) -> CompiledFunction:
    # Inductor's caches on disk know our ops by name alone; code compiled for another version must not be found.
    tag = f"{torch.compiler.config.cache_key_tag}mmcompile-{_kernels_digest()}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        return inner(module, inputs)


@lru_cache
def _kernels_digest() -> str:
    """Digest of the kernels' sources, which say what an op returns."""
    sources = sorted(files(kernels).iterdir(), key=lambda file: file.name)
    return sha256(b"".join(file.read_bytes() for file in sources if file.name.endswith(".py"))).hexdigest()


def _inner_compiler(name: str, mode: str | None, why_no_cuda_graph: str | None) -> CompiledFunction:
    compiler: CompiledFunction = lookup_backend(name)
    if name != "inductor":
        if mode not in (None, "default"):
            raise ValueError(f'mode={mode!r}: only inner="inductor" has modes, not {name!r}')
        return compiler
    patches = {} if mode is None else torch._inductor.list_mode_options(mode)
    # A mode turns CUDA graphs on, or the user's own configuration.
    recorded = patches.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs)
    if why_no_cuda_graph is not None:
        if recorded:
            log.info("left out of CUDA graphs: %s", why_no_cuda_graph)
        # In any case: what is compiled later may find another configuration.
        patches = patches | {"triton.cudagraphs": False}
    return partial(compiler, config_patches=patches) if patches else compiler


def require_sparse(records: Sequence[SiteRecord]) -> None:
    """Raise UnsupportedSitesError, with the list of them, if an attention had to stay dense."""
    refused = [record for record in records if record.reason.is_refusal]
    if refused:
        raise UnsupportedSitesError(
            f"strict=True, and {len(refused)} attention(s) must stay dense:\n{describe_records(refused)}"
        )


def _log(records: Sequence[SiteRecord], module: fx.GraphModule) -> None:
    if not records:
        return
    log.info("attention sites:\n%s", describe_records(records))
    if log.isEnabledFor(logging.DEBUG):
        log.debug("rewritten graph:\n%s", describe_graph(module))
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "mminference_sites", "encoding": "string"},
        payload_fn=lambda: describe_records(records),
    )
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "mminference_rewritten_graph", "encoding": "string"},
        payload_fn=lambda: describe_graph(module),
    )
