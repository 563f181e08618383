"""Qwen2.5-VL answers a question about a video, dense and then compiled.

    python examples/qwen2_5_vl.py --video holiday.mp4
    python examples/qwen2_5_vl.py --tiny

Its processor needs torchvision and pillow. The loading code was run on a tiny checkpoint with a processor of its own,
not on the public one.
"""

import argparse
import sys

import av
import torch
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
from transformers.video_utils import VideoMetadata
from video_question import QUESTION, Asked, Example, generated, need_torchvision, show_tokens

from mmcompile.huggingface import example_inputs
from mmcompile.tiny_qwen import tiny_qwen2_5_vl
from mmcompile.video import read_frames


def load(options: argparse.Namespace) -> Asked:
    """The public checkpoint and its processor."""
    need_torchvision()
    processor = AutoProcessor.from_pretrained(options.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(options.model, dtype="auto").eval().to(device)
    frames = read_frames(options.video, options.frames)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    inputs = processor(
        text=processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        videos=[frames],
        # Rotary positions follow the clock: the processor has to know how far apart the frames are.
        video_metadata=[_metadata(options, len(frames))],
        do_sample_frames=False,
        return_tensors="pt",
    ).to(device)
    prompt = f"{len(frames)} frames, {inputs['input_ids'].shape[1]} tokens"
    decode = processor.tokenizer.decode
    return Asked(model, generated(model, inputs, lambda tokens: decode(tokens, skip_special_tokens=True)), prompt)


def tiny(options: argparse.Namespace) -> Asked:
    """The same classes with random weights, and a prompt laid out without a processor."""
    model = tiny_qwen2_5_vl(window_size=672)
    frames = read_frames(options.video, options.frames)
    inputs = example_inputs(model, frames=frames, tokens=4096)
    prompt = f"{len(frames)} frames, {inputs['input_ids'].shape[1]} tokens"
    return Asked(model, generated(model, inputs, show_tokens), prompt)


def _metadata(options: argparse.Namespace, frames: int) -> VideoMetadata:
    with av.open(str(options.video)) as container:
        # Some containers do not say how long they are: then 24 frames a second, as the processor assumes too.
        seconds = container.duration / av.time_base if container.duration else frames / 24
    return VideoMetadata(total_num_frames=frames, fps=frames / seconds, frames_indices=list(range(frames)))


EXAMPLE = Example("Qwen2.5-VL", "qwen2_5_vl.py", "Qwen/Qwen2.5-VL-7B-Instruct", 256, 16, load, tiny)

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
