"""Prefills shorter than `min_tokens`: which graph serves them, when it is compiled, and what it takes for granted."""

import copy
import logging
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._dynamo.backends.registry import register_backend
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import mmcompile
from mmcompile import HeadPattern, Reason
from mmcompile.backend import mminference
from tests.mmcompile.test_backend import DIM, HEADS, TINY_TEXT, Decoder, tokens
from tests.models.families import FAMILIES

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
LONG = 256  # min_tokens of these tests


class _Counted(fx.Interpreter):
    def call_function(self, target, args, kwargs):
        if getattr(target, "namespace", "") == "mminference":
            ran.append(target._schema.name.split("::")[1])
        return super().call_function(target, args, kwargs)


traced: list[fx.GraphModule] = []  # by Dynamo
compiled: list[bool] = []  # graphs that the inner backend was given: whether each is sparse
ran: list[str] = []  # our ops, one entry a call


def find_sparse(module):
    return any("mminference" in str(node.target) for node in module.graph.nodes)


@register_backend
def count_ops(module, example_inputs):
    compiled.append(find_sparse(module))
    return lambda *inputs: _Counted(module).run(*inputs)


@pytest.fixture(autouse=True)
def nothing_yet():
    for seen in (traced, compiled, ran):
        seen.clear()


def run_of(model, inner="count_ops", min_tokens=LONG, **settings):
    """The model compiled, with every tile of a long prefill."""

    def backend(module, example_inputs):
        traced.append(module)
        return mminference(module, example_inputs, options=options)

    options = {"min_tokens": min_tokens, "inner": inner, "density": 1.0}
    return torch.compile(model, backend=backend, **settings)


@torch.no_grad()
def test_lengths_that_cross_the_limit_trace_nothing_and_compile_each_side_once():
    model = Decoder()
    run = run_of(model)
    for index, length in enumerate((600, 700, 200, 900, 130, LONG, LONG - 1, 640, 2000, 150)):
        ran.clear()
        x = tokens(length, batch=2)
        torch.testing.assert_close(run(x), model(x), **TOLERANCE)
        assert ("block_sparse_attention" in ran) == (length >= LONG) == bool(ran)
        assert len(traced) == min(index + 1, 2)
        why = "" if length >= LONG else "too short"
        assert [(site.density, site.dense, site.layer) for site in mmcompile.stats(model)] == [(1, why, 0), (1, why, 1)]
    assert compiled == [True, True, False]  # one length, long ones, short ones


@torch.no_grad()
@pytest.mark.parametrize(("lengths", "sparse"), [((130, 140, 200, 255), False), ((600, 700, 900, LONG), True)])
def test_who_stays_on_one_side_compiles_nothing_for_the_other(lengths, sparse):
    model = Decoder()
    run = run_of(model)
    for length in lengths:
        run(tokens(length))
    assert compiled == [sparse, sparse]


@torch.no_grad()
@pytest.mark.parametrize("length", [200, 600])
def test_a_known_length_needs_one_graph(length):
    model = Decoder()
    run = run_of(model, dynamic=False)
    torch.testing.assert_close(run(tokens(length)).shape, (1, length, HEADS * DIM))
    assert compiled == [length >= LONG]
    assert {site.dense for site in mmcompile.stats(model)} == {"" if length >= LONG else "too short"}


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("first", [200, 600])
def test_symbols_from_the_first_call_on_in_one_whole_graph_and_inference_mode(inner, first):
    model = Decoder(layers=1)
    run = run_of(model, inner, dynamic=True, fullgraph=True)
    seen = []
    for length in (first, 800 - first, first + 8, 150, 700):
        with torch.inference_mode():
            x = tokens(length)
            torch.testing.assert_close(run(x), model(x), **TOLERANCE)
        seen.append(len(traced))
    assert len(set(seen)) == 1


def causal(x, keep=True):
    index = torch.arange(x.shape[2])
    return ((index <= index[:, None]) & keep)[None, None]


MASKS = {
    "causal": causal,
    "window": lambda x: causal(x, torch.arange(x.shape[2]) > torch.arange(x.shape[2])[:, None] - 70),
    "valid": lambda x, valid: causal(x) & valid[:, None, None, :],
}


@torch.no_grad()
@pytest.mark.parametrize("inner", ["count_ops", "aot_eager"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_that_arrive_with_the_graph(name, inner):
    def attend(x, *valid):
        return F.scaled_dot_product_attention(x, x * 2, x, MASKS[name](x, *valid))

    run = run_of(attend, inner)
    for length in (600, 700, 200, 900, 130):
        x = torch.randn(2, HEADS, length, DIM)
        inputs = (torch.arange(length) >= torch.tensor([[0], [7]]),) if name == "valid" else ()
        real = inputs[0][:, None, :, None].expand_as(x) if inputs else torch.ones_like(x).bool()
        torch.testing.assert_close(run(x, *inputs)[real], attend(x, *inputs)[real], **TOLERANCE)
    assert len(traced) == 2


@torch.no_grad()
@pytest.mark.parametrize("inner", ["count_ops", "inductor"])
def test_chunks_cross_the_limit_by_the_number_of_keys(inner):
    def attend(x, keys, values):
        past, length = keys.shape[2], x.shape[2]
        keys, values = torch.cat([keys, x], 2), torch.cat([values, x], 2)
        mask = torch.arange(past + length) <= torch.arange(length)[:, None] + past
        return F.scaled_dot_product_attention(x, keys, values, mask), keys, values

    run, graphs = run_of(attend, inner), []
    for size in (80, 80, 50, 60):
        x = torch.randn(1, HEADS, 600, DIM)
        whole = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        keys, values = x[:, :, :size].clone(), x[:, :, :size]  # the second is a view
        for start in range(size, 600 - size, size):
            ran.clear()
            out, keys, values = run(x[:, :, start : start + size], keys, values)
            torch.testing.assert_close(out, whole[:, :, start : start + size], **TOLERANCE)
            assert inner != "count_ops" or bool(ran) == (keys.shape[2] >= LONG)
        graphs.append(len(traced))
    assert graphs[-1] == graphs[-2]


@torch.no_grad()
def test_what_later_code_assumes_of_sizes_is_checked_at_each_call(caplog):
    def narrow(module, example_inputs):
        for example in example_inputs:
            if isinstance(example, torch.SymInt) and not find_sparse(module):
                compiled.append(bool(example < 180) and bool(example % 2 == 0))
        return module.forward

    register_backend(narrow, name="narrow")
    model = Decoder()
    run = run_of(model, "narrow")
    run(tokens(600))
    run(tokens(700))
    compiled.clear()
    with caplog.at_level(logging.INFO, logger="mmcompile"):
        for length in (150, 160, 151, 200, 152, 240, 162, 151):
            x = tokens(length)
            torch.testing.assert_close(run(x), model(x), **TOLERANCE)
    assert compiled == [True, False, False]  # even and below 180; odd; even and not below
    assert caplog.text.count("compiled after tracing") == 3
    assert len(traced) == 2


@torch.no_grad()
def test_a_backend_that_knows_one_length_at_a_time_is_not_asked_for_ever(caplog):
    def rigid(module, example_inputs):
        if find_sparse(module):
            compiled.extend(int(example) for example in example_inputs if isinstance(example, torch.SymInt))
        return module.forward

    register_backend(rigid, name="rigid")
    model = Decoder()
    run = run_of(model, "rigid", dynamic=True)
    run(tokens(200))
    compiled.clear()
    with torch._dynamo.config.patch(recompile_limit=3):
        for length in (600, 610, 620, 630, 640, 600):
            x = tokens(length)
            torch.testing.assert_close(run(x), model(x), **TOLERANCE)
    assert caplog.text.count("others run uncompiled") == 1


@torch.no_grad()
def test_an_input_that_is_written_to():
    def write(x, cache):
        cache[:, :, : x.shape[2]] += x
        return F.scaled_dot_product_attention(x, x, x, is_causal=True) + cache.sum()

    for inner in ("aot_eager", "inductor"):
        run = run_of(write, inner)
        torch._dynamo.reset()
        ours, theirs = torch.zeros(2, 1, HEADS, 1000, DIM)
        for length in (600, 700, 200, 900, 130):
            x = torch.randn(1, HEADS, length, DIM)
            torch.testing.assert_close(run(x, ours), write(x, theirs), atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_autocast_is_what_it_was_when_the_graph_was_traced():
    model = Decoder(layers=1)
    run = run_of(model, "aot_eager")
    for length in (600, 700, 200, 900, 130):
        x = tokens(length)
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = run(x), model(x)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(run(x), model(x), **TOLERANCE)


@torch.no_grad()
def test_two_threads_compile_the_other_side_once():
    model = Decoder()
    run = run_of(model)
    for length in (600, 700):
        run(tokens(length))
    inputs = [tokens(200 + index) for index in range(4)]
    expected, got = [model(x) for x in inputs], {}

    def short(index):
        with torch.no_grad():
            got[index] = run(inputs[index])

    threads = [threading.Thread(target=short, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        torch.testing.assert_close(got[index], expected[index], **TOLERANCE)
    assert compiled == [True, True, False]


@torch.no_grad()
def test_gradients_of_a_part_keep_the_short_side_trainable():
    def attend(x, weight):
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True)  # nothing to learn here
        x = x * weight
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    run = run_of(attend, "aot_eager")
    weight = torch.ones(DIM, requires_grad=True)
    for length in (600, 700, 200, 130):
        x = torch.randn(1, HEADS, length, DIM)
        with torch.enable_grad():
            gradients = [torch.autograd.grad(one(x, weight).square().sum(), weight)[0] for one in (run, attend)]
        torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)
    assert len(traced) == 2


def qwen():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**TINY_TEXT)).eval()


@torch.no_grad()
@pytest.mark.parametrize("room", [200, 300])
def test_what_is_short_in_a_static_cache_is_the_cache(room):
    def attend(x, cache):
        cache[:, :, : x.shape[2]] = x
        mask = torch.arange(cache.shape[2]) <= torch.arange(x.shape[2])[:, None]
        return F.scaled_dot_product_attention(x, cache, cache, mask)

    run = run_of(attend)
    for length in (40, 50, 60):
        x = torch.randn(1, HEADS, length, DIM)
        got, expected = (one(x, torch.zeros(1, HEADS, room, DIM)) for one in (run, attend))
        torch.testing.assert_close(got, expected, **TOLERANCE)
    assert set(compiled) == {room >= LONG}


@torch.no_grad()
def test_a_second_turn_is_as_long_as_its_cache():
    model, eager = qwen(), qwen()
    run = run_of(model)
    for first, second in ((300, 20), (310, 30), (100, 20), (120, 30), (250, 10), (330, 40)):
        ids = torch.randint(3, 60, (1, first + second))
        for part in (ids[:, :first], ids[:, first:]):
            if part.shape[1] == first:
                caches = [DynamicCache(config=model.config) for _ in range(2)]
            got, expected = (
                one(input_ids=part, past_key_values=cache).logits
                for one, cache in zip((run, eager), caches, strict=True)
            )
            torch.testing.assert_close(got, expected, **TOLERANCE)
            keys = caches[0].get_seq_length()
            assert {site.dense for site in mmcompile.stats(model)} == {"" if keys >= LONG else "too short"}


@torch.no_grad()
def test_a_length_that_the_data_tell_before_it_does_not_hinder_the_short_side():
    def attend(x, keep):
        chosen = x[0, 0, keep.nonzero().squeeze(1)].sum(0)
        return F.scaled_dot_product_attention(x, x, x, is_causal=True) + chosen

    for inner in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        run = run_of(attend, inner)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            for length in (600, 700, 200, 130):
                x, keep = torch.randn(1, HEADS, length, DIM), torch.rand(length) < 0.5
                torch.testing.assert_close(run(x, keep), attend(x, keep), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_explain_says_from_where_on_it_is_sparse():
    x = tokens(200)
    report = mmcompile.explain(Decoder(), x, options={"min_tokens": LONG})
    assert [site.reason for site in report.sites] == [Reason.TOO_SHORT] * 2
    torch._dynamo.maybe_mark_dynamic(x, 1)
    report = mmcompile.explain(Decoder(), x, options={"min_tokens": LONG})
    assert [site.reason for site in report.sites] == [Reason.SPARSE] * 2
    assert "dense below 256 tokens" in report.sites[0].detail


@torch.no_grad()
def test_cuda_graphs_are_left_out_on_both_sides(monkeypatch):
    recorded = []

    def inductor(module, example_inputs, config_patches=None):
        with torch._inductor.config.patch(config_patches or {}):
            recorded.append(torch._inductor.config.triton.cudagraphs)
        return module.forward

    monkeypatch.setattr("mmcompile.backend.lookup_backend", lambda name: inductor)
    backend = partial(mminference, options={"min_tokens": LONG, "patterns": HeadPattern()})
    run = torch.compile(Decoder(), backend=backend, dynamic=True)
    run(tokens(600))
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        run(tokens(200))
    assert recorded == [False, False]


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_whole_model_on_both_sides(family, dynamic):
    model = FAMILIES[family].model()
    eager = copy.deepcopy(model)
    prompts = vars(FAMILIES[family].prompts(eager))
    names = ("longest", "first", "longer", "padded", "longest", "first", "padded")
    lengths = {name: prompts[name]["input_ids"].shape[1] for name in names}
    limit = lengths["first"] + 1
    assert limit <= lengths["longest"]
    mmcompile.compile(model, min_tokens=limit, density=1.0, inner="aot_eager", dynamic=dynamic)
    for name in names:
        real = prompts[name]["attention_mask"].bool()
        got, expected = (one(**prompts[name]).logits[real] for one in (model, eager))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
        assert {site.dense for site in mmcompile.stats(model)} == {"" if lengths[name] >= limit else "too short"}
