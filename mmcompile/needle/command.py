"""`python -m mmcompile needle`: what sparsity costs in quality, on a model that has learned to look."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmcompile.console import out

if TYPE_CHECKING:
    from mmcompile.needle.results import Results

SHORTEST, LONGEST = 256, 2**21  # tokens


def needle(
    model: Annotated[
        str | None,
        typer.Option(help="Folder made by save_pretrained, or a name on a hub; the kept one by default."),
    ] = None,
    videos: Annotated[Path | None, typer.Option(help="Folder of videos to hide cards in, not drawn scenes.")] = None,
    task: Annotated[str, typer.Option(help="Any of video, mixed (a quarter of the tokens is text).")] = "video,mixed",
    tokens: Annotated[str, typer.Option(help="Lengths, separated by commas.")] = "4096,8192",
    depths: Annotated[int, typer.Option(min=1, help="Depths of the needle, from first to last.")] = 11,
    samples: Annotated[int, typer.Option(min=1, help="Questions of each length and depth.")] = 1,
    questions: Annotated[
        int, typer.Option(min=1, max=6, help="Asked of each synthetic prompt, about another needle each.")
    ] = 1,
    methods: Annotated[str, typer.Option(help='Such as "dense,auto,a-shape@auto"; all.')] = "all",
    table: Annotated[Path | None, typer.Option(help="A searched table: methods table and table-none.")] = None,
    density: Annotated[float | None, typer.Option(help="Cap on the tiles that auto computes.")] = None,
    recall: Annotated[float | None, typer.Option(help="Share of the attention that auto is to cover.")] = None,
    check: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the query tiles to compare with dense attention; 0: none.")
    ] = 0.1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the GPU where there is one.")] = None,
    out_path: Annotated[Path, typer.Option("--out", help="JSON, written as it goes.")] = Path("needle.json"),
    plot: Annotated[Path | None, typer.Option(help="The heat maps, PNG or SVG; needs matplotlib.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --out holds.")] = False,
    redraw: Annotated[bool, typer.Option("--redraw", help="Show and plot --out again; ask nothing.")] = False,
) -> None:
    """Ask for a number on a card, hidden in a long video, under dense attention and under each sparse method.

    NAME@auto is a single pattern with the density that auto used. auto-q and auto-2d group tokens by modality.

    With --videos, a model that has a processor and a chat template is asked by these, one question a prompt.

    Example: [bold]python -m mmcompile needle --tokens 16384,32768 --samples 5 --plot needle.png[/bold]
    """
    from mmcompile.bench.measurement import choices, numbers
    from mmcompile.drawing import require_matplotlib
    from mmcompile.needle.evaluate import Plan
    from mmcompile.needle.haystack import TASKS
    from mmcompile.needle.methods import choose_methods
    from mmcompile.needle.results import Results
    from mmcompile.needle.run import ask, begin, load
    from mmcompile.tables import PatternTable

    if plot is not None:
        require_matplotlib()  # before minutes are spent
    if redraw:
        _show(Results.load(out_path), plot)
        return
    searched = None if table is None else PatternTable.load(table)
    plan = Plan(
        choices("--task", task, TASKS),
        numbers("--tokens", tokens, int, SHORTEST, LONGEST),
        tuple(place / max(1, depths - 1) for place in range(depths)),
        samples,
        choose_methods(methods, searched, density, recall),
        check,
    )
    decoder, prompts = load(model, videos, questions, dtype, device)
    told = {"model": model, "videos": videos and str(videos), "density": density, "recall": recall}
    results = begin(plan, decoder, prompts, out_path, resume=resume, **told)
    ask(plan, decoder, prompts, results, out_path)
    _show(results, plot)
    out.print(
        f"wrote {out_path}. Next: [bold]--samples 50 --resume[/bold] asks more, [bold]--redraw --plot needle.png[/bold]"
        " draws it; [bold]mmcompile.compile(model, check=0.01)[/bold] keeps an eye on a model in use.",
        highlight=False,
        soft_wrap=True,
    )


def _show(results: Results, plot: Path | None) -> None:
    """Tables, the heads that are farthest off, and the picture."""
    from mmcompile.bench.show import print_tables
    from mmcompile.drawing import save_drawing
    from mmcompile.needle.heat_map import draw_heat_maps

    results.figure.rows = results.rows()
    print_tables(results.figure, out)
    for head in results.worst_heads()[:3]:
        out.print(
            f"{head['task']}, {head['tokens']} tokens, {head['method']}: layer {head['layer']} head {head['head']} "
            f"held {head['recall']:.1%} of its attention, estimated {head['estimated']:.1%}",
            highlight=False,
        )
    if plot is not None:
        save_drawing(draw_heat_maps(results), plot)
        out.print(f"wrote {plot}", highlight=False, soft_wrap=True)
