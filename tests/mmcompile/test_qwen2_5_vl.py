"""A whole tiny Qwen2.5-VL through the backend: prefill, decode, second videos, boundaries, recompiles."""

import copy

import pytest
import torch
from torch._dynamo.backends.registry import register_backend
from torch._subclasses.fake_tensor import FakeTensorMode

import mmcompile
from mmcompile import HeadPattern
from mmcompile.backend import mminference
from mmcompile.encode_first import encodes_first
from mmcompile.huggingface import Text, prompts
from mmcompile.input_boundaries import IMAGE, TEXT, VIDEO
from mmcompile.passes.find_attention import find_attention
from mmcompile.passes.graph import fake_value
from tests.mmcompile import spy
from tests.models.tiny import image, tiny_qwen2_5_vl, video

# Every tile, in an order that is not the tokens' own.
DENSE = {"patterns": HeadPattern("dense", boundary="2d"), "min_tokens": 0, "inner": "eager"}
SPY = DENSE | {"inner": "spy_on_plans"}
LAYERS = 2


@pytest.fixture(scope="module")
def eager():
    return tiny_qwen2_5_vl(layers=LAYERS, window_size=224)  # few windows, so that few attentions trace


@pytest.fixture
def model(eager):
    return copy.deepcopy(eager)


def short_video(model, steps=4, text=20):
    return prompts(model, [[Text(text), video(steps, 8, 8), Text(text)]])


def prefill_and_decode(model, inputs, steps=8):
    """Logits of a prefill and of greedy decode steps on its cache, [steps + 1, vocabulary]."""
    out = model(**inputs, use_cache=True)
    logits, cache = [out.logits[:, -1]], out.past_key_values
    for _ in range(steps):
        token = logits[-1].argmax(-1, keepdim=True)
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.cat(logits)


@torch.no_grad()
def test_prefill_decode_and_a_second_longer_video_equal_eager(eager, model):
    run = torch.compile(model, backend="mminference", options=DENSE)
    for inputs in (short_video(eager), short_video(eager, steps=6, text=40)):
        torch.testing.assert_close(
            prefill_and_decode(run, inputs), prefill_and_decode(eager, inputs), atol=1e-4, rtol=0
        )
        assert [site.density >= 1.0 for site in mmcompile.stats(model)] == [True] * LAYERS


@torch.no_grad()
def test_generate_prefills_through_the_compiled_model(eager, model):
    mmcompile.compile(model, **DENSE)
    inputs = short_video(eager)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **settings), eager.generate(**inputs, **settings))
    assert [site.layer for site in mmcompile.stats(model)] == list(range(LAYERS))


def mixed_prompt(model):
    return prompts(model, [[Text(9), image(4, 8), Text(5), video(4, 4, 8), Text(7)]])


# <|vision_start|> and <|vision_end|> are text.
MIXED = [(0, TEXT), (10, IMAGE), (18, TEXT), (25, VIDEO), (57, TEXT)]


@torch.no_grad()
def test_plain_torch_compile_finds_the_boundaries_in_rotary_positions(model):
    run = torch.compile(model, backend="mminference", options=SPY)
    spy.arrange_arguments.clear()
    run(**mixed_prompt(model))
    assert list(map(spy.segments, spy.arrange_arguments)) == [MIXED]  # one plan serves every layer


@torch.no_grad()
def test_bound_boundaries_come_first_and_the_next_call_reads_its_own_inputs(model):
    mmcompile.compile(model, **SPY)
    inputs = mixed_prompt(model)
    length = inputs["input_ids"].shape[1]
    given = mmcompile.ModalityBoundaries(torch.tensor([0, 30, length]).int(), torch.tensor([2, 0]).int())
    spy.arrange_arguments.clear()
    with mmcompile.bind(given):
        model(**inputs)
    model(**inputs)
    model(**short_video(model))
    first, second, third = map(spy.segments, spy.arrange_arguments)
    assert first == [(0, VIDEO), (30, TEXT)]
    assert second == MIXED
    assert third == [(0, TEXT), (21, VIDEO), (85, TEXT)]


@torch.no_grad()
def test_a_left_padded_batch_with_different_layouts(eager, model):
    rows = [[Text(9), video(4, 8, 8), Text(30)], [Text(40), image(4, 8), Text(5)]]
    inputs = prompts(eager, rows)
    run = torch.compile(model, backend="mminference", options=DENSE | {"strict": False})
    got, expected = run(**inputs).logits, eager(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=0)


def decoder_inputs(eager, text, height):
    """Embeddings and positions as the whole model computes them before its decoder."""
    inputs = prompts(eager, [[Text(text), video(2, height, 8), Text(text + 3)]])
    kept = {}
    hook = eager.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: kept.update(kwargs), with_kwargs=True
    )
    eager(**inputs, use_cache=False)
    hook.remove()
    return {name: kept[name] for name in ("inputs_embeds", "position_ids", "attention_mask")}


@torch.no_grad()
def test_the_decoder_under_inductor_equals_eager_with_a_cache(eager, model):
    run = torch.compile(model.model.language_model, backend="mminference", options=DENSE | {"inner": "inductor"})
    decoder = eager.model.language_model
    for text in (30, 80):
        arguments = decoder_inputs(eager, text, 8)
        got, expected = run(**arguments, use_cache=True), decoder(**arguments, use_cache=True)
        torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, atol=1e-4, rtol=0)
        next_position = arguments["position_ids"].amax(dim=(0, 2)).view(1, 1, 1).expand(3, 1, 1)
        for step in range(2):
            token = {
                "inputs_embeds": arguments["inputs_embeds"][:, step : step + 1],
                "position_ids": next_position + 1 + step,
                "use_cache": True,
            }
            got = run(**token, past_key_values=got.past_key_values)
            expected = decoder(**token, past_key_values=expected.past_key_values)
            torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, atol=1e-4, rtol=0)


@torch.no_grad()
def test_ten_lengths_and_ten_boundary_sets_after_the_first_two_recompile_nothing(eager, model):
    language_graphs = []

    def backend(module, example_inputs):
        if find_attention(module):
            language_graphs.append(module)
        return mminference(module, example_inputs, options=DENSE)

    text_model = model.model.language_model
    run = torch.compile(text_model, backend=backend)

    for index in range(12):
        arguments = decoder_inputs(eager, text=17 + 5 * index, height=4 + 2 * (index % 4)) | {"use_cache": False}
        if index == 2:
            warm = len(language_graphs)
        torch.testing.assert_close(
            run(**arguments).last_hidden_state,
            eager.model.language_model(**arguments).last_hidden_state,
            atol=1e-4,
            rtol=0,
        )
    assert len(language_graphs) == warm <= 2


@torch.no_grad()
def test_explain_names_every_layer_of_the_decoder_and_every_refusal(model):
    report = mmcompile.explain(model, **short_video(model), options={"min_tokens": 0})
    decoder = [site for site in report.sites if "language_model" in site.module_path]
    assert [(site.layer, site.sparse, site.mask) for site in decoder] == [
        (layer, True, "causal+padding") for layer in range(LAYERS)
    ]
    vision = [site for site in report.sites if site not in decoder]
    if encodes_first(model):  # as mmcompile.compile traces it
        assert (vision, report.graph_count, report.breaks) == ([], 1, ())
        assert "get_placeholder_mask" not in vars(model.model)
    else:
        assert {str(site.reason) for site in vision} == {"non-causal"}
        assert report.graph_count > 1
        assert report.breaks


@torch.no_grad()
def test_sparse_is_finite_and_says_its_density(model):
    inputs = prompts(model, [[Text(300), video(16, 8, 16), Text(300)]])
    options = {"min_tokens": 0, "inner": "eager", "patterns": HeadPattern("a_shape", 128, 128, boundary="q")}
    mmcompile.compile(model, **options)
    assert model(**inputs).logits.isfinite().all()
    for site in mmcompile.stats(model):
        assert 0 < site.density < 1
        assert site.recall is None


@torch.no_grad()
def test_auto_says_for_each_head_what_it_held_and_where_it_fell_short(model):
    inputs = prompts(model, [[Text(300), video(16, 8, 16), Text(300)]])
    for options in ({"density": 0.3}, {"recall": 0.5}):
        mmcompile.compile(model, min_tokens=0, inner="eager", **options)
        assert model(**inputs).logits.isfinite().all()
        for site in mmcompile.stats(model):
            assert 0 < site.density < 1
            assert len(site.heads) == model.config.text_config.num_attention_heads
            for head in site.heads:
                assert head.target == options.get("recall", 0.95)
                assert 0 < head.recall <= 1 + 1e-5
                # Random weights attend to everything alike: a third of the tiles is not enough.
                assert head.falls_short == (head.recall < head.target)
        assert any(head.falls_short for head in site.heads) == ("density" in options)


@pytest.mark.parametrize(("chunk", "least"), [(None, 60), (0, 100)], ids=["in chunks", "whole"])
@torch.no_grad()
def test_a_million_tokens_compile_without_a_node_of_queries_times_keys(chunk, least):
    length = 2**20
    nodes = []

    def inner(module, example_inputs):
        nodes.extend(module.graph.nodes)
        return module.forward

    register_backend(inner, name=f"keep_nodes_{least}")
    with FakeTensorMode():
        decoder = tiny_qwen2_5_vl(layers=LAYERS).model.language_model
        options = {"inner": f"keep_nodes_{least}", "strict": True, "chunk_tokens": chunk}
        run = torch.compile(decoder, backend="mminference", options=options)
        run(
            inputs_embeds=torch.randn(1, length, 64),
            attention_mask=torch.ones(1, length, dtype=torch.int64),
            position_ids=torch.arange(length).expand(3, 1, -1),
        )
    sizes = {node.name: fake_value(node).numel() for node in nodes if isinstance(fake_value(node), torch.Tensor)}
    assert len(sizes) > least
    assert max(sizes.values()) < length * length // 1000, max(sizes, key=sizes.__getitem__)
