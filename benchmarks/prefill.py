"""Prefill of Qwen2.5-VL-7B's text decoder: ours against Inductor with cuDNN's and with flash attention.

The decoder comes from its config with random bfloat16 weights: time depends on shapes and on the tiles a pattern
selects, not on what the weights have learned. Every length is measured for all contenders in one run.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from figure import Figure
from repeated_heads import REPEATED_HEADS
from rich.progress import track
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

import mmcompile
from mmcompile import HeadPattern

FRAME = (16, 16)  # tokens of a frame, after merging
TEXT = 64  # tokens of text before and after the video
OURS = "mminference"
PATTERNS = {"a_shape": HeadPattern("a_shape", sink=128, local=4096), "auto": "auto"}


def decoder(layers: int) -> Qwen2_5_VLTextModel:
    """Qwen2.5-VL-7B's text decoder (28 heads, 4 KV heads, hidden 3584) with random weights on the GPU."""
    config = Qwen2_5_VLTextConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=2**20,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2_5_VLTextModel(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def inputs(tokens: int) -> dict[str, torch.Tensor]:
    """Embeddings [1, S, 3584] and multimodal positions [3, 1, S] of text, one video, text."""
    video = (tokens - 2 * TEXT) // (FRAME[0] * FRAME[1]) * FRAME[0] * FRAME[1]
    before = torch.arange(TEXT).expand(3, -1)
    index = torch.arange(video)
    grid = [index // (FRAME[0] * FRAME[1]), index // FRAME[1] % FRAME[0], index % FRAME[1]]
    middle = torch.stack(grid) + TEXT
    after = torch.arange(tokens - TEXT - video).expand(3, -1) + int(middle.max()) + 1
    positions = torch.cat([before, middle, after], dim=1)[:, None]
    embeddings = torch.randn(1, tokens, 3584, device="cuda", dtype=torch.bfloat16)
    return {"inputs_embeds": embeddings, "position_ids": positions.cuda()}


def milliseconds(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and half the range of the calls' times, each measured with device events."""
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), (max(times) - min(times)) / 2


def attention_kernel(call: Callable[[], object]) -> str:
    """The name of the longest attention kernel that a call launches: which library really ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    words = ("attention", "flash", "fmha", "sdpa", "cudnn")
    found = [event for event in profile.key_averages() if any(word in event.key.lower() for word in words)]
    return max(found, key=lambda event: event.device_time_total).key[:60] if found else "none found"


def contenders(model: torch.nn.Module, pattern: HeadPattern | str) -> dict[str, Callable[..., object]]:
    """Name to a compiled forward, each with compiled code of its own."""

    def ours(**arguments):
        return model(**arguments)

    def cudnn(**arguments):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return model(**arguments)

    def flash(**arguments):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return model(**arguments)

    return {
        OURS: torch.compile(ours, backend="mminference", options={"patterns": pattern}),
        "Inductor, cuDNN": torch.compile(cudnn),
        "Inductor, flash": torch.compile(flash),
    }


@torch.no_grad()
def measure(name: str, run: Callable[..., object], model: torch.nn.Module, tokens: int, repeats: int) -> dict:
    """One contender at one length."""
    arguments = inputs(tokens)
    for tensor in arguments.values():
        # One compilation serves every length, for every contender.
        torch._dynamo.maybe_mark_dynamic(tensor, tensor.shape.index(tokens))

    def call():
        return run(**arguments, use_cache=True).last_hidden_state[:, -1]

    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    torch.cuda.reset_peak_memory_stats()
    median, spread = milliseconds(call, repeats)
    densities = [site.density for site in mmcompile.stats(model)] if name == OURS else [1.0]
    return {
        "tokens": tokens,
        "attention": name,
        "prefill ms": round(median, 1),
        "spread ms": round(spread, 1),
        "density": round(statistics.mean(densities), 4),
        "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "first call s": round(first, 1),
        "attention kernel": attention_kernel(call),
    }


def compared(rows: list[dict]) -> list[dict]:
    """The rows by length, each with how much longer than ours it takes."""
    ours = {row["tokens"]: row["prefill ms"] for row in rows if row["attention"] == OURS}
    ordered = sorted(rows, key=lambda row: row["tokens"])
    return [row | {"ours is faster by": f"{row['prefill ms'] / ours[row['tokens']]:.2f}x"} for row in ordered]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="where the JSON goes")
    parser.add_argument("--tokens", default="8192,32768,131072", help="lengths, separated by commas")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pattern", choices=PATTERNS, default="a_shape", help="of every head")
    parser.add_argument("--contenders", default="cuDNN,flash", help="attention libraries to compare with")
    arguments = parser.parse_args()
    pattern = PATTERNS[arguments.pattern]
    model = decoder(arguments.layers)
    figure = Figure.begin(
        "Prefill of Qwen2.5-VL-7B's text decoder",
        notes=f"{arguments.layers} layers, random weights, bf16, batch 1, KV cache kept, {pattern} for every head "
        "(random weights attend to everything alike, so that estimated patterns spend their whole cap); "
        f"median of {arguments.repeats} runs, spread is half their range",
    )
    lengths = [int(tokens) for tokens in arguments.tokens.split(",")]
    rows: list[dict] = []
    wanted = (OURS, *(f"Inductor, {library}" for library in arguments.contenders.split(",")))
    for name, run in track(contenders(model, pattern).items(), "prefill"):
        if name not in wanted:
            continue
        torch.compiler.reset()
        model.config._attn_implementation = "sdpa" if name == OURS else REPEATED_HEADS
        for tokens in lengths:
            rows.append(measure(name, run, model, tokens, arguments.repeats))
            print(rows[-1], flush=True)
            figure.rows = compared(rows)
            figure.save(arguments.out)


if __name__ == "__main__":
    main()
