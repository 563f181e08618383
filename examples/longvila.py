"""LongVILA answers a question about a video, dense and then compiled.

    python examples/longvila.py --video holiday.mp4 --trust-remote-code
    python examples/longvila.py --tiny

The checkpoint brings code of its own, which reads the video itself. `load` follows its model card and was not run
against the real checkpoint; that code needs a GPU, accelerate and the packages that the card names, and may not fit
today's transformers. Its decoder is given embeddings alone, so that nothing tells mmcompile where the video is: the
frames' size is searched in the attention. --tiny has the same parts (SigLIP, projector, Qwen2) from transformers.
"""

import argparse
import sys
from typing import Any

import torch
from transformers import AutoModel
from video_question import (
    QUESTION,
    TINY_QWEN2,
    TINY_SIGLIP,
    TINY_VIDEO_TOKEN,
    Asked,
    Example,
    ExampleError,
    ask_tiny,
    remote_code,
    tests_on_path,
    with_fixed_weights,
)


def load(options: argparse.Namespace) -> Asked:
    """The public checkpoint, with the code that it brings."""
    if not torch.cuda.is_available():
        raise ExampleError(f"{options.model}: the checkpoint's own code runs on a CUDA device alone; try --tiny")
    with remote_code(options.model):
        model: Any = AutoModel.from_pretrained(options.model, trust_remote_code=True, device_map="auto").eval()
        # No fixed rate: that many frames, spread over the whole video.
        model.config.num_video_frames, model.config.fps = options.frames, 0

    def answer(new_tokens: int) -> str:
        with remote_code(options.model):
            settings = model.default_generation_config
            settings.update(max_new_tokens=new_tokens, do_sample=False)
            return model.generate_content([QUESTION, {"path": str(options.video)}], generation_config=settings)

    # `generate_content` embeds the video and then calls the decoder's own `generate`.
    return Asked(model.llm, answer, f"{options.frames} frames", "reading the video, vision tower and decoder")


def tiny(options: argparse.Namespace) -> Asked:
    """The same parts with random weights: every frame keeps all of its 16 x 16 tokens."""
    with tests_on_path():
        from tests.models.longvila import FrameConfig, LongVila
    config = FrameConfig(TINY_QWEN2, TINY_SIGLIP, TINY_VIDEO_TOKEN)
    return ask_tiny(with_fixed_weights(lambda: LongVila._from_config(config)), options, per_frame=16 * 16)


EXAMPLE = Example(
    "LongVILA",
    "longvila.py",
    "Efficient-Large-Model/LongVILA-R1-7B",
    256,
    16,
    load,
    tiny,
    remote_code=True,
)

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
