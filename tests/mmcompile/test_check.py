"""The option `check`: true errors and recalls in `stats`, warnings of heads over the bound, nothing when it is off."""

import warnings

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import mmcompile
from mmcompile import CheckWarning, HeadPattern
from mmcompile.passes.graph import op_count, placeholders
from mmcompile.passes.pipeline import run_passes
from tests.mmcompile.test_backend import TINY_TEXT, Decoder, compiled, tokens
from tests.passes.test_find_attention import capture

NARROW = HeadPattern("a_shape", sink=128, local=128)
COMPARE = torch.ops.mminference.compare_with_dense.default


def heads(model):
    return [head for site in mmcompile.stats(model) for head in site.heads]


def test_without_it_the_graph_has_nothing_of_it():
    model, x = Decoder(), tokens(300)
    plain, checked = (run_passes(capture(model, x), NARROW, check=check).module for check in (None, 0.5))
    assert op_count(plain, COMPARE) == 0 and op_count(checked, COMPARE) == 2
    assert len(placeholders(checked.graph)) == len(placeholders(plain.graph)) + 1


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("boundary", ["none", "q", "2d"])
def test_every_tile_has_no_error_and_a_narrow_pattern_has_its_own(inner, boundary):
    model, x = Decoder(layers=1), tokens(600, batch=2)
    dense = model(x) - x
    compiled(model, density=1.0, check=1.0, inner=inner)(x)
    for head in heads(model):
        assert head.error < 1e-5 and abs(head.true_recall - 1) < 1e-5
    torch._dynamo.reset()
    narrow = HeadPattern("a_shape", sink=1, local=1, boundary=boundary)
    out = compiled(model, patterns=narrow, check=1.0, inner=inner)(x) - x
    for got, true, head in zip(*(y.unflatten(2, (4, -1)).unbind(2) for y in (out, dense)), heads(model), strict=True):
        assert head.error == pytest.approx(float((got - true).norm() / true.norm()), rel=1e-3)
        assert 0.1 < head.true_recall < 0.99
    (site,) = mmcompile.stats(model)
    mean = sum(head.true_recall for head in site.heads) / 4
    assert site.to_dict()["true_recall"] == site.true_recall == pytest.approx(mean)


@torch.no_grad()
def test_other_tiles_are_drawn_each_time_and_nothing_recompiles():
    model = Decoder(layers=1)
    run = compiled(model, patterns=NARROW, check=0.05)
    found, frames = set(), []
    for length in (640, 900, 900, 900, 1300):
        run(tokens(length))
        found.add(tuple(head.error for head in heads(model)))
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    assert len(found) == 5
    assert any(None in errors for errors in found)  # a twentieth of the tiles is not one of every head
    assert frames[2:] == frames[2:3] * 3
    assert mmcompile.stats(model)[0].error is not None


@torch.no_grad()
def test_a_bound_warns_of_layers_and_heads_with_the_next_call():
    model, x = Decoder(), tokens(700)
    run = compiled(model, patterns=NARROW, check=1.0, check_bound=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(x)  # waits for nothing, and so knows nothing yet
    with pytest.warns(CheckWarning, match=r"check_bound=0.001 in 8 heads .*layer [01] head [0-3] \(0\.\d+\), layer"):
        run(x)
    with pytest.warns(CheckWarning):
        mmcompile.stats(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mmcompile.stats(model)  # said once
        compiled(model, density=1.0, check=1.0, check_bound=1e-3)(x)
        mmcompile.stats(model)


@torch.no_grad()
def test_generate_warns_at_a_decode_step():
    model = Qwen2ForCausalLM(Qwen2Config(**TINY_TEXT)).eval()
    mmcompile.compile(model, patterns=NARROW, min_tokens=0, inner="eager", check=1.0, check_bound=1e-6)
    with pytest.warns(CheckWarning, match="layer 0 head 0") as told:
        model.generate(torch.randint(3, 64, (1, 600)), max_new_tokens=3, do_sample=False)
    assert len([one for one in told if one.category is CheckWarning]) == 1


@torch.no_grad()
def test_padded_prompts_are_checked_where_they_have_keys():
    model = Qwen2ForCausalLM(Qwen2Config(**TINY_TEXT)).eval()
    mmcompile.compile(model, density=1.0, min_tokens=0, inner="eager", check=1.0)
    mask = torch.ones(2, 400, dtype=torch.int64)
    mask[0, :300] = 0
    model(torch.randint(3, 64, (2, 400)), attention_mask=mask)
    for head in heads(model):
        assert head.error < 1e-5 and abs(head.true_recall - 1) < 1e-5


@torch.no_grad()
def test_registered_attention_checks_too():
    mmcompile.register_attention("mminference_checked", patterns=NARROW, min_tokens=0, check=1.0, check_bound=1e-6)
    model = Qwen2ForCausalLM(Qwen2Config(**TINY_TEXT, attn_implementation="mminference_checked")).eval()
    with pytest.warns(CheckWarning, match="layer 0 head 0"):
        model(torch.randint(3, 64, (1, 600)))
        stats = mmcompile.stats(model)
    assert len(stats) == 2
    assert all(head.error > 0 and 0.1 < head.true_recall < 1 for site in stats for head in site.heads)
