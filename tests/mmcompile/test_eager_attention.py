"""`attn_implementation="mminference"`: sparse prefills in eager mode, and transformers' own attention elsewhere."""

import copy
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import masking_utils

import mmcompile
from mmcompile import HeadPattern, ModalityBoundaries, PatternTable, eager_attention
from mmcompile.errors import BoundaryError, OptionError
from tests.models.families import FAMILIES

TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def sparse_calls(monkeypatch):
    """The arguments of every attention that ran sparse."""
    calls, attention = [], eager_attention.plan_attention

    def keep(query, *args, **kwargs):
        calls.append({"length": query.shape[2], "boundaries": args[2], **kwargs})
        return attention(query, *args, **kwargs)

    monkeypatch.setattr(eager_attention, "plan_attention", keep)
    eager_attention._say_once.cache_clear()
    return calls


def pair(family, **options):
    """A model with "sdpa", its twin with "mminference", and their prompts by name."""
    model = FAMILIES[family].model()
    mmcompile.register_attention(**{"min_tokens": 0, "density": 1.0} | options)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("mminference")
    return model, twin, vars(FAMILIES[family].prompts(model))


def decode(model, inputs, steps=3):
    """Logits of a prefill and of greedy steps on its cache."""
    out = model(**inputs, use_cache=True)
    logits = [out.logits]
    for _ in range(steps):
        out = model(input_ids=logits[-1][:, -1:].argmax(-1), past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(("family", "sparse"), [("qwen2_5_vl", 2), ("llava", 2), ("gemma3", 0), ("mistral3", 2)])
def test_every_tile_equals_sdpa_and_decode_steps_and_towers_are_sdpa(family, sparse, sparse_calls):
    model, twin, prompt = pair(family)
    torch.testing.assert_close(decode(twin, prompt["first"]), decode(model, prompt["first"]), **TOLERANCE)
    assert len(sparse_calls) == sparse  # one a layer of the decoder; Gemma 3's images see themselves both ways
    real = prompt["padded"]["attention_mask"].bool()
    got, expected = (one(**prompt["padded"]).logits[real] for one in (twin, model))
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert len(sparse_calls) == 2 * sparse
    assert all(call["key_valid"] is not None for call in sparse_calls[sparse:])


@torch.no_grad()
def test_sliding_windows_are_read(sparse_calls):
    model, twin, _ = pair("gemma3")
    text = {"input_ids": torch.randint(3, 400, (2, 70)), "attention_mask": torch.ones(2, 70, dtype=torch.long)}
    text["attention_mask"][1, :9] = 0
    real = text["attention_mask"].bool()
    torch.testing.assert_close(twin(**text).logits[real], model(**text).logits[real], **TOLERANCE)
    assert [call["window"] for call in sparse_calls] == [16, None]


@torch.no_grad()
def test_generate_and_a_second_turn_equal_sdpa(sparse_calls):
    model, twin, prompt = pair("llava")
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(twin.generate(**prompt["padded"], **settings), model.generate(**prompt["padded"], **settings))
    following, logits = torch.randint(3, 400, (1, 11)), []
    for one in (twin, model):
        cache = one(**prompt["first"], use_cache=True).past_key_values
        logits.append(one(input_ids=following, past_key_values=cache).logits)
    torch.testing.assert_close(*logits, **TOLERANCE)
    assert sparse_calls[-1]["query_offset"] == prompt["first"]["input_ids"].shape[1]


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_a_static_cache_whose_masks_are_made_beforehand_equals_sdpa(family):
    model, twin, _ = pair(family)
    text = {"input_ids": torch.randint(3, 400, (1, 40))}
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    assert torch.equal(twin.generate(**text, **settings), model.generate(**text, **settings))


@torch.no_grad()
def test_options_belong_to_the_name(sparse_calls):
    model, twin, prompt = pair("llava", min_tokens=10**6)
    torch.testing.assert_close(twin(**prompt["first"]).logits, model(**prompt["first"]).logits, atol=0, rtol=0)
    assert not sparse_calls
    narrow = HeadPattern("a_shape", 1, 16)
    mmcompile.register_attention("narrow", min_tokens=0, patterns=PatternTable.of([[narrow] * 4] * 2))
    twin.set_attn_implementation("narrow")
    long = {"input_ids": torch.randint(3, 400, (1, 600))}
    assert not torch.allclose(twin(**long).logits, model(**long).logits, atol=1e-3)
    assert len(sparse_calls) == 2


@torch.no_grad()
def test_bound_boundaries_reach_the_plan(sparse_calls):
    _, twin, _ = pair("llava")
    text = {"input_ids": torch.randint(3, 400, (1, 60))}
    with mmcompile.bind(ModalityBoundaries(torch.tensor([0, 20, 60]).int(), torch.tensor([0, 2]).int())):
        twin(**text)
    twin(**text)
    assert [call["boundaries"][1].tolist() for call in sparse_calls[::2]] == [[0, 2, 0], [0, 0]]
    with (
        mmcompile.bind(ModalityBoundaries(torch.tensor([0, 59]).int(), torch.tensor([0]).int())),
        pytest.raises(BoundaryError, match="the last is 59"),
    ):
        twin(**text)


@torch.no_grad()
def test_stats_are_of_the_last_prefill_and_say_what_ran_dense():
    _, twin, prompt = pair("llava", density=None, patterns=HeadPattern("a_shape", 128, 128), min_tokens=500)
    twin(input_ids=torch.randint(3, 400, (1, 600)))
    found = mmcompile.stats(twin)
    assert [site.layer for site in found] == [0, 1]
    assert all(0 < site.density < 1 and site.dense == "" and len(site.heads) == 4 for site in found)
    decode(twin, prompt["first"])
    assert [(site.density, site.dense) for site in mmcompile.stats(twin)] == [(1.0, "too short")] * 2


def test_training_is_sdpa_with_its_gradients_and_says_so_once(sparse_calls, caplog):
    model, twin, prompt = pair("llava")
    with caplog.at_level(logging.WARNING, logger="mmcompile"):
        for one in (model, twin):
            one(**prompt["first"], labels=prompt["first"]["input_ids"]).loss.backward()
    for got, expected in zip(twin.parameters(), model.parameters(), strict=True):
        assert (got.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad)
    assert not sparse_calls
    assert caplog.text.count("gradients are needed") == 1


@torch.no_grad()
def test_what_is_more_than_causal_is_sdpa_and_said_once(sparse_calls, caplog):
    model, twin, prompt = pair("gemma3")
    with caplog.at_level(logging.WARNING, logger="mmcompile"):
        torch.testing.assert_close(twin(**prompt["first"]).logits, model(**prompt["first"]).logits, **TOLERANCE)
    assert "stays dense: the mask holds or_masks" in caplog.text
    assert not sparse_calls
    assert [(site.layer, site.density) for site in mmcompile.stats(twin)] == [(0, 1.0), (1, 1.0)]
    assert {site.dense for site in mmcompile.stats(twin)} == {"its mask is more than causal, window and padding"}
    static = {"cache_implementation": "static", "max_new_tokens": 3, "do_sample": False}
    llava, sparse, _ = pair("llava")
    with caplog.at_level(logging.WARNING, logger="mmcompile"):
        for length in (40, 50):
            text = {"input_ids": torch.randint(3, 400, (1, length))}
            assert torch.equal(sparse.generate(**text, **static), llava.generate(**text, **static))
    assert caplog.text.count("a static cache") == 1


@torch.no_grad()
def test_under_compile_it_is_sdpa_that_the_backend_rewrites(sparse_calls):
    model, twin, prompt = pair("llava")
    mmcompile.compile(twin, min_tokens=0, density=1.0, inner="eager")
    torch.testing.assert_close(twin(**prompt["first"]).logits, model(**prompt["first"]).logits, atol=2e-5, rtol=0)
    assert len(mmcompile.stats(twin)) == 2
    assert not sparse_calls


windows = st.one_of(st.none(), st.integers(1, 9))


@given(st.integers(2, 9), st.integers(0, 6), windows, st.booleans(), st.booleans(), st.integers(0, 3))
def test_what_is_read_is_the_mask_that_transformers_builds(queries, prefix, window, padded, inside, first):
    causal = masking_utils.causal_mask_function
    function = causal if window is None else masking_utils.sliding_window_causal_mask_function(window)
    keys = prefix + queries
    padding = torch.rand(2, first + keys) < 0.7
    if inside:
        function = masking_utils.and_masks(function, masking_utils.padding_mask_function(padding))
    arguments = {
        "batch_size": 2,
        "q_length": queries,
        "kv_length": keys,
        "q_offset": first + prefix,
        "kv_offset": first,
        "mask_function": function,
        "attention_mask": padding if padded else None,
        "allow_is_causal_skip": False,
    }
    built = masking_utils.sdpa_mask(**arguments)
    mask = eager_attention._read(arguments, lambda: built)
    query, key = torch.arange(queries)[:, None] + mask.offset, torch.arange(keys)
    allowed = (key <= query) if mask.window is None else (key <= query) & (key > query - mask.window)
    allowed = (
        allowed[None, None] & (torch.ones(2, keys) > 0 if mask.key_valid is None else mask.key_valid)[:, None, None]
    )
    assert torch.equal(allowed, built.expand_as(allowed))
    assert mask.built() is built


@pytest.mark.parametrize(
    "function",
    [
        masking_utils.bidirectional_mask_function,
        masking_utils.sliding_window_overlay(4),
        masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.sliding_window_overlay(4)),
        masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)),
        lambda batch, head, query, key: key <= query,
    ],
)
def test_other_masks_are_not_read(function):
    arguments = {"q_length": 8, "kv_length": 8, "mask_function": function}
    with pytest.raises(eager_attention._Unread):
        eager_attention._read(arguments, lambda: None)


def test_wrong_names_and_options_are_one_clear_error():
    for name in ("", "sdpa", "my_flash", "paged|mine"):
        with pytest.raises(ValueError, match="gives it a meaning of its own"):
            mmcompile.register_attention(name)
    with pytest.raises(OptionError, match="did you mean 'density'"):
        mmcompile.register_attention(densty=0.1)
    with pytest.raises(OptionError, match="strict=True: an attention has the options patterns"):
        mmcompile.register_attention(strict=True)
