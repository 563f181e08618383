"""Random mask programs: the masks that models write in many spellings, near misses of them, and plain nonsense.

A program is source text, so that a failure can be read and run again. It has these names: B, H, Sq, Sk; `past` keys
before the first query; index tensors b, q, k (q counted from the first key); inputs am, ids, pos, score, bias.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.passes.captured_masks import DIM, HEADS, Program

INPUTS = ("query", "key", "am", "ids", "pos", "score", "bias")

INDICES = (
    (
        "b = torch.arange(B)[:, None, None, None]",
        "q = (torch.arange(Sq) + past)[None, None, :, None]",
        "k = torch.arange(Sk)[None, None, None, :]",
    ),
    (
        "b = torch.arange(B).view(B, 1, 1, 1)",
        "q = torch.arange(Sq).unsqueeze(1) + past",
        "k = torch.arange(Sk).unsqueeze(0)",
    ),
    (
        "b = torch.arange(B).reshape(-1, 1, 1, 1)",
        "q = torch.arange(past, Sk).view(1, 1, Sq, 1)",
        "k = torch.arange(0, Sk, 1, dtype=torch.int64).view(1, 1, 1, Sk)",
    ),
    (
        "b = torch.arange(B, dtype=torch.int32)[:, None, None, None]",
        "q = torch.arange(Sq, dtype=torch.int32).reshape(1, 1, Sq, 1).add(past)",
        "k = torch.arange(Sk, dtype=torch.int32).reshape(1, 1, Sk, 1).transpose(2, 3)",
    ),
    (
        "b = torch.arange(B)[:, None, None, None].expand(B, 1, Sq, Sk)",
        "q = (past + torch.arange(Sq))[:, None].expand(Sq, Sk)[None, None]",
        "k = torch.arange(Sk).expand(1, 1, Sq, Sk).contiguous()",
    ),
)

CAUSAL = (
    "k <= q",
    "q >= k",
    "~(k > q)",
    "k < q + 1",
    "(q - k) >= 0",
    "(k - q).le(0)",
    "torch.logical_not(k.gt(q))",
    "torch.le(k, q)",
    "q + 1 > k",
    "torch.ones(Sq, Sk, dtype=torch.bool).tril(diagonal=past)",
    "torch.tril(torch.ones((Sq, Sk), dtype=torch.bool), past)",
    "torch.triu(torch.ones(Sq, Sk), diagonal=past + 1) == 0",
    "~query.new_ones(Sq, Sk, dtype=torch.bool).triu(past + 1)",
    "torch.where(k > q, False, torch.ones((), dtype=torch.bool))",
    "(2 * k) <= (2 * q + 1)",
    "-q <= -k",
)
WINDOW = (
    "k > q - {w}",
    "q - k < {w}",
    "(q - k).le({w} - 1)",
    "~(q - k >= {w})",
    "torch.ones(Sq, Sk, dtype=torch.bool).triu(past - {w} + 1)",
    "(k + {w}) > q",
    "torch.logical_not((q - {w}).ge(k))",
)
PADDING = (
    "am[b, k].bool()",
    "am[b, k] != 0",
    "am.bool()[b, k]",
    "am.bool()[:, None, None, :]",
    "am.to(torch.bool).view(B, 1, 1, Sk)",
    "am.bool().unsqueeze(1).unsqueeze(1).expand(B, 1, Sq, Sk)",
    "am.bool()[:, None].unsqueeze(2)",
    "(am == 1)[:, None, None]",
    "~(am == 0)[:, None, None, :]",
    "torch.logical_not(am[:, None, None, :] == 0)",
    "am.bool().index_select(1, torch.arange(Sk))[:, None, None, :]",
    "(score > 0.25)[:, None, None, :]",
    "(am.cumsum(-1) > 1)[:, None, None, :]",
)
KEYS = (
    "k < Sk - 2",
    "k >= 1",
    "k % 2 == 0",
    "(k // 3) != 1",
    "(k + 1) % 3 > 0",
    "ids[b, k] != 2",
    "am[b, k] <= ids[b, k]",
)
SEGMENT = (
    "ids[b, q] == ids[b, k]",
    "ids[b, k].eq(ids[b, q])",
    "~(ids[b, q] != ids[b, k])",
    "ids[:, past:][:, None, :, None] == ids[:, None, None, :]",
    "(q // 3) == (k // 3)",
    "torch.div(q, 3, rounding_mode='floor') == torch.div(k, 3, rounding_mode='floor')",
    "am.bool()[b, q] == am.bool()[b, k]",
    "(ids > 0)[b, q] == (ids > 0)[b, k]",
    "ids[b, q] == ids[b, k].long()",
)
SPAN = (
    "(ids[b, q] == ids[b, k]) & (ids[b, q] >= 0)",
    "(ids[b, k] == ids[b, q]) & (ids[b, k] > -1)",
    "torch.logical_and(ids[b, q].eq(ids[b, k]), ids[b, q].ge(0))",
    "(ids[b, q] == ids[b, k]) & ~(ids[b, q] < 0)",
    "(ids[:, past:][:, None, :, None] == ids[:, None, None, :]) & (ids >= 0)[:, None, None, :]",
    "(ids[b, q] == ids[b, k]) & (ids[b, q] > 0)",
    "(ids[b, q] >= 0) & (ids[b, k] >= 0) & (ids[b, k] == ids[b, q])",
    "am.bool()[b, q] & am.bool()[b, k]",
    "(q // 4) == (k // 4)",
)
PACKED = "(p[b, q] == p[b, k]) & (pos[b, k] <= pos[b, q])"
PACKED_WINDOW = "(p[b, q] == p[b, k]) & (pos[b, k] <= pos[b, q]) & (pos[b, k] > pos[b, q] - {w})"
COUNT_SEQUENCES = (
    "p = (torch.diff(pos, prepend=pos[:, :1] - 1, dim=-1) != 1).cumsum(-1)",
    "p = torch.ne(torch.diff(pos, dim=1, prepend=pos[:, 0:1] - 1), 1).long().cumsum(dim=1)",
)

NEAR_MISS = (
    "k < q",
    "k <= q + 3",
    "k <= q - 2",
    "q <= k",
    "k * 2 <= q",
    "k <= q * q",
    "(q - k) ** 2 < 9",
    "abs(q - k) <= 2",
    "(q - k).abs() < {w}",
    "q - k <= {w}",
    "k % 2 == q % 2",
    "(k <= q) ^ am.bool()[b, k]",
    "ids[b, q] <= ids[b, k]",
    "pos[b, k] <= pos[b, q]",
    "ids[b, k] <= q",
    "k <= ids[b, q]",
    "am.bool()[b, q]",
    "q >= 2",
    "q >= 0",
    "bias > 0",
    "bias[:, :, :1] > 0",
    "bias[:, :, -1:, :] > 0.1",
    "(k - q) >= -(torch.arange(H) + 2)[None, :, None, None]",
    "torch.ones(Sk, Sk, dtype=torch.bool).triu()[past:]",
    "torch.ones(Sk, Sk, dtype=torch.bool).tril()[past:].t().t()",
    "torch.ones(Sk, Sk, dtype=torch.bool).tril()[-Sq:, :Sk]",
    "torch.ones(Sk, Sk, dtype=torch.bool).tril().transpose(0, 1)[past:]",
    "ids[b, k - 3] > 0",
    "am.bool()[b, k - 1]",
    "am.flip(-1).bool()[:, None, None, :]",
    "ids.roll(1, -1)[b, k] > 0",
    "(ids & 1)[b, k].bool()",
    "(am.to(torch.int32) & 1)[b, k] == 1",
    "(am.to(torch.uint8) - 1)[b, k] > 100",
    "am.to(torch.uint8)[b, k] > -1",
    "(k.to(torch.int8) * 100) > 0",
    "torch.arange(Sk, dtype=torch.uint8) - 1 < 250",
    "ids[b, k] + 1 > ids[b, k]",
    "ids[b, q] + 1 > ids[b, k]",
    "ids[b, q] - 1 == ids[b, k]",
    "am[b, k] + k <= q",
    "(k <= q).int() + am[b, k] > 1",
    "torch.where(ids[b, k] > 0, k, q) <= q",
    "torch.where(k > 2, k, q) <= q",
    "(k.float() <= q)",
    "torch.maximum(k, q) <= q",
    "k == q",
    "(score[b, k] > 0.25)",
    "k != q",
    "ids[b, q] == k",
    "ids[b, ids[b, k].clamp(0, 2)] > 0",
    "ids[0][k] > 0",
    "ids[-1, k] > 0",
    "ids[..., 0][b] > ids[b, k]",
    "am[:, :1].bool()[:, None, None]",
    "ids.sum() > k",
    "torch.ones(Sq, Sk, dtype=torch.int64).tril(past).cumsum(-1) > 2",
    "((k <= q) & am.bool()[b, k]).any(-2, keepdim=True)",
    "(k > q - {w}) | (k < 2)",
)

AND = (
    "({x}) & ({y})",
    "torch.logical_and({x}, {y})",
    "({x}) * ({y})",
    "torch.where({x}, {y}, False)",
    "~(~({x}) | ~({y}))",
    "(({x}).int() * ({y}).int()).bool()",
    "(({x}).long() + ({y}).long()) == 2",
    "(({x}).to(torch.uint8) & ({y}).to(torch.uint8)).bool()",
    "({x}).bitwise_and({y})",
)
OR = (
    "({x}) | ({y})",
    "torch.logical_or({x}, {y})",
    "torch.where({x}, True, {y})",
    "~(~({x}) & ~({y}))",
    "(({x}).int() + ({y}).int()) > 0",
    "({x}) + ({y})",
    "({x}).logical_or({y})",
)
NOT = ("~({x})", "torch.logical_not({x})", "({x}) == False", "({x}) ^ True", "(1 - ({x}).int()).bool()")
SAME = ("({x})", "({x}).to(torch.bool)", "({x}) & True", "~(~({x}))", "({x}) != 0", "0 < ({x}).int()", "({x}).clone()")

BOOL_RESULT = (
    "m.expand(B, 1, Sq, Sk)",
    "m.expand(B, -1, Sq, Sk)",
    "m",
    "torch.ones(B, 1, Sq, Sk, dtype=torch.bool) & m",
    "query.new_zeros((), dtype=torch.bool) | m",
)
INFINITE_RESULT = (
    "torch.where(m, 0.0, float('-inf'))",
    "torch.zeros(B, 1, Sq, Sk).masked_fill(~m, float('-inf'))",
    "torch.where(~m, torch.full((Sq, Sk), float('-inf')), torch.zeros(Sq, Sk))",
    "torch.zeros(B, 1, Sq, Sk, dtype=torch.float16).masked_fill(m == 0, float('-inf'))",
)
FINITE_RESULT = (
    "torch.where(m, 0.0, torch.finfo(torch.float32).min)",
    "(~m).float() * torch.finfo(torch.float32).min",
    "(1.0 - m.float()) * torch.finfo(torch.float32).min",
    "torch.zeros(B, 1, Sq, Sk, dtype=torch.bfloat16).masked_fill(~m, torch.finfo(torch.bfloat16).min)",
)
ODD_RESULT = (
    "torch.where(m, 1.0, float('-inf'))",
    "torch.where(m, 0.0, -1e4)",
    "(1.0 - m.float()) * float('-inf')",
    "torch.where(m, bias, float('-inf'))",
    "m.float()",
    "m.float().log()",
    "m.expand(B, 1, Sq, Sk).clone().logical_and_(k >= 1)",
    "m.expand(B, 1, Sq, Sk).clone().index_fill_(3, torch.zeros(1, dtype=torch.int64), True)",
    "m.expand(B, 1, Sq, Sk).flip(3)",
)


@dataclass(frozen=True)
class MaskProgram:
    """A program as text; `kind` says what it was made as: "known", "near miss" or "wild"."""

    kind: str
    source: str

    def compiled(self) -> Program:
        """The program as a function of its named inputs."""
        names: dict = {"torch": torch}
        exec(self.source, names)
        return names["program"]


def write_program(choose: random.Random) -> MaskProgram:
    """One random program."""
    writer = _Writer(choose)
    kind = choose.choices(("known", "near miss", "wild"), (5, 3, 2))[0]
    if kind == "known":
        mask, result = writer.known()
    elif kind == "near miss":
        mask, result = writer.near_miss()
    else:
        mask, result = writer.tree(choose.randint(2, 4)), choose.choice(BOOL_RESULT + INFINITE_RESULT)
    return MaskProgram(kind, writer.source(mask, result))


def program_source(
    mask: str,
    result: str = "m",
    past: str = "Sk - Sq",
    indices: Sequence[str] = INDICES[0],
    count_sequences: str = COUNT_SEQUENCES[0],
) -> str:
    """The text of a program that returns `result`, where `m` is `mask`."""
    lines = ["B, H, Sq, _ = query.shape", "Sk = key.shape[2]", f"past = {past}", *indices]
    lines += [count_sequences] if "p[b" in mask else []
    lines += [f"m = {mask}", f"return {result}"]
    return f"def program({', '.join(INPUTS)}):\n" + "".join(f"    {line}\n" for line in lines)


class _Writer:
    """Writes masks in randomly chosen spellings."""

    def __init__(self, choose: random.Random) -> None:
        self.choose = choose
        self.window = choose.choice((1, 2, 3, 5, 40))

    def pick(self, spellings: Sequence[str], **parts: str) -> str:
        return self.choose.choice(spellings).format(**{"w": self.window, **parts})

    def chance(self, share: float) -> bool:
        return self.choose.random() < share

    def both(self, x: str, y: str) -> str:
        x, y = (x, y) if self.chance(0.5) else (y, x)
        return self.same(self.pick(AND, x=x, y=y))

    def either(self, x: str, y: str) -> str:
        x, y = (x, y) if self.chance(0.5) else (y, x)
        return self.same(self.pick(OR, x=x, y=y))

    def same(self, x: str) -> str:
        return self.pick(SAME, x=x) if self.chance(0.3) else x

    def known(self) -> tuple[str, str]:
        """A mask that should be read, and the form it is returned in."""
        parts = [self.same(self.pick(CAUSAL))]
        others = []
        if self.chance(0.3):
            others.append(self.pick(WINDOW))
        if self.chance(0.6):
            others.append(self.same(self.pick(PADDING)))
        if self.chance(0.15):
            others.append(self.pick(KEYS))
        if self.chance(0.3):
            others.append(self.pick(SEGMENT) if self.chance(0.6) else self.pick((PACKED, PACKED_WINDOW)))
        if self.chance(0.3):
            span = self.pick(SPAN)
            if others and self.chance(0.3):  # the shared condition on each side
                common = others.pop()
                parts = [self.either(self.both(parts[0], common), self.both(span, common))]
            else:
                parts = [self.either(parts[0], span)]
        everything = parts + others
        self.choose.shuffle(everything)
        mask = everything[0]
        for part in everything[1:]:
            mask = self.both(mask, part)
        forms = BOOL_RESULT * 2 + INFINITE_RESULT + (() if others else FINITE_RESULT)
        return mask, self.choose.choice(forms)

    def near_miss(self) -> tuple[str, str]:
        """A known mask with one thing wrong, or one thing that is only rarely seen."""
        mask, result = self.known()
        if self.chance(0.15):
            return mask, self.choose.choice(ODD_RESULT)
        if self.chance(0.15):
            return mask, self.choose.choice(FINITE_RESULT)
        joined = self.both if self.chance(0.6) else self.either
        wrong = self.pick(NEAR_MISS)
        return (wrong if self.chance(0.2) else joined(mask, wrong)), result

    def tree(self, depth: int) -> str:
        if depth == 0 or self.chance(0.15):
            family = self.choose.choice((CAUSAL, WINDOW, PADDING, KEYS, SEGMENT, SPAN, (PACKED,), NEAR_MISS))
            return self.pick(family)
        if self.chance(0.25):
            return self.pick(NOT, x=self.tree(depth - 1))
        join = self.choose.choice((self.both, self.either))
        return join(self.tree(depth - 1), self.tree(depth - 1))

    def source(self, mask: str, result: str) -> str:
        past = "Sk - Sq" if self.chance(0.85) else "0"
        indices = self.choose.choice(INDICES)
        return program_source(mask, result, past, indices, self.pick(COUNT_SEQUENCES))


@dataclass(frozen=True)
class Sizes:
    """The sizes of a program's inputs."""

    batch: int
    queries: int
    keys: int


def choose_sizes(choose: random.Random) -> tuple[Sizes, Sizes, Sizes]:
    """Sizes to capture at, and two more with the same equalities among them."""
    batch, past = choose.choice((1, 2, 3)), choose.choice((0, 0, 2, 5))
    queries = choose.choice((4, 5, 7, 9))
    sizes = [Sizes(batch, queries, queries + past)]
    for _ in range(2):
        batch = batch if batch == 1 else choose.choice((2, 3))
        past = past and choose.choice((2, 3, 11))
        queries = choose.choice((6, 8, 10))
        sizes.append(Sizes(batch, queries, queries + past))
    return sizes[0], sizes[1], sizes[2]


def make_inputs(sizes: Sizes, seed: int, padding: torch.dtype) -> dict[str, Tensor]:
    """Random inputs: padding of 0 and 1 (and more, where the dtype has more), ids with large ones among them."""
    random_ = torch.Generator().manual_seed(seed)
    batch, keys = sizes.batch, sizes.keys

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (batch, keys), generator=random_)

    ids = integers(-2, 4)
    if seed % 2:
        ids = ids + integers(0, 2) * 2**32  # the same in 32 bits, and not the same
    starts = torch.where(integers(0, 4) == 0, torch.arange(keys), 0).cummax(-1).values
    am = integers(0, 2) if seed % 3 else integers(-1, 3) if padding.is_signed else integers(0, 3)
    return {
        "query": torch.zeros(batch, HEADS, sizes.queries, DIM),
        "key": torch.zeros(batch, HEADS, keys, DIM),
        "am": am.to(padding),
        "ids": ids,
        "pos": torch.arange(keys) - starts,
        "score": torch.rand(batch, keys, generator=random_),
        "bias": torch.randn(batch, 1, sizes.queries, keys, generator=random_),
    }
