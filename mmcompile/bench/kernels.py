"""`bench kernels`: attention over listed tiles, how it grows with the length, and the row copies around it.

Attention is measured against cuDNN's and flash attention (dense) and FlexAttention on the same tiles. Rates count the
products of computed tiles, and for dense causal attention half the square.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import mmcompile.kernels.ops  # noqa: F401  registers torch.ops.mminference
from mmcompile.bench.dense import BASELINE, DENSE, dense_calls, dense_names
from mmcompile.bench.figure import Row
from mmcompile.bench.random_heads import DTYPES, random_heads, require_groups
from mmcompile.bench.scattered_walk import listed_tiles, scattered_walk, tiles_of_density
from mmcompile.bench.timing import FAILURE, Call, Failure, Times, race, significant
from mmcompile.console import Step
from mmcompile.errors import OptionError
from mmcompile.kernels import block_sparse_cpu
from mmcompile.kernels.flex import block_mask, flex_attention_on_plan
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_walk import TileWalk

Attention = Callable[[Tensor, Tensor, Tensor, TileWalk, float], Tensor]

ATTENTION, GROWTH, COPIES = TABLES = ("attention", "growth", "copies")
OURS, FLEX = "ours", "FlexAttention, same plan"
GROWTH_TILES = 16  # of each query tile, whatever the length
LEAD = 2.0  # ms; every contender's launch takes the host less, FlexAttention's guards the longest
SAMPLE = 61  # every such row of an output is compared; odd, so that all places in a tile come up

_OPS = torch.ops.mminference


def variants(device: str) -> dict[str, Attention]:
    """Our ways to run a walk by name, the first one the op's own; a new variant of the kernel gets its line here."""
    if device == "cpu":
        return {OURS: block_sparse_cpu.block_sparse_attention}
    from mmcompile.kernels import block_sparse  # here, because Triton is absent where there is no GPU

    return {OURS: block_sparse.block_sparse_attention, f"{OURS}, portable kernel": block_sparse.portable_attention}


@dataclass(frozen=True)
class KernelsBench:
    """The options of `bench kernels`. tokens: multiples of TILE; density: fractions of the causal tiles."""

    tokens: tuple[int, ...]
    density: tuple[float, ...]
    head_dim: tuple[int, ...] = (128,)
    dtype: tuple[str, ...] = ("bf16",)
    heads: int = 28
    kv_heads: int = 4
    device: str = "cuda"
    repeats: int = 20
    tables: tuple[str, ...] = TABLES
    title: str = "Kernels"

    def __post_init__(self) -> None:
        require_groups(self.heads, self.kv_heads)
        for tokens in self.tokens:
            if tokens % TILE:
                raise OptionError(f"--tokens {tokens}: must be a multiple of {TILE}, the rows of a tile")

    @property
    def notes(self) -> str:
        """As in Measurement."""
        return (
            f"{self.heads} query heads, {self.kv_heads} KV heads, batch 1, causal, scattered tiles, random data. "
            "Median of runs in turns, the L2 cache emptied before each; the spread is half their range. TFLOP/s are of "
            "computed tiles. Difference: of an output from that of the first row with the same tiles, relative, in "
            f"one row of {SAMPLE}"
        )

    @property
    def steps(self) -> int:
        """As in Measurement."""
        ours, geometries = len(variants(self.device)), len(self.tokens) * len(self.head_dim)
        attention = len(dense_names(self.device)) + len(self.density) * (ours + 1) + self.repeats
        count = attention * geometries * len(self.dtype) if ATTENTION in self.tables else 0
        count += (2 * ours + self.repeats) * len(self.tokens) if GROWTH in self.tables else 0
        return count + ((5 + self.repeats) * geometries if COPIES in self.tables else 0)

    def measure(self, step: Step) -> Iterator[list[Row]]:
        """As in Measurement."""
        if ATTENTION in self.tables:
            for tokens, head_dim, dtype in product(self.tokens, self.head_dim, self.dtype):
                yield self._attention(tokens, head_dim, dtype, step)
        if GROWTH in self.tables:
            for tokens in self.tokens:
                yield self._growth(tokens, step)
        if COPIES in self.tables:
            for tokens, head_dim in product(self.tokens, self.head_dim):
                yield self._copies(tokens, head_dim, step)

    def _attention(self, tokens: int, head_dim: int, dtype: str, step: Step) -> list[Row]:
        query, key, value = self._tensors(tokens, head_dim, dtype)
        group = _Group(4 * self.heads * head_dim * TILE * TILE, self.device)
        for name, call in dense_calls(query, key, value).items():
            group.add(name, 1.0, (tokens / TILE) ** 2 / 2, call)
        torch.compiler.reset()
        for density in self.density:
            walk = scattered_walk(tiles_of_density(tokens, density, self.device), self.heads, self.kv_heads)
            tiles, causal = listed_tiles(walk), tokens // TILE * (tokens // TILE + 1) // 2
            scale = head_dim**-0.5
            group.add(FLEX, tiles / causal, tiles, _FlexAttention(query, key, value, walk, scale))
            for name, attention in variants(self.device).items():
                group.add(name, tiles / causal, tiles, partial(attention, query, key, value, walk, scale))
        same = {"table": ATTENTION, "tokens": tokens, "head dim": head_dim, "dtype": dtype}
        return [same | row for row in group.race(self.repeats, step)]

    def _growth(self, tokens: int, step: Step) -> list[Row]:
        head_dim, dtype = self.head_dim[0], self.dtype[0]
        calls: dict[str, Call] = {}
        tiles = []
        for length in (tokens, 2 * tokens):
            tensors = self._tensors(length, head_dim, dtype)
            listed = torch.full((length // TILE,), GROWTH_TILES, device=self.device)
            walk = scattered_walk(listed, self.heads, self.kv_heads)
            tiles.append(listed_tiles(walk))
            for name, attention in variants(self.device).items():
                calls[f"{name}, {length}"] = partial(attention, *tensors, walk, head_dim**-0.5)
        times = race(calls, self.device, self.repeats, lead=LEAD, step=step)
        rows = []
        for name in variants(self.device):
            row: Row = {"table": GROWTH, "attention": name, "tokens": tokens, "tiles of a query tile": GROWTH_TILES}
            short, long = times[f"{name}, {tokens}"], times[f"{name}, {2 * tokens}"]
            if isinstance(short, Times) and isinstance(long, Times):
                row |= short.columns() | long.columns("ms of twice the tokens")
                row |= {"tiles grow": significant(tiles[1] / tiles[0]), "time grows": significant(long.ms / short.ms)}
            else:
                row |= {FAILURE: next(one.reason for one in (short, long) if isinstance(one, Failure))}
            rows.append(row)
        return rows

    def _copies(self, tokens: int, head_dim: int, step: Step) -> list[Row]:
        """A plain copy of [1, H, S, D] and both ops, with a random order and with one that moves runs of rows."""
        dtype = DTYPES[self.dtype[0]]
        # A model's layout: projections come with the heads inside.
        x = torch.randn(1, tokens, self.heads, head_dim, dtype=dtype, device=self.device).transpose(1, 2)
        orders = {
            "random": torch.randperm(tokens, device=self.device),
            f"runs of {TILE}": torch.arange(tokens, device=self.device).view(-1, TILE).flip(0).flatten(),
        }
        every_head, rows = list(range(self.heads)), [0] * self.heads
        calls: dict[str, Call] = {"copy": x.clone}
        for name, order in orders.items():
            order = order.int().view(1, 1, -1)
            calls[f"permute, {name}"] = partial(_OPS.permute, x, order, None, every_head, rows)
            calls[f"unpermute, {name}"] = partial(_OPS.unpermute, x, order, None, rows)
        times = race(calls, self.device, self.repeats, lead=LEAD, step=step)
        found: list[Row] = []
        for name, time in times.items():
            row: Row = {"table": COPIES, "tokens": tokens, "head dim": head_dim, "op": name}
            if isinstance(time, Times):
                rate = 2 * x.numel() * x.element_size() / time.ms / 1e9
                row |= time.columns() | {"runs": time.runs, "TB/s": significant(rate)}
                copy = times["copy"]
                row |= {"of a copy's rate": significant(copy.ms / time.ms)} if isinstance(copy, Times) else {}
            else:
                row[FAILURE] = time.reason
            found.append(row)
        return found

    def _tensors(self, tokens: int, head_dim: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
        return random_heads(self.heads, self.kv_heads, tokens, head_dim, dtype, self.device)

    def summary(self, rows: list[Row]) -> str:
        """As in Measurement."""
        parts = []
        for row in rows:
            if row.get("table") == ATTENTION and row["attention"] == OURS and "of the dense rate" in row:
                parts.append(f"{row['of the dense rate']:.2f}x at {row['tokens']} tokens and density {row['density']}")
        return (
            f"Rate of our kernel on the tiles it computes, over torch's dense one: {'; '.join(parts)}." if parts else ""
        )

    def draw(self, rows: list[Row], pyplot: Any) -> Any:
        """TFLOP/s over density, one panel for each length, head dim and dtype; dense attention as a level."""
        rows = [row for row in rows if row.get("table") == ATTENTION and "TFLOP/s" in row]
        keys = ("tokens", "head dim", "dtype")
        panels = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
        names = list(dict.fromkeys(row["attention"] for row in rows))
        figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(4 * max(1, len(panels)), 4), squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=False):
            for name in names:
                points = [row for row in rows if tuple(row[k] for k in keys) == panel and row["attention"] == name]
                color = f"C{names.index(name)}"
                if name in DENSE:
                    for row in points:
                        axis.axhline(row["TFLOP/s"], linestyle="--", color=color, label=name)
                else:
                    points.sort(key=lambda row: row["density"])
                    values = [[row[column] for row in points] for column in ("density", "TFLOP/s")]
                    axis.plot(*values, marker="o", color=color, label=name)
            axis.set(xscale="log", xlabel="computed share of the causal tiles", ylim=(0, None))
            axis.set_title("{} tokens, head dim {}, {}".format(*panel))
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel("TFLOP/s of computed tiles")
        axes[0][-1].legend(frameon=False)
        return figure


class _FlexAttention:
    """FlexAttention on one walk; mask and code are made in the first call, where that may fail."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float) -> None:
        self.query, self.key, self.value, self.walk, self.scale = query, key, value, walk, scale

    def __call__(self) -> Tensor:
        return flex_attention_on_plan(self.query, self.key, self.value, self.walk, self.scale, *self._compiled)

    @cached_property
    def _compiled(self) -> tuple[BlockMask, Callable[..., Tensor]]:
        return block_mask(self.walk), torch.compile(flex_attention, dynamic=False)


class _Entry(NamedTuple):
    """One attention in a group: its share of the causal tiles, and the tiles that one head computes."""

    name: str
    density: float
    tiles: float
    call: Call


class _Group:
    """Attentions of the same tensors that race together, and the rows that come of it."""

    def __init__(self, tile_flops: int, device: str) -> None:
        """tile_flops: of one tile of every head."""
        self.tile_flops, self.device = tile_flops, device
        self.entries: dict[str, _Entry] = {}
        self.samples: dict[str, Tensor] = {}
        self.times: dict[str, Times | Failure] = {}

    def add(self, name: str, density: float, tiles: float, call: Call) -> None:
        """tiles: that one head computes."""
        self.entries[_label(name, density)] = _Entry(name, density, tiles, call)

    def race(self, repeats: int, step: Step) -> list[Row]:
        """One row for each attention."""
        calls = {label: entry.call for label, entry in self.entries.items()}
        self.times = race(calls, self.device, repeats, lead=LEAD, step=step, look=self._sample)
        return [self._row(label, entry) for label, entry in self.entries.items()]

    def _row(self, label: str, entry: _Entry) -> Row:
        row: Row = {"density": round(entry.density, 4), "attention": entry.name}
        time = self.times[label]
        if isinstance(time, Failure):
            return row | {FAILURE: time.reason}
        row |= time.columns() | {"runs": time.runs, "TFLOP/s": significant(self._rate(label))}
        baseline = _label(BASELINE[self.device], 1.0)
        dense, flex = self.times[baseline], self.times.get(_label(FLEX, entry.density))
        if isinstance(dense, Times):
            row["of the dense rate"] = significant(self._rate(label) / self._rate(baseline))
            row["faster than dense"] = significant(dense.ms / time.ms)
        if isinstance(flex, Times) and entry.name in variants(self.device):
            row["faster than FlexAttention"] = significant(flex.ms / time.ms)
        first = next(
            one for one, other in self.entries.items() if other.density == entry.density and one in self.samples
        )
        if first != label:
            difference = (self.samples[label] - self.samples[first]).norm() / self.samples[first].norm()
            row["difference"] = significant(float(difference), 2)
        return row

    def _rate(self, label: str) -> float:
        """TFLOP/s of one that ran."""
        time = self.times[label]
        assert isinstance(time, Times)
        return self.tile_flops * self.entries[label].tiles / time.ms / 1e9

    def _sample(self, label: str, output: Tensor) -> None:
        self.samples[label] = output[:, :, ::SAMPLE].float()


def _label(name: str, density: float) -> str:
    return f"{name}, density {density:.4f}"
