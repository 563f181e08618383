"""A package of AOTInductor against the compiled backend: the prefill of Qwen2.5-VL-7B's text decoder.

    python benchmarks/exported_prefill.py --out x.json   # 4 layers, "auto" at 10 %, on a CUDA device
    python benchmarks/exported_prefill.py --tiny         # a trial of the script itself, on the CPU

One process makes the package. Another loads it, checks it against the compiled backend at each length, and times both
in turns. Weights are random: time depends on shapes and on the tiles alone.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

import mmcompile
from mmcompile.bench.figure import Figure
from mmcompile.bench.prefill import QWEN2_5_VL_7B
from mmcompile.bench.timing import race, significant
from mmcompile.bench.video_prompt import PATTERNS, boundaries, positions
from mmcompile.passes.add_boundaries import BOUNDARY_NAMES
from mmcompile.prefill_module import PrefillModule

NARROW = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 65536, 262144])
    parser.add_argument("--pattern", choices=PATTERNS, default="auto")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON: rows, command, commit, versions, device")
    parser.add_argument("--tiny", action="store_true", help="narrow layers, short prompts, the CPU, no compiler")
    parser.add_argument("--package", type=Path, help=argparse.SUPPRESS)  # the second process
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.layers, arguments.tokens, arguments.repeats = 1, [400, 700], 1
    if arguments.package is not None:
        compare(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefill.pt2"
        begin = time.perf_counter()
        program = mmcompile.export(decoder(arguments), kwargs=inputs(arguments, 1000), **options(arguments))
        print(f"exported in {time.perf_counter() - begin:.1f} s", flush=True)
        begin = time.perf_counter()
        mmcompile.package(program, path)
        size = path.stat().st_size / 1e9
        print(f"packaged in {time.perf_counter() - begin:.1f} s, {size:.2f} GB", flush=True)
        del program
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--package", str(path)], check=True)


@torch.no_grad()
def compare(arguments: argparse.Namespace) -> None:
    """Outputs and times of the package and of the compiled backend, at each length."""
    kind = device(arguments)
    package = torch._inductor.aoti_load_package(str(arguments.package))
    settings = options(arguments) | {"min_tokens": 0, "inner": "eager" if arguments.tiny else "inductor"}
    notes = f"{arguments.layers} layers, random weights, pattern {arguments.pattern} at {arguments.density:g}"
    figure = Figure.begin("A package beside the compiled backend", notes, kind)
    figure.command = figure.command.split(" --package ")[0]
    compiled = torch.compile(PrefillModule(decoder(arguments)), backend="mminference", options=settings)
    for tokens in arguments.tokens:
        given, told = inputs(arguments, tokens), boundaries(tokens, kind)
        named = dict(zip(BOUNDARY_NAMES, told, strict=True))
        for tensor in given.values():
            torch._dynamo.maybe_mark_dynamic(tensor, tensor.shape.index(tokens))

        def packaged(given: Any = given, named: Any = named) -> Any:
            return package(**given, **named)

        def by_backend(given: Any = given, told: Any = told) -> Any:
            with mmcompile.bind(told):
                return compiled(**given)

        found, expected = (call()["last_hidden_state"].float() for call in (packaged, by_backend))
        error = float((found - expected).norm() / expected.norm())
        del found, expected
        times: Any = race({"package": packaged, "compiled": by_backend}, kind, arguments.repeats)
        row = {"tokens": tokens} | times["package"].columns("package ms") | times["compiled"].columns("compiled ms")
        row |= {"ratio": significant(times["package"].ms / times["compiled"].ms), "difference": significant(error, 2)}
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        figure.rows.append(row)
        if arguments.out is not None:
            figure.save(arguments.out)


def device(arguments: argparse.Namespace) -> str:
    return "cpu" if arguments.tiny else "cuda"


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"patterns": PATTERNS[arguments.pattern], "density": arguments.density}


def decoder(arguments: argparse.Namespace) -> Qwen2_5_VLTextModel:
    """The same weights in both processes; no vocabulary to speak of, since embeddings come ready-made."""
    sizes = QWEN2_5_VL_7B | {"vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2}
    if arguments.tiny:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
        sizes |= NARROW | {"rope_parameters": rope}
    config = Qwen2_5_VLTextConfig(num_hidden_layers=arguments.layers, **sizes)
    torch.manual_seed(0)
    with torch.device(device(arguments)):
        return Qwen2_5_VLTextModel._from_config(config, dtype=dtype(arguments)).eval()


def dtype(arguments: argparse.Namespace) -> torch.dtype:
    return torch.float32 if arguments.tiny else torch.bfloat16


def inputs(arguments: argparse.Namespace, tokens: int) -> dict[str, Tensor]:
    kind = device(arguments)
    generator = torch.Generator(kind).manual_seed(tokens)
    width = (NARROW if arguments.tiny else QWEN2_5_VL_7B)["hidden_size"]
    hidden = torch.randn(1, tokens, width, device=kind, dtype=dtype(arguments), generator=generator)
    return {"inputs_embeds": hidden, "position_ids": positions(tokens).to(kind)}


if __name__ == "__main__":
    main()
