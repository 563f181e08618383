"""Long prefills in chunks of tokens: the same results, in one graph for all lengths, whatever compiles it."""

import copy

import pytest
import torch
from torch._dynamo.backends.registry import register_backend
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, StaticCache

import mmcompile
from mmcompile.backend import mminference
from tests.mmcompile.test_backend import TINY_TEXT, Decoder, tokens
from tests.models.families import FAMILIES

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
CHUNK = 64
ran: list[str] = []  # graphs that ran, by what they are


@register_backend
def note_runs(module, example_inputs):
    targets = [str(node.target) for node in module.graph.nodes]
    kinds = {"in_chunks": "long", "mminference": "sparse"}
    name = next((kind for word, kind in kinds.items() if any(word in target for target in targets)), "stretch")

    def run(*inputs):
        ran.append(name)
        return module(*inputs)

    return run


@pytest.fixture(autouse=True)
def nothing_yet():
    ran.clear()


def run_of(model, inner="note_runs", chunk=CHUNK, graphs=None, **settings):
    def backend(module, example_inputs):
        if graphs is not None:
            graphs.append(module)
        return mminference(module, example_inputs, options=options)

    options = {"min_tokens": 0, "inner": inner, "density": 1.0, "chunk_tokens": chunk}
    return torch.compile(model, backend=backend, **settings)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dynamic", [None, True])
def test_prefills_of_any_length_on_both_sides_are_traced_once(batch, dynamic):
    model, graphs = Decoder(), []
    run = run_of(model, graphs=graphs, dynamic=dynamic)
    for length in (200, 300, 40, 64, 65, 129, 700, 33):
        ran.clear()
        x = tokens(length, batch)
        torch.testing.assert_close(run(x), model(x), **TOLERANCE)
        assert ("long" in ran) == (length > CHUNK)
        # One before the first attention and one between the two; what follows is an addition.
        assert ran.count("stretch") == (2 * -(-length // CHUNK) if length > CHUNK else 0)
        assert len(mmcompile.stats(model)) == 2
    assert len(graphs) == (1 if dynamic else 2)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_compiled_and_in_inference_mode(inner):
    model, graphs, seen = Decoder(layers=1), [], []
    run = run_of(model, inner, chunk=256, graphs=graphs, dynamic=True)
    for length in (600, 300, 200, 301):
        with torch.inference_mode():
            x = tokens(length)
            torch.testing.assert_close(run(x), model(x), **TOLERANCE)
        seen.append(len(graphs))
    assert len(set(seen)) == 1


@torch.no_grad()
def test_autocast_is_what_it_was_when_the_graph_was_traced():
    model = Decoder(layers=1)
    run = run_of(model, "aot_eager")
    for length in (200, 300, 310):
        x = tokens(length)
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = run(x), model(x)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(run(x), model(x), **TOLERANCE)


def test_training_runs_whole():
    model = Decoder()
    run = run_of(model, "aot_eager")
    x = tokens(200)
    for one in (run, model):
        gradients = torch.autograd.grad(one(x).square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"chunk_tokens": 0}, {"chunk_tokens": CHUNK, "disable": ["chunk_tokens"]}, {}])
def test_it_can_be_left_out_and_is_where_it_does_not_pay(options):
    model = Decoder()
    run = torch.compile(model, backend="mminference", options={"min_tokens": 0, "inner": "note_runs"} | options)
    run(tokens(200))
    assert ran == ["sparse"]


@torch.no_grad()
def test_explain_says_how():
    x = tokens(200)
    for chunk, told in ((0, "all tokens at once (option chunk_tokens)"), (CHUNK, "6 matrix products in 2 stretches")):
        report = mmcompile.explain(Decoder(), x, options={"min_tokens": 0, "chunk_tokens": chunk})
        assert told in report.summary()
        assert told in report.to_json()


def qwen():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**TINY_TEXT)).eval()


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_caches_hold_what_they_would_and_decoding_goes_on(static):
    model = qwen()
    run, ids = run_of(model), torch.randint(3, 60, (1, 200))

    def cache():
        return StaticCache(model.config, max_cache_len=256) if static else DynamicCache(config=model.config)

    caches = [cache(), cache()]
    for part in (ids[:, :150], ids[:, 150:190], ids[:, 190:191]):
        got, expected = (
            one(input_ids=part, past_key_values=kept).logits for one, kept in zip((run, model), caches, strict=True)
        )
        torch.testing.assert_close(got, expected, **TOLERANCE)
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, **TOLERANCE)
        torch.testing.assert_close(ours.values, theirs.values, **TOLERANCE)
        assert ours.keys.stride() == theirs.keys.stride()
    assert "long" in ran


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava_onevision", "internvl", "idefics3"])
def test_families(family):
    model = FAMILIES[family].model()
    eager = copy.deepcopy(model)
    inputs = FAMILIES[family].prompts(eager).padded
    mmcompile.compile(model, min_tokens=0, density=1.0, inner="note_runs", chunk_tokens=100)
    real = inputs["attention_mask"].bool()
    got, expected = (one(**inputs).logits[real] for one in (model, eager))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    assert ran.count("stretch") >= 3 * 2


class _Gathers(torch.nn.Module):
    """As a table of positions: of each token's row, the entries that an index has, one for each token."""

    def __init__(self):
        super().__init__()
        self.decoder, self.table = Decoder(layers=1), torch.nn.Linear(64, 64)

    def forward(self, x, index):
        return self.decoder(x + self.table(x)[:, :, index].sum(-1, keepdim=True))


@torch.no_grad()
def test_an_index_with_an_entry_for_each_token_is_not_cut_with_them():
    torch.manual_seed(0)
    model = _Gathers()
    run = run_of(model, "aot_eager")
    x = tokens(200)
    index = torch.arange(200) % x.shape[-1]
    torch.testing.assert_close(run(x, index), model(x, index), **TOLERANCE)
