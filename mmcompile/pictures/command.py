"""The command line: `python -m mmcompile plot attention|heads|recall`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmcompile.console import out, steps
from mmcompile.errors import MMCompileError, OptionError

if TYPE_CHECKING:
    from mmcompile.options import Options

plot = typer.Typer(
    help="Draw what heads attend to and what is computed of it; needs matplotlib.",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Option(help="Folder made by save_pretrained, or a name on a model hub.")]
Patterns = Annotated[str, typer.Option(help='"auto", the path of a pattern table, or a kind such as grid.')]
Density = Annotated[float | None, typer.Option(help="Cap on the computed tiles, as a fraction of the causal ones.")]
Tokens = Annotated[int, typer.Option(min=2, help="Length of the prompt; with --video, the most.")]
Video = Annotated[Path | None, typer.Option(help="Put this video in the prompt (Qwen2-VL, Qwen2.5-VL).")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames to take of the video; all by default.")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the GPU where there is one.")]
Layer = Annotated[int, typer.Option(min=0, help="Of the text decoder.")]
Out = Annotated[Path, typer.Option("--out", help="PNG, SVG or PDF.")]


@plot.command()
def attention(
    model: Model,
    layer: Layer,
    head: Annotated[int, typer.Option(min=0, help="Of the layer.")],
    patterns: Patterns = "auto",
    density: Density = None,
    pool: Annotated[str, typer.Option(help="What a cell of long prompts shows: max or mean.")] = "max",
    video: Video = None,
    frames: Frames = None,
    tokens: Tokens = 8192,
    dtype: DType = "auto",
    device: Device = None,
    out_path: Out = Path("attention.png"),
) -> None:
    """One head's attention with the tiles that are computed, in token order and in the head's own.

    Example: [bold]python -m mmcompile plot attention --model ./my-model --video holiday.mp4 --layer 3 --head 5[/bold]
    """
    from mmcompile.drawing import require_matplotlib, save_drawing

    require_matplotlib()  # before minutes are spent
    from mmcompile.kernels.attend import plan_attention
    from mmcompile.kernels.patterns import TILE
    from mmcompile.pictures.attention_map import attention_map, require_pool
    from mmcompile.pictures.draw_attention_map import draw_attention_map
    from mmcompile.pictures.layers import describe_sample, seen_layer
    from mmcompile.pictures.measure import of_layer

    require_pool(pool)
    options = parse_patterns(patterns, density)
    with steps(3) as step:
        loaded, inputs = load(step, model, options, video, frames, tokens, dtype, device)
        step(f"run to layer {layer}")
        seen = seen_layer(loaded, inputs, layer)
    heads, length = seen.query.shape[1:3]
    _require_head(head, heads)
    passes = options.for_passes
    of_head = of_layer(passes["patterns"], passes["density"], layer, heads)
    with steps(1 + -(-length // TILE)) as step:
        step("plan")
        planned = plan_attention(seen.query, seen.key, of_head, seen.boundaries, **seen.mask)
        drawn = attention_map(seen, planned, head, pool=pool, step=step)
    save_drawing(draw_attention_map(drawn, f"layer {layer}, head {head}: {of_head[head]}"), out_path)
    out.print(f"{describe_sample(seen)}.", highlight=False)
    out.print(
        f"wrote {out_path}: {drawn.density:.1%} of the causal tiles hold {drawn.recall:.1%} of the attention. "
        f"Next: [bold]plot recall[/bold] of the same head says which pattern would hold more.",
        highlight=False,
    )


@plot.command()
def heads(
    table: Annotated[Path, typer.Argument(help="A pattern table, from `python -m mmcompile search`.")],
    out_path: Out = Path("heads.png"),
) -> None:
    """A map of layers x heads: the patterns of a table, and the densities and errors that the search found.

    Example: [bold]python -m mmcompile plot heads table.json --out heads.png[/bold]
    """
    from mmcompile.drawing import require_matplotlib, save_drawing

    require_matplotlib()
    from mmcompile.pictures.head_map import draw_head_map
    from mmcompile.tables import PatternTable

    loaded = _load_table(PatternTable, table)
    figures = {}
    if loaded.heads is not None:
        figures["density"] = [[head.density for head in of_layer] for of_layer in loaded.heads]
        figures["error of the output"] = [[head.error for head in of_layer] for of_layer in loaded.heads]
    save_drawing(draw_head_map(loaded.layers, figures, table.name), out_path)
    layers, count = loaded.shape
    unknown = "" if figures else "; the table holds no densities or errors, it was not made by a search"
    out.print(
        f"wrote {out_path}: {layers} layers x {count} heads{unknown}. Next: [bold]plot attention --patterns {table}"
        "[/bold] shows one of them at work.",
        highlight=False,
    )


@plot.command()
def recall(
    model: Model,
    layer: Layer,
    head: Annotated[int | None, typer.Option(min=0, help="Of the layer; the mean of all by default.")] = None,
    video: Video = None,
    frames: Frames = None,
    tokens: Tokens = 8192,
    dtype: DType = "auto",
    device: Device = None,
    out_path: Out = Path("recall.png"),
) -> None:
    """What each pattern would hold of the attention, as more tiles are allowed.

    Example: [bold]python -m mmcompile plot recall --model ./my-model --video holiday.mp4 --layer 3 --head 5[/bold]
    """
    from mmcompile.drawing import require_matplotlib, save_drawing

    require_matplotlib()
    from mmcompile.pictures.layers import describe_sample, seen_layer
    from mmcompile.pictures.recall_curve import draw_recall_curves, recall_curves, swept_patterns

    with steps(3 + len(swept_patterns(tokens))) as step:
        loaded, inputs = load(step, model, parse_patterns("auto", None), video, frames, tokens, dtype, device)
        step(f"run to layer {layer}")
        seen = seen_layer(loaded, inputs, layer)
        if head is not None:
            _require_head(head, seen.query.shape[1])
        which = range(seen.query.shape[1]) if head is None else [head]
        curves = recall_curves(seen, which, swept_patterns(seen.key.shape[2]), step=step)
    title = f"layer {layer}, " + ("mean of all heads" if head is None else f"head {head}")
    save_drawing(draw_recall_curves(curves, title), out_path)
    best = max(curves, key=lambda name: curves[name][-1].recall)
    point = curves[best][-1]
    out.print(f"{describe_sample(seen)}.", highlight=False)
    out.print(
        f"wrote {out_path}: {best} holds most, {point.recall:.1%} in {point.density:.1%} of the causal tiles. "
        "Next: [bold]python -m mmcompile search[/bold] finds each head's best pattern.",
        highlight=False,
    )


def parse_patterns(patterns: str, density: float | None) -> Options:
    """Options of a prefill that is never too short. Raises OptionError."""
    from mmcompile.kernels.patterns import KINDS, HeadPattern
    from mmcompile.options import Options

    try:
        chosen: Any = HeadPattern(patterns) if patterns in KINDS else patterns
    except ValueError as error:
        raise OptionError(f"--patterns {patterns}: {error}") from error
    return Options(patterns=chosen, density=density, min_tokens=0)


def load(
    step: Any,
    model: str,
    options: Options,
    video: Path | None,
    frames: int | None,
    tokens: int,
    dtype: str,
    device: str | None,
) -> tuple[Any, dict[str, Any]]:
    """The model, which a pattern table must be for, and a prompt: two steps."""
    from mmcompile.architecture import Architecture
    from mmcompile.huggingface import example_inputs, load_model
    from mmcompile.tables import PatternTable
    from mmcompile.video import read_frames

    step(f"load {model}")
    loaded = load_model(model, dtype=dtype, device=device)
    if isinstance(options.patterns, PatternTable):
        options.patterns.require(Architecture.of(loaded))
    step("make a prompt")
    return loaded, example_inputs(loaded, frames=None if video is None else read_frames(video, frames), tokens=tokens)


def _load_table(kind: Any, path: Path) -> Any:
    try:
        return kind.load(path)
    except OSError as error:
        raise MMCompileError(f"{path}: cannot be read ({error.strerror})") from error


def _require_head(head: int, heads: int) -> None:
    if head >= heads:
        raise OptionError(f"--head {head}: the layer has heads 0 to {heads - 1}")
