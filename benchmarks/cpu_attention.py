"""The CPU path at 10 % density against torch's dense causal attention, on the same threads."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from causal_walks import causal_walk, listed_tiles
from figure import Figure
from rich.progress import track
from torch.nn.functional import scaled_dot_product_attention

from mmcompile.kernels.block_sparse_cpu import block_sparse_attention
from mmcompile.kernels.patterns import TILE

SHAPES = {"28 heads, 4 KV heads": (28, 4), "8 heads, 8 KV heads": (8, 8)}
WIDTH = 128


def seconds(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and half the range, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), (max(times) - min(times)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="where the JSON goes")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    tokens = arguments.tokens
    figure = Figure.begin(
        "Attention on the CPU",
        notes=f"{tokens} tokens, head dim {WIDTH}, causal, batch 1, {torch.get_num_threads()} threads, "
        f"scattered tiles; median of {arguments.repeats} runs, spread is half their range",
        device="cpu",
    )
    cases = [(name, dtype) for name in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    for name, dtype in track(cases, "CPU attention"):
        heads, key_heads = SHAPES[name]
        walk = causal_walk(tokens, arguments.density, heads, key_heads, "cpu")
        query, key, value = (torch.randn(1, h, tokens, WIDTH).to(dtype) for h in (heads, key_heads, key_heads))
        ours, our_spread = seconds(
            lambda q=query, k=key, v=value, w=walk: block_sparse_attention(q, k, v, w, WIDTH**-0.5),
            arguments.repeats,
        )
        dense, dense_spread = seconds(
            lambda q=query, k=key, v=value: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            arguments.repeats,
        )
        share = listed_tiles(walk) / (tokens // TILE * (tokens // TILE + 1) / 2)
        figure.rows.append(
            {
                "heads": name,
                "dtype": str(dtype).removeprefix("torch."),
                "density": round(share, 4),
                "ours s": round(ours, 3),
                "spread s": round(our_spread, 3),
                "torch dense s": round(dense, 2),
                "its spread s": round(dense_spread, 2),
                "faster by": f"{dense / ours:.1f}x",
            }
        )
        print(figure.rows[-1], flush=True)
    figure.save(arguments.out)


if __name__ == "__main__":
    main()
