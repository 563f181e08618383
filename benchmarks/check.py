"""What the option `check` costs: the comparison with dense attention beside the sparse attention that it looks at.

A-shape of a tenth of the tiles, for every head: which tiles are listed makes no difference to the comparison.
"""

import argparse

import torch

from mmcompile.bench.figure import Figure, Row
from mmcompile.bench.timing import time_call
from mmcompile.kernels.attend import plan_attention
from mmcompile.kernels.patterns import HeadPattern

HEADS, KV_HEADS, WIDTH, DENSITY = 28, 4, 128, 0.1


def measure(tokens: int, shares: list[float], device: str, repeats: int) -> Row:
    """One length."""
    dtype = torch.bfloat16
    query = torch.randn(1, HEADS, tokens, WIDTH, device=device, dtype=dtype)
    key, value = torch.randn(2, 1, KV_HEADS, tokens, WIDTH, device=device, dtype=dtype)
    boundaries = [torch.tensor(part, dtype=torch.int32, device=device) for part in ([0, tokens], [0], [[0, 0, 0]])]
    pattern = HeadPattern("a_shape", local=tokens)
    planned = plan_attention(query, key, pattern, tuple(boundaries), density=DENSITY)
    output, seed = planned.attend(query, value), torch.zeros(1, dtype=torch.int64, device=device)
    row: Row = {"tokens": tokens} | time_call(lambda: planned.attend(query, value), device, repeats).columns(
        "sparse ms"
    )
    for share in shares:
        compared = time_call(lambda share=share: planned.compare(query, value, output, seed, share), device, repeats)
        row |= compared.columns(f"check {share:g} ms")
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="where the JSON goes")
    parser.add_argument("--tokens", default="32768,131072")
    parser.add_argument("--shares", default="0.001,0.01,0.1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    notes = (
        f"{HEADS} heads, {KV_HEADS} KV heads, head dim {WIDTH}, bf16, causal, batch 1, {DENSITY:.0%} of the tiles; "
        f"check SHARE compares that share of the query tiles; median of {arguments.repeats} runs, spread is half their "
        "range"
    )
    figure = Figure.begin("What a check costs", notes, arguments.device)
    shares = [float(share) for share in arguments.shares.split(",")]
    for tokens in map(int, arguments.tokens.split(",")):
        figure.rows.append(measure(tokens, shares, arguments.device, arguments.repeats))
        figure.save(arguments.out)


if __name__ == "__main__":
    main()
