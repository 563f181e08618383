"""The map of layers x heads: every head's pattern and figures in its place."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex

from mmcompile.kernels.patterns import KINDS, HeadPattern
from mmcompile.pictures import palette
from mmcompile.pictures.head_map import draw_head_map, letters

LAYERS = (
    (HeadPattern(), HeadPattern("a_shape"), HeadPattern("grid")),
    (HeadPattern("top_p", order="auto"), HeadPattern("top_p", order="site", boundary="2d"), HeadPattern("a_shape")),
)


def test_every_kind_has_a_colour_of_its_own():
    assert palette.KINDS.keys() == set(KINDS)
    assert len(set(palette.KINDS.values())) == len(KINDS)


@pytest.mark.parametrize(
    ("pattern", "written"),
    [
        (HeadPattern("a_shape"), ""),
        (HeadPattern("grid"), "s"),
        (HeadPattern("top_p", order="auto"), "a"),
        (HeadPattern("top_p", order="column", boundary="q"), "cq"),
        (HeadPattern("vertical_slash", order="site", boundary="2d"), "s2"),
        (HeadPattern("vertical_slash", boundary="k"), ""),
    ],
)
def test_letters_say_the_order(pattern, written):
    assert letters(pattern) == written


def test_each_head_has_its_colour_letters_and_figures():
    density = [[1.0, 0.1, math.nan], [0.2, 0.05, 0.0]]
    figure = draw_head_map(LAYERS, {"density": density}, "two layers")
    patterns, densities = figure.axes[:2]
    shown = patterns.get_images()[0].get_array()
    assert [[to_hex(cell) for cell in row] for row in shown] == [
        [palette.KINDS[pattern.kind] for pattern in heads] for heads in LAYERS
    ]
    written = {text.get_position(): text.get_text() for text in patterns.texts if text.get_text()}
    assert written == {(2, 0): "s", (0, 1): "a", (1, 1): "s2"}
    values = densities.get_images()[0].get_array()
    np.testing.assert_array_equal(values.mask, [[False, False, True], [False, False, False]])
    assert values.compressed().tolist() == [1.0, 0.1, 0.2, 0.05, 0.05]  # 0 as the least of the others
    (legend,) = figure.legends
    told = [text.get_text() for text in legend.get_texts()]
    assert told[:4] == ["dense", "a_shape", "grid", "top_p"]
    assert set(told[4:]) == {"by site", "raster or site", "queries and keys by modality"}


@pytest.mark.parametrize(("value", "says"), [(math.nan, "not known"), (0.0, "0 everywhere")])
def test_figures_without_a_scale(value, says):
    figure = draw_head_map(LAYERS, {"error": [[value] * 3] * 2}, "")
    assert [text.get_text() for text in figure.axes[1].texts] == [says]


def test_a_large_model_is_drawn_without_letters():
    figure = draw_head_map([[HeadPattern("grid")] * 64] * 80, {}, "")
    assert not figure.axes[0].texts
    assert len(figure.axes[0].get_xticks()) <= 20
