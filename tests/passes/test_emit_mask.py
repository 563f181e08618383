"""Rows out of a read mask: what they hold, what they cost, and where they stand in the graph."""

from __future__ import annotations

import pytest
import torch

from mmcompile.passes.confirm_mask import confirm_mask
from mmcompile.passes.emit_mask import emit_mask
from mmcompile.passes.emit_sizes import UnknownSize, check_size, emit_size
from mmcompile.passes.find_attention import find_attention
from mmcompile.passes.graph import copy_graph, expression, fake_value, size_argument
from mmcompile.passes.mask_spec import OpaqueMask
from mmcompile.passes.read_mask import read_mask
from tests.passes.captured_masks import (
    DIM,
    combine,
    emit_rows,
    real_mask,
    record,
    rewritten_mask,
    run_rows,
    trace_aten,
)
from tests.passes.mask_grammar import MaskProgram, Sizes, make_inputs, program_source
from tests.passes.test_transformers_masks import DESCRIBED, transformer_inputs

SIZES = Sizes(2, 5, 8)


def captured_program(mask, *, dynamic=False, capture=record, padding=torch.int64, sizes=SIZES):
    function = MaskProgram("known", program_source(mask)).compiled()
    captured = capture(function, make_inputs(sizes, 1, padding), dynamic=dynamic)
    spec = captured.read()
    assert not isinstance(spec, OpaqueMask), spec
    return function, captured, spec


MASKS = (
    "(k <= q) & am.bool()[b, k]",
    "(k <= q) & am.bool()[:, None, None, :] & (k % 2 == 0) & (ids[b, k] < 3)",
    "(k <= q) & (k > q - 2) & ((am.bool()[b, k] & (ids[b, k] != 1)) | (k < 2))",
    "(k <= q) & (ids[b, q] == ids[b, k])",
    "(k <= q) & ((ids > 0)[b, q] == am.bool()[b, k])",
    "(k <= q) & ((q + 1) // 4 == (k + 1) // 4)",
    "(k <= q) | ((ids[b, q] == ids[b, k]) & (ids[b, q] >= 0) & am.bool()[b, k])",
    "(k <= q) | ((ids[b, q] == ids[b, k]) & (ids[b, q] > 0) & am.bool()[b, q])",
    "(k <= q) | am.bool()[b, k]",
    "(p[b, q] == p[b, k]) & (pos[b, k] <= pos[b, q])",
    "(k <= q) & (ids[b, k] <= am[b, k])",
    "(k <= q) & (ids[0, k] < ids[1, 2])",
    "(k <= q) & (ids[b, k] + 1 > 0)",
    "(k <= q) & ~(ids[b, k - 2] > 0)",
    "(k <= q) & (ids[:, None, None, :] <= k)",
)


@pytest.mark.parametrize("capture", [record, trace_aten])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_rows_make_the_mask(mask, dynamic, capture):
    function, captured, spec = captured_program(mask, dynamic=dynamic, capture=capture)
    module = emit_rows(captured, spec)
    for seed, sizes in enumerate((SIZES, Sizes(3, 6, 11) if dynamic else SIZES)):
        inputs = make_inputs(sizes, seed, torch.int64)
        read = combine(run_rows(module, captured, inputs), spec, inputs)[:, None]
        assert torch.equal(real_mask(function, inputs), read)


class Checked(torch.fx.Interpreter):
    """Runs a graph and holds every value against the fake value of its node."""

    def run_node(self, node):
        value, fake = super().run_node(node), fake_value(node)
        if isinstance(value, torch.Tensor):
            assert (value.shape, value.dtype) == (fake.shape, fake.dtype), node
            assert node.op == "placeholder" or fake.numel() <= SIZES.batch * (SIZES.queries + SIZES.keys), node
        return value


@pytest.mark.parametrize("mask", MASKS)
def test_every_node_has_its_fake_value_and_none_is_large(mask):
    _, captured, spec = captured_program(mask)
    module = emit_rows(captured, spec)
    for node in captured.graph.nodes:
        if node.target is not torch.ops.aten.sort.default:  # a pair of tensors
            assert node.op == "output" or isinstance(fake_value(node), torch.Tensor), node
    Checked(module).run(*make_inputs(SIZES, 0, torch.int64).values())


def test_a_mask_of_positions_alone_needs_no_rows():
    _, captured, spec = captured_program("(k <= q) & (k > q - 3)")
    before = len(captured.graph.nodes)
    rows = emit_mask(captured.graph, spec, *SIZES_ARGUMENTS)
    assert len(captured.graph.nodes) == before
    assert (rows.key_valid, rows.query_segment, rows.key_segment, rows.query_span, rows.key_span) == (None,) * 5
    assert rows.offset == SIZES.keys - SIZES.queries


SIZES_ARGUMENTS = (SIZES.batch, SIZES.queries, SIZES.keys)


def test_a_tensor_that_is_the_row_is_used_as_it_is():
    _, captured, spec = captured_program("(k <= q) & am.bool()[:, None, None, :]", padding=torch.bool)
    rows = emit_mask(captured.graph, spec, *SIZES_ARGUMENTS)
    assert rows.key_valid is captured.tensors["am"]


def test_ids_of_64_bits_that_agree_in_32_stay_apart():
    function, captured, spec = captured_program("(k <= q) & (ids[b, q] == ids[b, k])")
    inputs = make_inputs(SIZES, 0, torch.int64)
    inputs["ids"] = torch.arange(SIZES.keys).expand(SIZES.batch, -1) % 3 * 2**32 - 2**40
    real = real_mask(function, inputs)
    assert torch.equal(rewritten_mask(captured, spec, inputs)[:, None], real)
    assert not real[:, :, -1].all()


def test_counted_ids_are_not_sorted():
    _, captured, spec = captured_program("(p[b, q] == p[b, k]) & (pos[b, k] <= pos[b, q])")
    emit_rows(captured, spec)
    assert not captured.graph.find_nodes(op="call_function", target=torch.ops.aten.sort.default)


def test_sizes_come_from_the_inputs():
    _, captured, spec = captured_program("k <= q", dynamic=True)
    graph = captured.graph
    offset = emit_size(graph, expression(spec.offset) if isinstance(spec.offset, int) else spec.offset)
    assert fake_value(offset).node.hint == SIZES.keys - SIZES.queries
    for node in graph.find_nodes(op="placeholder"):  # without SymInt inputs, from the tensors' dimensions
        if isinstance(fake_value(node), torch.SymInt):
            del node.meta["example_value"]
    assert fake_value(emit_size(graph, spec.offset)).node.hint == SIZES.keys - SIZES.queries
    assert graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    for tensor in captured.tensors.values():
        del tensor.meta["example_value"]
    with pytest.raises(UnknownSize, match="no dimension of an input"):
        check_size(graph, spec.offset)


def test_rows_stand_where_the_graph_inserts():
    _, captured, spec = captured_program("(k <= q) & am.bool()[b, k]")
    graph = captured.graph
    with graph.inserting_after(captured.mask):
        graph.output(captured.mask)
    last = graph.find_nodes(op="output")[0]
    known = set(graph.nodes)
    with graph.inserting_before(last):
        emit_mask(graph, spec, *SIZES_ARGUMENTS)
    added = [node for node in graph.nodes if node not in known]
    assert added and all(captured.mask < node < last for node in added)
    assert DIM not in {size for node in added for size in fake_value(node).shape}
    graph.lint()


@pytest.mark.parametrize("function", DESCRIBED, ids=lambda function: function.__name__)
def test_rows_of_transformers_masks(function):
    """The mask as Dynamo's graph computes it, and as the rows beside it in the same graph make it."""
    calls = []

    def backend(module, example_inputs):
        copy = copy_graph(module)
        (site,) = find_attention(copy)
        spec = read_mask(site.mask, site.query_length, site.key_length)
        assert spec.describe() == DESCRIBED[function] and confirm_mask(site.mask, spec) is None
        (output,) = copy.graph.find_nodes(op="output")
        with copy.graph.inserting_before(site.node):
            sizes = [size_argument(copy.graph, site.query, 0), *(size_argument(copy.graph, site.query, 2),) * 2]
            rows = emit_mask(copy.graph, spec, *sizes)
        output.args = (
            (site.mask, rows.key_valid, rows.query_segment, rows.key_segment, rows.query_span, rows.key_span),
        )
        copy.recompile()
        calls.append((copy, spec))
        return module.forward

    x, padding, ids, positions = transformer_inputs(9)
    padding[0, :3] = 0
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2]).expand(2, -1)
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=False)(x, padding, ids, positions)
    module, spec = calls[0]
    known = {"x": x, "padding": padding, "ids": ids, "positions": positions}
    arguments = [known[str(node.target)[2:-1]] for node in module.graph.find_nodes(op="placeholder")]
    mask, *rows = module(*arguments)
    inputs = {"query": x[:, None], "key": x[:, None]}
    assert torch.equal(mask, combine((*rows, 0), spec, inputs)[:, None])
