"""`python -m mmcompile export` and `run`: a package of a model's text prefill, and a try of one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmcompile.aoti_package import IMPORT, is_package, package, packed_record
from mmcompile.console import out, steps
from mmcompile.errors import ExportError, OptionError
from mmcompile.export_program import export as export_program
from mmcompile.huggingface import example_inputs, load_model
from mmcompile.input_boundaries import BoundaryTensors, boundary_tensors_of
from mmcompile.modality import unknown_boundaries
from mmcompile.passes.add_boundaries import BOUNDARY_NAMES
from mmcompile.prefill_module import PrefillModule
from mmcompile.program_record import ProgramRecord, record_of
from mmcompile.report import Report
from mmcompile.text_prefill import text_prefill
from mmcompile.video import read_frames

EXAMPLE_TOKENS = 512
_UNITS = {"": 1, "K": 2**10, "M": 2**20}
Model = Annotated[str, typer.Option(help="Folder made by save_pretrained, or a name on a model hub.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the GPU where there is one.")]


def export(
    model: Model,
    out_path: Annotated[Path, typer.Option("--out", help="A .pt2 file.")] = Path("model.pt2"),
    patterns: Annotated[str, typer.Option(help='"auto", or the path of a table.')] = "auto",
    density: Annotated[float | None, typer.Option(help="Cap on the computed tiles of each head.")] = None,
    recall: Annotated[float | None, typer.Option(help="Share of the attention to cover, within the cap.")] = None,
    tokens_max: Annotated[str, typer.Option(help="The longest prompt: 32768, 256K, 1M.")] = "1M",
    cache_room: Annotated[bool, typer.Option(help="Return a KV cache with room for --tokens-max tokens.")] = False,
    program: Annotated[bool, typer.Option(help="Write a program, as torch.export.save does, uncompiled.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Compile a model's text prefill ahead of time, into a package that takes any prompt's boundaries as inputs.

    Encoders of images and videos are no part of it: the package takes the embeddings that they fill.

    Example: [bold]python -m mmcompile export --model ./my-model --out model.pt2 --patterns table.json[/bold]
    """
    longest = parse_tokens(tokens_max)
    with steps(3) as step:
        step(f"load {model}")
        loaded = load_model(model, dtype=dtype, device=device)
        part = text_prefill(loaded, **example_inputs(loaded, tokens=min(EXAMPLE_TOKENS, longest)))
        step("export and rewrite")
        made = export_program(
            part.module,
            kwargs=part.kwargs,
            tokens_max=longest,
            cache_length=longest if cache_room else None,
            patterns=patterns,
            density=density,
            recall=recall,
        )
        record = record_of(made)
        if record is None:
            raise ExportError(
                f"no attention of {model} can be sparse; python -m mmcompile explain --model {model} says why"
            )
        step("save" if program else "compile ahead of time")
        if program:
            torch.export.save(made, out_path)
        else:
            package(made, out_path)
    sparse = sum(site.sparse for site in record.sites)
    what = "program" if program else f"package, for {loaded.device.type}, to be loaded after [bold]{IMPORT}[/bold]"
    out.print(f"wrote {out_path}: a {what}; {sparse} of {len(record.sites)} attentions are sparse.", highlight=False)
    out.print(
        f"Next: [bold]python -m mmcompile run {out_path} --model {model} --video FILE[/bold] tries it, and "
        f"[bold]python -m mmcompile explain {out_path}[/bold] says what is in it.",
        highlight=False,
    )


def run(
    path: Annotated[Path, typer.Argument(help="What `export` wrote: a package or a program.")],
    model: Model,
    video: Annotated[Path | None, typer.Option(help="Put this video in the prompt (Qwen2-VL, Qwen2.5-VL).")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames to take of the video; all by default.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Length of the prompt; with --video, the most.")] = 8192,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Try a package on a prompt: the model's encoders make the embeddings, and the package does the prefill.

    The model's own dense prefill runs beside it.

    Example: [bold]python -m mmcompile run model.pt2 --model ./my-model --video holiday.mp4[/bold]
    """
    with steps(4) as step:
        step(f"load {path}")
        prefill = load(path)
        step(f"load {model}, make a prompt")
        loaded = load_model(model, dtype=dtype, device=device)
        pictures = None if video is None else read_frames(video, frames)
        inputs = example_inputs(loaded, frames=pictures, tokens=tokens)
        part = text_prefill(loaded, **inputs)
        boundaries = boundary_tensors_of(loaded.config, inputs) or unknown_boundaries(loaded.device)
        step("run the package")
        given = part.kwargs | dict(zip(BOUNDARY_NAMES, boundaries, strict=True))
        with torch.no_grad():
            got, seconds = _timed(lambda: prefill(**given))
            step("run the model")
            expected, dense_seconds = _timed(lambda: PrefillModule(part.module)(**part.kwargs))
    name = next(iter(expected))
    last, dense = (result[name][:, -1].float() for result in (got, expected))
    length = part.kwargs["inputs_embeds"].shape[1]
    out.print(
        f"{length} tokens in {_segments(boundaries)} segments: the package took {seconds:.2f} s, the model itself "
        f"{dense_seconds:.2f} s (the second call of each). The last token's {name} differ by "
        f"{float((last - dense).norm() / dense.norm()):.2g} of their norm.",
        highlight=False,
    )
    out.print(
        "Next: decode from the keys and values that it returned; "
        f"[bold]python -m mmcompile explain {path}[/bold] says what is in it.",
        highlight=False,
    )


def load(path: Path) -> Any:
    """A package or a program as a function; ExportError where it is neither, or was made for another device."""
    try:
        if is_package(path):
            return torch._inductor.aoti_load_package(str(path))
        return torch.export.load(path).module()
    except RuntimeError as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{path} cannot be loaded here: {str(error).splitlines()[0]}") from error


def explain_file(path: Path) -> tuple[Report, ProgramRecord]:
    """What a program or a package keeps of how it was made. Raises ExportError for a file that keeps nothing."""
    record = packed_record(path) if is_package(path) else record_of(torch.export.load(path))
    if record is None:
        raise ExportError(f"{path}: nothing of mmcompile's is in it; mmcompile.transform makes a program sparse")
    return Report(record.sites, 1, (), (), ()), record


def parse_tokens(text: str) -> int:
    """A number of tokens, such as 32768, 256K or 1M. Raises OptionError."""
    digits = text.rstrip("KMkm")
    unit = text[len(digits) :].upper()
    if not digits.isdigit() or unit not in _UNITS or int(digits) * _UNITS[unit] < 2:
        raise OptionError(f"--tokens-max {text}: must be a number of at least 2, such as 32768, 256K or 1M")
    return int(digits) * _UNITS[unit]


def _timed(call: Any) -> tuple[Any, float]:
    """What a call returns, and the seconds of the second one."""
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def _segments(boundaries: BoundaryTensors) -> int:
    offsets = boundaries.offsets
    return int((offsets < offsets[-1]).sum())
