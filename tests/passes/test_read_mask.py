"""Reading masks: the forms that are read, the forms that must stay opaque, and what reading costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmcompile.passes.confirm_mask import confirm_mask
from mmcompile.passes.index_expressions import KEY, QUERY
from mmcompile.passes.mask_spec import OpaqueMask
from tests.passes.captured_masks import emit_rows, real_mask, record, rewritten_mask, trace_aten
from tests.passes.mask_grammar import INDICES, MaskProgram, Sizes, make_inputs, program_source


def read_program(mask, result="m", *, dynamic=False, capture=record, sizes=Sizes(2, 5, 8), **options):  # noqa: B008
    """The reading of a mask written in the words of mask_grammar, confirmed where it is one."""
    function = MaskProgram("known", program_source(mask, result, **options)).compiled()
    captured = capture(function, make_inputs(sizes, 0, torch.int64), dynamic=dynamic)
    spec = captured.read()
    assert isinstance(spec, OpaqueMask) or confirm_mask(captured.mask, spec) is None
    return spec


_BLOCK = "torch.where(pos == 1, ids, -1)"  # ids of the blocks of one token type, as Gemma makes them
READ = {
    "k <= q": "causal (offset 3)",
    "(k <= q) & (k > q - 2)": "causal, window 2 (offset 3)",
    "(k <= q) & (q - k <= 2)": "causal, window 3 (offset 3)",
    "torch.ones(Sk, Sk, dtype=torch.bool).tril()[-Sq:]": "causal (offset 3)",
    "torch.ones(Sq, Sk, dtype=torch.bool).tril()": "causal",
    "(k <= q) & am.bool()[:, None, None, :]": "causal+padding (offset 3)",
    "(k <= q) & (score[:, None, None, :] > 0.5)": "causal+padding (offset 3)",
    "(k <= q) & (k % 2 == 0)": "causal+padding (offset 3)",
    "(k <= q) | ((ids[b, q] == ids[b, k]) & (ids[b, q] >= 0))": "causal|spans (offset 3)",
    f"(k <= q) | (({_BLOCK}[b, q] == {_BLOCK}[b, k]) & ({_BLOCK}[b, q] >= 0))": "causal|spans (offset 3)",
    "(k <= q) | (am.bool()[b, q] & am.bool()[b, k])": "causal|spans (offset 3)",
    "(k <= q) | am.bool()[b, k]": "causal|spans (offset 3)",
    "(k <= q) & (ids[b, q] == ids[b, k])": "packed causal (offset 3)",
    "(k <= q) & (q // 4 == k // 4)": "packed causal (offset 3)",
    "(k <= q) & (am.bool()[b, q] == am.bool()[b, k])": "packed causal (offset 3)",
    "(p[b, q] == p[b, k]) & (pos[b, k] <= pos[b, q])": "packed causal (offset 3)",
    "(q >= 0) & am.bool()[b, k]": "bidirectional+padding",
    "((k <= q) & (k >= 0)) & ~(k > 99)": "causal (offset 3)",
}


@pytest.mark.parametrize("capture", [record, trace_aten])
@pytest.mark.parametrize("mask", READ)
def test_forms_that_are_read(mask, capture):
    assert read_program(mask, capture=capture).describe() == READ[mask]


OPAQUE = {
    "bias > 0": "the values of bias",
    "k <= q + 1": "queries see later keys than their own (offset 4)",
    "abs(q - k) <= 2": "queries see later keys than their own (offset 5)",
    "k < q - 3": "the first queries see no key",
    "(k <= q) & am.bool()[b, q]": "a condition on queries alone",
    "(k - q) >= -(torch.arange(H) + 2)[None, :, None, None]": "differs between heads",
    "(k <= q) & (torch.arange(H)[None, :, None, None] != 1)": "differs between heads",
    "(k <= q) ^ am.bool()[b, k]": "no known form",
    "k <= ids[b, q]": "a data-dependent bound",
    "(k <= q) & (ids[b, q] <= ids[b, k])": "a data-dependent bound",
    "(k <= q) | (ids[b, q] == ids[b, k])": "without a condition that the ids are not negative",
    "(k <= q) & (pos[b, k] <= pos[b, q])": "a data-dependent bound",
    "(k <= q) & ((k > q - 2) | (k < 2))": "no known form",
    "(k <= q) & (ids[b, q] == ids[b, k]) & (pos[b, q] == pos[b, k])": "more than one equality of ids",
    "((k <= q) & am.bool()[b, k]).any(-2, keepdim=True)": "operation any",
    "(k <= q) & (k > q)": "no position is allowed",
    "torch.rand(Sq, Sk) > 0.5": "operation rand",
    "(k.to(torch.float32) <= q)": "cast of positions or ids",
}


@pytest.mark.parametrize("capture", [record, trace_aten])
@pytest.mark.parametrize("mask", OPAQUE)
def test_forms_that_stay_opaque(mask, capture):
    spec = read_program(mask, capture=capture)
    assert isinstance(spec, OpaqueMask)
    assert OPAQUE[mask] in spec.reason.replace("arg6_1", "bias")


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("torch.where(m, 0.0, float('-inf'))", None),
        ("torch.zeros(B, 1, Sq, Sk).masked_fill(~m, float('-inf'))", None),
        ("torch.zeros(B, 1, Sq, Sk, dtype=torch.float16).masked_fill(~m, float('-inf'))", None),
        ("torch.where(m, 0.0, torch.finfo(torch.float32).min)", None),
        ("(1.0 - m.float()) * torch.finfo(torch.float32).min", None),
        ("torch.full((Sq, Sk), float('-inf')).triu(past + 1)", None),
        ("torch.where(m, 0.0, torch.finfo(torch.float16).min)", "the value -65504"),
        ("torch.where(m, 0.0, -1e4)", "the value -10000"),
        ("torch.where(m, 1.0, float('-inf'))", "the value 1.0"),
        ("(1.0 - m.float()) * float('-inf')", "the value nan"),
        ("torch.where(m, bias, float('-inf'))", "the values of bias"),
        (
            "torch.where(m & am.bool()[:, None, None], 0.0, torch.finfo(torch.float32).min)",
            "a row without any allowed key",
        ),
        ("m.clone().logical_and_(k > 1)", "is changed in place"),
        ("torch.logical_and(m, k > 1, out=m.clone())", "arguments of logical_and"),
    ],
)
def test_additive_and_in_place_masks(result, reason):
    spec = read_program("k <= q", result)
    if reason is None:
        assert spec.describe() == "causal (offset 3)"
    else:
        assert reason in spec.reason


def changes_its_input_later(query, key, am):
    mask = causal_mask(query, key) & am.bool()[:, None, None, :]
    am[:, 0] = 1
    return mask


def changes_its_input_before(query, key, am):
    am.clamp_(min=0)
    return causal_mask(query, key) & (am > 0)[:, None, None, :]


def changes_a_view(query, key, am):
    flags = am.bool()
    flags[:1, 2:].view(torch.uint8).zero_()
    return causal_mask(query, key) & flags[:, None, None, :]


def changes_the_mask(query, key, am):
    mask = causal_mask(query, key).clone()
    mask[:, 0] = True
    return mask


def changes_by_operator(query, key, am):
    mask = causal_mask(query, key)
    mask |= am.bool()[:, None, None, :].expand_as(mask)
    return mask


def causal_mask(query, key):
    offset = key.shape[2] - query.shape[2]
    mask = torch.arange(key.shape[2]) <= torch.arange(query.shape[2])[:, None] + offset
    return mask.expand(query.shape[0], 1, -1, -1)


@pytest.mark.parametrize("program", [changes_a_view, changes_the_mask, changes_by_operator])
def test_tensors_changed_in_place_are_opaque(program):
    inputs = {name: make_inputs(Sizes(2, 5, 8), 0, torch.int64)[name] for name in ("query", "key", "am")}
    spec = record(program, inputs, dynamic=False).read()
    assert isinstance(spec, OpaqueMask) and spec.reason.endswith("is changed in place")


@pytest.mark.parametrize("program", [changes_its_input_later, changes_its_input_before])
def test_what_was_computed_before_or_after_a_change_is_read(program):
    """Not from the changed tensor: from what the graph computed of it at that time."""
    inputs = {name: make_inputs(Sizes(2, 5, 8), 0, torch.int64)[name] for name in ("query", "key", "am")}
    real = real_mask(program, inputs | {"am": inputs["am"].clone()})
    captured = record(program, inputs, dynamic=False)
    spec = captured.read()
    assert confirm_mask(captured.mask, spec) is None
    assert torch.equal(rewritten_mask(captured, spec, inputs)[:, None], real)


def test_integers_are_no_conditions():
    """`&` on integers is bitwise, uint8 wraps, and a scalar is cast to the tensor's dtype before it is compared."""
    both = "(am.to(torch.uint8)[b, k] & ids.to(torch.uint8)[b, k]).bool()"
    for mask in (both, "(am.to(torch.uint8) - 1)[b, k] > 100", "am.to(torch.uint8)[b, k] > -1"):
        spec = read_program(f"(k <= q) & ({mask})")
        assert spec.describe() == "causal+padding (offset 3)"  # by the tensor that the graph makes of it


@pytest.mark.parametrize(
    "count_sequences",
    [
        "p = (torch.diff(pos, prepend=pos[:, :1] - 1, dim=-1) != 2).cumsum(-1)",
        "p = (torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)",
        "p = (torch.diff(pos, prepend=pos[:, :1] - 1, dim=-1) == 1).cumsum(-1)",
        "p = (torch.diff(pos, prepend=pos[:, :1] - 1, dim=-1) != 1).cumsum(0)",
        "p = (torch.diff(pos, prepend=pos[:1] - 1, dim=0) != 1).cumsum(-1)",
        "p = (torch.diff(pos, append=pos[:, :1], dim=-1) != 1).cumsum(-1)",
        "p = (torch.diff(pos, prepend=pos[:, :2], dim=-1)[:, 1:] != 1).cumsum(-1)",
        "p = (torch.diff(pos.int(), prepend=pos[:, :1].int() - 1, dim=-1) != 1).cumsum(-1)",
        "p = (pos == 0).cumsum(-1)",
    ],
)
def test_positions_compare_tokens_only_in_sequences_counted_from_them(count_sequences):
    mask = "(p[b, q] == p[b, k]) & (pos[b, k] <= pos[b, q])"
    spec = read_program(mask, count_sequences=count_sequences)
    assert spec.reason.startswith("a data-dependent bound between query and key")


def test_offsets_of_symbolic_sizes():
    spec = read_program("k <= q", dynamic=True)
    assert spec.offset == spec.key_length - spec.query_length
    spec = read_program("(k <= q) & (k > q - 3)", dynamic=True)
    assert spec.offset == spec.key_length - spec.query_length and spec.window == 3


class NothingLarge(TorchDispatchMode):
    """Fails where a real tensor of more than a million elements is made."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
                assert value.numel() <= 2**20, function
        return result


@pytest.mark.parametrize("indices", INDICES)
def test_a_million_tokens_allocate_nothing(indices):
    """On fake tensors with static sizes: neither reading nor confirming makes anything of queries x keys."""
    tokens = 2**20

    def program(query, key, am):
        names = {"torch": torch, "query": query, "key": key, "am": am}
        B, Sq, Sk = 1, query.shape[2], key.shape[2]
        names |= {"B": B, "Sq": Sq, "Sk": Sk, "past": Sk - Sq}
        for line in indices:
            exec(line, names)
        q, k = names["q"], names["k"]
        return (k <= q) & (k > q - 4096) & am.bool()[:, None, None, :]

    for queries, keys in ((tokens, tokens), (tokens, tokens + 4096), (4096, tokens)):
        inputs = {
            "query": torch.empty(1).expand(1, 2, queries, 4),
            "key": torch.empty(1).expand(1, 2, keys, 4),
            "am": torch.ones(1, dtype=torch.int64).expand(1, keys),
        }
        captured = record(program, inputs, dynamic=False)
        with NothingLarge():
            spec = captured.read()
            assert confirm_mask(captured.mask, spec) is None
            emit_rows(captured, spec)
        prefix = f" (offset {keys - queries})" if keys != queries else ""
        assert spec.describe() == f"causal+padding, window 4096{prefix}"


def test_confirming_finds_wrong_readings():
    captured = record(
        MaskProgram("known", program_source("(k <= q) & (k > q - 3) & am.bool()[b, k]")).compiled(),
        make_inputs(Sizes(2, 5, 8), 0, torch.int64),
        dynamic=True,
    )
    spec = captured.read()
    assert confirm_mask(captured.mask, spec) is None
    for wrong in (
        {"offset": 0},
        {"offset": spec.offset + 1},
        {"window": 4},
        {"window": None},
        {"key_valid": None},
        {"causal": False},
        {"query_segment": QUERY, "key_segment": KEY},
    ):
        assert "says that query" in confirm_mask(captured.mask, replace(spec, **wrong))


def test_reading_adds_no_guard():
    function = MaskProgram("known", program_source("(k <= q) & am.bool()[b, k]")).compiled()
    captured = record(function, make_inputs(Sizes(2, 5, 8), 0, torch.int64), dynamic=True)
    environment = captured.length("query").node.shape_env
    guards = len(environment.guards)
    spec = captured.read()
    confirm_mask(captured.mask, spec)
    assert len(environment.guards) == guards
