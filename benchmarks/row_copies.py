"""permute and unpermute against a plain device copy of the same bytes."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from figure import Figure
from torch import Tensor
from triton.testing import do_bench

import mmcompile.kernels.ops  # noqa: F401  registers torch.ops.mminference

OPS = torch.ops.mminference


HEADS = 28


def calls(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """A device copy of x [1, H, S, D], and both ops with a random order and with one that moves runs of rows."""
    tokens, every_head, rows = x.shape[2], list(range(HEADS)), [0] * HEADS
    found: dict[str, Callable[[], Tensor]] = {"copy": x.clone}
    orders = {
        "random": torch.randperm(tokens, device="cuda"),
        "runs of 256": torch.arange(tokens, device="cuda").view(-1, 256).flip(0).flatten(),
    }
    for name, order in orders.items():
        order = order.int().view(1, 1, -1)
        found[f"permute, {name}"] = partial(OPS.permute, x, order, None, every_head, rows)
        found[f"unpermute, {name}"] = partial(OPS.unpermute, x, order, None, rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="where the JSON goes")
    parser.add_argument("--tokens", default="32768,131072", help="lengths, separated by commas")
    parser.add_argument("--head-dims", default="64,80,128", help="separated by commas")
    arguments = parser.parse_args()
    figure = Figure.begin(
        "Row copies",
        notes=f"{HEADS} heads in [B, S, H, D] memory, bf16; rates count bytes read and written; median of runs "
        "with the L2 cache flushed between them",
    )
    for tokens in map(int, arguments.tokens.split(",")):
        for width in map(int, arguments.head_dims.split(",")):
            x = torch.randn(1, tokens, HEADS, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for name, call in calls(x).items():
                median = statistics.median(do_bench(call, return_mode="all"))
                rate = 2 * x.numel() * x.element_size() / median / 1e9
                row = {"tokens": tokens, "head dim": width, "op": name, "ms": round(median, 3)}
                figure.rows.append(row | {"TB/s": round(rate, 2)})
                print(figure.rows[-1], flush=True)
    figure.save(arguments.out)


if __name__ == "__main__":
    main()
