"""The pictures of one head, as a page holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmcompile.drawing import png
from mmcompile.kernels.attend import Planned
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pictures.attention_map import attention_map
from mmcompile.pictures.draw_attention_map import draw_attention_map
from mmcompile.pictures.page import Picture
from mmcompile.pictures.recall_curve import draw_recall_curves, recall_curves, swept_patterns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSS_DPI = 100


def head_pictures(seen: SeenAttention, planned: Planned, head: int, name: str) -> list[Picture]:
    """Its attention with what the plan computes of it, and what other patterns would hold of it."""
    drawn = attention_map(seen, planned, head)
    orders = "in token order and in the head's own order" if drawn.reordered else "in token order"
    held = f"{drawn.density:.1%} of the causal tiles are computed and hold {drawn.recall:.1%} of the attention"
    curves = recall_curves(seen, [head], swept_patterns(seen.key.shape[2]))
    reached = ", ".join(
        f"{pattern} {points[-1].recall:.0%} at {points[-1].density:.0%}" for pattern, points in curves.items()
    )
    return [
        picture(
            draw_attention_map(drawn, name),
            f"Attention of {name}, {orders}: {held}.",
            f"{name}, {orders}.",
        ),
        picture(
            draw_recall_curves(curves, name, (drawn.density, drawn.recall)),
            f"Recall against density of {name}. At the largest cap: {reached}.",
            f"{name}: what other patterns would hold of its attention.",
        ),
    ]


def picture(figure: Figure, alt: str, caption: str) -> Picture:
    """A matplotlib figure as a picture of a page."""
    width, height = (round(inches * CSS_DPI) for inches in figure.get_size_inches())
    return Picture(png(figure), width, height, alt, caption)
