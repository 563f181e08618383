"""`explain(model, tokens=...)`: what a prefill of another length takes, and what it takes for nothing."""

import pytest
import torch
from torch import nn

import mmcompile
from mmcompile.errors import MMCompileError
from mmcompile.options import Options
from mmcompile.report import trace_call
from mmcompile.tiny_qwen import tiny_qwen2_5_vl

MILLION = 2**20
KV_CACHE = 2 * 2 * 2 * 16 * 4 * MILLION / 1e9  # keys and values of two layers of two heads of 16 channels, float32


@pytest.fixture(scope="module")
def model():
    return tiny_qwen2_5_vl()


def prompt(length):
    return {"input_ids": torch.randint(0, 400, (1, length)), "attention_mask": torch.ones(1, length, dtype=torch.int64)}


def test_a_million_tokens_are_predicted_from_a_few(model):
    inputs = prompt(96)
    report = mmcompile.explain(model, tokens=MILLION, **inputs, logits_to_keep=1)
    memory = report.memory
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert memory.tokens == MILLION
    assert memory.weights == pytest.approx(weights / 1e9, rel=0.01)
    assert memory.kept == pytest.approx(KV_CACHE, rel=0.01)
    assert memory.peak > memory.weights + memory.kept + memory.workspace
    assert not memory.traps
    assert f"{MILLION} tokens: {memory.peak:.1f} GB" in str(report)
    assert report.to_dict()["memory"]["largest"][0]["gigabytes"] == memory.largest[0].gigabytes
    assert inputs["input_ids"].shape == (1, 96)
    assert not hasattr(inputs["input_ids"], "_dynamo_weak_dynamic_indices")


def test_logits_of_all_tokens_are_a_trap(model):
    memory = mmcompile.explain(model, tokens=MILLION, **prompt(96)).memory
    (trap,) = memory.traps
    assert "logits of all tokens take 2.1 GB: pass logits_to_keep=1" in trap


def test_a_mask_of_queries_and_keys_is_a_trap():
    class Opaque(nn.Module):
        def forward(self, inputs_embeds):
            x = inputs_embeds.unsqueeze(1)
            scores = torch.rand(x.shape[2], x.shape[2]).tril()
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=scores)

    report = mmcompile.explain(Opaque(), inputs_embeds=torch.randn(1, 64, 16), tokens=2**17)
    assert not report.sparse_count
    (trap,) = report.memory.traps
    assert "a float mask of queries x keys takes 68.7 GB" in trap
    assert "stays dense" in trap


def test_one_trace_tells_of_every_length_in_the_form_that_serves_it(model):
    options = Options(min_tokens=1024)
    traced = trace_call(model, (), prompt(96) | {"logits_to_keep": 1}, options, any_length=True)
    dense, sparse, million, two = (traced.memory(tokens, model) for tokens in (1023, 1024, MILLION, 2 * MILLION))
    assert dense.workspace == 0 < sparse.workspace
    assert two.kept == pytest.approx(2 * million.kept, rel=1e-3)
    assert 1.8 < (two.peak - two.weights) / (million.peak - million.weights) < 4.0


def test_a_length_needs_a_prompt():
    with pytest.raises(MMCompileError, match="input_ids or inputs_embeds"):
        mmcompile.explain(nn.Linear(2, 2), torch.randn(1, 2), tokens=64)


def test_what_data_alone_tells_is_no_prediction():
    class Nonzero(nn.Module):
        def forward(self, inputs_embeds):
            return inputs_embeds[inputs_embeds > 0]

    report = mmcompile.explain(Nonzero(), inputs_embeds=torch.randn(1, 64, 16), tokens=2**17)
    assert report.memory is None or report.memory.peak > 0
