"""Which graphs of a model are left out of CUDA graphs: sparse prefills, and what returns a cache that grows."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM, StaticCache

from mmcompile.kernels.patterns import HeadPattern
from mmcompile.passes.cuda_graphs import why_no_cuda_graph
from mmcompile.passes.pipeline import run_passes

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
WINDOW = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention"]}


def qwen():
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()


def gemma():
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **WINDOW)).eval()


def reasons(model, cache, lengths, patterns=None):
    """Of each graph that the calls compile, why it is left out of CUDA graphs."""
    found = []

    def backend(module, example_inputs):
        found.append(why_no_cuda_graph(run_passes(module, patterns or HeadPattern())))
        return module.forward

    run = torch.compile(model, backend=backend)
    with torch.no_grad():
        for length in lengths:
            run(input_ids=torch.ones(1, length, dtype=torch.int64), past_key_values=cache, use_cache=cache is not None)
    return found


@pytest.mark.parametrize("make", [qwen, gemma])
def test_steps_on_a_cache_that_grows_are_left_out_and_so_are_sparse_prefills(make):
    prefill, *steps = reasons(model := make(), DynamicCache(config=model.config), [20, 1, 1, 1])
    assert "sparse" in prefill
    assert steps
    assert all("cache that grows" in step for step in steps)


def test_a_short_prefill_that_returns_its_cache_is_left_out():
    model = qwen()
    found = []

    def backend(module, example_inputs):
        rewritten = run_passes(module, HeadPattern(), min_tokens=500)
        assert not rewritten.sparse
        found.append(why_no_cuda_graph(rewritten))
        return module.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(input_ids=torch.ones(1, 20, dtype=torch.int64), use_cache=True)
    assert "cache that grows" in found[0]


def test_steps_on_a_static_cache_are_recorded():
    model = qwen()
    prefill, *steps = reasons(model, StaticCache(config=model.config, max_cache_len=40), [20, 1, 1, 1])
    assert "sparse" in prefill
    assert steps == [None]


def test_what_keeps_no_keys_is_recorded():
    assert reasons(qwen(), None, [1]) == [None]
    tower = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True).eval()
    found = []

    def backend(module, example_inputs):
        found.append(why_no_cuda_graph(run_passes(module, HeadPattern())))
        return module.forward

    torch.compile(tower, backend=backend)(torch.randn(1, 9, 16, requires_grad=True))
    assert found == [None]
