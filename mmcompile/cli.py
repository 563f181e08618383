"""The command line: `python -m mmcompile COMMAND`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.markup import escape

from mmcompile.bench.command import bench
from mmcompile.console import out, progress_console, steps, write
from mmcompile.errors import MMCompileError, OptionError
from mmcompile.export_command import explain_file, export, run
from mmcompile.needle.command import needle
from mmcompile.pattern_search.command import search
from mmcompile.pictures.command import plot

# Prompts of more tokens are not run, not even without attention: one of TRACED tokens tells of them.
LONGEST_TRACED, TRACED = 2**15, 2**11

app = typer.Typer(
    help="A torch.compile backend that makes the prefill of vision-language models sparse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(bench, name="bench")
app.command()(search)
app.command()(export)
app.command()(run)
app.command()(needle)
app.add_typer(plot, name="plot")


def main() -> None:
    """Run a command; what a user can put right ends in one line and exit code 1."""
    try:
        app()
    except MMCompileError as error:
        progress_console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)


@app.callback()
def _quiet() -> None:
    # Dynamo tells of every graph break as a warning; `explain` lists them where somebody looks for them.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    # One progress bar is enough.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@app.command()
def demo(
    video: Annotated[Path | None, typer.Option(help="Video file; the one in examples/ by default.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames to take, spread evenly over the video.")] = 32,
    tokens_max: Annotated[int, typer.Option(min=1, help="The most tokens that the prompt may have.")] = 8192,
    inner: Annotated[str | None, typer.Option(help="What compiles the rewritten graphs: inductor, eager.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything shown here too.")] = None,
) -> None:
    """Show a tiny Qwen2.5-VL reading a video: dense, compiled with every tile, compiled sparse.

    Example: [bold]python -m mmcompile demo --video holiday.mp4 --json demo.json[/bold]
    """
    from mmcompile import demo as shown
    from mmcompile.demo_tables import decisions_table, runs_table

    with steps(shown.step_count()) as step:
        result = shown.run(video, frames=frames, tokens=tokens_max, inner=inner, step=step)
    out.print(decisions_table(result.report))
    out.print(runs_table(result))
    if inner is None and result.inner != "inductor":
        out.print(
            "No C++ compiler with Python's headers was found, so the graphs ran as they are. With g++ and "
            "python3-dev installed, Inductor compiles them, as it does in real use."
        )
    if json_path is not None:
        write(json_path, json.dumps(result.to_dict(), indent=2))
    if not result.exact:
        raise MMCompileError(
            f"with every tile computed the answer must be dense attention's, and differs by "
            f"{result.runs[1].logit_difference:.1e}: please report it, with --json"
        )
    out.print(
        f"{result.report.sparse_count} attentions of the decoder were rewritten; with every tile they gave "
        "dense attention's answer to rounding. Next: [bold]mmcompile.compile(your_model)[/bold], or "
        "[bold]python -m mmcompile explain --model PATH[/bold] for what it would do to yours.",
        highlight=False,
    )


@app.command()
def explain(
    file: Annotated[Path | None, typer.Argument(help="A program or a package that `export` wrote.")] = None,
    model: Annotated[str, typer.Option(help="Folder made by save_pretrained, or a name on a model hub.")] = "",
    tokens: Annotated[
        str, typer.Option(help="Length of the prompt, such as 4096, 128K or 1M; with --video, the most.")
    ] = "32K",
    video: Annotated[Path | None, typer.Option(help="Put this video in the prompt (Qwen2-VL, Qwen2.5-VL).")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames to take of the video; all by default.")] = None,
    logits_to_keep: Annotated[
        int | None, typer.Option(min=1, help="Make logits of the last tokens alone; a plain call makes all of them.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the GPU where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say for every attention of a model whether it becomes sparse, and why not; and what memory a prefill takes.

    No attention is computed, and of prompts over 32K tokens nothing at all: a short one is traced in their place.

    Example: [bold]python -m mmcompile explain --model ./my-model --tokens 1M[/bold]

    Example: [bold]python -m mmcompile explain model.pt2[/bold]
    """
    if (file is None) == (not model):
        raise OptionError("explain: say --model PATH, or the name of a .pt2 file, one of the two")
    if file is not None:
        report, record = explain_file(file)
        if as_json:
            print(json.dumps(record.to_dict(), indent=2))
            return
        out.print(report)
        out.print(record.describe(), highlight=False, markup=False)
        out.print(record.next_step(file), highlight=False)
        return
    import mmcompile
    from mmcompile.bench.measurement import numbers, token_count
    from mmcompile.huggingface import example_inputs, load_model
    from mmcompile.video import read_frames

    (length,) = numbers("--tokens", tokens, token_count, 2, 2**24)
    with steps(3) as step:
        step(f"load {model}")
        loaded = load_model(model, dtype=dtype, device=device)
        step("make a prompt")
        pictures = None if video is None else read_frames(video, frames)
        traced = length if length <= LONGEST_TRACED or video is not None else TRACED
        inputs = example_inputs(loaded, frames=pictures, tokens=traced)
        asked = inputs["input_ids"].shape[1] if traced == length else length
        step("trace and decide")
        kept = {} if logits_to_keep is None else {"logits_to_keep": logits_to_keep}
        report = mmcompile.explain(loaded, tokens=asked, **inputs, **kept)
    if as_json:
        print(report.to_json())
        return
    out.print(report)
    if report.memory is not None:
        out.print(report.memory)
        for trap in report.memory.traps:
            out.print(f"[yellow]trap:[/yellow] {escape(trap)}", highlight=False)
    elif report.memory_unknown:
        out.print(f"no memory could be predicted: {report.memory_unknown}", highlight=False, markup=False)
    for reason in report.breaks:
        out.print(f"graph break: {reason}", highlight=False, markup=False)
    out.print(
        f"{report.sparse_count} of {len(report.sites)} attentions become sparse. "
        "Next: [bold]mmcompile.compile(model)[/bold] before the first prefill.",
        highlight=False,
    )


@app.command()
def doctor(
    model: Annotated[str, typer.Option(help="Folder made by save_pretrained, or a name on a model hub.")],
    tiny: Annotated[
        bool, typer.Option(help="Two layers of the same kind with random weights, from the config alone.")
    ] = True,
    way: Annotated[
        list[str] | None, typer.Option(help="torch.compile, mmcompile.compile, text model; all by default.")
    ] = None,
    check: Annotated[list[str] | None, typer.Option(help="Run this check alone; may be repeated.")] = None,
    inner: Annotated[str, typer.Option(help="What compiles the rewritten graphs: eager, inductor.")] = "eager",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything found here too.")] = None,
) -> None:
    """Check that a model is served: right with every tile, nothing compiled twice, and what becomes sparse.

    Example: [bold]python -m mmcompile doctor --model ./my-model --json doctor.json[/bold]
    """
    from mmcompile.doctor import CHECKS, WAYS, Doctor
    from mmcompile.doctor_prompts import make_prompts
    from mmcompile.huggingface import load_model
    from mmcompile.tiny_config import load_config, tiny_model

    ways, checks = way or WAYS, check or CHECKS
    with steps(2 + len(ways) * len(checks)) as step:
        step(f"load {model}")
        patient = tiny_model(load_config(model)) if tiny else load_model(model)
        step("make prompts")
        made = make_prompts(patient, model)
        diagnosis = Doctor(patient, made.prompts, inner=inner).diagnose(ways, checks, step=step)
    out.print(diagnosis)
    out.print(f"prompts: {made.told}", highlight=False, markup=False)
    if json_path is not None:
        found = {"model": model, "tiny": tiny, "prompts": made.told} | diagnosis.to_dict()
        write(json_path, json.dumps(found, indent=2))
    out.print(diagnosis.advice(), highlight=False)
    if not diagnosis.healthy:
        raise typer.Exit(1)


@app.command()
def report(
    model: Annotated[str, typer.Option(help="Folder made by save_pretrained, or a name on a model hub.")],
    patterns: Annotated[str, typer.Option(help='"auto", the path of a table, or a kind such as grid.')] = "auto",
    density: Annotated[float | None, typer.Option(help="Cap on the computed tiles of each head.")] = None,
    draw: Annotated[str | None, typer.Option(help="Heads to draw, LAYER:HEAD,... or none; a few by default.")] = None,
    video: Annotated[Path | None, typer.Option(help="Put this video in the prompt (Qwen2-VL, Qwen2.5-VL).")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames to take of the video; all by default.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Length of the prompt; with --video, the most.")] = 8192,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the GPU where there is one.")] = None,
    out_path: Annotated[Path, typer.Option("--out", help="One HTML file that needs no network.")] = Path("report.html"),
) -> None:
    """A page about every head of a model on one prompt: patterns, densities, errors, pictures, and every decision.

    Example: [bold]python -m mmcompile report --model ./my-model --video holiday.mp4 --patterns table.json[/bold]
    """
    from mmcompile.drawing import require_matplotlib

    require_matplotlib()  # before minutes are spent
    import mmcompile
    from mmcompile.pictures.command import load, parse_patterns
    from mmcompile.pictures.layers import architecture_of
    from mmcompile.pictures.measure import choose_heads, measure
    from mmcompile.pictures.model_page import make_page
    from mmcompile.pictures.page import render

    options = parse_patterns(patterns, density)
    passes = options.for_passes
    with steps(3) as step:
        loaded, inputs = load(step, model, options, video, frames, tokens, dtype, device)
        architecture = architecture_of(loaded)
        chosen = choose_heads(draw, architecture, passes["patterns"])
        step("trace and decide")
        explained = mmcompile.explain(loaded, **inputs, options=options)
    with steps(architecture.layers + len(chosen)) as step:
        found = measure(loaded, inputs, passes["patterns"], passes["density"], chosen, step)
    table = options.patterns if isinstance(options.patterns, mmcompile.PatternTable) else None
    page = make_page(model, patterns, explained, found, chosen, table, loaded.device.type)
    write(out_path, render(page))
    error, layer, head = found.worst()
    out.print(
        f"{len(found.scores)} layers, {len(found.pictures)} pictures of heads; the largest error is {error:.2g}, of "
        f"layer {layer}, head {head}. Next: open it in a browser; [bold]--draw {layer}:{head}[/bold] shows that head.",
        highlight=False,
    )
