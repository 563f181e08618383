"""The memory that a prefill of a given length will take, from its graphs and before anything of that size runs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from torch import fx, nn

from mmcompile.passes.list_steps import Buffer, Steps, list_steps
from mmcompile.passes.peak_memory import peak_memory
from mmcompile.passes.pipeline import Rewritten

GB = 1e9
SHOWN = 8  # largest tensors
NAMED_FROM = 0.01  # of the peak: smaller ones are not worth a line
TRAP_FROM = 0.1  # GB


@dataclass(frozen=True)
class LargeTensor:
    """One of the tensors that are held when most memory is. count: how many like it are. module: of the first."""

    operation: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    gigabytes: float  # of one
    count: int


@dataclass(frozen=True)
class MemoryUse:
    """What a prefill of `tokens` tokens holds at its peak, in GB (1e9 bytes).

    peak: all of it. weights: of the model. kept: what the prefill returns, mostly the KV cache. workspace: what the
    operation of the peak needs besides its results, and what is held for later ones. largest: the largest tensors at
    the peak, without weights. step: the operation at which the peak is. traps: what takes memory for nothing, and what
    to do about it.
    """

    tokens: int
    peak: float
    weights: float
    kept: float
    workspace: float
    step: str
    largest: tuple[LargeTensor, ...]
    traps: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)

    def summary(self) -> str:
        """In one line."""
        return (
            f"{self.tokens} tokens: {self.peak:.1f} GB at the peak, of which {self.weights:.1f} GB weights, "
            f"{self.kept:.1f} GB returned, its KV cache among it, and {self.workspace:.1f} GB workspace"
        )

    def __rich__(self) -> Table:
        table = Table("GB", "tensor", "made by", "in", title=f"Largest tensors at the peak, {self.step}")
        for one in self.largest:
            size = f"{one.gigabytes:.2f}" if one.count == 1 else f"{one.count} x {one.gigabytes:.2f}"
            table.add_row(size, f"{list(one.shape)} {one.dtype}", one.operation, one.module or "-")
        table.caption = self.summary()
        return table


@dataclass(frozen=True)
class PrefillGraph:
    """One graph of a prefill as it was traced: with `traced` tokens."""

    rewritten: Rewritten
    traced: int | None

    def module(self, tokens: int) -> fx.GraphModule:
        """The form that serves a length."""
        short, long = self.rewritten.short, self.rewritten.long
        if short is not None and tokens < short.min_tokens:
            return short.module
        return self.rewritten.module if long is None or tokens <= long.tokens else long.module


def predict_memory(
    graphs: Sequence[PrefillGraph], tokens: int, *, fused: bool, model: nn.Module | None = None, vocabulary: int = 0
) -> MemoryUse | None:
    """The memory of the graph that takes most; what others return is taken to be kept. None where there is no graph.

    fused: as Inductor runs them. model: whose weights are held; those of the graphs alone where it is None. vocabulary:
    tokens of it, by which logits are known; 0 where there is none.
    """
    every = [list_steps(graph.module(tokens), tokens, graph.traced) for graph in graphs]
    if not every:
        return None
    weights = _weights(every, model)
    peaks = [peak_memory(steps, fused=fused) for steps in every]
    index = max(range(len(every)), key=lambda index: peaks[index].nbytes)
    peak = peaks[index]
    kept = [sum(one.buffers[i].nbytes for i in one.returned - set(one.given)) for one in every]
    others = sum(kept) - kept[index]
    total = weights + peak.nbytes + others
    return MemoryUse(
        tokens=tokens,
        peak=total / GB,
        weights=weights / GB,
        kept=sum(kept) / GB,
        workspace=peak.workspace / GB,
        step=peak.step,
        largest=_largest(peak.live, total),
        traps=tuple(dict.fromkeys(trap for one in every for trap in _traps(one, tokens, vocabulary))),
    )


def _weights(every: Sequence[Steps], model: nn.Module | None) -> int:
    if model is None:
        return sum(steps.buffers[index].nbytes for steps in every for index in steps.weights)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def _largest(live: Sequence[Buffer], total: int) -> tuple[LargeTensor, ...]:
    groups: dict[tuple[Any, ...], list[Buffer]] = {}
    for buffer in live:
        groups.setdefault((buffer.name, buffer.shape, buffer.dtype), []).append(buffer)
    order = sorted(groups.values(), key=lambda group: -len(group) * group[0].nbytes)
    return tuple(
        LargeTensor(
            operation=group[0].name,
            module=group[0].module_path,
            shape=group[0].shape,
            dtype=str(group[0].dtype).removeprefix("torch."),
            gigabytes=group[0].nbytes / GB,
            count=len(group),
        )
        for group in order[:SHOWN]
        if len(group) * group[0].nbytes >= NAMED_FROM * total
    )


def _traps(steps: Steps, tokens: int, vocabulary: int) -> list[str]:
    """What takes memory for nothing."""
    large = [buffer for buffer in steps.buffers if buffer.nbytes >= TRAP_FROM * GB]
    logits = [one for one in large if one.shape[-1:] == (vocabulary,) and tokens in one.shape[:-1]]
    masks = [one for one in large if one.shape[-2:] == (tokens, tokens)]
    found = []
    if logits:
        found.append(
            f"logits of all tokens take {logits[0].nbytes / GB:.1f} GB: pass logits_to_keep=1 to the model for "
            "those of the last token alone"
        )
    if masks:
        kind = "float" if masks[0].dtype.is_floating_point else str(masks[0].dtype).removeprefix("torch.")
        found.append(
            f"a {kind} mask of queries x keys takes {masks[0].nbytes / GB:.1f} GB, for an attention that stays dense: "
            "the list of sites has the reason; pass a mask [B, S], or none"
        )
    return found
