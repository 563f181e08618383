"""`mmcompile.compile`: encoders first and the rest in one graph, generation, and what users get wrong."""

import copy
import io
import threading
from types import MethodType

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import register_backend
from transformers import DynamicCache, StaticCache

import mmcompile
from mmcompile import HeadPattern, PatternTable
from mmcompile.encode_first import encodes_first, get_placeholder_mask, without_checks
from mmcompile.errors import BoundaryError, OptionError
from mmcompile.huggingface import Text, prompts
from tests.models.families import FAMILIES
from tests.models.tiny import tiny_qwen2_5_vl, video

graphs: list[torch.fx.GraphModule] = []


@register_backend
def count_graphs(module, example_inputs):
    graphs.append(module)
    return module.forward


DENSE = {"min_tokens": 0, "density": 1.0, "inner": "count_graphs"}
TOLERANCE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(autouse=True)
def no_graphs_yet():
    graphs.clear()


# In versions of transformers that take no encoders' outputs, the encoders are traced with the rest.
encoders_first = pytest.mark.skipif(
    not encodes_first(tiny_qwen2_5_vl()), reason="this version of transformers takes no mm_encoder_outputs"
)


def pair(family):
    """An eager model, one with the same weights to compile, and their prompts by name."""
    eager = FAMILIES[family].model()
    return eager, FAMILIES[family].model(), vars(FAMILIES[family].prompts(eager))


def assert_close(got, expected, inputs):
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], expected.logits[real], **TOLERANCE)


@encoders_first
@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "video_llama_3", "molmo2", "llava_next_video"]
)
def test_a_whole_model_is_one_graph_and_equals_eager(family):
    eager, model, prompt = pair(family)
    mmcompile.compile(model, fullgraph=True, **DENSE)
    for index, name in enumerate(("first", "longer", "longest", "padded")):
        assert_close(model(**prompt[name]), eager(**prompt[name]), prompt[name])
        assert len(graphs) == (1, 2, 2, 3)[index]  # a padded batch differs in more than its length
    assert all(site.density == 1.0 for site in mmcompile.stats(model))
    assert len(mmcompile.stats(model)) == 2


@encoders_first
@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "way", "name"),
    [
        ("qwen2_5_vl", {}, "padded"),
        ("qwen2_5_vl", {"prefill_chunk_size": 64}, "longer"),
        ("llava", {"num_beams": 3}, "first"),
    ],
)
def test_every_way_to_generate_equals_eager(family, way, name):
    eager, model, prompt = pair(family)
    mmcompile.compile(model, fullgraph=True, **DENSE)
    settings = {"max_new_tokens": 4, "do_sample": False} | way
    expected = eager.generate(**prompt[name], **settings)
    assert torch.equal(model.generate(**prompt[name], **settings), expected)


def qwen():
    """A tiny Qwen2.5-VL to run eagerly, and its twin to compile."""
    eager = tiny_qwen2_5_vl(window_size=224)
    return eager, copy.deepcopy(eager)


def short_video(model, steps=2, text=9):
    return prompts(model, [[Text(text), video(steps, 4, 8), Text(text)]])


@torch.no_grad()
def test_prompt_lookup_equals_eager():
    eager, model = qwen()
    mmcompile.compile(model, **DENSE)
    settings = {"max_new_tokens": 6, "do_sample": False, "prompt_lookup_num_tokens": 3}
    inputs = short_video(model)
    assert torch.equal(model.generate(**inputs, **settings), eager.generate(**inputs, **settings))


@torch.no_grad()
@pytest.mark.parametrize("text", [9, 80])
def test_a_second_turn_and_a_step_on_the_same_cache_equal_eager(text):
    eager, model = qwen()
    mmcompile.compile(model, **DENSE)
    following = torch.randint(3, 400, (1, 11))
    logits = []
    for one in (model, eager):
        out = one(**short_video(one, text=text), use_cache=True)
        logits.append([out.logits])
        for tokens in (following, following[:, :7], following[:, :1]):
            logits[-1].append(one(input_ids=tokens, past_key_values=out.past_key_values).logits)
    for got, expected in zip(*logits, strict=True):
        torch.testing.assert_close(got, expected, **TOLERANCE)


@encoders_first
@torch.no_grad()
def test_any_number_of_images_and_videos_is_one_graph():
    eager, model = qwen()
    mmcompile.compile(model, fullgraph=True, **DENSE)
    for count in (1, 2, 3, 5):
        row = [Text(7)] + [part for index in range(count) for part in (video(2, 4, 4 + 4 * index), Text(3 + index))]
        inputs = prompts(eager, [row])
        assert_close(model(**inputs), eager(**inputs), inputs)
    assert len(graphs) == 2


@encoders_first
@torch.no_grad()
def test_encoders_run_once_a_prefill_and_never_in_a_decode_step():
    _, model = qwen()
    mmcompile.compile(model, **DENSE)
    runs = []
    model.model.visual.register_forward_hook(lambda *_: runs.append(torch.compiler.is_compiling()))
    out = model(**short_video(model), use_cache=True)
    for _ in range(3):
        out = model(input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values)
    assert runs == [False]


@encoders_first
@torch.no_grad()
def test_the_callers_inputs_stay_as_they_are():
    _, model = qwen()
    mmcompile.compile(model, **DENSE)
    inputs = short_video(model)
    names, outputs = set(inputs), {}
    model(**inputs)
    assert set(inputs) == names
    text = {name: value for name, value in inputs.items() if "pixel" not in name}
    outputs["video"] = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    given = outputs["video"]
    model(**text, mm_encoder_outputs=outputs)
    assert outputs["video"] is given


@encoders_first
@torch.no_grad()
@pytest.mark.parametrize("before", [False, True])
def test_features_that_do_not_fit_the_prompt_are_the_models_own_error(before, caplog):
    eager, model = qwen()
    mmcompile.compile(model, **DENSE)
    inputs = short_video(model)
    if before:  # the graph has no check in it
        model(**inputs)
    wrong = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.video_token_id, 7)
    wrong[:, -3] = model.config.video_token_id
    for one in (eager, model):
        with pytest.raises(ValueError, match="features and video tokens do not match"):
            one(**inputs | {"input_ids": wrong, "mm_token_type_ids": None})
    assert "differ in number" in caplog.text


def test_features_are_counted_as_the_model_counts_them_wherever_its_checks_stay():
    class Counts(nn.Module):
        def get_placeholder_mask(self, input_ids, inputs_embeds, features):
            return inputs_embeds + features.numel() // features.shape[-1]  # as Granite Docling does

    model, embeddings, features = Counts(), torch.zeros(3), torch.ones(5, 8)
    model.get_placeholder_mask = MethodType(get_placeholder_mask, model)
    run = torch.compile(lambda *inputs: model.get_placeholder_mask(None, *inputs), backend="count_graphs")
    assert run(embeddings, features).tolist() == [5, 5, 5]
    if without_checks():
        torch._dynamo.reset()
        with torch._dynamo.config.patch(without_checks()):
            assert run(embeddings, features).tolist() == [1, 1, 1]  # the same for features of any number


@encoders_first
@torch.no_grad()
def test_nothing_is_changed_outside_the_call():
    _, model = qwen()
    config = torch._dynamo.config
    before = config.recompile_limit, set(config.ignore_logging_functions)
    seen = []

    def look(*_):
        thread = threading.Thread(
            target=lambda: seen.append((config.recompile_limit, set(config.ignore_logging_functions)))
        )
        thread.start()
        thread.join()

    mmcompile.compile(model, **DENSE)
    model.model.visual.register_forward_hook(look)
    model(**short_video(model))
    assert seen == [before]
    assert (config.recompile_limit, set(config.ignore_logging_functions)) == before


@torch.no_grad()
def test_positional_arguments_mean_what_they_mean_to_the_model():
    eager, model = qwen()
    mmcompile.compile(model, **DENSE)
    inputs = short_video(model)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    torch.testing.assert_close(model(ids, mask, **inputs).logits, eager(ids, mask, **inputs).logits, **TOLERANCE)
    with pytest.raises(TypeError, match="multiple values"):
        model(ids, input_ids=ids)


class Scaled(nn.Module):
    """Causal attention of one head, and nothing that transformers knows."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x):
        x = x * self.scale
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


@torch.no_grad()
def test_compiling_again_replaces_the_options_and_alike_options_compile_nothing():
    model, x = Scaled(), torch.randn(1, 1, 600, 16)
    table = PatternTable.of([[HeadPattern("a_shape", 128, 128)]])
    for patterns, forms in ((HeadPattern("dense"), 1), (HeadPattern("a_shape", 1, 128), 2), (table, 2)):
        mmcompile.compile(model, patterns=patterns, min_tokens=0, inner="count_graphs")
        model(x)
        mmcompile.compile(model, patterns=patterns, min_tokens=0, inner="count_graphs")
        model(x)
        assert len(graphs) == forms or patterns is table
    mmcompile.compile(model, **DENSE)
    torch.testing.assert_close(model(x), Scaled()(x))
    assert [site.density for site in mmcompile.stats(model)] == [1.0]


def test_training_goes_through_with_dense_attention_and_eager_gradients():
    eager, model = qwen()
    mmcompile.compile(model.train(), **DENSE)
    inputs = short_video(model)
    for one in (eager.train(), model):
        one(**inputs, labels=inputs["input_ids"]).loss.backward()
    for got, expected in zip(model.parameters(), eager.parameters(), strict=True):
        if expected.grad is None:
            assert got.grad is None
        else:
            torch.testing.assert_close(got.grad, expected.grad, atol=1e-4, rtol=1e-3)
    assert mmcompile.stats(model) == []


@torch.no_grad()
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_the_plain_model_and_can_be_compiled_for_itself(how):
    eager, model = qwen()
    mmcompile.compile(model, **DENSE)
    inputs = short_video(model)
    model(**inputs)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert copied._compiled_call_impl is None
    copied.lm_head.weight.zero_()
    assert copied(**inputs).logits.abs().max() == 0
    assert mmcompile.stats(copied) == []
    mmcompile.compile(copied, **DENSE)
    assert copied(**inputs).logits.abs().max() == 0
    assert len(mmcompile.stats(copied)) == 2
    assert_close(model(**inputs), eager(**inputs), inputs)


@torch.no_grad()
def test_a_model_may_be_moved_or_cast_and_dynamo_reset_after_compiling():
    eager, model = qwen()
    mmcompile.compile(model, **DENSE)
    inputs = short_video(model)
    model(**inputs)
    model.to(torch.float64), eager.to(torch.float64)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].double()
    assert_close(model(**inputs), eager(**inputs), inputs)
    torch._dynamo.reset()
    assert_close(model(**inputs), eager(**inputs), inputs)


@torch.no_grad()
def test_two_models_in_two_threads():
    models = [FAMILIES[family].model() for family in ("llava", "internvl")]
    inputs = [
        vars(FAMILIES[family].prompts(model))["first"]
        for family, model in zip(("llava", "internvl"), models, strict=True)
    ]
    expected = [model(**one).logits for model, one in zip(models, inputs, strict=True)]
    got = [[], []]

    def run(index):
        with torch.no_grad():
            got[index] += [models[index](**inputs[index]).logits for _ in range(3)]

    for model in models:
        mmcompile.compile(model, **DENSE)
    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(got[index]) == 3
        for logits in got[index]:
            torch.testing.assert_close(logits, expected[index], **TOLERANCE)
        assert len(mmcompile.stats(models[index])) == 2


@torch.no_grad()
def test_explain_and_an_outer_torch_compile_trace_through_a_compiled_model():
    model, x = mmcompile.compile(Scaled(), **DENSE), torch.randn(1, 1, 600, 16)
    report = mmcompile.explain(model, x, options={"min_tokens": 0})
    assert [site.sparse for site in report.sites] == [True]
    assert report.graph_count == 1
    outer = torch.compile(lambda x: model(x) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(outer(x), Scaled()(x) + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fullgrap": True}, "unknown option 'fullgrap'; did you mean 'fullgraph'"),
        ({"densty": 0.5}, "unknown option 'densty'; did you mean 'density'"),
        ({"backend": "inductor"}, 'the backend is always "mminference"'),
        ({"options": {"density": 0.5}}, "keyword arguments of their own"),
        ({"mode": "fastest"}, "mode='fastest': must be one of .*max-autotune"),
        ({"mode": "max-autotune", "inner": "eager"}, 'only inner="inductor" has modes'),
        ({"density": 2}, r"density=2: must be a number in \(0, 1\]"),
    ],
)
def test_a_wrong_option_is_one_clear_error_at_once(options, message):
    model = Scaled()
    with pytest.raises(OptionError, match=message):
        mmcompile.compile(model, **options)
    assert model._compiled_call_impl is None


def test_what_is_no_module_is_one_clear_error():
    with pytest.raises(TypeError, match=r"model=function: must be a torch\.nn\.Module"):
        mmcompile.compile(lambda x: x)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_symbols_from_the_first_call_on(family):
    eager, model, inputs = pair(family)
    mmcompile.compile(model, dynamic=True, **DENSE)  # Dynamo makes a symbol of the scale of attention too
    for name in ("first", "longer"):
        assert_close(model(**inputs[name]), eager(**inputs[name]), inputs[name])
        assert len(mmcompile.stats(model)) == 2
    if encodes_first(model):
        assert len(graphs) == 1


@torch.no_grad()
def test_torchs_own_keywords_reach_torch():
    class Breaks(Scaled):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    x = torch.randn(1, 1, 600, 16)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        mmcompile.compile(Breaks(), fullgraph=True, **DENSE)(x)
    model = mmcompile.compile(Scaled(), dynamic=True, **DENSE)
    for length in (200, 300):
        model(torch.randn(1, 1, length, 16))
    assert len(graphs) == 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])  # gemma3's masks: sliding, and of blocks of one type
def test_a_static_cache_prefills_sparse_and_its_copy_generates(family):
    eager, model, inputs = pair(family)
    mmcompile.compile(model, **DENSE, strict=True)
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    expected = eager.generate(**inputs["padded"], **settings)
    assert torch.equal(model.generate(**inputs["padded"], **settings), expected)
    assert all(site.density == 1.0 for site in mmcompile.stats(model))
    assert len(mmcompile.stats(model)) == 2
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).generate(**inputs["padded"], **settings), expected)


@torch.no_grad()
def test_a_static_cache_that_a_prefill_allocates_keeps_its_addresses():
    _, model = qwen()
    mmcompile.compile(model, **DENSE)
    cache = StaticCache(config=model.config, max_cache_len=600)
    model(**short_video(model), past_key_values=cache)
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values, layer.cumulative_length):
            # What Dynamo reads, and Inductor's CUDA graphs need to write to an input in place.
            assert tensor._dynamo_static_input_type == "unguarded"


class Offloaded(DynamicCache):
    """A cache that works like one which is offloaded to the host, without the streams that need a device."""

    def __init__(self, config):
        super().__init__(config=config)
        self.offloading = self.only_non_sliding = True
        self.fetched, self.sent = [], []

    def prefetch(self, layer_idx, only_non_sliding=True):
        assert not torch.compiler.is_compiling()
        self.fetched.append(layer_idx % len(self.layers))

    def offload(self, layer_idx, only_non_sliding=True):
        self.sent.append(layer_idx)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if not self.offloading:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        assert not torch.compiler.is_compiling()
        self.offloading = False
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.offloading = True
        self.prefetch(layer_idx + 1)
        self.offload(layer_idx)
        return result


@torch.no_grad()
def test_an_offloaded_cache_prefills_sparse_and_keeps_its_streams_out_of_the_graphs():
    eager, model = qwen()
    mmcompile.compile(model, **DENSE)
    caches = [Offloaded(model.config), Offloaded(model.config)]
    text = {"input_ids": torch.randint(3, 400, (1, 150))}
    for step in (short_video(model), {"input_ids": torch.tensor([[7]])}, text):  # a prefill on a prefix in the end
        for cache in caches:
            cache.fetched.clear()
        expected, got = (one(**step, past_key_values=cache) for one, cache in zip((eager, model), caches, strict=True))
        torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
        assert caches[1].sent == caches[0].sent
        assert caches[1].fetched[-1] == caches[0].fetched[-1] == 0  # what the next call begins with
        if len(step["input_ids"][0]) > 1:
            assert len(mmcompile.stats(model)) == 2
    assert caches[1].offloading


@torch.no_grad()
def test_cuda_graphs_leave_out_all_of_a_prefill_and_what_returns_a_cache(monkeypatch, caplog):
    _, model = qwen()
    recorded = []

    def inductor(module, example_inputs, config_patches):
        recorded.append(config_patches["triton.cudagraphs"])
        return module.forward

    monkeypatch.setattr("mmcompile.backend.lookup_backend", lambda name: inductor)
    mmcompile.compile(model, mode="reduce-overhead", min_tokens=0)
    for cache, steps in ((None, False), (StaticCache(config=model.config, max_cache_len=600), True)):
        recorded.clear()
        with caplog.at_level("INFO", logger="mmcompile"):
            cache = model(**short_video(model), past_key_values=cache).past_key_values
            assert not any(recorded)
            assert "left out of CUDA graphs: it is part of a prefill" in caplog.text
            recorded.clear()
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        assert set(recorded) == {steps}
    assert "left out of CUDA graphs: it returns a cache that grows" in caplog.text


@torch.no_grad()
def test_stats_are_of_the_last_prefill_alone():
    _, model = qwen()
    mmcompile.compile(model, **DENSE)
    model(**short_video(model))
    assert len(mmcompile.stats(model)) == 2
    with torch.enable_grad():
        model(**short_video(model))  # where gradients are needed, attention stays dense
    assert mmcompile.stats(model) == []


@encoders_first
@torch.no_grad()
def test_a_direct_call_reads_the_same_grids_as_generate():
    from mmcompile.prefill_steps import boundary_tensors_of as read

    _, model, inputs = pair("llava")
    found = []

    def keep(config, inputs):
        found.append(read(config, inputs))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmcompile.prefill_steps.boundary_tensors_of", keep)
        # By its config an image might have another size than the tower gave it.
        model.config.vision_config.image_size = 28
        mmcompile.compile(model, **DENSE)
        model(**inputs["first"])
        model.generate(**inputs["first"], max_new_tokens=1)
    direct, generated = found
    for one, other in zip(direct, generated, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_types_of_fewer_tokens_than_the_prompt_are_one_clear_error():
    _, model, inputs = pair("llava")
    mmcompile.compile(model, **DENSE)
    with pytest.raises(BoundaryError, match=r"mm_token_type_ids: 9 tokens; must be at least \d+, as the prompt"):
        model(**inputs["first"], mm_token_type_ids=torch.zeros(1, 9, dtype=torch.int32))


@encoders_first
@torch.no_grad()
def test_a_video_whose_placeholders_are_image_tokens_is_compiled(caplog):
    eager, model, _ = pair("glm4v")
    mmcompile.compile(model, **DENSE)
    frame = [503, *[500] * 4, 504, 9]  # marks, four tokens of 4 x 4 patches, a time
    ids = torch.tensor([[5] * 130 + frame * 2 + [6] * 40])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.where(ids == 500, 2, 0).int(),
        "pixel_values_videos": torch.randn(2 * 4 * 4, 3 * 2 * 14 * 14),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    assert_close(model(**inputs), eager(**inputs), inputs)
    assert len(mmcompile.stats(model)) == 2
    assert not caplog.records
