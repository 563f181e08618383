"""LLaVA-Video answers a question about a video, dense and then compiled.

    python examples/llava_video.py --video holiday.mp4
    python examples/llava_video.py --tiny

LLaVA-Video has the architecture of LLaVA-OneVision with Qwen2, and the default is a public checkpoint of that which
transformers loads without code of its own; --model takes any other in the same format. Its processor needs torchvision
and pillow. The loading code was run on a tiny checkpoint with a processor of its own, not on the public one.
"""

import argparse
import sys

import torch
from transformers import AutoProcessor, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from video_question import (
    QUESTION,
    TINY_IMAGE_TOKEN,
    TINY_QWEN2,
    TINY_SIGLIP,
    TINY_VIDEO_TOKEN,
    Asked,
    Example,
    ask_tiny,
    generated,
    need_torchvision,
    with_fixed_weights,
)

from mmcompile.video import read_frames


def load(options: argparse.Namespace) -> Asked:
    """The public checkpoint and its processor."""
    need_torchvision()
    processor = AutoProcessor.from_pretrained(options.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(options.model, dtype="auto").eval().to(device)
    frames = read_frames(options.video, options.frames)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    inputs = processor(
        text=processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        videos=[frames],
        do_sample_frames=False,
        return_tensors="pt",
    ).to(device, model.dtype)
    prompt = f"{len(frames)} frames, {inputs['input_ids'].shape[1]} tokens"
    decode = processor.tokenizer.decode
    return Asked(model, generated(model, inputs, lambda tokens: decode(tokens, skip_special_tokens=True)), prompt)


def tiny(options: argparse.Namespace) -> Asked:
    """The same classes with random weights: 16 x 16 patches a frame, pooled to 8 x 8, and a newline after the video."""
    config = LlavaOnevisionConfig(
        text_config=TINY_QWEN2,
        vision_config=TINY_SIGLIP,
        image_token_index=TINY_IMAGE_TOKEN,
        video_token_index=TINY_VIDEO_TOKEN,
        image_grid_pinpoints=[[224, 224]],
    )
    model = with_fixed_weights(lambda: LlavaOnevisionForConditionalGeneration(config))
    return ask_tiny(model, options, per_frame=8 * 8, newline=1)


# 196 tokens a frame: more frames than 166 would pass the 32768 positions that the checkpoint was trained for.
EXAMPLE = Example("LLaVA-Video", "llava_video.py", "llava-hf/llava-onevision-qwen2-7b-ov-hf", 128, 32, load, tiny)

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
