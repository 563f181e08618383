"""`bench prefill`: the prefill of Qwen2.5-VL-7B's text decoder, ours against Inductor, and where sparse begins to win.

The decoder has random weights: time depends on shapes and on the tiles a pattern selects, not on what the weights have
learned. All contenders stay compiled and take turns at each length.
"""

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

import mmcompile
from mmcompile.bench.figure import Row
from mmcompile.bench.repeated_heads import REPEATED_HEADS
from mmcompile.bench.timing import FAILURE, Failure, Times, race, significant
from mmcompile.bench.video_prompt import FRAME, PATTERNS, SHORTEST, positions
from mmcompile.console import Step
from mmcompile.errors import OptionError

QWEN2_5_VL_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2**20,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
LIBRARIES = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
BASELINE, OURS_DENSE = "Inductor, cuDNN", "ours, dense"
PREFILL, SHORTEST_SPARSE = "prefill", "shortest sparse prefill"
ALWAYS, NEVER = 0, 2**30  # values of min_tokens


@dataclass(frozen=True)
class PrefillBench:
    """The options of `bench prefill`. density: caps; None leaves it to the pattern. inner: compiles every graph."""

    tokens: tuple[int, ...]
    density: tuple[float | None, ...] = (0.1, 0.2)
    pattern: str = "auto"
    layers: int = 28
    against: tuple[str, ...] = tuple(LIBRARIES)
    device: str = "cuda"
    repeats: int = 3
    inner: str = "inductor"
    config: Mapping[str, Any] = field(default_factory=lambda: QWEN2_5_VL_7B)
    title: str = "Prefill of Qwen2.5-VL-7B's text decoder"

    def __post_init__(self) -> None:
        for tokens in self.tokens:
            if tokens < SHORTEST:
                raise OptionError(f"--tokens {tokens}: must be at least {SHORTEST}, some text and a frame")

    @property
    def notes(self) -> str:
        """As in Measurement."""
        return (
            f"{self.layers} layers, random weights, bf16, batch 1, KV cache kept, a video of {FRAME[0] * FRAME[1]} "
            f"tokens per frame, pattern {self.pattern} (random weights attend to everything alike, so that estimated "
            f'patterns spend their whole cap). "{OURS_DENSE}" is what serves below min_tokens, the others of '
            f"ours are sparse at every length. Median of {self.repeats} runs in turns, the spread is half their range; "
            "peak GB is that of the first run, first call s holds what is compiled"
        )

    @property
    def steps(self) -> int:
        """As in Measurement."""
        contenders = len(self.against) + 1 + len(self.density)
        return 1 + len(self.tokens) * (contenders + self.repeats)

    def measure(self, step: Step) -> Iterator[list[Row]]:
        """As in Measurement."""
        step(f"make {self.layers} layers")
        model = self._decoder()
        torch.compiler.reset()
        rows: list[Row] = []
        # Each contender has an entry of its own for the same code.
        with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
            contenders = self._contenders(model)
            for tokens in sorted(self.tokens):
                measured = self._rows(contenders, tokens, step)
                rows += measured
                yield measured
        yield [self._shortest(rows, self._name(density)) for density in self.density]

    def _decoder(self) -> Qwen2_5_VLTextModel:
        config = Qwen2_5_VLTextConfig(num_hidden_layers=self.layers, **self.config)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(self.device):
                return Qwen2_5_VLTextModel(config).eval()
        finally:
            torch.set_default_dtype(default)

    def _contenders(self, model: Qwen2_5_VLTextModel) -> dict[str, "_Contender"]:
        def prefill(**inputs: Tensor) -> Tensor:
            return model(**inputs, use_cache=True).last_hidden_state[:, -1]

        found = {}
        for library in self.against:

            def on_library(backend: Any = LIBRARIES[library], **inputs: Tensor) -> Tensor:
                with sdpa_kernel(backend):
                    return prefill(**inputs)

            dense = torch.compile(on_library, backend=self.inner)
            found[f"Inductor, {library}"] = _Contender(model, dense, REPEATED_HEADS, self.device)
        limits = {OURS_DENSE: (None, NEVER)} | {self._name(density): (density, ALWAYS) for density in self.density}
        for name, (density, min_tokens) in limits.items():
            options: Any = {"patterns": PATTERNS[self.pattern], "density": density, "min_tokens": min_tokens}
            ours = torch.compile(prefill, backend="mminference", options=options | {"inner": self.inner})
            found[name] = _Contender(model, ours, "sdpa", self.device)
        return found

    def _name(self, density: float | None) -> str:
        return f"ours, {self.pattern}" if density is None else f"ours, {self.pattern}, at most {density:g}"

    def _rows(self, contenders: dict[str, "_Contender"], tokens: int, step: Step) -> list[Row]:
        hidden = torch.randn(1, tokens, self.config["hidden_size"], device=self.device, dtype=torch.bfloat16)
        inputs = {"inputs_embeds": hidden, "position_ids": positions(tokens).to(self.device)}
        for tensor in inputs.values():
            # One compilation serves every length, for every contender.
            torch._dynamo.maybe_mark_dynamic(tensor, tensor.shape.index(tokens))
        seen: dict[str, Row] = {}

        def look(name: str, _result: Tensor) -> None:
            seen[name] = contenders[name].seen()

        for one in contenders.values():
            one.begin(inputs)
        times = race(contenders, self.device, self.repeats, seconds=60.0, step=step, look=look)
        baseline = times.get(BASELINE)
        rows = []
        for name, measured in times.items():
            row: Row = {"table": PREFILL, "tokens": tokens, "attention": name}
            if isinstance(measured, Failure):
                rows.append(row | {FAILURE: measured.reason})
                continue
            row |= measured.columns() | {"runs": measured.runs}
            if isinstance(baseline, Times):
                row["faster than cuDNN"] = significant(baseline.ms / measured.ms)
            rows.append(row | seen[name])
        return rows

    def _shortest(self, rows: list[Row], name: str) -> Row:
        """What the rows say of one sparse contender: the `min_tokens` that suits it, and what dense costs below it."""
        times = {one: {row["tokens"]: row["ms"] for row in rows if row["attention"] == one and "ms" in row}
                 for one in (BASELINE, OURS_DENSE, name)}  # fmt: skip
        dense, sparse = times[OURS_DENSE], times[name]
        row: Row = {"table": SHORTEST_SPARSE, "attention": name, "min_tokens": shortest_win(dense, sparse)}
        shortest = row["min_tokens"]
        below = [
            dense[one] / times[BASELINE][one] - 1
            for one in dense.keys() & times[BASELINE].keys()
            if shortest is None or one < shortest
        ]
        return row | {"our dense path over cuDNN's, at most": f"{max(below):+.1%}" if below else None}

    def summary(self, rows: list[Row]) -> str:
        """As in Measurement."""
        parts = []
        for row in rows:
            if row.get("table") == SHORTEST_SPARSE:
                length = row["min_tokens"]
                won = (
                    "not at any length measured" if length is None else f"from {length} tokens on: min_tokens={length}"
                )
                parts.append(f"{row['attention']}: {won}")
        return f"Sparse is faster than our dense path: {'; '.join(parts)}."

    def draw(self, rows: list[Row], pyplot: Any) -> Any:
        """Time for each 1024 tokens over the length: a level where time grows with the length alone."""
        rows = [row for row in rows if row.get("table") == PREFILL and "ms" in row]
        figure, axis = pyplot.subplots(figsize=(7, 4))
        for name in dict.fromkeys(row["attention"] for row in rows):
            points = [row for row in rows if row["attention"] == name]
            lengths = [row["tokens"] for row in points]
            times, spreads = ([row[column] / row["tokens"] * 1024 for row in points] for column in ("ms", "ms spread"))
            axis.errorbar(lengths, times, yerr=spreads, marker="o", capsize=3, label=name)
        axis.set(xscale="log", xlabel="tokens", ylabel="ms for each 1024 tokens", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        return figure


def shortest_win(dense: Mapping[int, float], sparse: Mapping[int, float]) -> int | None:
    """The shortest length from which on sparse is the faster at every length that both have; None where it is not at
    the longest. dense, sparse: length to time."""
    shortest = None
    for length in sorted(dense.keys() & sparse.keys(), reverse=True):
        if sparse[length] >= dense[length]:
            break
        shortest = length
    return shortest


class _Contender:
    """A compiled prefill, called with the inputs of the length at hand."""

    def __init__(self, model: Qwen2_5_VLTextModel, compiled: Any, attention: str, device: str) -> None:
        self.model, self.compiled, self.attention, self.device = model, compiled, attention, device
        self.inputs: dict[str, Tensor] = {}
        self.first: float | None = None  # seconds of the first call at this length
        self.peak = 0
        self.kernel: str | None = None

    def begin(self, inputs: dict[str, Tensor]) -> None:
        """Take the inputs of another length."""
        self.inputs, self.first = inputs, None

    def __call__(self) -> Tensor:
        self.model.config._attn_implementation = self.attention
        if self.first is not None:
            return self.compiled(**self.inputs)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        result = self.compiled(**self.inputs)
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        self.first = time.perf_counter() - begin
        return result

    def seen(self) -> Row:
        """What is known after a first call."""
        ours = self.attention == "sdpa"
        density = statistics.mean(site.density for site in mmcompile.stats(self.model)) if ours else 1.0
        row: Row = {"density": significant(density), "first call s": round(self.first or 0.0, 1)}
        if self.device == "cuda":
            if self.kernel is None:  # the same at every length
                self.kernel = _attention_kernel(self)
            row |= {"peak GB": round(self.peak / 1e9, 1), "attention kernel": self.kernel}
        return row


def _attention_kernel(call: _Contender) -> str:
    """The name of the longest attention kernel that a call launches: which library really ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    words = ("attention", "flash", "fmha", "sdpa", "cudnn")
    found = [event for event in profile.key_averages() if any(word in event.key.lower() for word in words)]
    return max(found, key=lambda event: event.device_time_total).key[:60] if found else "none found"
