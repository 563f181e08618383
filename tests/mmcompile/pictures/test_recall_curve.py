"""Recall curves: their points are true shares of the attention, and they tell patterns apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.planted_heads import VIDEO, Head, Look, Plant, Segment, plant_heads
from mmcompile.kernels.attend import plan_attention
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pictures.recall_curve import (
    RecallPoint,
    draw_recall_curves,
    recall_curves,
    spread_queries,
    swept_patterns,
)
from tests.mmcompile.pictures.seen import LENGTH, dense_weights, seen_attention


@pytest.mark.parametrize("mask", ["causal", "padding", "window", "spans"])
def test_points_are_true_shares_of_the_attention(mask):
    seen = seen_attention(mask)
    pattern = HeadPattern("a_shape", local=LENGTH)
    points = recall_curves(seen, [1, 3], {"a_shape": pattern}, [0.5, 0.9], queries=LENGTH)["a_shape"]
    for point in points:
        planned = plan_attention(seen.query, seen.key, pattern, seen.boundaries, density=point.cap, **seen.mask)
        shares = []
        for head in (1, 3):
            weights, allowed, computed = dense_weights(seen, planned, head, 0)
            shares.append((weights * computed).sum(-1)[allowed.any(-1)].mean())
        assert point.recall == pytest.approx(float(sum(shares)) / 2, rel=1e-5)
        assert point.density == pytest.approx(float(planned.density[0, 0]))


def test_more_tiles_never_hold_less():
    seen = seen_attention(length=1500, batch=1)
    steps = []
    curves = recall_curves(seen, range(4), swept_patterns(1500), step=steps.append)
    assert steps == list(swept_patterns(1500))
    for name in ("top_p", "a_shape"):
        recalls = [point.recall for point in curves[name]]
        assert recalls == sorted(recalls)
        assert all(0 < recall <= 1 for recall in recalls)


def test_a_head_that_looks_at_its_own_site_is_a_grid():
    video = Segment(VIDEO, 4096, (16, 16, 16))
    planted = plant_heads(Plant((video,), (Head("grid", (Look("site"),)),), 1, 256, width=64))
    seen = SeenAttention(
        planted.query, planted.key, planted.value, tuple(planted.boundaries), 64**-0.5, None, 0, None, None, None, ""
    )
    patterns = {name: swept_patterns(4096)[name] for name in ("auto", "grid", "a_shape")}
    curves = recall_curves(seen, [0], patterns, [0.2], queries=64)
    assert curves["auto"][0].recall > 0.9 and curves["grid"][0].recall > 0.9
    assert curves["a_shape"][0].recall < 0.5


@given(st.integers(1, 5000), st.integers(1, 300))
def test_queries_are_spread_over_all_of_them(length, count):
    queries = spread_queries(length, count)
    assert len(queries) == min(length, count)
    assert queries[0] >= 0 and queries[-1] < length
    assert bool((queries.diff() > 0).all())
    assert int(queries.diff().max() if len(queries) > 1 else 0) < 2 * -(-length // count) + 1
    assert torch.equal(queries, spread_queries(length, count))


def test_what_is_drawn():
    curves = {
        "grid": [RecallPoint(0.01, 0.05, 0.2), RecallPoint(0.02, 0.05, 0.2), RecallPoint(0.1, 0.1, 0.9)],
        "auto": [RecallPoint(0.1, 0.1, 0.95)],
    }
    figure = draw_recall_curves(curves, "layer 3", own=(0.08, 0.9))
    (axis,) = figure.axes
    assert [len(line.get_xdata()) for line in axis.lines] == [2, 1]  # the same plan once
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["grid", "auto", "the head's own"]
    assert axis.collections[0].get_offsets().tolist() == [[0.08, 0.9]]
    figure.canvas.draw()
    assert [label.get_text() for label in axis.get_xticklabels()] == ["5%", "10%"]
