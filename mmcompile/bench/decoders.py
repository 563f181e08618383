"""Text decoders of public checkpoints by their geometry alone, with random weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mmcompile.tiny_config import load_config


def rotary(sections: tuple[int, int, int], **fields: Any) -> dict[str, Any]:
    """Multimodal rotary positions of a text decoder."""
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)} | fields
    return {"rope_parameters": parameters}


QWEN2 = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2**20,
}
QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 2**20,
}
# Fields of transformers' config of the text decoder.
DECODERS: Mapping[str, Mapping[str, Any]] = {
    "Qwen2.5-VL-7B": {"model_type": "qwen2_5_vl_text", **QWEN2, **rotary((16, 24, 24))},
    "Qwen3-VL-8B": {"model_type": "qwen3_vl_text", **QWEN3, **rotary((24, 20, 20), mrope_interleaved=True)},
    "LLaVA-OneVision-7B": {"model_type": "qwen2", **QWEN2},
    "InternVL3-8B": {"model_type": "qwen2", **QWEN2},
}


def decoder_config(name: str) -> Any:
    """A text decoder's config: of a name in DECODERS, in capitals or not, else of a folder or a name on a model hub.

    Raises ModelError where there is none.
    """
    from transformers import AutoConfig

    known = full_name(name)
    return AutoConfig.for_model(**DECODERS[known]) if known in DECODERS else load_config(name).get_text_config()


def full_name(name: str) -> str:
    """A name in DECODERS as it is written; others as they are."""
    return next((known for known in DECODERS if known.lower() == name.lower()), name)


def make_decoder(config: Any, layers: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The text decoder with random weights, in eval mode; layers: the first so many."""
    from transformers import AutoModel

    config = copy.deepcopy(config)
    _keep_layers(config, layers)
    with torch.device(device):
        return AutoModel.from_config(config, dtype=dtype).eval()


def first_layers(decoder: Any, layers: int) -> Any:
    """A decoder of the first layers of another one, whose weights it shares."""
    shallow = copy.copy(decoder)
    shallow._modules = decoder._modules | {"layers": nn.ModuleList(list(decoder.layers)[:layers])}
    shallow.config = copy.deepcopy(decoder.config)
    _keep_layers(shallow.config, layers)
    return shallow


def _keep_layers(config: Any, layers: int) -> None:
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def takes_multimodal_positions(config: Any) -> bool:
    """Whether rotary positions have parts for time, row and column."""
    return "mrope_section" in (getattr(config, "rope_parameters", None) or {})
