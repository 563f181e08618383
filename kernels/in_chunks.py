"""The op `mminference::in_chunks`: token-wise work on some tokens at a time, so that what it makes on the way fits.

A graph names the work by a text, since an op takes no function; whoever makes the graph registers it under that name
and keeps it. Each chunk's results go where they belong in the whole ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.library import custom_op

# Tokens of a chunk. Measured on an H200 with four layers of Qwen2.5-VL-7B's decoder at 256K tokens: 4,096 take 939 ms,
# 8,192 918 ms, 16,384 908 ms and 9.2 GB of work, all tokens at once 940 ms and 30.8 GB.
CHUNK = 16384
SHORTEST_CHUNK = 1024
CHUNKS_FROM = 2 * CHUNK  # tokens; what fewer make on the way is small beside the weights
ALIGNED = 16  # tokens, so that each chunk's rows begin where wide loads can


@dataclass(frozen=True)
class RowOutput:
    """One result of a stretch: a dense tensor whose tokens lie along `row_dim`.

    shape: sizes; None the number of tokens, a pair the index of an input and which of its sizes it is.
    order: dimensions as they lie in memory, the outermost first.
    """

    shape: tuple[int | tuple[int, int] | None, ...]
    order: tuple[int, ...]
    row_dim: int
    dtype: torch.dtype

    @property
    def is_written(self) -> bool:
        """Whether a chunk of it is one piece of memory, which the work then writes itself; else it is copied there."""
        before = self.order[: self.order.index(self.row_dim)]
        return all(self.shape[dim] == 1 for dim in before)

    def allocate(self, inputs: Sequence[Tensor], tokens: int, device: torch.device) -> Tensor:
        sizes = [tokens if size is None else inputs[size[0]].shape[size[1]] if isinstance(size, tuple) else size
                 for size in self.shape]  # fmt: skip
        strides, stride = [1] * len(sizes), 1
        for dim in reversed(self.order):
            strides[dim] = stride
            stride *= sizes[dim]
        return torch.empty_strided(sizes, strides, dtype=self.dtype, device=device)


@dataclass(eq=False)
class Stretch:
    """Token-wise work.

    rows: of each input, the dimension along which its tokens lie; None where it is needed whole.
    run: is given the inputs cut to some tokens, then those of `outputs` that are written, cut too, which it fills;
        it returns the others.
    token_bytes: most that it holds for a token at one time, about.
    """

    rows: tuple[int | None, ...]
    outputs: tuple[RowOutput, ...]
    token_bytes: int
    run: Callable[..., Sequence[Tensor]]

    def tokens(self, inputs: Sequence[Tensor]) -> int:
        return next(x.shape[dim] for x, dim in zip(inputs, self.rows, strict=True) if dim is not None)

    def device(self, inputs: Sequence[Tensor]) -> torch.device:
        """Where the tokens are; a number among the inputs may be on the host."""
        return next(x.device for x, dim in zip(inputs, self.rows, strict=True) if dim is not None)

    def allocate(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        tokens, device = self.tokens(inputs), self.device(inputs)
        return [output.allocate(inputs, tokens, device) for output in self.outputs]


_stretches: WeakValueDictionary[str, Stretch] = WeakValueDictionary()


def register_stretch(name: str, stretch: Stretch) -> Stretch:
    """The stretch of that name: `stretch`, unless there is one already. It is known as long as someone keeps it."""
    return _stretches.setdefault(name, stretch)


@custom_op("mminference::in_chunks", mutates_args=(), schema="(Tensor[] inputs, str stretch, int? chunk) -> Tensor[]")
def in_chunks(inputs: Sequence[Tensor], stretch: str, chunk: int | None) -> list[Tensor]:
    """The outputs of a registered stretch for all tokens of its inputs.

    chunk: tokens at a time, at most; None for CHUNK, or fewer where little memory is free.
    Raises KeyError where nothing is registered under that name.
    """
    work = _stretches[stretch]
    outputs, tokens = work.allocate(inputs), work.tokens(inputs)
    size = even_chunk(tokens, _affordable(work.token_bytes, work.device(inputs)) if chunk is None else chunk)
    for start in range(0, tokens, size):
        count = min(size, tokens - start)
        cut = [x if dim is None else _cut(x, dim, start, count) for x, dim in zip(inputs, work.rows, strict=True)]
        parts = [_cut(x, one.row_dim, start, count) for x, one in zip(outputs, work.outputs, strict=True)]
        written = [part for part, one in zip(parts, work.outputs, strict=True) if one.is_written]
        copied = [part for part, one in zip(parts, work.outputs, strict=True) if not one.is_written]
        for part, result in zip(copied, work.run(*cut, *written), strict=True):
            part.copy_(result)
    return outputs


@in_chunks.register_fake
def _(inputs, stretch, chunk):
    return _stretches[stretch].allocate(inputs)


def workspace_bytes(inputs: Sequence[Tensor], stretch: str, chunk: int | None) -> int:
    """What the op holds besides its results, where there is room for whole chunks. Arguments as of `in_chunks`."""
    work = _stretches[stretch]
    return work.token_bytes * even_chunk(work.tokens(inputs), CHUNK if chunk is None else chunk)


def even_chunk(tokens: int, most: int) -> int:
    """The size of chunks that are about equal, of at most `most` tokens where that is a multiple of ALIGNED."""
    size = -(-tokens // -(-tokens // most))
    size = -(-size // ALIGNED) * ALIGNED
    return size + ALIGNED if tokens % size == 1 else size  # compiled code for one row is another


def _affordable(token_bytes: int, device: torch.device) -> int:
    size = CHUNK
    if device.type == "cuda":
        # Numbers that the host has: nothing waits for the device.
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        while size > SHORTEST_CHUNK and 2 * size * token_bytes > free:
            size //= 2
    return size


def _cut(x: Tensor, dim: int, start: int, count: int) -> Tensor:
    """Some tokens of x, with strides that do not tell the number of all of them where that is one piece of memory."""
    part = x.narrow(dim, start, count)
    strides = [1 if size == 1 else stride for size, stride in zip(part.shape, part.stride(), strict=True)]
    return part.as_strided(part.shape, strides)
