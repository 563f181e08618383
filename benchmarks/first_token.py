"""Time to the first token of whole vision-language models on a video: dense, by itself and under Inductor, against
`mmcompile.compile`.

The models have the geometry of a public checkpoint and random bfloat16 weights, their vision towers are real: time
depends on shapes and on the tiles that a pattern selects, not on what the weights have learned. Random weights attend
to everything alike, so that estimated patterns spend their whole cap. The encoders are timed by themselves and the rest
is the difference.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForImageTextToText

import mmcompile
from mmcompile.bench.decoders import QWEN2, QWEN3, rotary
from mmcompile.bench.figure import Figure
from mmcompile.bench.repeated_heads import REPEATED_HEADS
from mmcompile.bench.timing import time_call

IMAGE, VIDEO, START, END = 151655, 151656, 151652, 151653
WHOLE, OURS = "dense, Inductor on the whole", "mminference"
TEXT = 64  # tokens of text before and after the video
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A model's geometry, and how a video enters it.

    config: fields of transformers' config. inputs: from the number of frames, a forward's arguments without
    `attention_mask`, on the CPU.
    """

    name: str
    model_type: str
    config: Mapping[str, Any]
    inputs: Callable[[int], Inputs]


def patches(frames: int, side: int, patch: int) -> tuple[Tensor, Tensor]:
    """A video as Qwen's patches: [t * h * w, 3 * 2 * patch**2] and its grid [1, 3]; two frames make one step."""
    t, h, w = frames // 2, side // patch, side // patch
    return torch.randn(t * h * w, 3 * 2 * patch**2, dtype=torch.bfloat16), torch.tensor([[t, h, w]])


def prompt(runs: list[int], token: int) -> Inputs:
    """Text, runs of placeholders between marks, text: `input_ids` and `mm_token_type_ids` [1, S]."""
    words = torch.randint(1000, 100000, (2, TEXT), generator=torch.Generator().manual_seed(0))
    parts = [words[0]]
    for run in runs:
        parts += [torch.tensor([START]), torch.full((run,), token), torch.tensor([END])]
    ids = torch.cat([*parts, words[1]])[None]
    return {"input_ids": ids, "mm_token_type_ids": torch.where(ids == token, 1 if token == IMAGE else 2, 0).int()}


def qwen2_5_vl(frames: int) -> Inputs:
    pixels, grid = patches(frames, 448, 14)
    return prompt([grid.prod().item() // 4], VIDEO) | {"pixel_values_videos": pixels, "video_grid_thw": grid}


def qwen3_vl(frames: int) -> Inputs:
    # Its prompts have the time before each step of a video, so that each stands by itself.
    pixels, grid = patches(frames, 512, 16)
    steps = int(grid[0, 0])
    runs = [grid.prod().item() // 4 // steps] * steps
    return prompt(runs, VIDEO) | {"pixel_values_videos": pixels, "video_grid_thw": grid}


def llava_onevision(frames: int) -> Inputs:
    # 27 x 27 patches a frame are pooled to 14 x 14, and one token ends the video.
    pixels = torch.randn(1, frames, 3, 384, 384, dtype=torch.bfloat16)
    ids = prompt([frames * 196 + 1], VIDEO)["input_ids"]
    return {"input_ids": ids, "pixel_values_videos": pixels}


def internvl(frames: int) -> Inputs:
    pixels = torch.randn(frames, 3, 448, 448, dtype=torch.bfloat16)
    return {"input_ids": prompt([256] * frames, IMAGE)["input_ids"], "pixel_values": pixels}


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
MODELS = (
    Model(
        "Qwen2.5-VL-7B",
        "qwen2_5_vl",
        {
            "text_config": {"model_type": "qwen2_5_vl_text", **QWEN2, **rotary((16, 24, 24))},
            "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
            | {"out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
            **IDS,
        },
        qwen2_5_vl,
    ),
    Model(
        "Qwen3-VL-8B",
        "qwen3_vl",
        {
            "text_config": {"model_type": "qwen3_vl_text", **QWEN3, **rotary((24, 20, 20), mrope_interleaved=True)},
            "vision_config": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}
            | {"out_hidden_size": 4096, "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]},
            **IDS,
        },
        qwen3_vl,
    ),
    Model(
        "LLaVA-OneVision-7B",
        "llava_onevision",
        {
            "text_config": {"model_type": "qwen2", **QWEN2},
            "vision_config": SIGLIP,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
        },
        llava_onevision,
    ),
    Model(
        "InternVL3-8B",
        "internvl",
        {
            "text_config": {"model_type": "qwen2", **QWEN2},
            "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
            | {"num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14]},
            "image_token_id": IMAGE,
        },
        internvl,
    ),
)


def build(model: Model, layers: int | None, device: str) -> Any:
    """The model with random bfloat16 weights; layers: of both towers, None for all of them."""
    config = AutoConfig.for_model(model.model_type, **model.config)
    if layers is not None:
        config.text_config.num_hidden_layers = layers
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = config.text_config.layer_types[:layers]
        setattr(config.vision_config, "depth" if "depth" in model.config["vision_config"] else "num_hidden_layers", 1)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()


def encoder(model: Any, inputs: Inputs) -> Callable[[], object]:
    """A call that runs the vision tower and projector alone."""
    given = {name: value for name, value in inputs.items() if "pixel" in name or "grid" in name}
    encode = model.get_video_features if "pixel_values_videos" in given else model.get_image_features
    return lambda: encode(**given)


def contenders(model: Any, pattern: Any, whole: bool) -> Iterator[str]:
    """One name after the other, with the model as the name says until the next is asked for; whole: see `--whole`."""
    text = model.config.get_text_config()
    text._attn_implementation = REPEATED_HEADS
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        yield "dense, not compiled"
        compiled = {"dense, Inductor on the text": model.get_decoder()} | ({WHOLE: model} if whole else {})
        for name, part in compiled.items():
            torch.compiler.reset()
            part.compile()
            yield name
            part._compiled_call_impl = None
    text._attn_implementation = "sdpa"
    torch.compiler.reset()
    mmcompile.compile(model, patterns=pattern)
    yield OURS


@torch.inference_mode()
def measure(name: str, model: Any, inputs: Inputs, repeats: int) -> dict[str, Any]:
    """One contender: the first call, later ones, and of these the encoders' part."""

    def call():
        return model(**inputs, use_cache=True, logits_to_keep=1).logits

    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    torch.cuda.reset_peak_memory_stats()
    whole = time_call(call, "cuda", repeats)
    row = {
        "attention": name,
        "first token s": round(whole.ms / 1e3, 3),
        "first token s spread": round(whole.spread / 1e3, 3),
    }
    if name != WHOLE:  # there the encoders are compiled with the rest, and cannot be told from it
        vision = time_call(encoder(model, inputs), "cuda", repeats)
        row |= {"vision s": round(vision.ms / 1e3, 3), "text s": round((whole.ms - vision.ms) / 1e3, 3)}
    density = statistics.mean(site.density for site in mmcompile.stats(model)) if name == OURS else 1.0
    return row | {
        "first call s": round(first, 1),
        "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "density": round(density, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="where the JSON goes")
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--models", default=",".join(model.name for model in MODELS), help="separated by commas")
    parser.add_argument("--layers", type=int, help="fewer layers, for a try")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pattern", help='an entry of mmcompile.HeadPattern such as "a_shape"; auto by default')
    parser.add_argument(
        "--whole", action="store_true", help="Inductor on the encoders too: hours, where a tower calls SDPA a window"
    )
    arguments = parser.parse_args()
    pattern = mmcompile.HeadPattern(arguments.pattern) if arguments.pattern else "auto"
    figure = Figure.begin(
        "Time to the first token",
        notes=f"{arguments.frames} frames, bf16, batch 1, random weights (estimated patterns spend their whole cap), "
        f"pattern {pattern}; median of {arguments.repeats} runs, spread is half their range. Dense is transformers' "
        "own, its text attention held to cuDNN. Vision is the tower and projector called by themselves, text the rest; "
        "where Inductor compiles the whole model they are not told apart",
    )
    wanted = arguments.models.split(",")
    for one in track([model for model in MODELS if model.name in wanted], "models"):
        model = build(one, arguments.layers, "cuda")
        inputs = {name: tensor.cuda() for name, tensor in one.inputs(arguments.frames).items()}
        tokens = inputs["input_ids"].shape[1]
        eager: float | None = None
        for name in contenders(model, pattern, arguments.whole):
            row = measure(name, model, inputs, arguments.repeats)
            eager = eager or row["first token s"]
            faster = f"{eager / row['first token s']:.2f}x"
            figure.rows.append({"model": one.name, "tokens": tokens} | row | {"faster": faster})
            print(figure.rows[-1], flush=True)
        figure.save(arguments.out)
        print(f"wrote {arguments.out}; `make figures` puts its table into the docs")
        del model, inputs
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
