"""The pattern search on planted heads: its space against the paper's, one budget for all heads against an even one.

Each layer is a plant (`planted_heads.py`) of 28 heads on 4 KV heads over two videos in text, of which it is known what
they look at; some need a thousandth of the keys and some a tenth. Both spaces are searched at the same measured kernel
times.
"""

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from planted_heads import TEXT, VIDEO, Head, Look, Plant, Segment, plant_heads
from rich.progress import track

from mmcompile.bench.figure import Figure
from mmcompile.bench.timing import significant
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pattern_search.allocate import allocate, front, uniform
from mmcompile.pattern_search.candidates import SPACES
from mmcompile.pattern_search.equal_time import LEVELS, TOLERANCE, Costs, measure_costs
from mmcompile.pattern_search.layer_search import Evaluation, search_layer
from mmcompile.pattern_search.score import LayerAttention
from mmcompile.tables import FrontPoint

HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128  # of Qwen2.5-VL-7B
GRID = (16, 16)  # tokens of a frame
SHOWN = (0.25, 0.5, 1.0)  # of LEVELS


def plant_of(tokens: int, seed: int) -> Plant:
    """28 heads with different needs over text, a video, text, a video, text."""
    draw = random.Random(seed)
    frames = (tokens - 3 * 128) // 2 // math.prod(GRID)
    video = Segment(VIDEO, frames * math.prod(GRID), (frames, *GRID))
    text = Segment(TEXT, 128)
    segments = (text, video, text, video, Segment(TEXT, tokens - 2 * (text.tokens + video.tokens)))

    def share(low: float, high: float) -> float:
        return math.exp(draw.uniform(math.log(low), math.log(high)))

    def seven() -> tuple[Head, ...]:
        pairs = (
            Look("site", queries=VIDEO, keys=VIDEO, share=0.5),
            Look("segment", queries=VIDEO, keys=TEXT, share=0.5),
            Look("columns", share(0.005, 0.02), queries=TEXT, keys=VIDEO, share=0.5),
            Look("local", queries=TEXT, keys=TEXT, share=0.5),
        )
        return (
            Head("site", (Look("site"),)),
            Head("site and columns", (Look("site", share=0.5), Look("columns", share(0.002, 0.01), share=0.5))),
            Head("local", (Look("local", share(0.002, 0.02)),)),
            Head("wide local", (Look("local", share(0.05, 0.2)),)),
            Head("columns", (Look("columns", share(0.002, 0.01)),)),
            Head("many columns", (Look("columns", share(0.02, 0.1)),)),
            Head("pairs", pairs),
        )

    heads = tuple(head for _ in range(KV_HEADS) for head in seven())
    return Plant(segments, heads, KV_HEADS, math.prod(GRID), width=HEAD_DIM, seed=seed)


def attention_of(plant: Plant, device: str) -> LayerAttention:
    planted = plant_heads(plant, device, torch.bfloat16 if device == "cuda" else torch.float32)
    tensors = planted.query, planted.key, planted.value, tuple(planted.boundaries)
    return LayerAttention(SeenAttention(*tensors, HEAD_DIM**-0.5, None, 0, None, None, None, ""))  # type: ignore[arg-type]


def of_space(costs: Costs, name: str) -> Costs:
    """The costs of a part of the whole space."""
    candidates = SPACES["full"]
    sized = [one for one in costs.sized if one.candidate < 0 or candidates[one.candidate] in SPACES[name]]
    return replace(costs, sized=tuple(sized))


def rows_of(space: str, found: Sequence[list[Evaluation]], kinds: Sequence[str], costs: Costs) -> list[dict[str, Any]]:
    """At each shown time: a uniform budget, and one budget for all heads of all layers."""
    fronts = [front(layer, head) for layer in found for head in range(HEADS)]
    rows = []
    for level, share in enumerate(LEVELS):
        if share not in SHOWN:
            continue
        budget = costs.targets[level]
        for name, chosen in (
            ("even", uniform(fronts, budget / HEADS * (1 + TOLERANCE))),
            ("shared", allocate(fronts, budget * len(found))),
        ):
            row = {"budget ms a layer": significant(budget), "space": space, "budget": name}
            rows.append(row | _errors(chosen, kinds) | {"ms a layer": _ms(chosen) / len(found)})
    return rows


def best_single(layers: Sequence[LayerAttention], kinds: Sequence[str], costs: Costs) -> list[dict[str, Any]]:
    """At each shown time, the one pattern for all heads with the least mean error."""
    rows = []
    for level, share in enumerate(LEVELS):
        if share not in SHOWN:
            continue
        scored = {one: [layer.score(one.pattern).read() for layer in layers] for one in costs.at(level)}
        best = min(scored, key=lambda one: math.fsum(error for score in scored[one] for error in score.error))
        points = [
            FrontPoint(best.pattern, best.ms / HEADS, density, error)
            for score in scored[best]
            for density, error in zip(score.density, score.error, strict=True)
        ]
        row = {"budget ms a layer": significant(costs.targets[level]), "space": str(best.pattern)}
        rows.append(row | {"budget": "one pattern"} | _errors(points, kinds) | {"ms a layer": best.ms})
    return rows


def _errors(points: Sequence[FrontPoint], kinds: Sequence[str]) -> dict[str, float]:
    row = {"mean error": significant(math.fsum(point.error for point in points) / len(points))}
    for kind in dict.fromkeys(kinds):
        own = [point.error for point, of_head in zip(points, kinds, strict=True) if of_head == kind]
        row[kind] = significant(math.fsum(own) / len(own), 3)
    return row


def _ms(points: Sequence[FrontPoint]) -> float:
    return math.fsum(point.ms for point in points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="where the JSON goes")
    parser.add_argument("--tokens", type=int, default=25088)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    figure = Figure.begin(
        "Pattern search",
        notes=f"{HEADS} query heads, {KV_HEADS} KV heads, head dim {HEAD_DIM}, batch 1, {arguments.tokens} tokens; "
        f"{arguments.layers} layers of planted heads over two videos of 256 tokens per frame. Budgets: parts of the "
        "time, planning included, of an A-shape of 1024 sink and 4096 local tokens, the paper's, the last of them that "
        "time. "
        "Even: every head the same time; shared: all heads of all layers together. Errors are of the attention's "
        "output, relative to dense, means over heads; ms from fitted lines of measured times",
        device=arguments.device,
    )
    plants = [plant_of(arguments.tokens, seed) for seed in range(arguments.layers)]
    layers = [attention_of(plant, arguments.device) for plant in plants]
    kinds = [head.name for plant in plants for head in plant.heads]
    costs = measure_costs(layers[0], SPACES["full"], None)
    rows = []
    for space in SPACES:
        begin = time.perf_counter()
        found = [search_layer(layer, of_space(costs, space)) for layer in track(layers, space)]
        print(f"{space}: {(time.perf_counter() - begin) / len(layers):.2f} s a layer", flush=True)
        rows += rows_of(space, found, kinds, costs)
    rows += best_single(layers, kinds, costs)
    figure.rows += sorted(rows, key=lambda row: (row["budget ms a layer"], -row["mean error"]))
    for row in figure.rows:
        print(row)
    figure.save(arguments.out)
    print(f"wrote {arguments.out}; `make figures` puts its table into the docs")


if __name__ == "__main__":
    main()
