"""Draw the example pictures of README.md on planted heads: `python -m docs.make_pictures`.

The head is planted, so that what it looks at is known: the same site of every earlier frame, and the text before the
video. Half a minute on a CPU; the same files come out again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.planted_heads import TEXT, VIDEO, Head, Look, Plant, Segment, plant_heads
from mmcompile.drawing import save_drawing
from mmcompile.kernels.attend import plan_attention
from mmcompile.options import AUTO_DENSITY, AUTO_PATTERN
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pictures.attention_map import attention_map
from mmcompile.pictures.draw_attention_map import draw_attention_map
from mmcompile.pictures.recall_curve import draw_recall_curves, recall_curves, swept_patterns

FRAMES, ROWS, COLUMNS = 24, 12, 16
VIDEO_TOKENS = FRAMES * ROWS * COLUMNS
SEGMENTS = (
    Segment(TEXT, 256),
    Segment(VIDEO, VIDEO_TOKENS, (FRAMES, ROWS, COLUMNS)),
    Segment(TEXT, 192),
)
HEAD = Head(
    "own site and the text before",
    (
        Look("site", queries=VIDEO, keys=VIDEO, share=0.7),
        Look("segment", queries=VIDEO, keys=TEXT, share=0.3),
        Look("columns", fraction=0.01, queries=TEXT),
    ),
)


def main() -> None:
    """Write docs/figures/attention_map.png and recall_curve.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("figures"), help="folder")
    out = parser.parse_args().out
    planted = plant_heads(Plant(SEGMENTS, (HEAD,), key_heads=1, stride=ROWS * COLUMNS))
    boundaries = (planted.boundaries.offsets, planted.boundaries.modality, planted.boundaries.grid)
    tensors = (planted.query, planted.key, planted.value)
    seen = SeenAttention(*tensors, boundaries, planted.plant.width**-0.5, None, 0, None, None, None, "planted")
    pattern = replace(AUTO_PATTERN, density=AUTO_DENSITY)
    drawn = attention_map(seen, plan_attention(seen.query, seen.key, pattern, boundaries), 0)
    save_drawing(draw_attention_map(drawn, f"A planted head, {pattern}"), out / "attention_map.png")
    curves = recall_curves(seen, [0], swept_patterns(planted.plant.tokens))
    figure = draw_recall_curves(curves, "The same head: recall against density", (drawn.density, drawn.recall))
    save_drawing(figure, out / "recall_curve.png")
    print(f"wrote attention_map.png and recall_curve.png to {out}: {drawn.density:.1%} hold {drawn.recall:.1%}")


if __name__ == "__main__":
    main()
