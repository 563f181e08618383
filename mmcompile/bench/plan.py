"""`bench plan`: what planning and permuting cost beside the sparse attention that they serve."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor

from mmcompile.bench.dense import BASELINE, dense_calls
from mmcompile.bench.figure import Row
from mmcompile.bench.op_times import OpTimes
from mmcompile.bench.random_heads import random_heads, require_groups
from mmcompile.bench.timing import FAILURE, Call, Failure, Times, race, significant
from mmcompile.bench.video_prompt import FRAME, PATTERNS, SHORTEST, boundaries
from mmcompile.console import Step
from mmcompile.errors import OptionError
from mmcompile.kernels.attend import Attended, sparse_attention

OVERHEAD = ("arrange", "plan", "permutations")


@dataclass(frozen=True)
class PlanBench:
    """The options of `bench plan`. patterns: names in PATTERNS; density: caps; dense: torch's attention beside them."""

    tokens: tuple[int, ...]
    patterns: tuple[str, ...] = tuple(PATTERNS)
    density: tuple[float, ...] = (0.1,)
    head_dim: int = 128
    dtype: str = "bf16"
    heads: int = 28
    kv_heads: int = 4
    device: str = "cuda"
    repeats: int = 10
    dense: bool = True
    title: str = "Planning"

    def __post_init__(self) -> None:
        require_groups(self.heads, self.kv_heads)
        for tokens in self.tokens:
            if tokens < SHORTEST:
                raise OptionError(f"--tokens {tokens}: must be at least {SHORTEST}, some text and a frame")

    @property
    def notes(self) -> str:
        """As in Measurement."""
        return (
            f"{self.heads} query heads, {self.kv_heads} KV heads, head dim {self.head_dim}, {self.dtype}, batch 1, a "
            f"video of {FRAME[0] * FRAME[1]} tokens per frame, random data (estimated patterns spend their whole cap). "
            "Times of the parts are the GPU's, with all launches made beforehand; host ms is what launching arrange, "
            "plan and permutations takes; whole ms is one attention as a waiting caller sees it, all parts in it. A "
            "compiled model runs arrange once for all layers, so that the share leaves it out. Permutations are of "
            "keys and values; those of queries and outputs are in the attention's time, as copies below 65,536 tokens. "
            "Median of runs in turns, the spread is half their range"
        )

    @property
    def steps(self) -> int:
        """As in Measurement."""
        contenders = len(self.patterns) * len(self.density)
        return len(self.tokens) * (2 * (contenders + self.repeats) + self.dense)

    def measure(self, step: Step) -> Iterator[list[Row]]:
        """As in Measurement."""
        for tokens in self.tokens:
            yield self._rows(tokens, step)

    def _rows(self, tokens: int, step: Step) -> list[Row]:
        heads = self.heads, self.kv_heads
        query, key, value = random_heads(*heads, tokens, self.head_dim, self.dtype, self.device)
        segments = boundaries(tokens, self.device)
        watched: dict[str, _Watched] = {}
        for pattern, cap in product(self.patterns, self.density):

            def attend(pattern: str = pattern, cap: float = cap) -> Attended:
                return sparse_attention(query, key, value, PATTERNS[pattern], segments, density=cap)

            watched[f"{pattern}, {cap}"] = _Watched(attend, self.device)
        baseline = BASELINE[self.device]
        calls: dict[str, Call] = {baseline: dense_calls(query, key, value)[baseline]} if self.dense else {}
        calls |= watched
        whole = race(calls, self.device, self.repeats, step=step)
        host = {name: Times.of(one.host_ms()) for name, one in watched.items() if isinstance(whole[name], Times)}
        # Long enough that a whole attention is launched before its first kernel runs.
        lead = max((time.ms for time in host.values()), default=0.0) * 1.5 + 1.0
        busy = race(dict(watched), self.device, self.repeats, lead=lead, step=step)
        dense = whole.get(baseline)
        rows = []
        for name, (pattern, cap) in zip(watched, product(self.patterns, self.density), strict=True):
            row: Row = {"tokens": tokens, "pattern": pattern, "cap": cap}
            measured, alone = busy[name], whole[name]
            if isinstance(measured, Times) and isinstance(alone, Times):
                row |= watched[name].columns(measured.runs) | {"host ms": significant(host[name].ms)}
                row |= alone.columns("whole ms")
                row |= {"faster than dense": significant(dense.ms / alone.ms)} if isinstance(dense, Times) else {}
            else:
                row[FAILURE] = next(one.reason for one in (measured, alone) if isinstance(one, Failure))
            rows.append(row)
        if dense is None:
            return rows
        whole_dense = dense.columns("whole ms") if isinstance(dense, Times) else {FAILURE: dense.reason}
        return [*rows, {"tokens": tokens, "pattern": baseline, "density": 1.0} | whole_dense]

    def summary(self, rows: list[Row]) -> str:
        """As in Measurement."""
        parts = [
            f"{row['share']:.1%} for {row['pattern']} at {row['tokens']} tokens and density {row['density']}"
            for row in rows
            if "share" in row
        ]
        return f"Plan and permutations beside the attention that they serve: {'; '.join(parts)}." if parts else ""

    def draw(self, rows: list[Row], pyplot: Any) -> Any:
        """Stacked bars of the parts, relative to the attention, one panel for each length."""
        rows = [row for row in rows if "share" in row]
        lengths = list(dict.fromkeys(row["tokens"] for row in rows))
        figure, axes = pyplot.subplots(1, max(1, len(lengths)), figsize=(4 * max(1, len(lengths)), 4), squeeze=False)
        for axis, tokens in zip(axes[0], lengths, strict=False):
            bars = [row for row in rows if row["tokens"] == tokens]
            names = [f"{row['pattern']}\n{row['density']:.3g}" for row in bars]
            bottom = [0.0] * len(bars)
            for part in OVERHEAD:
                heights = [row[f"{part} ms"] / row["attention ms"] for row in bars]
                axis.bar(names, heights, bottom=bottom, label=part)
                bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
            axis.set(title=f"{tokens} tokens", xlabel="pattern and its density")
            axis.grid(alpha=0.3, axis="y")
        axes[0][0].set_ylabel("time over that of the sparse attention")
        axes[0][-1].legend(frameon=False)
        return figure


class _Watched:
    """An attention that can be called often, and the times of its ops in each call."""

    def __init__(self, attend: Callable[[], Attended], device: str) -> None:
        self.attend, self.device = attend, device
        self.calls: list[OpTimes] = []
        self.density: Tensor

    def __call__(self) -> None:
        times = OpTimes(self.device)
        with times:
            attended = self.attend()
        self.calls.append(times)
        self.density = attended.density

    def host_ms(self) -> list[float]:
        """Of each call but the first, which compiled kernels: the host's time in all parts but the attention."""
        return [call.host_ms(*OVERHEAD) for call in self.calls[1:]]

    def columns(self, runs: int) -> Row:
        """Density, and the device's time in each part, of the latest calls."""
        parts = {part: Times.of([call.ms(part) for call in self.calls[-runs:]]) for part in (*OVERHEAD, "attention")}
        row: Row = {"density": round(float(self.density.mean()), 4)}
        for part, times in parts.items():
            row |= times.columns(f"{part} ms")
        share = (parts["plan"].ms + parts["permutations"].ms) / parts["attention"].ms
        arranged = share + parts["arrange"].ms / parts["attention"].ms
        return row | {"share": significant(share), "share with arrange": significant(arranged)}
