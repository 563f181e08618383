"""Random chains of views: every element of the result is read from where torch reads it."""

from __future__ import annotations

import random

import pytest
import sympy
import torch

from mmcompile.passes import value_rules, view_rules  # noqa: F401  register rules
from mmcompile.passes.element_values import Unreadable, cases_of
from mmcompile.passes.evaluate_mask import evaluate
from mmcompile.passes.index_expressions import Bounds
from mmcompile.passes.read_tensors import TensorReader
from tests.passes.captured_masks import record

CHAINS = 60


def random_slice(choose, size):
    start = choose.choice((None, 0, 1, 2, -1, -2, -size))
    stop = choose.choice((None, size, size - 1, -1, size + 3))
    return slice(start, stop, choose.choice((None, 1, 1, 2)))


def random_key(choose, shape):
    """A key of slices, integers, None, Ellipsis and tensors of positions."""
    key, positions = [], choose.random() < 0.5
    for size in shape:
        kinds = ["slice"] * 3 + ["whole"] * 2 + ["integer"] + ["tensor"] * 3 * positions
        kind = choose.choice(kinds)
        if kind == "slice":
            key.append(random_slice(choose, size))
        elif kind == "whole":
            key.append(slice(None))
        elif kind == "integer":
            key.append(choose.choice((0, size - 1, -1)))
        else:
            length = choose.choice((size, 1))
            key.append(torch.arange(length).reshape(choose.choice(((length,), (length, 1), (1, length)))))
        if choose.random() < 0.15:
            key.append(None)
    if choose.random() < 0.2 and key:
        key[-1] = Ellipsis
    return tuple(key)


def random_view(choose, x):
    """One more view of `x`."""
    dims = x.dim()
    kind = choose.choice(
        ("key", "key", "key", "unsqueeze", "squeeze", "transpose", "permute", "expand", "triangle", "narrow")
    )
    if kind == "key" and dims:
        return x[random_key(choose, x.shape)]
    if kind == "unsqueeze":
        return x.unsqueeze(choose.randint(-dims - 1, dims))
    if kind == "squeeze":
        return x.squeeze()
    if kind == "transpose" and dims > 1:
        return x.transpose(choose.randrange(dims), choose.randrange(-dims, 0))
    if kind == "permute":
        return x.permute(choose.sample(range(dims), dims))
    if kind == "expand" and dims:
        return x.expand(*(3 if size == 1 and choose.random() < 0.5 else -1 for size in x.shape))
    if kind == "triangle" and dims > 1:
        return choose.choice((torch.tril, torch.triu))(x, choose.randint(-2, 2))
    if kind == "narrow" and dims:
        dim = choose.randrange(dims)
        return x.narrow(dim, 1, x.shape[dim] - 1) if x.shape[dim] > 1 else x.select(dim, 0)
    return x.reshape(*x.shape, 1)


def chain(seed):
    """A program that makes a chain of views of a tensor in which every element is different."""

    def program(query, key):
        choose = random.Random(seed)
        x = torch.arange(3)[:, None, None] * 10000 + torch.arange(5)[:, None] * 100 + torch.arange(4)
        for _ in range(choose.randint(1, 5)):
            x = random_view(choose, x)
        return x

    return program


@pytest.mark.parametrize("batch", range(4))
def test_views_are_read_where_they_point(batch):
    inputs = {"query": torch.zeros(1, 2, 70, 4), "key": torch.zeros(1, 2, 70, 4)}
    read = tried = 0
    for seed in range(batch, 4 * CHAINS, 4):
        try:
            real = chain(seed)(**inputs)
        except (IndexError, RuntimeError):
            continue
        if 0 in real.shape:
            continue
        tried += 1
        captured = record(chain(seed), inputs, dynamic=False)
        bounds = Bounds()
        symbols = [sympy.Symbol(f"i{dim}", integer=True, nonnegative=True) for dim in range(real.dim())]
        bounds.lengths.update(zip(symbols, map(sympy.Integer, real.shape), strict=True))
        reader = TensorReader(captured.graph, sympy.Integer(70), sympy.Integer(70), bounds)
        try:
            cases = cases_of(reader.element(captured.mask, symbols))
        except Unreadable:
            continue
        if reader.unknown:
            continue
        read += 1
        places = (
            dict(zip(symbols, torch.meshgrid(*map(torch.arange, real.shape), indexing="ij"), strict=True))
            if symbols
            else {}
        )
        value = torch.zeros(real.shape, dtype=torch.int64)
        for guard, number in cases:
            value = torch.where(evaluate(guard, places, {}), evaluate(number, places, {}), value)
        assert torch.equal(value, real), f"chain {seed}: {captured.graph}"
    assert read >= 0.9 * tried > 30
