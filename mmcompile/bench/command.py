"""The command line: `python -m mmcompile bench kernels|plan|prefill`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmcompile.bench.decoders import DECODERS
from mmcompile.bench.measurement import token_count
from mmcompile.console import out, steps
from mmcompile.errors import MMCompileError, OptionError

if TYPE_CHECKING:
    from mmcompile.bench.measurement import Measurement

bench = typer.Typer(
    help="Measure the kernels, the planners, and whole prefills, each beside its competitors in the same run.",
    no_args_is_help=True,
)

LONGEST = 2**21  # tokens
Tokens = Annotated[str, typer.Option(help="Lengths, such as 4096, 32K or 1M, separated by commas.")]
Heads = Annotated[int, typer.Option(min=1, help="Query heads.")]
KVHeads = Annotated[int, typer.Option(min=1, help="Key and value heads.")]
Repeats = Annotated[int, typer.Option(min=1, help="Runs of each contender; slow ones make fewer, three at least.")]
Device = Annotated[str, typer.Option(help="cuda, or cpu for the CPU path against torch's.")]
Out = Annotated[Path | None, typer.Option("--out", help="JSON: rows, command, commit, versions, device.")]
Plot = Annotated[Path | None, typer.Option(help="A plot too, PNG or SVG; needs matplotlib.")]
Redraw = Annotated[bool, typer.Option("--redraw", help="Show and plot the JSON of --out again; measure nothing.")]


@bench.command()
def kernels(
    tokens: Tokens = "32768,131072",
    density: Annotated[str, typer.Option(help="Fractions of the causal tiles.")] = "1,0.1,0.01",
    head_dim: Annotated[str, typer.Option(help="Head dims, separated by commas.")] = "128",
    dtype: Annotated[str, typer.Option(help="Any of bf16, fp16, fp32.")] = "bf16",
    heads: Heads = 28,
    kv_heads: KVHeads = 4,
    table: Annotated[str, typer.Option(help="Any of attention, growth, copies; all by default.")] = "",
    device: Device = "cuda",
    repeats: Repeats = 20,
    out_path: Out = None,
    plot: Plot = None,
    redraw: Redraw = False,
) -> None:
    """Attention over listed tiles against cuDNN, flash and FlexAttention; its growth with the length; row copies.

    Example: [bold]python -m mmcompile bench kernels --tokens 32768 --out kernels.json --plot kernels.png[/bold]
    """
    from mmcompile.bench.kernels import ATTENTION, GROWTH, TABLES, KernelsBench
    from mmcompile.bench.measurement import choices, numbers
    from mmcompile.bench.random_heads import DTYPES

    every = TABLES if device == "cuda" else (ATTENTION, GROWTH)
    measurement = KernelsBench(
        numbers("--tokens", tokens, token_count, 128, LONGEST),
        numbers("--density", density, float, 1e-6, 1.0),
        numbers("--head-dim", head_dim, int, 1, 256),
        choices("--dtype", dtype, DTYPES),
        heads,
        kv_heads,
        device,
        repeats,
        choices("--table", table, TABLES) if table else every,
    )
    _run(measurement, out_path, plot, redraw)


@bench.command()
def plan(
    tokens: Tokens = "32768,131072",
    patterns: Annotated[str, typer.Option(help="Any of auto, vertical_slash, grid, a_shape.")] = (
        "auto,vertical_slash,grid,a_shape"
    ),
    density: Annotated[str, typer.Option(help="Caps on the computed tiles, as fractions of the causal ones.")] = "0.1",
    head_dim: Annotated[int, typer.Option(min=1, max=256, help="Channels of a head.")] = 128,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    heads: Heads = 28,
    kv_heads: KVHeads = 4,
    device: Device = "cuda",
    repeats: Repeats = 10,
    dense: Annotated[
        bool, typer.Option("--dense/--no-dense", help="Torch's attention too: at 1M tokens a minute.")
    ] = True,
    out_path: Out = None,
    plot: Plot = None,
    redraw: Redraw = False,
) -> None:
    """What planning and permuting cost beside the sparse attention that they serve, and all of it against cuDNN.

    Example: [bold]python -m mmcompile bench plan --tokens 131072 --patterns auto --out plan.json[/bold]
    """
    from mmcompile.bench.measurement import choices, numbers
    from mmcompile.bench.plan import PlanBench
    from mmcompile.bench.random_heads import DTYPES
    from mmcompile.bench.video_prompt import PATTERNS

    if dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    measurement = PlanBench(
        numbers("--tokens", tokens, token_count, 1, LONGEST),
        choices("--patterns", patterns, PATTERNS),
        numbers("--density", density, float, 1e-6, 1.0),
        head_dim,
        dtype,
        heads,
        kv_heads,
        device,
        repeats,
        dense,
    )
    _run(measurement, out_path, plot, redraw)


@bench.command()
def prefill(
    config: Annotated[
        str,
        typer.Option(help=f"{', '.join(name.lower() for name in DECODERS)}, or a folder or hub name with a config."),
    ] = "qwen2.5-vl-7b",
    tokens: Tokens = "2048,4096,8192,16384,32768,131072",
    patterns: Annotated[
        str,
        typer.Option(
            help="auto; paper: Grid by frame, Vertical-Slash (1000, 4096) and A-shape (128, 4096), a third of the "
            "heads each; vertical_slash, grid or a_shape for every head; or the path of a table."
        ),
    ] = "auto",
    density: Annotated[
        str | None, typer.Option(help='Caps; "none" leaves it to the patterns, as it is left to all but auto.')
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the decoder; fewer for a try.")] = None,
    few_layers: Annotated[
        int, typer.Option(min=1, help="Layers of the dense contenders from 512K tokens on; their times are scaled.")
    ] = 1,
    against: Annotated[str, typer.Option(help="Libraries of the dense contenders.")] = "cuDNN,flash",
    dense_form: Annotated[bool, typer.Option(help="Ours as it serves short prompts too, below 512K tokens.")] = True,
    floor: Annotated[bool, typer.Option(help="The decoder without attention too.")] = True,
    second_process: Annotated[bool, typer.Option(help="Compile from the cache in a second process too.")] = True,
    device: Device = "cuda",
    repeats: Repeats = 3,
    out_path: Out = None,
    plot: Plot = None,
    redraw: Redraw = False,
) -> None:
    """The prefill of a text decoder against Inductor: time and what it goes into, memory, compile time.

    Example: [bold]python -m mmcompile bench prefill --layers 4 --tokens 4K,16K --out prefill.json[/bold]

    All of it: [bold]python -m mmcompile bench prefill --config qwen2.5-vl-7b --tokens 32K,128K,256K,512K,1M --patterns
    paper --no-dense-form --repeats 1 --out prefill.json --plot prefill.png[/bold]
    """
    from mmcompile.bench.measurement import choices, numbers
    from mmcompile.bench.prefill import PrefillBench
    from mmcompile.bench.prefill_calls import LIBRARIES

    caps = density or ("0.1,0.2" if patterns == "auto" else "none")
    measurement = PrefillBench(
        numbers("--tokens", tokens, token_count, 1, LONGEST),
        (None,) if caps == "none" else numbers("--density", caps, float, 1e-6, 1.0),
        patterns,
        config,
        layers,
        few_layers,
        choices("--against", against, LIBRARIES),
        dense_form,
        floor,
        second_process,
        device=device,
        repeats=repeats,
    )
    _run(measurement, out_path, plot, redraw)


def _run(measurement: Measurement, path: Path | None, plot: Path | None, redraw: bool) -> None:
    """Measure (or load), show, save and plot. The JSON is written after each group of rows, so that none is lost."""
    import torch

    from mmcompile.bench.figure import Figure
    from mmcompile.bench.measurement import require_device
    from mmcompile.bench.show import print_tables, save_plot
    from mmcompile.drawing import require_matplotlib

    if plot is not None:
        require_matplotlib()  # before minutes are spent
    if redraw:
        if path is None:
            raise OptionError("--redraw needs --out, the JSON that was measured before")
        figure = Figure.load(path)
        if figure.title != measurement.title:
            raise OptionError(f"{path}: holds {figure.title!r}, which another command measured")
    else:
        require_device(measurement.device)
        figure = Figure.begin(measurement.title, measurement.notes, measurement.device)
        try:
            with steps(measurement.steps) as step:
                for rows in measurement.measure(step):
                    figure.rows += rows
                    if path is not None:
                        figure.save(path)
        except torch.OutOfMemoryError as error:
            raise MMCompileError("the device has too little memory for these --tokens") from error
    print_tables(figure, out)
    out.print(measurement.summary(figure.rows), highlight=False)
    if plot is not None:
        save_plot(measurement, figure, plot)
        out.print(f"wrote {plot}", highlight=False)
    if path is None:
        out.print(
            "Next: [bold]--out FILE.json[/bold] keeps these figures with their command and commit.", highlight=False
        )
    elif not redraw:
        out.print(
            f"wrote {path}. Next: [bold]make figures[/bold] puts what stands in docs/figures into the docs.",
            highlight=False,
        )
