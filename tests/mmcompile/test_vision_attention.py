"""Windows and frames of vision towers: one attention for all of them, equal to one for each."""

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import mmcompile
from mmcompile.encode_first import encodes_first
from mmcompile.huggingface import Text, prompts
from mmcompile.vision_attention import PACKED_ATTENTION, pack_vision_attention, packed_attention
from tests.models.families import FAMILIES
from tests.models.tiny import image, tiny_qwen2_5_vl, video


def one_by_one(query, key, value, lengths, scale):
    """[1, T, H, D], each window by itself."""
    groups = query.shape[1] // key.shape[1]
    pieces = zip(
        *(one.split(lengths, dim=2) for one in (query, key, value)),
        strict=True,
    )
    outputs = [
        F.scaled_dot_product_attention(q, *(x.repeat_interleave(groups, dim=1) for x in (k, v)), scale=scale)
        for q, k, v in pieces
        if q.shape[2] > 0
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def packed(lengths, heads=4, kv_heads=4, dim=16, device="cpu", dtype=torch.float32):
    tokens = sum(lengths)
    query = torch.randn(1, heads, tokens, dim, device=device, dtype=dtype)
    key, value = (torch.randn(1, kv_heads, tokens, dim, device=device, dtype=dtype) for _ in range(2))
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return query, key, value, starts


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(sum),
    st.sampled_from([4, 2, 1]),
    st.sampled_from([None, 0.3]),
    st.booleans(),
)
def test_one_call_equals_one_for_each_window(lengths, kv_heads, scale, told):
    query, key, value, starts = packed(lengths, kv_heads=kv_heads)
    got, weights = packed_attention(
        nn.Identity(),
        query,
        key,
        value,
        None,
        scaling=scale,
        cu_seq_lens_q=starts,
        cu_seq_lens_k=starts,
        max_length_q=max(lengths) if told else None,
        is_causal=False,
    )
    assert weights is None
    torch.testing.assert_close(got, one_by_one(query, key, value, lengths, scale), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[64] * 50, [64] * 50 + [20], [4] * 40 + [300]])
def test_nothing_of_tokens_times_tokens_is_made(lengths, monkeypatch):
    query, key, value, starts = packed(lengths)
    shapes, attention = [], F.scaled_dot_product_attention

    def keep(q, k, v, **settings):
        shapes.append((q.shape[0], q.shape[2]))
        return attention(q, k, v, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", keep)
    packed_attention(nn.Identity(), query, key, value, None, cu_seq_lens_q=starts, max_length_q=max(lengths))
    assert len(shapes) <= 2
    assert sum(count * length**2 for count, length in shapes) <= 2 * sum(length**2 for length in lengths)


@pytest.mark.parametrize("lengths", [[4, 4], [4, 3], [1, 1, 1, 30]])
def test_gradients_go_through_every_way(lengths):
    *operands, starts = packed(lengths)
    operands = [one.requires_grad_() for one in operands]
    got, _ = packed_attention(nn.Identity(), *operands, None, cu_seq_lens_q=starts)
    expected = one_by_one(*operands, lengths, None)
    for mine, theirs in zip(
        torch.autograd.grad(got.pow(2).sum(), operands),
        torch.autograd.grad(expected.pow(2).sum(), operands),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_windows_it_is_sdpa():
    query, key, value, _ = packed([9])
    got, _ = packed_attention(nn.Identity(), query, key, value, None, is_causal=False)
    torch.testing.assert_close(got, one_by_one(query, key, value, [9], None))


@torch.no_grad()
@pytest.mark.parametrize("window_size", [56, 112])
def test_the_tower_calls_one_attention_a_layer_and_equals_sdpa(window_size, monkeypatch):
    eager = tiny_qwen2_5_vl(window_size=window_size)
    model = copy.deepcopy(eager)
    pack_vision_attention(model)
    # Windows at the right and lower edges are smaller; the second image's frames are larger.
    inputs = prompts(eager, [[Text(5), video(2, 10, 14), Text(5), video(1, 4, 6), Text(3), image(12, 8), Text(5)]])
    calls, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    for modality, pixels in (("video", "pixel_values_videos"), ("image", "pixel_values")):
        features = []
        for one in (eager, model):
            calls.clear()
            encode = getattr(one.model, f"get_{modality}_features")
            features.append(torch.cat(encode(inputs[pixels], inputs[f"{modality}_grid_thw"]).pooler_output))
        assert len(calls) <= 3 * 2  # sizes of windows times layers
        torch.testing.assert_close(*features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "packs"),
    [("qwen2_5_vl", True), ("qwen3_vl", True), ("glm4v", True), ("llava", False), ("gemma3", False)],
)
def test_towers_that_pack_their_windows_are_found_by_their_code(family, packs):
    model = FAMILIES[family].model()
    pack_vision_attention(model)
    assert (model.config.vision_config._attn_implementation == PACKED_ATTENTION) == packs
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_another_attention_is_kept_and_sdpa_is_restored():
    model = tiny_qwen2_5_vl()
    vision = model.config.vision_config
    vision._attn_implementation = "eager"
    pack_vision_attention(model)
    assert vision._attn_implementation == "eager"
    vision._attn_implementation = "sdpa"
    mmcompile.compile(model, min_tokens=0, inner="eager")
    assert vision._attn_implementation == PACKED_ATTENTION
    assert PACKED_ATTENTION not in str(vision.to_dict())
    model.set_attn_implementation("sdpa")
    assert vision._attn_implementation == "sdpa"


@torch.no_grad()
def test_copies_and_pickles_keep_it_also_in_a_process_that_knows_nothing_of_it(tmp_path):
    model = mmcompile.compile(tiny_qwen2_5_vl(), min_tokens=0, inner="eager")
    inputs = prompts(model, [[Text(5), video(2, 4, 8), Text(5)]])
    arguments = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    expected = model.get_video_features(*arguments).pooler_output[0]
    torch.testing.assert_close(copy.deepcopy(model).get_video_features(*arguments).pooler_output[0], expected)
    torch.save((model, arguments, expected), tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "model, arguments, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():\n"
        "    torch.testing.assert_close(model.get_video_features(*arguments).pooler_output[0], expected)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "model.pt")], check=True)


@pytest.mark.skipif(not encodes_first(tiny_qwen2_5_vl()), reason="this transformers traces the tower with the rest")
@torch.no_grad()
def test_new_clip_lengths_compile_nothing_after_the_second():
    eager = tiny_qwen2_5_vl(window_size=56)
    model = copy.deepcopy(eager)
    mmcompile.compile(model, min_tokens=0, density=1.0, inner="eager")
    counters = torch._dynamo.utils.counters["stats"]
    graphs = []
    for steps in (2, 3, 4, 5):
        inputs = prompts(eager, [[Text(9), video(steps, 8, 12), Text(9)]])
        before = counters["unique_graphs"]
        torch.testing.assert_close(model(**inputs).logits, eager(**inputs).logits, atol=2e-5, rtol=0)
        graphs.append(counters["unique_graphs"] - before)
    assert graphs[2:] == [0, 0]


@torch.no_grad()
def test_a_tower_that_is_compiled_by_itself_equals_eager():
    eager = tiny_qwen2_5_vl(window_size=56)
    model = copy.deepcopy(eager)
    mmcompile.compile(model, min_tokens=0, density=1.0, inner="eager")
    model.model.visual.compile(backend="eager")
    for steps in (2, 3):
        inputs = prompts(eager, [[Text(9), video(steps, 8, 12), Text(9)]])
        torch.testing.assert_close(model(**inputs).logits, eager(**inputs).logits, atol=2e-5, rtol=0)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lengths", [[64] * 50, [64] * 50 + [20], [4] * 40 + [300]])
def test_the_gpus_kernel_equals_one_for_each_window(lengths, dtype):
    query, key, value, starts = packed(lengths, dim=80, device="cuda", dtype=dtype)
    got, _ = packed_attention(
        nn.Identity(), query, key, value, None, scaling=0.1, cu_seq_lens_q=starts, max_length_q=max(lengths)
    )
    expected = one_by_one(*(one.double() for one in (query, key, value)), lengths, 0.1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("batch", "arguments"), [(1, {"is_causal": True}), (2, {"is_causal": False})])
def test_what_packed_kernels_do_not_compute_goes_window_by_window(batch, arguments):
    lengths = [3, 0, 8, 5]
    query, key, value, starts = packed(lengths)
    query, key, value = (one.repeat(batch, 1, 1, 1) for one in (query, key, value))
    module = nn.Module()
    got, _ = packed_attention(module, query, key, value, None, cu_seq_lens_q=starts, **arguments)
    parts = zip(*(one.split([3, 8, 5], dim=2) for one in (query, key, value)), strict=True)
    expected = [F.scaled_dot_product_attention(q, k, v, **arguments) for q, k, v in parts]
    torch.testing.assert_close(got, torch.cat(expected, dim=2).transpose(1, 2))
