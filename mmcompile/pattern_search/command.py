"""`python -m mmcompile search`: a pattern table for a model, from videos."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from mmcompile.console import out


def search(
    model: Annotated[str, typer.Option(help="Folder made by save_pretrained, or a name on a model hub.")],
    target: Annotated[Path, typer.Option("--out", help="Where the table goes, JSON.")],
    video: Annotated[list[Path] | None, typer.Option(help="A sample; may be repeated. None: random words.")] = None,
    held_out: Annotated[list[Path] | None, typer.Option(help="A video to validate on; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Length of a prompt; with --video, the most.")] = 25000,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames to take of a video; all by default.")] = None,
    density: Annotated[float | None, typer.Option(help="Budget: the time of this share of the tiles.")] = None,
    recall: Annotated[float | None, typer.Option(help="Or a target: the share of attention to cover.")] = None,
    candidates: Annotated[str, typer.Option(help="full, or what the paper searches: paper.")] = "full",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted search.")] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Two layers with random weights, from the config alone.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the GPU where there is one.")] = None,
) -> None:
    """Find the best pattern of every head of a model, on this device, and write a table of them.

    Finished layers are kept in a folder beside the table until it is done; --resume goes on with them.

    Example: [bold]python -m mmcompile search --model ./my-model --video holiday.mp4 --held-out party.mp4 --out
    table.json[/bold]
    """
    from mmcompile.huggingface import example_inputs, load_model
    from mmcompile.pattern_search.search import search as find
    from mmcompile.tiny_config import load_config, tiny_model
    from mmcompile.video import read_frames

    loaded = tiny_model(load_config(model)) if tiny else load_model(model, dtype=dtype, device=device)

    def prompt(path: Path | None) -> dict[str, Any]:
        pictures = None if path is None else read_frames(path, frames)
        return example_inputs(loaded, frames=pictures, tokens=tokens)

    seen, unseen = video or [], held_out or []
    try:
        table = find(
            loaded,
            [prompt(path) for path in seen] or prompt(None),
            density=density,
            recall=recall,
            candidates=candidates,
            held_out=[prompt(path) for path in unseen],
            names=[*([path.name for path in seen] or ["random words"]), *(path.name for path in unseen)],
            partial=target.with_name(f"{target.name}.partial"),
            resume=resume,
        )
    except KeyboardInterrupt:
        out.print("interrupted; the same command with [bold]--resume[/bold] goes on", highlight=False)
        raise typer.Exit(130) from None
    table.save(target)
    # A path that is wrapped could not be copied.
    out.print(f"wrote {target}: {summary(table)}", highlight=False, soft_wrap=True)
    out.print(
        f'Next: [bold]mmcompile.compile(model, patterns="{target}")[/bold] before the first prefill.',
        highlight=False,
        soft_wrap=True,
    )


def summary(table: Any) -> str:
    """What a searched table is and how good, in a line."""
    from mmcompile.tables import mean_error

    layers, heads = table.shape
    told = table.settings
    spent, budget, dense = told["ms"], told["budget ms"], told["dense ms"]
    text = f"patterns of {layers} layers x {heads} heads, {spent:.3g} ms of attention a prefill (budget {budget:.3g}, "
    text += f"dense {dense:.3g}); mean error {mean_error(table):.3g}"
    text += f", {told['mean error of a uniform budget']:.3g} with a uniform budget"
    unseen = mean_error(table, held_out=True)
    text += "" if math.isnan(unseen) else f", {unseen:.3g} on held-out samples"
    if told["recall"] is None and budget > 0.9 * dense:
        text += ". So short a prompt leaves dense attention in its budget: take more --tokens, or a smaller --density"
    return text
