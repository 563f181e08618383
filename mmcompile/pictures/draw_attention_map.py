"""An attention map as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmcompile.drawing import set_title
from mmcompile.pictures.attention_map import AttentionMap, Panel
from mmcompile.pictures.palette import BLUE, VERMILLION, modality_colour, modality_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 24  # of each colour
COMPUTED, SKIPPED, FORBIDDEN = "#dcebf7", "#ffffff", "#eeeeee"
_POOLED = {"max": "largest", "mean": "mean"}
MOST_LINES = 64  # more boundaries than that would hide the map


def draw_attention_map(drawn: AttentionMap, title: str) -> Figure:
    """Both panels as a matplotlib figure; one, where the head keeps the order of the tokens."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names = [("token order", drawn.raster)] + ([("the head's own order", drawn.ordered)] if drawn.reordered else [])
    figure = Figure(figsize=(5.4 * len(names) + 1.6, 6.6), layout="constrained")
    *axes, scale = figure.subplots(1, len(names) + 1, width_ratios=[*(1 for _ in names), 0.07])
    largest = max(float(part.max()) for part in (drawn.raster.covered, drawn.raster.missed))
    norm = LogNorm(1.0, max(10.0, largest))  # uniform attention is as bright as nothing at all
    for axis, (name, panel) in zip(axes, names, strict=True):
        _draw_panel(axis, panel, drawn, norm)
        axis.set_title(name, fontsize=11, pad=14)
    _draw_scale(scale, norm, f"attention over uniform attention, {_POOLED[drawn.pool]} of a cell")
    kinds = sorted({*drawn.raster.query_modality.tolist(), *drawn.raster.key_modality.tolist()})
    figure.legend(handles=_patches(kinds), loc="outside lower center", ncols=3 + len(kinds), frameon=False, fontsize=9)
    held = f"{drawn.density:.1%} of the causal tiles hold {drawn.recall:.1%} of the attention"
    set_title(figure, f"{title}\n{held}")
    return figure


def _patches(kinds: list[int]) -> list[Any]:
    from matplotlib.patches import Patch

    grounds = ((COMPUTED, "computed tiles and keys"), (SKIPPED, "skipped"), (FORBIDDEN, "masked"))
    return [
        *(Patch(facecolor=colour, edgecolor="#888888", label=label) for colour, label in grounds),
        *(Patch(facecolor=modality_colour(kind), label=modality_name(kind)) for kind in kinds),
    ]


def _draw_scale(axis: Any, norm: Any, label: str) -> None:
    """One scale of weights for both colours that attention has."""
    axis.set_box_aspect(14)
    axis.set(yscale="log", ylim=(norm.vmin, norm.vmax), xlim=(0, 2), xticks=())
    edges = np.geomspace(norm.vmin, norm.vmax, 257)
    strength = np.repeat(np.linspace(0, 1, 256)[:, None], 2, 1)
    axis.pcolormesh([0, 1, 2], edges, _blend(strength * (1, 0), strength * (0, 1)))
    for place, name in ((0.25, "computed"), (0.75, "missed")):
        where = {"ha": "center", "va": "top", "transform": axis.transAxes}
        axis.text(place, 0.99, name, rotation=90, fontsize=8, color="white", **where)
    axis.tick_params(labelsize=8)
    axis.yaxis.tick_right()
    axis.yaxis.set_label_position("right")
    axis.set_ylabel(label, fontsize=9)


def _draw_panel(axis: Any, panel: Panel, drawn: AttentionMap, norm: Any) -> None:
    height, width = (size * drawn.cell for size in panel.covered.shape)
    axis.imshow(_colours(panel, norm), extent=(0, width, height, 0), interpolation="nearest")
    axis.set(xlim=(0, drawn.key_length), ylim=(drawn.query_length, 0), xlabel="keys", ylabel="queries", aspect="auto")
    axis.set_box_aspect(1)
    axis.tick_params(labelsize=8)
    for lines, draw in zip(panel.changes, (axis.axhline, axis.axvline), strict=True):
        for at in lines if len(lines) <= MOST_LINES else ():
            draw(at, color="#555555", linewidth=0.6, linestyle=(0, (4, 3)))
    for box, of, extent in (
        ((0, 1.008, 1, 0.022), panel.key_modality[None], (0, width, 0, 1)),
        ((1.008, 0, 0.022, 1), panel.query_modality[:, None], (0, 1, height, 0)),
    ):
        strip = axis.inset_axes(box)
        strip.imshow(_of_modality(of.cpu().numpy()), extent=extent, aspect="auto", interpolation="nearest")
        strip.set_axis_off()
        limits = {"xlim": axis.get_xlim()} if of.shape[0] == 1 else {"ylim": axis.get_ylim()}
        strip.set(**limits)


def _of_modality(modality: np.ndarray) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return np.array([to_rgb(modality_colour(kind)) for kind in range(256)])[modality]


def _colours(panel: Panel, norm: Any) -> np.ndarray:
    """RGB [Cq, Ck, 3]: the ground says what is computed, and attention lies over it."""
    from matplotlib.colors import to_rgb

    covered, missed, computed, allowed = (
        tensor.cpu().numpy() for tensor in (panel.covered, panel.missed, panel.computed, panel.allowed)
    )
    shown = _blend(_strength(covered, norm), _strength(missed, norm), computed / np.maximum(allowed, 1))
    shown[allowed == 0] = to_rgb(FORBIDDEN)
    return shown


def _blend(covered: np.ndarray, missed: np.ndarray, computed: np.ndarray | float = 0.0) -> np.ndarray:
    """RGB [..., 3] of strengths from 0 to 1."""
    from matplotlib.colors import to_rgb

    shown = np.broadcast_to(to_rgb(SKIPPED), (*covered.shape, 3))
    for colour, strength in ((COMPUTED, computed), (BLUE, covered), (VERMILLION, missed)):
        shown = shown + np.asarray(strength)[..., None] * (np.array(to_rgb(colour)) - shown)
    return shown


def _strength(weights: np.ndarray, norm: Any) -> np.ndarray:
    """From 0 to 1, in steps: what the eye cannot tell apart would make the file three times as long."""
    strength = np.clip(np.ma.filled(norm(np.maximum(weights, norm.vmin)), 0.0), 0.0, 1.0)
    return np.round(strength * STEPS) / STEPS
