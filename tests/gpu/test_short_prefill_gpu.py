"""Short prefills on the GPU: torch's dense attention alone, on the same compiled model that makes long ones sparse."""

import copy
from functools import partial

import pytest
import torch

import mmcompile
from mmcompile.backend import mminference
from tests.models.tiny import tiny_qwen2_5_vl

pytestmark = pytest.mark.gpu

MIN_TOKENS = 1000


def error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def arguments(tokens, padded, batch=2):
    index = torch.arange(tokens, device="cuda")
    mask = torch.ones(batch, tokens, dtype=torch.int64, device="cuda")
    mask[1:, :7] = 0
    return {
        "inputs_embeds": torch.randn(batch, tokens, 256, device="cuda", dtype=torch.bfloat16),
        "position_ids": torch.stack([index // 64, index // 8 % 8, index % 8])[:, None].expand(-1, batch, -1),
        "use_cache": False,
    } | ({"attention_mask": mask} if padded else {})


def launched(call):
    """Names of the ops and kernels that a call runs."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return [event.key for event in profile.key_averages()]


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_a_short_prefill_runs_none_of_our_ops_and_is_as_exact_as_eager(padded):
    exact = tiny_qwen2_5_vl(layers=2, hidden_size=256, heads=4).double().cuda().model.language_model
    eager = copy.deepcopy(exact).bfloat16()
    model = copy.deepcopy(eager)
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return mminference(module, inputs, options=options)

    # Inductor would spend most of the time on its code for what is not attention.
    options = {"min_tokens": MIN_TOKENS, "density": 1.0, "inner": "aot_eager"}

    run = torch.compile(model, backend=backend)
    for tokens in (1200, 1216, 512, 1408, 640, 1024):
        inputs = arguments(tokens, padded)
        real = inputs.get("attention_mask", torch.ones(2, tokens, device="cuda")).bool()
        names = launched(lambda inputs=inputs: run(**inputs))
        assert any("mminference::" in name for name in names) == (tokens >= MIN_TOKENS)
        expected = exact(**inputs | {"inputs_embeds": inputs["inputs_embeds"].double()}).last_hidden_state[real]
        by_us, by_eager = (error(one(**inputs).last_hidden_state[real], expected) for one in (run, eager))
        print(f"{tokens}: ours {by_us:.5f} eager {by_eager:.5f}")
        assert by_us <= 1.5 * by_eager
        assert {site.dense for site in mmcompile.stats(model)} == {"" if tokens >= MIN_TOKENS else "too short"}
    assert len(compiled) == 2  # one length, then all of them


@torch.no_grad()
@pytest.mark.parametrize("grouped", [False, True])
def test_the_kernel_of_a_short_prefill_is_the_one_that_torch_prefers_for_plain_causal_attention(grouped):
    def attend(query, key, value):
        index = torch.arange(query.shape[2], device="cuda")
        mask = None if grouped else (index <= index[:, None])[None, None]
        return torch.nn.functional.scaled_dot_product_attention(
            query * 1, key, value, mask, is_causal=grouped, enable_gqa=grouped
        )

    backend = partial(mminference, options={"min_tokens": 10**6})
    run = torch.compile(attend, backend=backend, dynamic=True)
    query = torch.randn(1, 2048, 28, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    key = query[:, :4] if grouped else query
    run(query, key, key)
    repeated = key.repeat_interleave(28 // key.shape[1], 1)
    plain = torch.nn.functional.scaled_dot_product_attention

    def attentions(call):
        return {name for name in launched(call) if "cudnn_gen" in name or "flash_fwd" in name or "fmha" in name}

    wanted = attentions(lambda: plain(query, repeated, repeated, is_causal=True))
    print(wanted)
    assert attentions(lambda: run(query, key, key)) == wanted
    torch.testing.assert_close(run(query, key, key), attend(query, key, key), atol=2e-2, rtol=2e-2)
