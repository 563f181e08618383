"""Every head pattern on planted video-like heads: what it computes, how far off its output is, how long it takes.

The heads are those of `planted_heads.video_like_mixture`, whose truth is known. The row "planted keys alone" is
attention over exactly these keys: no pattern gets below its error without computing much of the rest. Errors are
||output - dense|| / ||dense|| against float64 attention, over queries spread over the sequence and the last 64; over
these last ones alone too, because the first queries have the longest outputs and hide the others.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from planted_heads import Boundaries, Planted, planted_mass, sample_rows, softmax_rows, video_like_mixture
from rich.progress import track
from torch import Tensor

from mmcompile.bench.dense import BASELINE, dense_calls
from mmcompile.bench.figure import Figure
from mmcompile.bench.timing import Times, time_call, time_on_device
from mmcompile.kernels.attend import plan_attention
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.options import AUTO_PATTERN

ROWS, LAST = 512, 64  # sampled queries, the last ones among them


@dataclass(frozen=True)
class Run:
    """One line of the table for each kind of head. density: cap, recall: wanted share of the mass; None for neither."""

    name: str
    pattern: HeadPattern
    density: float | None = None
    recall: float | None = None


RUNS = (
    Run("dense", HeadPattern("dense"), density=1.0),
    Run("A-shape", HeadPattern("a_shape", sink=128, local=4096)),
    Run("Tri-shape", HeadPattern("tri_shape", sink=128, local=4096, last=128)),
    Run("SF-fixed", HeadPattern("sf_fixed")),
    Run("SF-strided", HeadPattern("sf_strided")),
    Run("Vertical-Slash", HeadPattern("vertical_slash", vertical=1000, slash=4096)),
    Run("Grid", HeadPattern("grid", lines="vs")),
    Run("block top-p pooled", HeadPattern("top_p", scores="pooled", mass=0.9), density=0.5),
    Run("block top-p antidiagonal", HeadPattern("top_p", scores="antidiagonal", mass=0.9), density=0.5),
    Run("block top-p sampled", HeadPattern("top_p"), density=0.05),
    Run("block top-p sampled by site", HeadPattern("top_p", order="site"), density=0.05),
    Run("columns", HeadPattern("columns", columns=1024)),
    Run("auto, 1 %", AUTO_PATTERN, density=0.01, recall=1.0),
    Run("auto, 2 %", AUTO_PATTERN, density=0.02, recall=1.0),
    Run("auto, 2.5 %", AUTO_PATTERN, density=0.025, recall=1.0),
    Run("auto, 5 %", AUTO_PATTERN, density=0.05, recall=1.0),
    Run("auto, 10 %", AUTO_PATTERN, density=0.1, recall=1.0),
)


def run_pattern(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Boundaries,
    pattern: HeadPattern,
    density: float | None,
    recall: float | None,
    repeats: int = 5,
) -> tuple[Tensor, list[float], dict[str, Times]]:
    """One pattern for every head: output [1, H, S, D], density of each head, and times by name. The plan's hold the
    arrangement and the permutation of the keys, the attention's that of queries and values."""
    options = {"density": density, "recall": recall}
    planned = plan_attention(query, key, pattern, boundaries, **options)
    output = planned.attend(query, value)
    device = query.device.type

    def plan() -> object:
        return plan_attention(query, key, pattern, boundaries, **options)

    times = {
        "plan": time_on_device(plan, device, repeats),
        "plan, host too": time_call(plan, device, repeats),
        "attention": time_call(lambda: planned.attend(query, value), device, repeats),
    }
    return output, planned.of_heads(planned.density)[0].tolist(), times


def references(planted: Planted, rows: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [H, R, D]: dense attention in some queries, and attention over their planted keys alone."""
    dense, alone = [], []
    for head, weights in enumerate(softmax_rows(planted, rows)):
        value = planted.value[0, head // planted.plant.group].double()
        dense.append(weights @ value)
        weights = weights * planted.truth.mask(head, rows)
        alone.append(weights @ value / weights.sum(-1, keepdim=True))
    return torch.stack(dense), torch.stack(alone)


def relative_error(output: Tensor, dense: Tensor) -> float:
    return round(float((output.double() - dense).norm() / dense.norm()), 5)


def table_row(
    name: str,
    planted: Planted,
    density: list[float],
    output: Tensor,
    dense: Tensor,
    times: dict[str, Times] | None = None,
) -> dict[str, Any]:
    """One pattern. output, dense: [H, R, D]; density: of each head. Errors of all heads together and of each kind."""
    kinds = [head.name for head in planted.plant.heads]
    line: dict[str, Any] = {"pattern": name, "density": round(statistics.mean(density), 5)}
    for kind in ["all", *dict.fromkeys(kinds)]:
        chosen = [head for head, its in enumerate(kinds) if kind in ("all", its)]
        line[f"error, {kind} heads"] = relative_error(output[chosen], dense[chosen])
    line[f"error, last {LAST} queries"] = relative_error(output[:, -LAST:], dense[:, -LAST:])
    for what, measured in (times or {}).items():
        line |= measured.columns(f"{what} ms")
    print(line, flush=True)
    return line


def plot(lines: list[dict[str, Any]], path: str, title: str) -> None:
    """Density against error, one panel for each kind of head, one marker for each pattern."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in lines if "error, all heads" in line]
    kinds = [column for column in lines[0] if column.startswith("error, ")]
    names = list(dict.fromkeys(line["pattern"].split(",")[0] for line in lines))
    markers = "osD^v<>Pp*hX8d"
    figure, panels = plt.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 4.4), sharex=True, sharey=True)
    for panel, kind in zip(panels, kinds, strict=True):
        for index, name in enumerate(names):
            points = [line for line in lines if line["pattern"].split(",")[0] == name]
            # Zero has no place on a logarithmic axis.
            panel.plot(
                [max(line["density"], 1e-4) for line in points],
                [max(line[kind], 1e-4) for line in points],
                linestyle="-" if len(points) > 1 and name == "auto" else "none",
                marker=markers[index % len(markers)], color=f"C{index % 10}", label=name,
            )  # fmt: skip
        panel.set(
            xscale="log", yscale="log", title=kind.removeprefix("error, "), xlabel="computed share of causal attention"
        )
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("relative error of the output")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.suptitle(title)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(names)), frameon=False)
    figure.set_layout_engine("constrained")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="where the JSON goes")
    parser.add_argument("--plot", help="where a plot goes, PNG or SVG; needs matplotlib")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mass", type=float, default=0.95, help="of the planted keys")
    parser.add_argument("--only", default="", help="patterns whose name begins so; all by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--redraw", action="store_true", help="draw --plot from an --out made before, and run nothing")
    arguments = parser.parse_args()
    if arguments.redraw:
        lines = json.loads(Path(arguments.out).read_text())["rows"]
        plot(lines, arguments.plot, f"{arguments.tokens} tokens, planted video-like heads")
        return
    planted = video_like_mixture(
        arguments.tokens, arguments.device, torch.bfloat16, arguments.seed, mass=arguments.mass
    )
    tensors = planted.query, planted.key, planted.value
    rows = sample_rows(arguments.tokens, ROWS, arguments.device, LAST)
    truth = planted_mass(planted, rows)
    mass, keys, tiles = (float(x.nanmean()) for x in (truth.mass, truth.planted_keys, truth.needed_tiles))
    figure = Figure.begin(
        "Head patterns on planted heads",
        notes=f"28 query heads, 4 KV heads, head dim 128, bf16, batch 1, {arguments.tokens} tokens, "
        f"seed {arguments.seed}; 3/7 grid heads of 256 tokens per frame, 2/7 local, 2/7 columns. In the measured "
        f"queries the planted keys are {keys:.2%} of the keys and hold {mass:.1%} of the mass; 95 % of the mass "
        f"needs {tiles:.0%} of the 128-key tiles in raster order. Errors are over {len(rows)} queries, density is "
        "of computed tiles. Plan ms are the device's, all launches made beforehand, as in a model; beside it what a "
        "caller waits who plans and does nothing else. Attention is permute, kernel and unpermute; median of "
        f"{arguments.repeats} runs, spread is half their range",
        device=arguments.device,
    )
    dense, alone = references(planted, rows)
    # In some queries nothing is planted, or everything is; both are dense.
    alone = torch.where(alone.isnan(), dense, alone)
    share = truth.planted_keys.nan_to_num(1.0).mean(1).tolist()
    figure.rows.append(table_row("planted keys alone", planted, share, alone, dense))
    library = BASELINE[planted.query.device.type]
    times = time_call(dense_calls(*tensors)[library], planted.query.device.type, arguments.repeats)
    figure.rows.append({"pattern": library, "density": 1.0} | times.columns("attention ms"))
    for run in track([run for run in RUNS if run.name.startswith(arguments.only)], "patterns"):
        output, density, measured = run_pattern(
            *tensors, planted.boundaries, run.pattern, run.density, run.recall, arguments.repeats
        )
        figure.rows.append(table_row(run.name, planted, density, output[0, :, rows], dense, measured))
        figure.save(arguments.out)
    print(f"wrote {arguments.out}; `make figures` puts its table into the docs")
    if arguments.plot:
        plot(figure.rows, arguments.plot, f"{arguments.tokens} tokens, planted video-like heads")


if __name__ == "__main__":
    main()
