"""The second check of a read mask: run the graph that builds it at small sizes and compare every element."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mmcompile.passes.evaluate_mask import allowed
from mmcompile.passes.graph import fake_value
from mmcompile.passes.mask_spec import MaskSpec
from mmcompile.passes.small_run import KEPT_SIZE, NEAR, CannotRun, SmallProgram, SmallSizes

_RUNS = 4  # successful ones wanted
_SMALL_WINDOW = 3
_WIDEST_WINDOW = 128  # a wider one is scaled down


def confirm_mask(mask: fx.Node, spec: MaskSpec) -> str | None:
    """Run the graph behind `mask` and compare with `spec`: None where they agree, else how they differ.

    The inputs are random masks, ids and positions; the lengths a few tokens, equal and unequal where the
    graph lets them differ. Nothing large is allocated, whatever sizes the graph was captured with.
    """
    with unset_fake_temporarily(), torch.no_grad(), torch.device("cpu"):
        program = SmallProgram(mask, spec.tensors.values())
        failure, runs = "no small sizes fit", 0
        for seed, sizes in enumerate(_trials(program, spec)):
            try:
                difference = _compare(mask, spec, program, sizes, seed)
            except CannotRun as error:
                failure = str(error)
                continue
            if difference is not None:
                return difference
            runs += 1
            if runs == _RUNS:
                return None
    return None if runs >= 2 else f"the mask could not be run at small sizes: {failure}"


def _compare(mask: fx.Node, spec: MaskSpec, program: SmallProgram, sizes: SmallSizes, seed: int) -> str | None:
    """The first element on which a run and `spec` differ, described; None where they agree."""
    contents = _Contents(seed)
    values = program.run(sizes, contents.make_up)
    built = values[mask]
    actual = built if built.dtype == torch.bool else built == 0
    small = _at(spec, sizes)
    batch = actual.shape[0] if actual.dim() == 4 else 1
    tensors = {name: values[node] for name, node in spec.tensors.items()}
    claimed = allowed(small, batch, sizes.symbols, tensors)[:, None]  # [B, 1, Sq, Sk]
    if built.dtype != torch.bool and bool((built[~actual] > torch.finfo(built.dtype).min).any()):
        return "the mask adds values other than 0 and the lowest"
    actual, claimed = torch.broadcast_tensors(actual, claimed)
    differing = (actual != claimed).nonzero()
    if len(differing) == 0:
        return None
    batch, _, query, key = differing[0].tolist()
    lengths = " x ".join(map(str, actual.shape[-2:]))
    said, found = ("allowed", "masked") if claimed[tuple(differing[0])] else ("masked", "allowed")
    return f"{spec.describe()} says that query {query}, key {key} of {lengths} is {said}, and it is {found}"


def _at(spec: MaskSpec, sizes: SmallSizes) -> MaskSpec:
    """The spec with the large numbers of the graph replaced as the run replaces them."""

    def small(expr: sympy.Basic | None) -> sympy.Basic | None:
        if expr is None:
            return None
        numbers = {number: sympy.Integer(sizes.number(int(number))) for number in expr.atoms(sympy.Integer)}
        return expr.xreplace({number: to for number, to in numbers.items() if number != to})

    fields = (
        "query_length",
        "key_length",
        "key_valid",
        "query_segment",
        "key_segment",
        "query_span",
        "key_span",
    )
    parts: dict[str, Any] = {name: small(getattr(spec, name)) for name in fields}
    return replace(
        spec,
        **parts,
        offset=small(sympy.sympify(spec.offset)),
        window=None if spec.window is None else sizes.number(spec.window),
    )


def _trials(program: SmallProgram, spec: MaskSpec) -> Iterator[SmallSizes]:
    """Sizes to try: equal lengths, longer keys, longer inputs than keys, and equal ones again."""
    tokens = 7 if spec.window is None or spec.window > _WIDEST_WINDOW else spec.window + 4
    queries, keys = spec.query_length.free_symbols, spec.key_length.free_symbols
    lowest = dict.fromkeys(sorted(queries | keys, key=str), 2) | program.lowest_sizes()
    for _ in range(2):
        for length, longer in ((tokens, 0), (tokens, 3), (tokens + 1, 1), (tokens + 2, 0)):
            numbers = _numbers(program, spec, length)
            wanted = {program.leading_symbol(): 2} | dict.fromkeys(keys, length + longer)
            wanted |= dict.fromkeys(queries, length)
            known = {symbol: max(low, wanted[symbol]) for symbol, low in lowest.items() if symbol in wanted}
            reached = SmallSizes(known, numbers).size(spec.key_length) + longer  # inputs that hold every key
            others = {symbol: max(low, reached) for symbol, low in lowest.items() if symbol not in known}
            yield SmallSizes(known | others, numbers)


def _numbers(program: SmallProgram, spec: MaskSpec, length: int) -> dict[int, int]:
    """Small numbers for the large ones that the graph was captured with; they keep their distances."""
    numbers: dict[int, int] = {}

    def assign(large: sympy.Expr | int | None, small: int) -> int:
        if large is None or not sympy.sympify(large).is_Integer or int(large) <= KEPT_SIZE:
            return small if large is None or not sympy.sympify(large).is_Integer else int(large)
        for known, chosen in numbers.items():
            if abs(int(large) - known) <= 2 * NEAR:
                return numbers.setdefault(int(large), chosen + int(large) - known)
        return numbers.setdefault(int(large), small)

    query = assign(spec.query_length, length)
    prefix = assign(spec.key_length - spec.query_length, 5)
    assign(spec.key_length, query + prefix)
    if spec.window is not None and spec.window > _WIDEST_WINDOW and query == length:
        numbers.setdefault(spec.window, _SMALL_WINDOW)
    for extra, size in enumerate(sorted(program.fixed_sizes())):
        assign(size, query + prefix + 8 * (extra + 1))
    return numbers


class _Contents:
    """Made-up inputs: padding masks, ids of runs of tokens, positions that start again; one of them a run."""

    def __init__(self, seed: int) -> None:
        self.kind = seed % 3
        self.random = torch.Generator().manual_seed(seed)

    def make_up(self, node: fx.Node, shape: tuple[int, ...]) -> Tensor:
        """A tensor of the node's dtype."""
        dtype = fake_value(node).dtype
        if dtype == torch.bool:
            return torch.rand(shape, generator=self.random) < 0.7
        if dtype.is_floating_point:
            return torch.randn(shape, generator=self.random, dtype=torch.float32).to(dtype)
        if self.kind == 0 or not shape:
            return torch.randint(0, 2, shape, generator=self.random).to(dtype)
        breaks = torch.rand(shape, generator=self.random) < 0.3
        if self.kind == 1:
            lowest = -1 if dtype.is_signed else 0
            return (breaks.cumsum(-1) % 4 + lowest).to(dtype)
        places = torch.arange(shape[-1]).expand(shape)
        starts = torch.where(breaks, places, 0).cummax(-1).values
        return (places - starts).to(dtype)
