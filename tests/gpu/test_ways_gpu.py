"""The ways in as people run them on a GPU: CUDA graphs, offloaded caches, models that move, families in bfloat16."""

import copy
import logging
from itertools import product

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import mmcompile
from mmcompile.encode_first import encodes_first
from mmcompile.reference_runs import rollout
from tests.models.families import FAMILIES

pytestmark = pytest.mark.gpu

EVERY_TILE = {"density": 1.0, "min_tokens": 0}
STATIC = {"cache_implementation": "static"}


def put(inputs, device="cuda", dtype=torch.float32):
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}


def tokens(model, prompts, **options):
    """Greedy tokens of two lengths, each twice: the second time nothing is new."""
    count = {"max_new_tokens": 10, "min_new_tokens": 10}
    runs = [prompts.first, prompts.longer] * 2
    return [model.generate(**put(one), **count, do_sample=False, **options).tolist() for one in runs]


def family(name):
    """A model of the table in float32 on the GPU, and prompts for it on the CPU."""
    if FAMILIES[name].config["text_config"]["model_type"] not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")
    model = FAMILIES[name].model()
    if name in ("llava_onevision", "llava_next_video") and not encodes_first(model):
        pytest.skip("before transformers 5.18 the model itself fails on prompts with images or videos alone")
    prompts = FAMILIES[name].prompts(model)
    return model.cuda(), prompts


@pytest.fixture
def replays(monkeypatch):
    """How many CUDA graphs were run."""
    count = [0]
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph):
        count[0] += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return count


# In a static cache transformers compiles the decode steps itself, with CUDA graphs, unless it is told not to.
CACHES = {"dynamic": {}, "static": STATIC | {"disable_compile": True}, "static, by transformers": STATIC}


CASES = [(None, "llava", "static"), *product(["reduce-overhead"], ["llava", "qwen2_5_vl"], CACHES)]


@pytest.mark.parametrize(("mode", "name", "cache"), CASES)
def test_cuda_graphs_serve_decode_steps_and_leave_out_prefills(mode, name, cache, replays, caplog):
    model, prompts = family(name)
    expected = tokens(model, prompts, **CACHES[cache])
    replays[0] = 0
    by_the_user = torch._inductor.config.patch({"triton.cudagraphs": mode is None})
    with by_the_user, caplog.at_level(logging.INFO, logger="mmcompile"):
        mmcompile.compile(model, mode=mode, **EVERY_TILE)
        assert tokens(model, prompts, **CACHES[cache]) == expected
    assert "left out of CUDA graphs: it is part of a prefill" in caplog.text
    assert len(mmcompile.stats(model)) == 2
    assert cache == "dynamic" or replays[0] >= 4 * 7  # of nine steps each; one warms up, one is recorded


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_caches_offloaded_to_the_host(cache):
    model, prompts = family("llava")
    expected = tokens(model, prompts)
    mmcompile.compile(model, **EVERY_TILE)
    # transformers would compile steps on the static one itself, and torch crashes where it traces the streams.
    assert tokens(model, prompts, cache_implementation=cache, disable_compile=True) == expected
    assert len(mmcompile.stats(model)) == 2


@torch.no_grad()
def test_a_model_that_moves_after_compiling():
    model, prompts = family("llava")
    plain = copy.deepcopy(model)
    # Dynamo and our kernels are what moves; Inductor would spend most of the time on its code for the CPU.
    mmcompile.compile(model.cpu(), **EVERY_TILE, inner="aot_eager")
    for device in ("cpu", "cuda", "cpu", "cuda"):
        inputs = put(prompts.first, device)
        got, expected = model.to(device)(**inputs).logits, plain.to(device)(**inputs).logits
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert len(mmcompile.stats(model)) == 2


def error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_in_bfloat16_is_as_exact_as_eager(name):
    exact, prompts = family(name)
    model = copy.deepcopy(exact).bfloat16()
    eager = copy.deepcopy(model)
    inputs = put(prompts.first, dtype=torch.bfloat16)
    fed = rollout(exact, put(prompts.first)).argmax(-1)[:, :-1]
    expected = rollout(exact, put(prompts.first), fed)
    by_us = error(rollout(mmcompile.compile(model, **EVERY_TILE), inputs, fed), expected)
    allowed = by_eager = error(rollout(eager, inputs, fed), expected)
    assert mmcompile.stats(model) or not encodes_first(model)
    print(f"{name}: ours {by_us:.5f} eager {by_eager:.5f}")
    if by_us > 1.5 * allowed:
        eager.compile()
        allowed = error(rollout(eager, inputs, fed), expected)  # dense, by Inductor
        print(f"{name}: dense by Inductor {allowed:.5f}")
    assert by_us <= 1.5 * allowed
