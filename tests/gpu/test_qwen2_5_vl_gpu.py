"""A whole tiny Qwen2.5-VL in bfloat16 on the GPU: as near to float64 as the eager model is."""

import copy

import pytest
import torch

import mmcompile
from mmcompile import HeadPattern
from mmcompile.huggingface import Text, prompts
from tests.models.tiny import tiny_qwen2_5_vl, video

pytestmark = pytest.mark.gpu

# Every tile, in an order that is not the tokens' own.
DENSE = {"patterns": HeadPattern("dense", boundary="2d"), "min_tokens": 0}
DECODE_STEPS = 8


@pytest.fixture(scope="module")
def exact():
    return tiny_qwen2_5_vl(layers=2, hidden_size=256, heads=4, window_size=224).double().cuda()


@pytest.fixture
def eager(exact):
    return copy.deepcopy(exact).bfloat16()


def steps(model, inputs, tokens=None):
    """Logits of a prefill and of decode steps that are fed `tokens` (their own choice where None)."""
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    out = model(**inputs, use_cache=True)
    logits, cache, fed = [out.logits[0]], out.past_key_values, []
    for step in range(DECODE_STEPS):
        token = logits[-1][-1:].argmax(-1, keepdim=True) if tokens is None else tokens[step]
        fed.append(token)
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        logits.append(out.logits[0])
    return torch.cat(logits).double(), fed


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("way", ["torch.compile", "mmcompile.compile"])
def test_prefill_decode_and_a_longer_video_are_as_exact_as_eager(exact, eager, way):
    model = copy.deepcopy(eager)
    if way == "torch.compile":
        run = torch.compile(model, backend="mminference", options=DENSE)
    else:
        run = mmcompile.compile(model, **DENSE)
    for frames, text in ((8, 50), (20, 300)):
        inputs = prompts(exact, [[Text(text), video(frames, 8, 16), Text(text)]])
        expected, tokens = steps(exact, inputs)
        by_eager, _ = steps(eager, inputs, tokens)
        by_us, _ = steps(run, inputs, tokens)
        assert error(by_us, expected) <= 1.5 * error(by_eager, expected)
        assert [site.density >= 1.0 for site in mmcompile.stats(model)] == [True, True]


@torch.no_grad()
@pytest.mark.parametrize("pattern", [HeadPattern("a_shape", 128, 128, boundary="2d"), "auto"], ids=str)
def test_a_prefill_never_waits_for_the_device(eager, pattern):
    decoder = eager.model.language_model
    run = torch.compile(decoder, backend="mminference", options={"min_tokens": 0, "patterns": pattern})

    def arguments(tokens):
        index = torch.arange(tokens, device="cuda")
        positions = torch.stack([index // 64, index // 8 % 8, index % 8])[:, None]
        return {
            "inputs_embeds": torch.randn(1, tokens, 256, device="cuda", dtype=torch.bfloat16),
            "position_ids": positions,
            "use_cache": False,
        }

    for tokens in (512, 1024, 1536):
        run(**arguments(tokens))
    final = arguments(1280)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = run(**final).last_hidden_state
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()
    assert all(0 < site.density < 1.5 for site in mmcompile.stats(decoder))
