"""Scores of one layer's attention against brute force, and what the search's recording sees of a model."""

import math
from dataclasses import replace

import pytest
import torch

import mmcompile
from benchmarks.planted_heads import Head, Look, Plant, Segment, plant_heads, softmax_rows
from mmcompile import HeadPattern, ModalityBoundaries
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pattern_search.record import record
from mmcompile.pattern_search.score import LayerAttention
from mmcompile.tiny_qwen import tiny_qwen2_5_vl
from tests.kernels.planted_recall import computed_keys
from tests.models.families import FAMILIES

TEXT, VIDEO = 0, 2
SEGMENTS = (Segment(TEXT, 70), Segment(VIDEO, 640, (10, 8, 8)), Segment(TEXT, 90))
HEADS = (Head("site", (Look("site"),)), Head("columns", (Look("columns", 0.03),)))
PATTERNS = (
    HeadPattern("a_shape", 64, 128),
    HeadPattern("grid", lines="s"),
    HeadPattern("vertical_slash", vertical=40, slash=128),
    HeadPattern("top_p", mass=1.0, density=0.4, boundary="2d"),
    HeadPattern("grid", lines="s", boundary="q", pairs=((TEXT, -1, HeadPattern("grid", lines="v")),)),
)


def seen_of(planted):
    tensors = planted.query, planted.key, planted.value, tuple(planted.boundaries)
    return SeenAttention(*tensors, planted.plant.width**-0.5, None, 0, None, None, None, "")


@pytest.fixture(scope="module")
def planted():
    return plant_heads(Plant(SEGMENTS, HEADS, key_heads=1, stride=64, width=64, seed=3))


@pytest.fixture(scope="module")
def attention(planted):
    return LayerAttention(seen_of(planted))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_error_and_recall_are_those_of_attention_over_the_computed_keys(planted, attention, pattern):
    score, planned = attention.score(pattern).read(), attention.arrange(pattern).plan()
    rows = torch.arange(planted.plant.tokens)
    for head, weights in enumerate(softmax_rows(planted, rows)):
        value = planted.value[0, 0].double()
        held = weights * computed_keys(planned, head, rows)
        dense, sparse = weights @ value, held @ value / held.sum(-1, keepdim=True)
        assert score.recall[head] == pytest.approx(float(held.sum(-1).mean()), abs=2e-4)
        assert score.error[head] == pytest.approx(float((sparse - dense).norm() / dense.norm()), rel=1e-3)
        kind = planted.truth.modality
        for modality in (TEXT, VIDEO):
            of = kind == modality
            expected = float((sparse[of] - dense[of]).norm() / dense[of].norm())
            assert score.by_modality[head][modality] == pytest.approx(expected, rel=1e-3)
        assert math.isnan(score.by_modality[head][1])
    assert score.density == pytest.approx(planned.of_heads(planned.density)[0].tolist())


def test_every_tile_is_without_error(attention):
    score = attention.score(HeadPattern()).read()
    assert score.error == (0.0, 0.0)
    assert score.recall == pytest.approx((1.0, 1.0))
    assert score.density == (1.0, 1.0)


def test_a_head_without_values_is_right_whatever_it_computes(planted):
    silent = LayerAttention(replace(seen_of(planted), value=torch.zeros_like(planted.value)))
    assert silent.score(PATTERNS[0]).read().error == (0.0, 0.0)


def test_heads_may_differ_and_each_is_scored_as_if_it_were_alone(attention):
    together = attention.score(PATTERNS[:2]).read()
    alone = [attention.score(pattern).read() for pattern in PATTERNS[:2]]
    assert together.error == pytest.approx([alone[0].error[0], alone[1].error[1]], rel=1e-5)
    assert together.recall == pytest.approx([alone[0].recall[0], alone[1].recall[1]], rel=1e-5)


def test_comparing_a_few_heads_at_a_time_changes_nothing(attention, monkeypatch):
    whole = attention.score(PATTERNS[0]).read()
    monkeypatch.setattr("mmcompile.pattern_search.score._AT_ONCE", 1)
    assert attention.score(PATTERNS[0]).read().error == pytest.approx(whole.error, rel=1e-5)


def test_padded_and_windowed_prompts_have_errors_and_recalls(planted):
    valid = torch.ones(1, planted.plant.tokens, dtype=torch.bool)
    valid[:, :50] = False
    for seen in (replace(seen_of(planted), key_valid=valid), replace(seen_of(planted), window=200)):
        score = LayerAttention(seen).score(HeadPattern("a_shape", 64, 128)).read()
        assert all(0 < error < 1 for error in score.error)
        assert all(0 < recall <= 1 for recall in score.recall)


@pytest.fixture(scope="module")
def model():
    return tiny_qwen2_5_vl(layers=3)


@torch.no_grad()
def test_recording_sees_every_layer_in_order_and_changes_nothing(model):
    tokens = torch.arange(300)[None]
    expected = model(input_ids=tokens).logits[:, -1:]
    seen = []

    def visit(attention):
        seen.append(attention)
        return LayerAttention(attention).output

    kept = {}
    model.register_forward_hook(lambda *call: kept.update(logits=call[2].logits), always_call=True)
    records = record(model, {"input_ids": tokens}, visit)
    assert [one.module_path.split(".")[-2] for one in seen] == ["0", "1", "2"]
    assert [one.sparse for one in records] == [True] * 3
    assert {tuple(one.query.shape) for one in seen} == {(1, 4, 300, 16)}
    assert {tuple(one.key.shape) for one in seen} == {(1, 2, 300, 16)}
    torch.testing.assert_close(kept["logits"], expected, atol=1e-4, rtol=1e-4)
    assert model._compiled_call_impl is None


@torch.no_grad()
def test_recording_uses_bound_boundaries(model):
    boundaries = ModalityBoundaries(
        torch.tensor([0, 44, 300], dtype=torch.int32),
        torch.tensor([0, 2], dtype=torch.int32),
        torch.tensor([[0, 0, 0], [4, 8, 8]], dtype=torch.int32),
    )
    told = []

    def visit(attention):
        told.append(attention.boundaries[2].tolist())
        return LayerAttention(attention).output

    with mmcompile.bind(boundaries):
        record(model, {"input_ids": torch.arange(300)[None]}, visit)
    assert all(grid[1] == [4, 8, 8] for grid in told) and len(told) == 3


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(16, 3 * 16)

    def heads(self, x):
        return self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        return (
            torch.nn.functional.scaled_dot_product_attention(*self.heads(x), is_causal=True).transpose(1, 2).flatten(2)
        )


class Broken(torch.nn.Module):
    """Layers with a graph break between them: one compiled graph may serve them all, and no name in it tells which."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


@torch.no_grad()
def test_layers_apart_by_graph_breaks_are_seen_in_the_order_in_which_they_run():
    model, x = Broken(), torch.randn(1, 200, 16)
    queries = []

    def visit(attention):
        queries.append(attention.query)
        return LayerAttention(attention).output

    record(model, {"x": x}, visit)
    for layer, query in zip(model.layers, queries, strict=True):
        torch.testing.assert_close(query, layer.heads(x)[0])
        x = layer(x)


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "llava_next_video"])
def test_every_layer_of_a_family_is_seen_whatever_its_mask(name):
    family = FAMILIES[name]
    model = family.model()
    architecture, seen = mmcompile.Architecture.of(model), []

    def visit(attention):
        layer = LayerAttention(attention)
        seen.append((attention.query.shape[1], attention.key.shape[1], attention.query.shape[3]))
        assert layer.score(HeadPattern()).read().error == (0.0,) * architecture.heads
        return layer.output

    record(model, family.prompts(model).first, visit)
    assert seen == [(architecture.heads, architecture.kv_heads, architecture.head_dim)] * architecture.layers
