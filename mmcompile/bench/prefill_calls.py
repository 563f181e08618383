"""What competes in `bench prefill`: compiled prefills of one decoder, whole or by some layers, and what is seen of
each call."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmcompile
from mmcompile.bench.compile_times import CompileTimes
from mmcompile.bench.decoders import takes_multimodal_positions
from mmcompile.bench.figure import Row
from mmcompile.bench.no_attention import NO_ATTENTION
from mmcompile.bench.repeated_heads import REPEATED_HEADS
from mmcompile.bench.time_split import ATTENTION, PLAN, TimeSplit
from mmcompile.bench.timing import significant
from mmcompile.bench.video_prompt import boundaries, positions
from mmcompile.modality import bind

LIBRARIES = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def prompt(decoder: Any, tokens: int, device: str) -> dict[str, Tensor]:
    """A video among some text as embeddings [1, S, hidden] with its positions; one compilation serves every length."""
    dtype = next(decoder.parameters()).dtype
    hidden = torch.randn(1, tokens, decoder.config.hidden_size, device=device, dtype=dtype)
    grid = takes_multimodal_positions(decoder.config)
    index = positions(tokens) if grid else torch.arange(tokens)[None]
    inputs = {"inputs_embeds": hidden, "position_ids": index.to(device)}
    for tensor in inputs.values():
        torch._dynamo.maybe_mark_dynamic(tensor, tensor.shape.index(tokens))
    return inputs


@dataclass
class PrefillCall:
    """A compiled prefill, called with the inputs of the length at hand. The KV cache is made, and kept until the call
    has returned.

    attention: transformers' name. compile: makes a compiled function of one. whole: layers of the model, of which the
    decoder may have fewer.
    """

    decoder: Any
    attention: str
    compile: Callable[[Callable[..., Any]], Callable[..., Any]]
    device: str
    whole: int
    library: SDPBackend | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    compiling: CompileTimes | None = None
    first: float | None = None  # seconds of the first call at this length
    peak: int = 0
    density: float = 1.0
    split: TimeSplit | None = None

    def __post_init__(self) -> None:
        def prefill(**inputs: Tensor) -> tuple[Tensor, Any]:
            output = self.decoder(**inputs, use_cache=True)
            return output.last_hidden_state[:, -1], output.past_key_values

        self.compiled = self.compile(prefill)

    @property
    def layers(self) -> int:
        """Of the decoder."""
        return int(self.decoder.config.num_hidden_layers)

    @property
    def scale(self) -> float:
        """From this call's time to that of all layers."""
        return self.whole / self.layers

    @property
    def ours(self) -> bool:
        """Whether our backend compiles it."""
        return self.attention == "sdpa"

    def begin(self, inputs: dict[str, Tensor]) -> None:
        """Take the inputs of another length."""
        self.inputs, self.first = inputs, None

    def compile_now(self, inputs: dict[str, Tensor]) -> CompileTimes:
        """The times of a first call, in which everything is compiled; no other call of the process may compile."""
        self.begin(inputs)
        with CompileTimes.watching(self.device) as times:
            self._run()
        self.compiling = times
        return times

    def __call__(self) -> tuple[Tensor, Any]:
        if self.first is not None:
            return self._run()
        if self.device == "cuda":
            torch.cuda.empty_cache()  # what another contender leaves lies in other pieces
            torch.cuda.reset_peak_memory_stats()
        result, self.split = TimeSplit.of(self._timed, self.device)
        if self.device == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        if self.ours:  # of this call: contenders share the decoder
            sites = mmcompile.stats(self.decoder)
            self.density = statistics.mean(site.density for site in sites) if sites else 1.0
        return result

    def _timed(self) -> tuple[Tensor, Any]:
        begin = time.perf_counter()
        result = self._run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.first = time.perf_counter() - begin
        return result

    def _run(self) -> tuple[Tensor, Any]:
        tokens = self.inputs["inputs_embeds"].shape[1]
        by_positions = takes_multimodal_positions(self.decoder.config)
        told = nullcontext() if by_positions else bind(boundaries(tokens, self.device))
        library = nullcontext() if self.library is None else sdpa_kernel(self.library)
        with attention_of(self.decoder, self.attention), told, library:
            return self.compiled(**self.inputs)

    @property
    def waited(self) -> bool:
        """Whether the first call at this length took much longer than its kernels: something was compiled in it."""
        busy = 0.0 if self.split is None else self.split.busy_ms
        return self.device == "cuda" and (self.first or 0.0) * 1e3 > 1.1 * busy

    def seen(self, ms: float) -> Row:
        """What is known after a first call; ms: of all layers."""
        row: Row = {}
        if self.attention != NO_ATTENTION:
            row["density"] = significant(self.density)
        row["first call s"] = round(self.first or 0.0, 1)
        if self.layers < self.whole:
            row["layers run"] = f"{self.layers} of {self.whole}, scaled"
        assert self.split is not None
        times = {part: spent * self.scale for part, spent in self.split.ms.items()}
        times["everything else"] = max(0.0, ms - sum(times.values()))
        row |= {f"{part} ms": significant(spent) for part, spent in times.items()}
        if self.device == "cuda":
            row |= {"peak GB": round(self.peak / 1e9, 1), "attention kernel": self.split.attention_kernel}
        return row

    def outside_attention(self, ms: float) -> float:
        """What is neither attention nor its planning, of all layers in ms."""
        assert self.split is not None
        inside = self.split.ms[ATTENTION] + self.split.ms[PLAN]
        return ms - inside * self.scale


@contextmanager
def attention_of(decoder: Any, name: str) -> Iterator[None]:
    """The decoder with an attention of transformers, by name."""
    # Layers that two decoders share keep the config that they were made with.
    configs = {id(part.config): part.config for part in decoder.modules() if hasattr(part, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def dense_call(decoder: Any, library: str, inner: str, device: str, whole: int) -> PrefillCall:
    """Dense attention of one of LIBRARIES under an inner backend."""
    return PrefillCall(
        decoder, REPEATED_HEADS, partial(torch.compile, backend=inner), device, whole, LIBRARIES[library]
    )


def floor_call(decoder: Any, inner: str, device: str, whole: int) -> PrefillCall:
    """No attention, under an inner backend."""
    return PrefillCall(decoder, NO_ATTENTION, partial(torch.compile, backend=inner), device, whole)


def our_call(decoder: Any, options: dict[str, Any], device: str) -> PrefillCall:
    """Our backend with some options."""
    compiled = partial(torch.compile, backend="mminference", options=options)
    return PrefillCall(decoder, "sdpa", compiled, device, decoder.config.num_hidden_layers)
