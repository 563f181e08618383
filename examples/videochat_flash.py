"""VideoChat-Flash answers a question about a video, dense and then compiled.

    python examples/videochat_flash.py --video holiday.mp4 --trust-remote-code
    python examples/videochat_flash.py --tiny

The checkpoint brings code of its own, which reads the video itself. `load` follows its model card and was not run
against the real checkpoint; that code needs a GPU and timm, av, imageio, decord and opencv-python, and the card asks
for transformers 4.40.1, older than any that mmcompile takes. Its decoder is given embeddings alone, so that nothing
tells mmcompile where the video is. --tiny merges the features of SigLIP, where the checkpoint has UMT, to the same 16
tokens a frame.
"""

import argparse
import sys
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer
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
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
        model: Any = AutoModel.from_pretrained(options.model, trust_remote_code=True)
        model = model.eval().to(torch.bfloat16).cuda()
        # Its own way to save time drops tokens between layers; here every token stays.
        model.config.mm_llm_compress = False

    def answer(new_tokens: int) -> str:
        with remote_code(options.model):
            return model.chat(
                video_path=str(options.video),
                tokenizer=tokenizer,
                user_prompt=QUESTION,
                return_history=False,
                max_num_frames=options.frames,
                generation_config={"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1},
            )

    return Asked(model, answer, f"at most {options.frames} frames", "reading the video, vision tower and decoder")


def tiny(options: argparse.Namespace) -> Asked:
    """The same parts with random weights: the 16 x 16 tokens of a frame are merged to 16."""
    with tests_on_path():
        from tests.models.longvila import FrameConfig
        from tests.models.videochat_flash import VideoChatFlash
    config = FrameConfig(TINY_QWEN2, TINY_SIGLIP, TINY_VIDEO_TOKEN, tokens_per_frame=16)
    return ask_tiny(with_fixed_weights(lambda: VideoChatFlash._from_config(config)), options, per_frame=16)


EXAMPLE = Example(
    "VideoChat-Flash",
    "videochat_flash.py",
    "OpenGVLab/VideoChat-Flash-Qwen2-7B_res448",
    512,
    64,
    load,
    tiny,
    remote_code=True,
)

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
