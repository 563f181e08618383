"""Compile a vision-language model's prefill ahead of time, and run the package in a process of its own.

    python examples/export_aoti.py --model PATH --out model.pt2
    python examples/export_aoti.py --tiny   # two layers with random weights: no network, no GPU, a minute

The encoders run as they are; the package takes the embeddings that they fill, and the prompt's boundaries.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import mmcompile
from mmcompile.huggingface import Text, example_inputs, load_model, prompts, video_of
from mmcompile.tiny_qwen import tiny_qwen2_5_vl

# What the process that serves runs: torch, the ops, and the package; no model, no tracing, no compiler.
SERVE = """
import sys
import torch
import mmcompile  # the ops that the package calls

prefill = torch._inductor.aoti_load_package(sys.argv[1])
prompts, results = torch.load(sys.argv[2]), []
for inputs in prompts:
    results.append(prefill(**inputs))
    print(inputs["inputs_embeds"].shape[1], "tokens: next token", results[-1]["logits"][0, -1].argmax().item())
torch.save([{name: result[name] for name in ("logits", "keys", "values")} for result in results], sys.argv[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder made by save_pretrained, or a name on a model hub")
    parser.add_argument("--tiny", action="store_true", help="a tiny Qwen2.5-VL with random weights")
    parser.add_argument("--out", type=Path, help="the package; a temporary file by default")
    arguments = parser.parse_args()
    if bool(arguments.model) == arguments.tiny:
        parser.error("say --model PATH or --tiny")
    model = tiny_qwen2_5_vl(layers=1) if arguments.tiny else load_model(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        show(model, arguments.out or Path(folder) / "model.pt2", Path(folder))


def show(model: torch.nn.Module, path: Path, folder: Path) -> None:
    example = prompt(model, frames=2)
    program = mmcompile.export(model, kwargs=mmcompile.text_prefill(model, **example).kwargs, density=0.5)
    print(mmcompile.explain(program))
    mmcompile.package(program, path)
    print(f"wrote {path}")

    # Other lengths and other boundaries: nothing is compiled again.
    calls = [prompt(model, frames) for frames in (2, 6, 4)]
    inputs = [mmcompile.text_prefill(model, **call).kwargs | boundaries(model, call) for call in calls]
    torch.save(inputs, folder / "prompts.pt")
    command = [sys.executable, "-c", SERVE, *map(str, (path, folder / "prompts.pt", folder / "results.pt"))]
    subprocess.run(command, check=True)
    served = torch.load(folder / "results.pt")
    with torch.no_grad():
        here = [program.module()(**one) for one in inputs]
    worst = max(float((a["logits"] - b["logits"]).abs().max()) for a, b in zip(served, here, strict=True))
    print(f"the package and the program that it was made of differ by at most {worst:.1e}")
    print("Next: decode from the keys and values that the package returns, in any engine.")


def prompt(model: torch.nn.Module, frames: int) -> dict[str, torch.Tensor]:
    """Text, a video of random frames, text, as the model's processor would lay it out."""
    if model.config.model_type not in ("qwen2_vl", "qwen2_5_vl"):
        return example_inputs(model, tokens=64 * frames)
    pictures = torch.randint(0, 256, (2 * frames, 112, 112, 3), dtype=torch.uint8)
    return prompts(model, [[Text(20), video_of(model.config, pictures, 4096), Text(30)]])


def boundaries(model: torch.nn.Module, call: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prompt's boundaries by the names of the package's inputs."""
    found = mmcompile.ModalityBoundaries.from_inputs(
        model.config, **{name: call[name] for name in ("input_ids", "video_grid_thw") if name in call}
    )
    names = ("modality_offsets", "modality", "modality_grid")
    return dict(zip(names, found.tensors(call["input_ids"].device), strict=True))


if __name__ == "__main__":
    main()
