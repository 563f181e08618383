"""The predicted memory of a prefill against what a GPU's allocator counts."""

import pytest
import torch

from mmcompile.bench.decoders import decoder_config, make_decoder
from mmcompile.bench.head_patterns import patterns_of
from mmcompile.bench.prefill_calls import attention_of, our_call, prompt
from mmcompile.options import Options
from mmcompile.report import trace_call

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("patterns", ["paper", "auto"])
@torch.no_grad()
def test_it_is_within_a_tenth_of_what_is_allocated(patterns):
    decoder = make_decoder(decoder_config("qwen2.5-vl-7b"), 2, "cuda")
    options = {"patterns": patterns_of(patterns, decoder.config), "min_tokens": 0}
    inputs = prompt(decoder, 2048, "cuda") | {"use_cache": True}
    with attention_of(decoder, "sdpa"):
        traced = trace_call(decoder, (), inputs, Options.parse(options), any_length=True)
    call = our_call(decoder, options, "cuda")
    for tokens in (16384, 65536, 131072):
        call.compile_now(prompt(decoder, tokens, "cuda"))
        call.begin(prompt(decoder, tokens, "cuda"))
        call()
        predicted = traced.memory(tokens, decoder).peak
        assert predicted * 1e9 == pytest.approx(call.peak, rel=0.1), tokens
