"""The rewrite on graphs small enough to count: which nodes come, which go, what is shared."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcompile.kernels.patterns import HeadPattern
from mmcompile.passes.add_boundaries import BOUNDARY_NAMES
from mmcompile.passes.find_attention import find_attention
from mmcompile.passes.fold_permutations import fold_permutations
from mmcompile.passes.graph import op_count, output_node, placeholders
from mmcompile.passes.pipeline import run_passes
from tests.passes.test_find_attention import capture

OPS = torch.ops.mminference
A_SHAPE = HeadPattern("a_shape", 128, 256)
BY_MODALITY = HeadPattern("a_shape", 128, 256, boundary="2d")
Q_BY_MODALITY = HeadPattern("a_shape", 128, 256, boundary="q")


class Two(nn.Module):
    """Two attentions in a row, the second on the first's output."""

    def forward(self, x):
        for _ in range(2):
            x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return x


def heads_of_one(batch=1, heads=4, length=300, dim=16):
    """[B, H, S, D] in [B, S, H, D] memory, as a model's projections leave it."""
    return torch.randn(batch, length, heads, dim).transpose(1, 2)


def captured(function=None):
    return capture(function or Two(), heads_of_one())


def test_the_callers_graph_is_never_edited():
    module = captured()
    before = str(module.graph)
    rewritten = run_passes(module, A_SHAPE)
    assert str(module.graph) == before
    assert rewritten.module is not module
    assert len(rewritten.sparse) == 2


def test_boundaries_come_last_among_the_inputs_and_figures_last_among_the_outputs():
    module = captured()
    rewritten = run_passes(module, A_SHAPE)
    names = [node.name for node in placeholders(rewritten.module.graph)]
    assert tuple(names[-3:]) == BOUNDARY_NAMES
    assert (
        len(output_node(rewritten.module.graph).args[0]) == len(output_node(module.graph).args[0]) + 4
    )  # density and recall of each site


def test_raster_patterns_permute_nothing_and_share_one_plan():
    module = run_passes(captured(), A_SHAPE).module
    assert op_count(module, OPS.plan.default) == 1
    assert op_count(module, OPS.block_sparse_attention.default) == 2
    assert op_count(module, OPS.permute.default, OPS.unpermute.default) == 0
    assert find_attention(module) == []


def test_grouped_queries_permute_queries_and_output_alone():
    module = run_passes(captured(), Q_BY_MODALITY, disable=["fold_permutations"]).module
    assert op_count(module, OPS.permute.default) == op_count(module, OPS.unpermute.default) == 2


def test_permutations_of_queries_and_outputs_are_folded_into_the_attention():
    # The first attention's output is the second's query as it is.
    unfolded = run_passes(captured(), Q_BY_MODALITY, disable=["fold_permutations"]).module
    folded = run_passes(captured(), Q_BY_MODALITY).module
    assert op_count(folded, OPS.permute.default, OPS.unpermute.default) == 0
    assert op_count(folded, OPS.block_sparse_attention.default) == 2
    x = heads_of_one()
    boundaries = (
        torch.tensor([0, 90, 170, 300]).int(),
        torch.tensor([0, 2, 0]).int(),
        torch.zeros(3, 3).int(),
    )
    torch.testing.assert_close(folded(x, *boundaries)[0], unfolded(x, *boundaries)[0])


def test_permutations_of_keys_stay():
    folded = run_passes(captured(), BY_MODALITY).module
    unfolded = run_passes(captured(), BY_MODALITY, disable=["fold_permutations"]).module
    assert op_count(folded, OPS.unpermute.default) == 0
    assert op_count(folded, OPS.permute.default) == op_count(unfolded, OPS.permute.default) - 2


def test_permutations_in_another_order_are_not_folded():
    module = run_passes(captured(), BY_MODALITY, disable=["fold_permutations"]).module
    for node in module.graph.find_nodes(op="call_function", target=OPS.unpermute.default):
        node.update_arg(3, [0, 0, 0, 1])
    before = op_count(module, OPS.permute.default)
    assert fold_permutations(module) == 0
    assert op_count(module, OPS.permute.default) == before


def test_each_key_head_is_copied_once_in_each_order():
    def grouped(x):
        k = x[:, :2]
        return F.scaled_dot_product_attention(x, k, k, is_causal=True, enable_gqa=True)

    heads = [A_SHAPE, BY_MODALITY, A_SHAPE, A_SHAPE]  # KV head 0 in two orders, KV head 1 in one
    table = [heads]

    class Layered(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Grouped()])

        def forward(self, x):
            return self.layers[0](x)

    class Grouped(nn.Module):
        def forward(self, x):
            return grouped(x)

    module = run_passes(captured(Layered()), table).module
    (attention,) = module.graph.find_nodes(op="call_function", target=OPS.block_sparse_attention.default)
    names = [argument.name for argument in OPS.block_sparse_attention.default._schema.arguments]
    arguments = dict(zip(names, attention.args, strict=False))
    assert arguments["key"].target is OPS.permute.default
    _, _, _, source_head, order = arguments["key"].args
    assert (list(source_head), list(order)) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert list(arguments["head_plan"]) == [0, 1, 0, 0]
    assert list(arguments["key_head"]) == [0, 0, 2, 2]


AUTO = HeadPattern("top_p", order="auto", columns=64)


@pytest.mark.parametrize(("search", "arrangements"), [(True, 2), (False, 1)])
def test_estimated_patterns_are_planned_for_each_site_on_one_arrangement(search, arrangements):
    module = run_passes(captured(), AUTO, search_strides=search).module
    assert op_count(module, OPS.plan.default) == 2
    assert op_count(module, OPS.arrange.default) == arrangements
    for plan in module.graph.find_nodes(op="call_function", target=OPS.plan.default):
        assert plan.args[0] is not None and plan.args[1].target is OPS.permute.default


def test_a_cap_of_everything_needs_no_estimate():
    module = run_passes(captured(), AUTO, density=1.0, search_strides=False).module
    assert op_count(module, OPS.plan.default) == 1


def test_repeated_heads_and_the_mask_are_gone():
    def model(x):
        k = x[:, :2][:, :, None].expand(1, 2, 2, x.shape[2], 16).reshape(1, 4, x.shape[2], 16)
        index = torch.arange(x.shape[2])
        mask = (index[None, :] <= index[:, None])[None, None]
        return F.scaled_dot_product_attention(x, k, k, attn_mask=mask)

    rewritten = run_passes(captured(model), A_SHAPE)
    assert rewritten.records[0].mask == "causal"
    for node in rewritten.module.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            assert value.shape[-2:] != (300, 300), node
    assert op_count(rewritten.module, "expand") == 0
    assert rewritten.records[0].kv_heads == 2


@pytest.mark.parametrize(
    "use",
    [
        lambda out: out.view(4, 300, 16),
        lambda out: (out * 2).view(4, 300, 16),
        lambda out: out.as_strided((4, 300), (16, 1), 100),
        lambda out: out.transpose(1, 2).reshape(1, 300, 64),
    ],
)
@pytest.mark.parametrize("merged", [True, False])
def test_users_of_the_output_find_the_layout_that_they_were_traced_with(use, merged):
    x = heads_of_one() if merged else heads_of_one().contiguous()

    def model(x):
        out = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return use(out if out.is_contiguous() else out.contiguous())

    rewritten = run_passes(capture(model, x), HeadPattern("dense"), density=1.0).module
    boundaries = (torch.tensor([0, 300, 300]).int(), torch.zeros(2).int(), torch.zeros(2, 3).int())
    torch.testing.assert_close(rewritten(x, *boundaries)[0], model(x))
