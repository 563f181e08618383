"""Draw a training's curve from its log.

    python -m mmcompile.needle.training.curve examples/needle_model/training.json

Writes `training.png` beside the log: the loss on answers and the share of right ones over time, and the recall measured
at the end. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from mmcompile.drawing import require_matplotlib, save_drawing


def draw_curve(found: dict[str, Any]) -> Any:
    """A matplotlib figure of a log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, right, final = figure.subplots(1, 3)
    seconds = [point["seconds"] for point in found["curve"]]
    loss.plot(seconds, [point["loss"] for point in found["curve"]], label="answers")
    loss.plot(seconds, [point["naming"] for point in found["curve"]], label="what cards show")
    loss.set(xlabel="seconds", ylabel="loss", yscale="log")
    loss.legend()
    right.plot(seconds, [point["right"] for point in found["curve"]])
    right.set(xlabel="seconds", ylabel="share of right answers", ylim=(0, 1))
    for begin, point in zip(seconds[1:], zip(found["curve"], found["curve"][1:], strict=False), strict=False):
        if point[0]["longest"] != point[1]["longest"]:
            right.axvline(begin, color="grey", linewidth=0.5)
            right.text(begin, 0.02, f" to {point[1]['longest']}", fontsize=6, rotation=90)
    last = found["curve"][-1]["seconds"]
    for task in sorted({one["task"] for one in found["recall"]}):
        ends = [one for one in found["recall"] if one["task"] == task and one["seconds"] >= last]
        ends.sort(key=lambda one: one["tokens"])
        final.plot([one["tokens"] for one in ends], [one["recall"] for one in ends], marker="o", label=task)
    final.axhline(0.98, color="grey", linewidth=0.5)
    final.set(xlabel="tokens", ylabel="recall", xscale="log", ylim=(0.9, 1.001))
    final.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="training.json")
    path = parser.parse_args().log
    require_matplotlib()
    save_drawing(draw_curve(json.loads(path.read_text())), path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
