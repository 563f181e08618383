"""`mmcompile.search` on a whole decoder of Qwen2.5-VL-7B's geometry: its time, its memory, and what it finds.

The decoder is a planted one (`planted_model.py`), so that it is known which pattern each head should get: a grid, the
latest keys, or some fixed keys. Its MLPs are small and its vocabulary is the prompt; attention and projections are of
full size.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from planted_model import planted_model

import mmcompile
from mmcompile.bench.figure import Figure
from mmcompile.bench.timing import significant
from mmcompile.tables import PatternTable, mean_error

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS = 28, 4, 128, 3584, 28  # of Qwen2.5-VL-7B
GRID = (16, 16)  # tokens of a frame
FEW = 3  # layers of the searches that only ask what is found
SMALL = 0.2  # a budget that planted patterns and their planning fill

KINDS = ("site", "local", "columns")
EXPECTED = {"site": ("grid", True), "local": ("a_shape", False), "columns": ("vertical_slash", False)}


def search_decoder(layers: int, tokens: int, device: str, density: float | None, space: str) -> dict[str, Any]:
    """Search a planted decoder of the geometry, as `mmcompile.search` does it."""
    kinds = [[KINDS[(head + layer) % 3] for head in range(HEADS)] for layer in range(layers)]
    frames = (tokens - 256) // math.prod(GRID)
    sizes = {"grid": (frames, *GRID), "text": 128, "window": tokens // 40, "columns": tokens // 80}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    planted = planted_model(
        kinds, kv_heads=KV_HEADS, head_dim=HEAD_DIM, hidden=HIDDEN, device=device, dtype=dtype, **sizes
    )
    weights = sum(one.numel() * one.element_size() for one in planted.model.parameters())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    with mmcompile.bind(planted.boundaries):
        table = mmcompile.search(planted.model, planted.inputs, density=density, candidates=space, progress=False)
    seconds = time.perf_counter() - begin
    for kind in KINDS:
        of_kind = zip(chain.from_iterable(table.layers), chain.from_iterable(kinds), strict=True)
        print(kind, Counter(str(pattern) for pattern, planted in of_kind if planted == kind).most_common(4), flush=True)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else math.nan
    return {
        "layers": layers,
        "heads": HEADS,
        "tokens": tokens,
        "budget": "the paper's" if density is None else f"density {density}",
        "space": space,
        "search s": significant(seconds),
        "peak GB": significant(peak / 1e9),
        "of it weights GB": significant(weights / 1e9),
        "planted order found": significant(_found(table, kinds, kind_too=False)),
        "planted pattern found": significant(_found(table, kinds, kind_too=True)),
        "mean error": significant(mean_error(table)),
        "mean error, even budget": significant(table.settings["mean error of a uniform budget"]),
    }


def _found(table: PatternTable, kinds: Sequence[Sequence[str]], *, kind_too: bool) -> float:
    """The share of the heads whose pattern is of the planted kind, or at least in the planted order."""
    hits = []
    for patterns, of_heads in zip(table.layers, kinds, strict=True):
        for pattern, kind in zip(patterns, of_heads, strict=True):
            wanted, by_site = EXPECTED[kind]
            hits.append(pattern.by_site[0] == by_site and (not kind_too or pattern.kind == wanted))
    return sum(hits) / len(hits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="where the JSON goes")
    parser.add_argument("--tokens", type=int, default=25088)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    figure = Figure.begin(
        "Search of a decoder",
        notes=f"{HEADS} query heads, {KV_HEADS} KV heads, head dim {HEAD_DIM}, hidden size {HIDDEN}, small MLPs, batch "
        "1, a video of 256 tokens per frame in some text; a third of the heads look at their own site, at the latest "
        "keys, and at fixed keys each. The first search also compiles every kernel, and its time is that of the whole "
        "call. Budgets: the paper's, the time of an A-shape of 1024 sink and 4096 local tokens, or that of an "
        "A-shape of a density",
        device=arguments.device,
    )
    for layers, density, space in (
        (arguments.layers, None, "full"),
        (min(FEW, arguments.layers), SMALL, "full"),
        (min(FEW, arguments.layers), SMALL, "paper"),
    ):
        figure.rows.append(search_decoder(layers, arguments.tokens, arguments.device, density, space))
        print(figure.rows[-1], flush=True)
        figure.save(arguments.out)
    print(f"wrote {arguments.out}; `make figures` puts its table into the docs")


if __name__ == "__main__":
    main()
