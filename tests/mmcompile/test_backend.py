"""The backend on small attentions: what it rewrites, what it leaves untouched, and what it says."""

import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.registry import register_backend
from transformers import Qwen2Config, Qwen2ForCausalLM

import mmcompile
from mmcompile import HeadPattern, ModalityBoundaries, PatternTable, Reason, UnsupportedSitesError
from mmcompile.backend import mminference
from mmcompile.errors import BoundaryError
from mmcompile.passes.find_attention import find_attention
from mmcompile.report import without_attention
from tests.mmcompile import spy

HEADS, KV_HEADS, DIM = 4, 2, 16
TINY_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SPARSE = {"min_tokens": 0, "inner": "eager"}


class Attention(nn.Module):
    """Grouped-query self-attention with whatever mask `mask(length)` gives."""

    def __init__(self, mask=None, is_causal=True, dropout=0.0):
        super().__init__()
        width = HEADS * DIM
        self.q, self.k, self.v = (
            nn.Linear(width, width),
            nn.Linear(width, width // 2),
            nn.Linear(width, width // 2),
        )
        self.mask, self.is_causal, self.dropout = mask, is_causal, dropout

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, -1, DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        mask = None if self.mask is None else self.mask(length)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout, is_causal=self.is_causal and mask is None, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(batch, length, -1)


class Decoder(nn.Module):
    def __init__(self, layers=2, **attention):
        super().__init__()
        self.layers = nn.ModuleList([Attention(**attention) for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def tokens(length, batch=1):
    return torch.randn(batch, length, HEADS * DIM)


def compiled(model, **options):
    return torch.compile(model, backend="mminference", options=SPARSE | options)


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_every_tile_equals_dense(inner):
    model, x = Decoder(), tokens(300, batch=2)
    torch.testing.assert_close(compiled(model, density=1.0, inner=inner)(x), model(x), atol=1e-5, rtol=1e-5)
    assert [site.density for site in mmcompile.stats(model)] == [1.0, 1.0]


@torch.no_grad()
def test_compiled_code_in_inductors_cache_is_tied_to_the_kernels_sources():
    tags = []

    @register_backend
    def keep_tag(module, example_inputs):
        tags.append(torch.compiler.config.cache_key_tag)
        return module.forward

    compiled(Decoder(), inner="keep_tag")(tokens(200))
    assert tags[0].startswith("mmcompile-")
    assert len(tags[0]) > 64
    assert torch.compiler.config.cache_key_tag == ""


@torch.no_grad()
def test_a_narrow_pattern_is_really_sparse():
    model, x = Decoder(), tokens(1024)
    pattern = HeadPattern("a_shape", sink=128, local=128)
    out = compiled(model, patterns=pattern)(x)
    assert not torch.allclose(out, model(x), atol=1e-3)
    assert all(site.density < 0.7 for site in mmcompile.stats(model))
    assert [site.layer for site in mmcompile.stats(model)] == [0, 1]


@torch.no_grad()
def test_no_recompile_for_new_lengths_and_new_boundaries():
    model = Decoder()
    frames = []

    def backend(module, example_inputs):
        frames.append(module)
        return mminference(module, example_inputs, options=SPARSE | {"density": 1.0})

    run = torch.compile(model, backend=backend)
    for index, length in enumerate([130, 200, 257, 384, 500, 129, 640, 131, 300, 777, 256, 350]):
        if index == 2:
            warm = len(frames)
        x = tokens(length)
        cuts = torch.randperm(length - 1)[: index % 5 + 1].sort().values + 1
        offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([length])]).int()
        boundaries = ModalityBoundaries(offsets, torch.arange(offsets.numel() - 1, dtype=torch.int32) % 3)
        with mmcompile.bind(boundaries):
            torch.testing.assert_close(run(x), model(x), atol=1e-5, rtol=1e-5)
    assert len(frames) == warm == 2


@torch.no_grad()
def test_bound_boundaries_reach_the_plan_and_never_outlive_their_call():
    run = compiled(Decoder(layers=1), inner="spy_on_plans")
    boundaries = ModalityBoundaries(torch.tensor([0, 100, 300]).int(), torch.tensor([0, 2]).int())
    spy.arrange_arguments.clear()
    with mmcompile.bind(boundaries):
        run(tokens(300))
    run(tokens(300))
    first, second = map(spy.segments, spy.arrange_arguments)
    assert first == [(0, 0), (100, 2)]
    assert second == [(0, 0)]  # unknown again


@torch.no_grad()
def test_boundaries_that_do_not_fit_the_batch_are_one_clear_error():
    run = compiled(Decoder(layers=1))
    with (
        mmcompile.bind(ModalityBoundaries(torch.tensor([0, 299]).int(), torch.tensor([0]).int())),
        pytest.raises(BoundaryError, match=r"the last is 299; must be batch \* length = 1 \* 300 = 300"),
    ):
        run(tokens(300))


def alibi(length):
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    return torch.where(distance > 0, -torch.inf, 0.1 * distance)[None, None]


REFUSED = [
    ({"mask": alibi}, Reason.OPAQUE_MASK),
    ({"mask": lambda length: torch.rand(1, 1, length, length)}, Reason.OPAQUE_MASK),
    ({"is_causal": False}, Reason.NON_CAUSAL),
    ({"dropout": 0.5}, Reason.DROPOUT),
]


@torch.no_grad()
@pytest.mark.parametrize(("attention", "reason"), REFUSED)
def test_what_is_not_understood_is_untouched_reported_and_refused_when_strict(attention, reason):
    model, x = Decoder(**attention), tokens(200)
    graphs = []

    def inner(module, example_inputs):
        graphs.append(module)
        return module.forward

    register_backend(inner, name=f"keep_{id(graphs)}")
    handed = []

    def backend(module, example_inputs):
        handed.append(module)
        return mminference(module, example_inputs, options={"min_tokens": 0, "inner": f"keep_{id(graphs)}"})

    run = torch.compile(model, backend=backend)
    torch.manual_seed(1)
    out = run(x)
    torch.manual_seed(1)
    torch.testing.assert_close(out, model(x))
    assert graphs == handed  # the very module, not a copy

    report = mmcompile.explain(model, x, options={"min_tokens": 0})
    assert [site.reason for site in report.sites] == [reason] * 2
    torch.compiler.reset()
    with pytest.raises(UnsupportedSitesError, match="2 attention\\(s\\) must stay dense") as raised:
        compiled(model, strict=True)(x)
    assert str(reason) in str(raised.value)
    assert "layers.0" in str(raised.value)


def test_gradients_keep_attention_dense_and_right():
    model, x = Decoder(), tokens(200)
    compiled(model)(x).sum().backward()
    gradient = model.layers[0].q.weight.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(gradient, model.layers[0].q.weight.grad)
    with torch.enable_grad(), pytest.raises(UnsupportedSitesError, match="gradient needed"):
        torch.compiler.reset()
        compiled(model, strict=True)(x)


@torch.no_grad()
def test_strict_accepts_decode_steps_and_short_prefills():
    model = Decoder()
    run = torch.compile(model, backend="mminference", options={"strict": True, "inner": "eager", "min_tokens": 4096})
    for length in (1, 100):
        x = tokens(length)
        torch.testing.assert_close(run(x), model(x))


def two_layer_table(*kinds):
    return PatternTable.of([[HeadPattern(kind, 1, 128)] * HEADS for kind in kinds])


@torch.no_grad()
def test_a_table_reaches_its_layers():
    model, x = Decoder(), tokens(1024)
    compiled(model, patterns=two_layer_table("dense", "a_shape"))(x)
    first, second = mmcompile.stats(model)
    assert first.density == 1.0
    assert second.density < 0.7
    assert (first.patterns, second.patterns) == (("dense",), ("a_shape(1, 128)",))


@torch.no_grad()
def test_heads_of_one_layer_may_differ_in_pattern_and_order():
    heads = [
        HeadPattern("dense"),
        HeadPattern("dense", boundary="2d"),
        HeadPattern("dense", boundary="q"),
        HeadPattern("tri_shape", 64, 64, 64, boundary="2d"),
    ]
    model, x = Decoder(layers=1), tokens(600)
    types = torch.randint(0, 3, (6,)).repeat_interleave(100)[None]
    boundaries = ModalityBoundaries.from_inputs(None, mm_token_type_ids=types)
    with mmcompile.bind(boundaries):
        out = compiled(model, patterns=PatternTable.of([heads]), density=1.0)(x)
    torch.testing.assert_close(out, model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_graph_that_serves_several_layers_is_refused_for_a_table():
    model, x = Decoder(), tokens(512)
    expected = model(x)
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return mminference(module, example_inputs, options=SPARSE | {"patterns": two_layer_table("dense", "a_shape")})

    for layer in model.layers:
        layer.compile(backend=backend)
    torch.testing.assert_close(model(x), expected)  # dense: no layer could be told
    assert len(graphs) == 1, "the premise: one graph serves both layers"
    torch.compiler.reset()
    for layer in model.layers:
        layer.compile(
            backend="mminference",
            options=SPARSE | {"patterns": two_layer_table("dense", "a_shape"), "strict": True},
        )
    with pytest.raises(UnsupportedSitesError, match="unknown layer"):
        model(x)


@torch.no_grad()
def test_one_graph_that_serves_several_layers_is_right_for_one_pattern_everywhere():
    model, x = Decoder(), tokens(512)
    expected = model(x)
    for layer in model.layers:
        layer.compile(backend="mminference", options=SPARSE | {"density": 1.0})
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert len(mmcompile.stats(model)) == 2  # told apart by their own weights, not by the graph


class Stages(nn.Module):
    """Two stages of two layers, each stage compiled by itself: the layers' numbers are relative."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([Decoder(), Decoder()])

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


@torch.no_grad()
def test_relative_layer_numbers_are_not_taken_for_absolute_ones():
    model, x = Stages(), tokens(300)
    table = PatternTable.of([[HeadPattern("a_shape", 1, 128)] * HEADS] * 4)
    for stage in model.stages:
        stage.compile(backend="mminference", options=SPARSE | {"patterns": table, "strict": True})
    with pytest.raises(UnsupportedSitesError, match="the table has 4 layers"):
        model(x)


@torch.no_grad()
def test_two_models_in_one_process_keep_their_own_stats():
    first, second = Decoder(layers=1), Decoder(layers=2)
    compiled(first, density=1.0)(tokens(300))
    compiled(second, patterns=HeadPattern("a_shape", 1, 128))(tokens(1024))
    assert [site.density for site in mmcompile.stats(first)] == [1.0]
    assert len(mmcompile.stats(second)) == 2
    assert mmcompile.stats(nn.Linear(2, 2)) == []


def test_a_prefill_that_is_rewritten_nowhere_leaves_no_figures_of_the_one_before():
    model = Decoder()
    run = compiled(model)
    with torch.no_grad():
        run(tokens(300))
    assert len(mmcompile.stats(model)) == 2
    run(tokens(300))  # gradients are needed
    assert mmcompile.stats(model) == []


@torch.no_grad()
def test_the_log_shows_the_same_records(caplog):
    with caplog.at_level(logging.DEBUG, logger="mmcompile"):
        compiled(Decoder())(tokens(200))
    assert "causal prefill" in caplog.text
    assert "torch.ops.mminference.block_sparse_attention" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize(
    ("mode", "config", "dense"),
    [
        (None, False, False),
        (None, True, True),
        ("default", True, True),
        ("reduce-overhead", False, True),
        ("max-autotune", False, True),
        ("max-autotune-no-cudagraphs", False, False),
    ],
)
def test_cuda_graphs_are_for_what_stays_dense(mode, config, dense, monkeypatch, caplog):
    seen = []

    def inductor(module, example_inputs, config_patches=None):
        with torch._inductor.config.patch(config_patches or {}):
            seen.append((torch._inductor.config.triton.cudagraphs, torch._inductor.config.max_autotune))
        return module.forward

    monkeypatch.setattr("mmcompile.backend.lookup_backend", lambda name: inductor)
    autotune = mode is not None and mode.startswith("max-autotune")
    with torch._inductor.config.patch({"triton.cudagraphs": config}), caplog.at_level(logging.INFO, logger="mmcompile"):
        for causal in (True, False):
            # torch.compile takes options or a mode, mmcompile.compile both.
            backend = partial(mminference, mode=mode, options={"min_tokens": 500})
            torch.compile(Decoder(is_causal=causal), backend=backend, dynamic=True)(tokens(200))
    assert seen == [(False, autotune), (dense, autotune)]
    assert caplog.text.count("left out of CUDA graphs: its attention is sparse") == dense


@torch.no_grad()
def test_explain_runs_no_attention_and_counts_graphs(monkeypatch):
    class Broken(Decoder):
        def forward(self, x):
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            return self.layers[1](x)

    ran = []

    def keep(module):
        ran.append(without_attention(module))
        return ran[-1]

    monkeypatch.setattr(mmcompile.report, "without_attention", keep)
    report = mmcompile.explain(Broken(), tokens(300), options={"min_tokens": 0})
    assert len(ran) == 2
    assert not [site for module in ran for site in find_attention(module)]
    assert not [node for module in ran for node in module.graph.nodes if "mminference" in str(node.target)]
    assert report.graph_count == 2
    assert len(report.breaks) == 1
    assert "graph_break" in report.breaks[0]
    assert [site.sparse for site in report.sites] == [True, True]
    assert '"graph_count": 2' in report.to_json()
    assert len(report.no_cuda_graph) == 2
    summary = " ".join(report.summary().split())
    assert (
        "2 sparse, 0 dense, in 2 graphs with 1 graph breaks; sparse ones run on torch operations on the CPU" in summary
    )
    assert "; left out of CUDA graphs: its attention is sparse" in summary


@torch.no_grad()
def test_explain_leaves_the_callers_cache_alone():
    model = Qwen2ForCausalLM(Qwen2Config(**TINY_TEXT)).eval()
    ids = torch.randint(3, 60, (1, 70))
    cache = model(input_ids=ids[:, :40], use_cache=True).past_key_values
    report = mmcompile.explain(model, input_ids=ids[:, 40:], past_key_values=cache, options={"min_tokens": 0})
    assert cache.get_seq_length() == 40
    assert report.sites


@torch.no_grad()
def test_strict_refuses_attention_that_is_written_by_hand():
    model = Qwen2ForCausalLM(Qwen2Config(**TINY_TEXT, attn_implementation="eager")).eval()
    with pytest.raises(UnsupportedSitesError, match="written out as softmax and matmul"):
        compiled(model, strict=True)(input_ids=torch.randint(3, 60, (1, 70)))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [torch.randint(3, 60, (1, 70)), [1, 2, 3]])
def test_compile_takes_whatever_the_model_takes(tokens):
    class Lengths(nn.Module):
        def forward(self, input_ids):
            return torch.zeros(len(input_ids))

    model = mmcompile.compile(Lengths(), min_tokens=0, inner="eager")
    assert model(tokens).shape == (len(tokens),)


@torch.no_grad()
def test_chunks_of_a_prefill_stay_sparse_and_compile_no_more_after_the_second():
    compilations = []

    def backend(module, example_inputs):
        compilations.append(module)
        return mminference(module, example_inputs, options=SPARSE | {"density": 1.0, "strict": True})

    def attend(x, keys, values):
        # Past keys and values are inputs of their own, so that each brings a length of its own.
        past, length = keys.shape[2], x.shape[2]
        keys, values = torch.cat([keys, x], 2), torch.cat([values, x], 2)
        mask = torch.arange(past + length) <= torch.arange(length)[:, None] + past
        return F.scaled_dot_product_attention(x, keys, values, mask), keys, values

    run = torch.compile(attend, backend=backend)
    for _ in range(2):
        x = torch.randn(1, HEADS, 500, DIM)
        whole = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        keys, values = x[:, :, :100].clone(), x[:, :, :100].clone()
        for start in range(100, 500, 80):
            out, keys, values = run(x[:, :, start : start + 80], keys, values)
            torch.testing.assert_close(out, whole[:, :, start : start + 80], atol=1e-5, rtol=1e-5)
    assert len(compilations) == 2
