"""Compiles one of our prefills again: `python -m mmcompile.bench.second_process JSON` prints the times as JSON."""

import json
import sys
from dataclasses import asdict
from typing import Any

import torch

from mmcompile.bench.compile_times import CompileTimes
from mmcompile.bench.decoders import decoder_config, make_decoder
from mmcompile.bench.head_patterns import patterns_of
from mmcompile.bench.prefill_calls import our_call, prompt


def first_call(
    config: str, layers: int, patterns: str, options: dict[str, Any], tokens: int, device: str
) -> CompileTimes:
    """Make the decoder, compile it and call it once."""
    decoder = make_decoder(decoder_config(config), layers, device)
    chosen = patterns_of(patterns, decoder.config)
    with torch.no_grad():
        call = our_call(decoder, options | {"patterns": chosen}, device)
        return call.compile_now(prompt(decoder, tokens, device))


if __name__ == "__main__":
    print(json.dumps(asdict(first_call(**json.loads(sys.argv[1])))))
