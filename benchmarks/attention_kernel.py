"""Our attention kernel against torch's: cuDNN and flash attention (dense), FlexAttention on the same plan.

Rates count the products of the tiles that are computed, and for dense causal attention half the square.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from causal_walks import causal_walk, listed_tiles
from figure import Figure
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from mmcompile.kernels.attention_config import Config, attention_config
from mmcompile.kernels.block_sparse import launch
from mmcompile.kernels.flex import block_mask, flex_attention_on_plan
from mmcompile.kernels.patterns import TILE

HEADS, KEY_HEADS = 28, 4
DENSE = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# Launch shapes that compile for Hopper without spills; --sweep measures them side by side.
SWEEP = [
    (Config(*shape), descriptors)
    for descriptors in (True, False)
    for shape in [
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 8, 4), (128, 64, 8, 3), (128, 64, 4, 3),
        (64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 4), (128, 32, 8, 3),
    ]
]  # fmt: skip


def milliseconds(call: Callable[[], object]) -> tuple[float, float]:
    """Median and half the range between the 20th and the 80th percentile, of half a second of calls."""
    times = do_bench(call, warmup=100, rep=500, return_mode="all")
    low, _, _, high = statistics.quantiles(times, n=5) if len(times) > 4 else (min(times), 0, 0, max(times))
    return statistics.median(times), (high - low) / 2


def row(tokens: int, density: float, name: str, tiles: float, width: int, call: Callable[[], object]) -> dict:
    """One measurement; a contender that cannot run is a row that says why."""
    found: dict[str, object] = {"tokens": tokens, "density": round(density, 4), "attention": name}
    try:
        median, spread = milliseconds(call)
    except Exception as error:
        torch.cuda.synchronize()
        found["error"] = f"{type(error).__name__}: {error}"[:200]
    else:
        rate = 4 * HEADS * width * TILE * TILE * tiles / median / 1e9
        found |= {"ms": round(median, 3), "spread ms": round(spread, 3), "TFLOP/s": round(rate)}
    print(found, flush=True)
    return found


def dense_rows(query: Tensor, key: Tensor, value: Tensor) -> list[dict]:
    """Torch's causal attention by each of its fast libraries."""
    tokens, width = query.shape[2:]
    rows = []
    for name, backend in DENSE.items():

        def call(backend=backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        rows.append(row(tokens, 1.0, f"torch SDPA, {name}", (tokens / TILE) ** 2 / 2, width, call))
    return rows


def sparse_rows(query: Tensor, key: Tensor, value: Tensor, density: float, sweep: bool) -> list[dict]:
    """Ours, and FlexAttention, on one plan; with `sweep` ours in every launch shape instead."""
    tokens, width = query.shape[2:]
    walk = causal_walk(tokens, density, HEADS, KEY_HEADS, "cuda")
    tiles, scale = listed_tiles(walk), width**-0.5
    share = tiles / (tokens // TILE * (tokens // TILE + 1) / 2)

    def ours(config: Config, descriptors: bool) -> Callable[[], Tensor]:
        return lambda: launch(query, key, value, walk, scale, config, descriptors)

    def measure(name: str, call: Callable[[], object]) -> dict:
        return row(tokens, share, name, tiles, width, call)

    if sweep:
        return [
            measure(f"ours, {tuple(config)}{', descriptors' * descriptors}", ours(config, descriptors))
            for config, descriptors in SWEEP
        ]
    torch.compiler.reset()
    compiled, mask = torch.compile(flex_attention, dynamic=False), block_mask(walk)
    config = attention_config(query)
    return [
        measure("ours", ours(config, True)),
        measure("ours, without descriptors", ours(config, False)),
        measure(
            "FlexAttention, same plan",
            lambda: flex_attention_on_plan(query, key, value, walk, scale, mask, compiled),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="where the JSON goes")
    parser.add_argument("--tokens", default="32768,131072", help="lengths, separated by commas")
    parser.add_argument("--density", default="1,0.1,0.01", help="fractions of the causal tiles")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--sweep", action="store_true", help="our launch shapes against each other instead")
    arguments = parser.parse_args()
    figure = Figure.begin(
        "Attention kernel",
        notes=f"{HEADS} query heads, {KEY_HEADS} KV heads, head dim {arguments.head_dim}, bf16, batch 1, "
        "causal, scattered tiles, random data; median of half a second of runs with the L2 cache flushed "
        "between them, spread is half the range from the 20th to the 80th percentile",
    )
    for tokens in track([int(tokens) for tokens in arguments.tokens.split(",")], "attention"):
        shapes = [(1, heads, tokens, arguments.head_dim) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        query, key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        if not arguments.sweep:
            figure.rows += dense_rows(query, key, value)
        for density in map(float, arguments.density.split(",")):
            figure.rows += sparse_rows(query, key, value, density, arguments.sweep)
    figure.save(arguments.out)


if __name__ == "__main__":
    main()
