"""Train the model of `python -m mmcompile needle` from nothing, in minutes on one GPU.

    python -m mmcompile.needle.training --out examples/needle_model --minutes 5

The vision tower first learns to name what frames show, number and colour of a card or nothing. Then prompts grow from
two frames to 64K tokens, half of them with a quarter of text; several questions follow each, and the loss is on their
answers. A phase ends when answers are right, or on the clock, so that the seed fixes the first weights and the order of
the data, and the number of steps depends on the machine. Written to the folder: model, tokenizer, preprocessing, and
`training.json`, the loss and the recall on the way.
"""

import argparse
import os
from pathlib import Path

import torch

from mmcompile.needle.training.train import train


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mmcompile.needle.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its log")
    parser.add_argument("--minutes", type=float, default=5, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--longest", type=int, default=65536, help="prompt to train on, in tokens")
    parser.add_argument("--step-tokens", type=int, default=131072, help="the most in a step; few for a try on a CPU")
    parser.add_argument("--samples", type=int, default=8, help="a depth, of the measurement at the end")
    parser.add_argument("--evaluate", default="1024,4096,8192,16384,32768,65536", help="lengths to measure at the end")
    given = vars(parser.parse_args())
    given["evaluate"] = [int(tokens) for tokens in given["evaluate"].split(",") if tokens]
    train(given.pop("out"), **given)


if __name__ == "__main__":
    main()
