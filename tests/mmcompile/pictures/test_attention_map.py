"""Attention maps against pooled dense attention, in every order and under every mask, and what is drawn of them."""

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from mmcompile.drawing import DrawingError, save_drawing
from mmcompile.errors import OptionError
from mmcompile.kernels.attend import plan_attention
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.pictures.attention_map import attention_map
from mmcompile.pictures.draw_attention_map import draw_attention_map
from tests.mmcompile.pictures.seen import BATCH, HEADS, LENGTH, dense_weights, seen_attention

PATTERNS = {
    "raster": HeadPattern("a_shape", sink=128, local=100),
    "columns": HeadPattern("vertical_slash", vertical=30, slash=20),
    "own columns": HeadPattern("columns", columns=40, order="site"),
    "site": HeadPattern("grid", lines="vs"),
    "2d": HeadPattern("top_p", order="site", boundary="2d", mass=0.5),
    "q": HeadPattern("top_p", boundary="q", mass=0.5),
}


def plan(seen, pattern, density=None):
    return plan_attention(seen.query, seen.key, pattern, seen.boundaries, density=density, **seen.mask)


def pooled(matrix, cell, how):
    """[S, S] to numpy [ceil(S / cell), ceil(S / cell)]."""
    short = -len(matrix) % cell
    cells = pad(matrix, (0, short, 0, short)).unflatten(0, (-1, cell)).unflatten(2, (-1, cell))
    return how(cells, (1, 3)).numpy()


def check_panel(panel, weights, allowed, computed, cell, pool):
    weights = weights * allowed.sum(-1, keepdim=True)
    for part, of in ((panel.covered, weights * computed), (panel.missed, weights * ~computed)):
        expected = pooled(of, cell, torch.amax if pool == "max" else torch.sum)
        if pool == "mean":
            expected = expected / np.maximum(pooled(allowed, cell, torch.sum), 1)
        np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-6)
    assert np.array_equal(panel.computed, pooled(computed, cell, torch.sum))
    assert np.array_equal(panel.allowed, pooled(allowed, cell, torch.sum))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("mask", ["causal", "padding", "window", "segments", "spans"])
def test_a_map_is_dense_attention_pooled(name, mask):
    seen = seen_attention(mask)
    planned = plan(seen, PATTERNS[name])
    for batch, head, pool in ((0, 0, "max"), (BATCH - 1, HEADS - 1, "mean")):
        drawn = attention_map(seen, planned, head, batch, pool=pool, cells=100)
        weights, allowed, computed = dense_weights(seen, planned, head, batch)
        assert drawn.cell == 8
        check_panel(drawn.raster, weights, allowed, computed, drawn.cell, pool)
        row = planned.rows.of_head[head]
        queries = planned.arrangement.query_order[batch, planned.lists.query_row[batch, row]].long()
        keys = planned.arrangement.key_order[batch, planned.lists.key_row[batch, row]].long()
        in_order = (matrix[queries][:, keys] for matrix in (weights, allowed, computed))
        check_panel(drawn.ordered, *in_order, drawn.cell, pool)
        with_keys = allowed.any(-1)
        assert drawn.recall == pytest.approx(float((weights * computed).sum(-1)[with_keys].mean()), rel=1e-5)
        assert drawn.density == pytest.approx(float(planned.of_heads(planned.density)[batch, head]))
        assert drawn.reordered == (name not in ("raster", "columns"))


def test_with_every_tile_nothing_is_missed():
    seen = seen_attention()
    drawn = attention_map(seen, plan(seen, HeadPattern(), density=1.0), 0)
    assert drawn.recall == pytest.approx(1.0)
    assert not drawn.raster.missed.any()
    assert torch.equal(drawn.raster.computed, drawn.raster.allowed)


def test_boundaries_stand_where_segments_begin():
    seen = seen_attention()
    starts = seen.boundaries[0].tolist()[1:3]
    for batch in range(BATCH):
        drawn = attention_map(seen, plan(seen, PATTERNS["2d"]), 0, batch, cells=LENGTH)
        assert drawn.cell == 1
        assert drawn.raster.changes == (tuple(starts), tuple(starts))
        modality = drawn.raster.query_modality
        assert modality.unique_consecutive().tolist() == [0, 2, 0]
        text = int((modality == 0).sum())
        assert drawn.ordered.changes == ((text,), (text,))  # all text, then the video
        assert drawn.ordered.key_modality.unique_consecutive().tolist() == [0, 2]


def test_keys_that_no_boundary_tells_are_text():
    seen = seen_attention(batch=1)
    latest = seen.query[:, :, -300:]
    offsets, modality, grid = torch.tensor([0, 300]), torch.tensor([2]), torch.zeros(1, 3)
    values = vars(seen) | {"query": latest, "query_offset": LENGTH - 300}
    values["boundaries"] = (offsets.int(), modality.int(), grid.int())
    cached = type(seen)(**values)
    drawn = attention_map(cached, plan(cached, PATTERNS["raster"]), 0, cells=LENGTH)
    assert drawn.raster.covered.shape == (300, LENGTH)
    assert drawn.raster.changes == ((), (LENGTH - 300,))
    assert drawn.raster.key_modality.unique_consecutive().tolist() == [0, 2]


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return result


def test_no_tensor_is_as_large_as_queries_x_keys():
    length = 4096
    seen = seen_attention(length=length, batch=1, heads=1, kv_heads=1)
    planned = plan(seen, PATTERNS["site"])
    done = []
    with Largest() as largest:
        attention_map(seen, planned, 0, step=done.append)
    assert largest.elements <= 128 * length
    assert len(done) == 32 and done[-1] == "query tile 32 of 32"


def test_an_unknown_pool_is_named():
    seen = seen_attention()
    with pytest.raises(OptionError, match="pool='median': must be one of max, mean"):
        attention_map(seen, plan(seen, HeadPattern()), 0, pool="median")


def texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize(
    ("name", "titles"), [("raster", ["token order"]), ("2d", ["token order", "the head's own order"])]
)
def test_what_is_drawn(name, titles, tmp_path):
    seen = seen_attention()
    drawn = attention_map(seen, plan(seen, PATTERNS[name]), 0, cells=100)
    figure = draw_attention_map(drawn, "layer 3, head 0")
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == titles
    assert {"computed tiles and keys", "masked", "text", "video"} <= set(texts(figure))
    assert f"{drawn.recall:.1%} of the attention" in figure.get_suptitle()
    lines = {tuple(line.get_ydata()) for line in panels[0].lines} | {
        tuple(line.get_xdata()) for line in panels[0].lines
    }
    assert all((start, start) in lines for start in drawn.raster.changes[0])
    for ending in ("png", "svg", "pdf"):
        path = tmp_path / "deep" / f"map.{ending}"
        save_drawing(figure, path)
        assert path.stat().st_size > 1000


def test_colours_say_computed_missed_and_masked():
    seen = seen_attention(batch=1, heads=1, kv_heads=1)
    drawn = attention_map(seen, plan(seen, HeadPattern("a_shape", sink=128, local=1)), 0, cells=100)
    (image,) = draw_attention_map(drawn, "").axes[0].get_images()
    red, _, blue = image.get_array()[..., :3].transpose(2, 0, 1)
    covered, missed = drawn.raster.covered.numpy() > 5, drawn.raster.missed.numpy() > 5
    assert covered.any() and (blue - red)[covered & ~missed].min() > 0.1
    assert missed.any() and (red - blue)[missed & ~covered].min() > 0.1
    masked = drawn.raster.allowed.numpy() == 0
    assert np.ptp(red[masked]) == 0 and np.array_equal(red[masked], blue[masked])


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    seen = seen_attention()
    figure = draw_attention_map(attention_map(seen, plan(seen, HeadPattern()), 0), "")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "map.png", tmp_path / "map.doc"):
        with pytest.raises(DrawingError, match=f"{path.name}: cannot be written"):
            save_drawing(figure, path)
