"""The dense form of short prefills: which graphs get one, and what their attention is given."""

import pytest
import torch
import torch.nn.functional as F

from mmcompile.kernels.patterns import HeadPattern
from mmcompile.passes.decide import Reason
from mmcompile.passes.find_attention import find_attention
from mmcompile.passes.graph import op_count, placeholders
from mmcompile.passes.pipeline import run_passes
from tests.passes.test_find_attention import capture
from tests.passes.test_rewrite_attention import Two, heads_of_one

OPS = torch.ops.mminference
REPEAT = torch.ops.aten.repeat_interleave.self_int


def causal(x, k, keep=True):
    index = torch.arange(x.shape[2])
    mask = ((index[None, :] <= index[:, None]) & keep)[None, None]
    return F.scaled_dot_product_attention(x, k, k, attn_mask=mask, scale=0.3)


def grouped(x):
    k = x[:, :2]
    return F.scaled_dot_product_attention(x, k, k, is_causal=True, enable_gqa=True)


def written_out(x):
    return causal(x, x[:, :2][:, :, None].expand(1, 2, 2, x.shape[2], 16).reshape(1, 4, x.shape[2], 16))


def padded(x):
    return causal(x, x, torch.arange(x.shape[2]) != 7)


def window(x):
    index = torch.arange(x.shape[2])
    mask = (index <= index[:, None]) & (index > index[:, None] - 9)
    return F.scaled_dot_product_attention(x, x, x, mask[None, None])


FORMS = {"grouped": (grouped, True), "mask": (lambda x: causal(x, x), True), "repeated, mask": (written_out, True),
         "plain": (Two(), False), "padded": (padded, False), "window": (window, False)}  # fmt: skip


@pytest.mark.parametrize(("model", "changed"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("layout", ["merged heads", "contiguous"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_plain_causal_attention_without_a_mask_is_what_torch_is_asked_for(model, changed, layout, dynamic):
    x = heads_of_one() if layout == "merged heads" else heads_of_one().contiguous()
    module = capture(model, x, dynamic=dynamic)
    rewritten = run_passes(module, HeadPattern(), min_tokens=1000)
    dense = rewritten.short.module if dynamic else rewritten.module
    assert len(placeholders(dense.graph)) == len(placeholders(module.graph))
    assert bool(rewritten.sparse) == dynamic
    assert op_count(dense, OPS.arrange.default, OPS.plan.default, OPS.block_sparse_attention.default) == 0
    if not dynamic and not changed:
        assert dense is module
    for site in find_attention(dense):
        assert (site.mask is None) == (model not in (padded, window))
        assert site.is_causal == (site.mask is None)
        assert not site.node.kwargs.get("enable_gqa")
    assert op_count(dense, REPEAT) == 2 * (model in (grouped, written_out))
    for node in dense.graph.nodes if changed else ():
        value = node.meta.get("example_value")
        assert not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[-1] != value.shape[-2], node
    inputs = (300, x) if dynamic else (x,)
    (got,) = dense(*inputs[-len(placeholders(module.graph)) :])
    torch.testing.assert_close(got, model(x))
    assert got.stride() == module(*inputs[-len(placeholders(module.graph)) :])[0].stride()


@pytest.mark.parametrize(("tokens", "now"), [(300, False), (301, True)])
def test_a_known_length_needs_one_graph_and_a_symbol_two(tokens, now):
    for dynamic in (False, True):
        rewritten = run_passes(capture(Two(), heads_of_one(), dynamic=dynamic), HeadPattern(), min_tokens=tokens)
        assert (rewritten.short is not None) == dynamic
        assert bool(rewritten.sparse) == (dynamic or not now)
    assert rewritten.short.now == now
    assert run_passes(capture(Two(), heads_of_one(), dynamic=True), HeadPattern()).short is None


def test_attentions_that_differ_in_length_are_decided_each_and_guarded():
    def attend(x, y):
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return x, F.scaled_dot_product_attention(y, y, y, is_causal=True)

    inputs = heads_of_one(length=300), heads_of_one(length=700)
    module = capture(attend, *inputs, dynamic=True)
    env = next(node.meta["example_value"] for node in module.graph.nodes if node.name == "x" or "x_" in node.name)
    before = len(env.fake_mode.shape_env.guards)
    rewritten = run_passes(module, HeadPattern(), min_tokens=500)
    assert [record.reason for record in rewritten.records] == [Reason.TOO_SHORT, Reason.SPARSE]
    assert "is less than 500" in rewritten.records[0].detail
    assert rewritten.short is None
    assert op_count(rewritten.module, OPS.block_sparse_attention.default) == 1
    assert len(env.fake_mode.shape_env.guards) == before + 2
    assert run_passes(module, HeadPattern(), min_tokens=0).sparse[1].record.detail == ""


def test_one_dense_site_may_be_anothers_query():
    class Chain(torch.nn.Module):
        def forward(self, x):
            return grouped(grouped(x))

    x = heads_of_one()
    module = run_passes(capture(Chain(), x), HeadPattern(), min_tokens=1000).module
    assert op_count(module, REPEAT) == 4
    torch.testing.assert_close(module(x)[0], Chain()(x))


def test_where_no_length_is_given_the_measured_one_of_the_kernel_counts(monkeypatch):
    monkeypatch.setattr("mmcompile.passes.decide.sparse_from", lambda device, dtype, head_dim: head_dim * 20)
    module = capture(Two(), heads_of_one(), dynamic=True)
    assert run_passes(module, HeadPattern(), min_tokens=None).short.min_tokens == 16 * 20
    (record, _) = run_passes(capture(Two(), heads_of_one()), HeadPattern(), min_tokens=None).records
    assert (record.reason, record.detail) == (Reason.TOO_SHORT, "300 tokens, sparse from 320 (option min_tokens)")
