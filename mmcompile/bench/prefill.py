"""`bench prefill`: the prefill of a text decoder, ours against Inductor, what its time and memory go into, and where
sparse begins to win.

The decoder has random weights: time depends on shapes and on the tiles a pattern selects, not on what the weights have
learned. All contenders stay compiled and take turns at each length.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from mmcompile.bench.compile_times import in_second_process
from mmcompile.bench.decoders import decoder_config, first_layers, full_name, make_decoder
from mmcompile.bench.figure import Row
from mmcompile.bench.head_patterns import patterns_of
from mmcompile.bench.prefill_calls import (
    LIBRARIES,
    PrefillCall,
    attention_of,
    dense_call,
    floor_call,
    our_call,
    prompt,
)
from mmcompile.bench.timing import FAILURE, Failure, Times, race, significant
from mmcompile.bench.video_prompt import FRAME, SHORTEST
from mmcompile.console import Step
from mmcompile.errors import OptionError
from mmcompile.kernels.in_chunks import CHUNKS_FROM
from mmcompile.options import Options
from mmcompile.report import TracedCall, trace_call

BASELINE, OURS_DENSE, FLOOR = "Inductor, cuDNN", "ours, dense", "no attention"
PREFILL, COMPILING, SHORTEST_SPARSE = "prefill", "compiling", "shortest sparse prefill"
ALWAYS, NEVER = 0, 2**30  # values of min_tokens
FEW_LAYERS_FROM = 2**19  # tokens from which dense contenders run some layers alone: a layer takes seconds there
ONCE = 10.0  # seconds of a call that is not repeated
# Tokens of the first calls, in which everything is compiled: of each form that the lengths measured need. The long one
# is compiled where indices pass 32 bits and the kernel folds permutations, if prefills that long are measured.
COMPILED_AT, CHUNKED_AT = 2**11, 2**17 + 2**10


@dataclass(frozen=True)
class PrefillBench:
    """The options of `bench prefill`.

    density: caps; None leaves it to the patterns. config: as `decoder_config` takes it. patterns: as `patterns_of`.
    few_layers: of dense contenders from FEW_LAYERS_FROM tokens on. dense_form: what serves below min_tokens too, at
    every length up to there. floor: no attention too. second_process: a second process compiles from the first one's
    cache. predict: the memory of ours. inner: compiles every graph.
    """

    tokens: tuple[int, ...]
    density: tuple[float | None, ...] = (None,)
    patterns: str = "auto"
    config: str = "qwen2.5-vl-7b"
    layers: int | None = None
    few_layers: int = 1
    against: tuple[str, ...] = tuple(LIBRARIES)
    dense_form: bool = True
    floor: bool = False
    second_process: bool = False
    predict: bool = True
    device: str = "cuda"
    repeats: int = 3
    inner: str = "inductor"

    def __post_init__(self) -> None:
        for tokens in self.tokens:
            if tokens < SHORTEST:
                raise OptionError(f"--tokens {tokens}: must be at least {SHORTEST}, some text and a frame")
        patterns_of(self.patterns, self._config)

    @cached_property
    def _config(self) -> Any:
        return decoder_config(self.config)

    @property
    def _layers(self) -> int:
        return self.layers or int(self._config.num_hidden_layers)

    @property
    def title(self) -> str:
        """As in Measurement."""
        return f"Prefill of {full_name(self.config)}'s text decoder"

    @property
    def notes(self) -> str:
        """As in Measurement."""
        text = self._config
        few = ""
        if self._few(max(self.tokens)):
            few = (
                f" From {FEW_LAYERS_FROM} tokens on dense contenders run {self.few_layers} of the layers, and their "
                "times are scaled by the number of layers; their memory is that of these layers."
            )
        return (
            f"{self._layers} layers, {text.num_attention_heads} query heads, {text.num_key_value_heads} KV heads, "
            f"hidden size {text.hidden_size}, random weights, bf16, batch 1, KV cache kept, a video of "
            f"{FRAME[0] * FRAME[1]} tokens per frame, patterns {self.patterns} (random weights attend to everything "
            f'alike, so that estimated patterns spend their whole cap). "{OURS_DENSE}" is what serves below '
            f'min_tokens, the others of ours are sparse at every length; "{FLOOR}" is the same decoder with queries in '
            f"place of attention's output, under Inductor.{few} Median of {self.repeats} runs in turns, the spread is "
            f"half their range; a call of over {ONCE:g} s runs once. Plan holds arranging and permuting; the parts and "
            "peak GB are those of the first run, predicted GB is what `explain` says beforehand"
        )

    @property
    def steps(self) -> int:
        """As in Measurement."""
        kinds = {kind for tokens in self.tokens for kind in self._kinds(tokens).values()}
        calls = sum(len(self._kinds(tokens)) + self.repeats for tokens in self.tokens)
        return 1 + self.predict * len(self.density) + len(kinds) + self.second_process + calls

    def _few(self, tokens: int) -> bool:
        return tokens >= FEW_LAYERS_FROM and self.few_layers < self._layers

    def _kinds(self, tokens: int) -> dict[str, "_Kind"]:
        """The contenders at a length by name."""
        layers = self.few_layers if self._few(tokens) else self._layers
        kinds = {f"Inductor, {library}": _Kind(layers, library=library) for library in self.against}
        if self.dense_form and tokens < FEW_LAYERS_FROM:
            kinds[OURS_DENSE] = _Kind(self._layers, min_tokens=NEVER)
        for density in self.density:
            kinds[self._name(density)] = _Kind(self._layers, min_tokens=ALWAYS, density=density)
        return kinds | ({FLOOR: _Kind(layers)} if self.floor else {})

    def _name(self, density: float | None) -> str:
        return f"ours, {self.patterns}" if density is None else f"ours, {self.patterns}, at most {density:g}"

    def measure(self, step: Step) -> Iterator[list[Row]]:
        """As in Measurement."""
        step(f"make {self._layers} layers")
        decoder = make_decoder(self._config, self._layers, self.device)
        torch.compiler.reset()
        rows: list[Row] = []
        calls: dict[_Kind, PrefillCall | Failure] = {}
        with ExitStack() as settings:
            # Each contender has an entry of its own for the same code.
            settings.enter_context(torch._dynamo.config.patch(recompile_limit=64))
            settings.enter_context(torch.no_grad())
            if self.second_process:
                settings.enter_context(fresh_cache())
            # First: it forgets what was compiled before.
            traced = self._trace(decoder, step) if self.predict else {}
            for tokens in sorted(self.tokens):
                kinds = self._kinds(tokens)
                for name, kind in kinds.items():
                    if kind not in calls:
                        step(f"compile {name}")
                        calls[kind], compiling = self._compile(decoder, name, kind)
                        yield compiling
                if self.second_process and tokens == min(self.tokens):
                    step("compile in a second process")
                    yield [self._compile_again()]
                predicted = {name: traced[kind] for name, kind in kinds.items() if kind in traced}
                measured = self._rows({name: calls[kind] for name, kind in kinds.items()}, predicted, tokens, step)
                rows += measured
                yield measured
        if self.dense_form:
            yield [self._shortest(rows, self._name(density)) for density in self.density]

    @property
    def _first_lengths(self) -> list[int]:
        whole = [COMPILED_AT] if min(self.tokens) <= CHUNKS_FROM else []
        longest = max(self.tokens)
        return whole + ([min(longest, CHUNKED_AT)] if longest > CHUNKS_FROM else [])

    def _options(self, kind: "_Kind") -> dict[str, Any]:
        return {"density": kind.density, "min_tokens": kind.min_tokens, "inner": self.inner}

    def _compile(self, decoder: Any, name: str, kind: "_Kind") -> tuple[PrefillCall | Failure, list[Row]]:
        part = decoder if kind.layers == self._layers else first_layers(decoder, kind.layers)
        if kind.library is not None:
            call = dense_call(part, kind.library, self.inner, self.device, self._layers)
        elif kind.min_tokens is not None:
            call = our_call(
                part, self._options(kind) | {"patterns": patterns_of(self.patterns, part.config)}, self.device
            )
        else:
            call = floor_call(part, self.inner, self.device, self._layers)
        rows: list[Row] = []
        for tokens in self._first_lengths if kind.min_tokens == ALWAYS else (COMPILED_AT,):
            row: Row = {"table": COMPILING, "tokens": tokens, "attention": name, "layers": kind.layers}
            try:
                times = call.compile_now(prompt(part, tokens, self.device))
            except Exception as error:  # contenders fail in as many ways as there are libraries
                failure = Failure.of(error)
                return failure, [*rows, row | {FAILURE: failure.reason}]
            rows.append(row | times.row())
        return call, rows

    def _compile_again(self) -> Row:
        kind = _Kind(self._layers, min_tokens=ALWAYS, density=self.density[0])
        arguments = {"config": self.config, "patterns": self.patterns, "options": self._options(kind)}
        first = self._first_lengths[0]
        sizes = {"layers": self._layers, "tokens": first, "device": self.device}
        times = in_second_process(arguments | sizes)
        name = f"{self._name(self.density[0])}, in a second process"
        row: Row = {"table": COMPILING, "tokens": first, "attention": name, "layers": self._layers}
        return row | ({FAILURE: times.reason} if isinstance(times, Failure) else times.row())

    def _trace(self, decoder: Any, step: Step) -> "dict[_Kind, TracedCall]":
        """The graphs of our sparse contenders, which tell of their memory."""
        kinds = [_Kind(self._layers, min_tokens=ALWAYS, density=density) for density in self.density]
        traced = {}
        for kind in kinds:
            step("trace for the memory")
            options = Options.parse(self._options(kind) | {"patterns": patterns_of(self.patterns, decoder.config)})
            inputs = prompt(decoder, COMPILED_AT, self.device) | {"use_cache": True}
            with attention_of(decoder, "sdpa"):
                traced[kind] = trace_call(decoder, (), inputs, options, any_length=True)
        return traced

    def _rows(
        self,
        calls: Mapping[str, PrefillCall | Failure],
        traced: "Mapping[str, TracedCall]",
        tokens: int,
        step: Step,
    ) -> list[Row]:
        running = {name: call for name, call in calls.items() if isinstance(call, PrefillCall)}

        def look(name: str, _result: Any) -> Times | None:
            first = (running[name].first or 0.0) * 1e3
            return Times.of([first]) if first > ONCE * 1e3 and not running[name].waited else None

        inputs: dict[str, Any] = {}
        for call in running.values():
            inputs = inputs or prompt(call.decoder, tokens, self.device)
            call.begin(inputs)
        times = race(running, self.device, self.repeats, seconds=60.0, step=step, look=look)
        baseline, floor = (_ms(running.get(name), times.get(name)) for name in (BASELINE, FLOOR))
        rows = []
        for name, one in calls.items():
            row: Row = {"table": PREFILL, "tokens": tokens, "attention": name}
            measured = one if isinstance(one, Failure) else times[name]
            if isinstance(measured, Failure):
                rows.append(row | {FAILURE: measured.reason})
                continue
            call = running[name]
            measured = measured.scaled(call.scale)
            row |= measured.columns() | {"runs": measured.runs}
            if baseline is not None:
                row["faster than cuDNN"] = significant(baseline / measured.ms)
            if floor is not None and name.startswith("ours"):
                row["outside attention, over none"] = significant(call.outside_attention(measured.ms) / floor)
            predicted = traced[name].memory(tokens, call.decoder) if name in traced else None
            rows.append(
                row | call.seen(measured.ms) | ({} if predicted is None else {"predicted GB": round(predicted.peak, 1)})
            )
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
        longest = max((row for row in rows if "faster than cuDNN" in row), key=lambda row: row["tokens"], default=None)
        said = [f"Sparse is faster than our dense path: {'; '.join(parts)}."] if parts else []
        ours = [row for row in rows if str(row.get("attention")).startswith("ours") and "faster than cuDNN" in row]
        if longest is not None and ours:
            best = max(ours, key=lambda row: (row["tokens"], row["faster than cuDNN"]))
            said.append(
                f"{best['attention']} takes {best['tokens']} tokens {best['faster than cuDNN']:g}x as fast as cuDNN."
            )
        return " ".join(said)

    def draw(self, rows: list[Row], pyplot: Any) -> Any:
        """Time against length, both logarithmic."""
        rows = [row for row in rows if row.get("table") == PREFILL and "ms" in row]
        figure, axis = pyplot.subplots(figsize=(7, 4.5))
        for name in dict.fromkeys(row["attention"] for row in rows):
            points = [row for row in rows if row["attention"] == name]
            lengths, seconds = [row["tokens"] for row in points], [row["ms"] / 1e3 for row in points]
            (line,) = axis.plot(lengths, seconds, marker="o", label=name)
            scaled = [(row["tokens"], row["ms"] / 1e3) for row in points if "layers run" in row]
            if scaled:  # hollow
                axis.plot(*zip(*scaled, strict=True), "o", color=line.get_color(), markerfacecolor="white")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds of a prefill")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False)
        return figure


@dataclass(frozen=True)
class _Kind:
    """One compiled prefill: dense on a library of torch's, ours where `min_tokens` is set, else without attention."""

    layers: int
    library: str | None = None
    min_tokens: int | None = None
    density: float | None = None


def _ms(call: PrefillCall | None, times: Times | Failure | None) -> float | None:
    return times.ms * call.scale if call is not None and isinstance(times, Times) else None


def shortest_win(dense: Mapping[int, float], sparse: Mapping[int, float]) -> int | None:
    """The shortest length from which on sparse is the faster at every length that both have; None where it is not at
    the longest. dense, sparse: length to time."""
    shortest = None
    for length in sorted(dense.keys() & sparse.keys(), reverse=True):
        if sparse[length] >= dense[length]:
            break
        shortest = length
    return shortest
