"""What the examples share: one question about a video, answered dense and then compiled, and the command line for it.

Each example says how its system is loaded and asked; `Example.main` does the rest.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

import mmcompile
from mmcompile.errors import MMCompileError
from mmcompile.video import read_frames

VIDEO = Path(__file__).with_name("moving_shapes.mp4")
QUESTION = "Describe what happens in this video."
ANSWER_TOKENS = 32
REPEATS = 3

# Parts of the tiny models: wide enough for every structure, and attention that is not uniform.
TINY_QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TINY_SIGLIP = {
    "model_type": "siglip_vision_model",
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vision_use_head": False,
}
TINY_IMAGE_TOKEN, TINY_VIDEO_TOKEN = 500, 501


class ExampleError(MMCompileError):
    """What a user can put right, in one line."""


@dataclass(frozen=True)
class Asked:
    """A model with a question about a video.

    module: the part that takes the prefill, which is compiled. answer: lets the model answer in at most so many tokens.
    prompt: what was asked, in words. timed: what an answer's time is made of.
    """

    module: nn.Module
    answer: Callable[[int], str]
    prompt: str
    timed: str = "vision tower and decoder"


@dataclass(frozen=True)
class Example:
    """One system and its command line.

    file: name of the example. checkpoint, frames: defaults of --model and --frames. tiny_frames: that of --frames with
    --tiny. load, tiny: make the model that the options ask for, and a tiny one. remote_code: whether the checkpoint
    brings Python code of its own.
    """

    system: str
    file: str
    checkpoint: str
    frames: int
    tiny_frames: int
    load: Callable[[argparse.Namespace], Asked]
    tiny: Callable[[argparse.Namespace], Asked]
    remote_code: bool = False

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the example; returns the exit code. What a user can put right ends in one line and code 1."""
        options = self._parse(arguments)
        try:
            self._run(options)
        except MMCompileError as error:
            print(f"error: {_first_line(error)}", file=sys.stderr)
            return 1
        except (OSError, ImportError) as error:  # no such checkpoint, no network, a package that it needs
            print(f"error: {options.model}: {_first_line(error)}", file=sys.stderr)
            return 1
        except torch.OutOfMemoryError:
            print(f"error: the GPU's memory is full; take fewer than --frames {options.frames}", file=sys.stderr)
            return 1
        return 0

    @property
    def _command(self) -> str:
        return f"python examples/{self.file} --video holiday.mp4" + " --trust-remote-code" * self.remote_code

    def _parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description=f"{self.system} answers a question about a video, dense and then compiled with mmcompile.",
            epilog=f"example: {self._command}\n         python examples/{self.file} --tiny",
        )
        parser.add_argument("--model", default=self.checkpoint, help="name on a model hub, or folder (%(default)s)")
        parser.add_argument("--video", type=Path, default=VIDEO, help="video file (the one in examples/)")
        parser.add_argument(
            "--frames",
            type=_positive,
            help=f"frames to take, spread evenly over the video ({self.frames}; with --tiny {self.tiny_frames})",
        )
        parser.add_argument("--density", type=float, help="most of the causal tiles to compute, in (0, 1] (0.2)")
        parser.add_argument("--tiny", action="store_true", help="a tiny random model on the CPU: no network, seconds")
        if self.remote_code:
            parser.add_argument(
                "--trust-remote-code", action="store_true", help="let the checkpoint's own Python code run"
            )
        options = parser.parse_args(arguments)
        options.frames = options.frames or (self.tiny_frames if options.tiny else self.frames)
        return options

    def _run(self, options: argparse.Namespace) -> None:
        # Compiling traces code of transformers that Dynamo warns of at length; mmcompile.explain lists graph breaks.
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
        if self.remote_code and not options.tiny and not options.trust_remote_code:
            raise ExampleError(
                f"{options.model} brings Python code of its own, which would run here: read it at "
                f"https://huggingface.co/{options.model}, then pass --trust-remote-code (--tiny needs neither)"
            )
        # Both fail at once here, not after a model was loaded.
        settings = {"density": options.density, "min_tokens": 0, "inner": "eager" if options.tiny else "inductor"}
        mmcompile.Options.parse(settings)
        read_frames(options.video, 1)
        asked = (self.tiny if options.tiny else self.load)(options)
        what = "a tiny random model" if options.tiny else options.model
        print(f"{self.system}, {what}: {options.video.name}, {asked.prompt}")
        compare(asked, settings)
        if options.tiny:
            print(
                "With so few tokens planning costs more than attention, and random weights answer nothing: this showed "
                f"that it runs. Next, on a GPU: {self._command}"
            )
        else:
            print(
                "Next: --video and --density of your own; in your own code mmcompile.compile(model) before the first "
                "prefill. Its min_tokens, 0 here, leaves short prompts dense by default."
            )


def compare(asked: Asked, settings: dict[str, Any]) -> None:
    """Answer dense, compile, answer again, and print both and what the compiled prefill computed.

    settings: options of `mmcompile.compile`. At `inner="eager"` the rewritten graphs run as they are: Inductor would
    compile for half a minute what a tiny model does in a moment.
    """
    _, dense = _times(asked)
    print(f"time to first token, dense:    {dense:.3f} s ({asked.timed}, median of {REPEATS})")
    dense_answer = asked.answer(ANSWER_TOKENS)
    mmcompile.compile(asked.module, **settings)
    first_call, compiled = _times(asked)
    print(f"time to first token, compiled: {compiled:.3f} s (the first call, which compiles, {first_call:.1f} s)")
    sites = mmcompile.stats(asked.module)
    for site in sites:
        recall = "not estimated" if site.recall is None else f"{site.recall:.3f}"
        print(f"  layer {site.layer}: density {site.density:.3f}, estimated recall {recall}")
    print(f"answer, dense:    {dense_answer}")
    print(f"answer, compiled: {asked.answer(ANSWER_TOKENS)}")
    if not sites:
        print("No attention was rewritten: mmcompile.explain(model, **inputs) says why.")
        return
    density = sum(site.density for site in sites) / len(sites)
    print(
        f"{len(sites)} attentions of the prefill ran sparse, {density:.1%} of their causal tiles, and the first token "
        f"took {compiled / dense:.2f} times as long as dense."
    )


def need_torchvision() -> None:
    """Say at once, not after the checkpoint was fetched, that its processor cannot work here."""
    if find_spec("torchvision") is None or find_spec("PIL") is None:
        raise ExampleError("the checkpoint's processor needs torchvision and pillow: pip install torchvision pillow")


def generated(model: Any, inputs: dict[str, torch.Tensor], decode: Callable[[torch.Tensor], str]) -> Callable[..., str]:
    """An `Asked.answer` by `model.generate`; decode turns the new tokens [new] into words."""

    def answer(new_tokens: int) -> str:
        tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        return decode(tokens[0, inputs["input_ids"].shape[1] :])

    return answer


def show_tokens(tokens: torch.Tensor) -> str:
    """The answer of a tiny model, which has no words."""
    return f"tokens {tokens.tolist()}"


def ask_tiny(model: Any, options: argparse.Namespace, *, per_frame: int, newline: int = 0) -> Asked:
    """The video, in pictures as `TINY_SIGLIP` takes them, and its placeholders between some random words.

    per_frame: tokens that the model makes of a frame. newline: tokens that end the video.
    """
    frames = read_frames(options.video, options.frames)
    side = TINY_SIGLIP["image_size"]
    pictures = F.interpolate(frames.permute(0, 3, 1, 2) / 127.5 - 1, (side, side), mode="bilinear", antialias=True)
    words = torch.randint(3, TINY_IMAGE_TOKEN, (2, 1, 32), generator=torch.Generator().manual_seed(0))
    video = torch.full((1, len(frames) * per_frame + newline), TINY_VIDEO_TOKEN)
    inputs = {"input_ids": torch.cat([words[0], video, words[1]], 1), "pixel_values_videos": pictures[None]}
    prompt = f"{len(frames)} frames, {inputs['input_ids'].shape[1]} tokens"
    return Asked(model.eval(), generated(model, inputs, show_tokens), prompt)


def with_fixed_weights(build: Callable[[], Any]) -> Any:
    """A model that `build` makes with the same random weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2504)
        return build()


@contextmanager
def tests_on_path() -> Iterator[None]:
    """Inside, the tiny models of tests/models can be imported from whatever folder the example is run."""
    root = str(VIDEO.parents[1])
    sys.path.insert(0, root)
    try:
        yield
    finally:
        sys.path.remove(root)


@contextmanager
def remote_code(model: str) -> Iterator[None]:
    """Inside, what goes wrong in a checkpoint's own code ends in one line that says whose code it was."""
    try:
        yield
    except (MMCompileError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever somebody else's code raises
        raise ExampleError(
            f"{model}: the checkpoint's own code failed under transformers {transformers.__version__} "
            f"({type(error).__name__}: {_first_line(error)}); its model card says which version it was written for"
        ) from error


def _times(asked: Asked) -> tuple[float, float]:
    """Seconds to the first token: of the first call, and the median of those after it."""
    seconds = []
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        asked.answer(1)  # ends in words on the host, so the device is done
        seconds.append(time.perf_counter() - begin)
    return seconds[0], statistics.median(seconds[1:])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
