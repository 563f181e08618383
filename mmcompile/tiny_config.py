"""Any vision-language model made small enough for a laptop: its config, with few layers and few heads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from mmcompile.huggingface import ModelError, first_line, require_source

LAYERS, HEADS, EXPERTS = 2, 4, 4
SPREAD = 0.05  # of the weights: at the usual 0.02 attention is all but uniform in so narrow a model

_LAYER_COUNTS = ("num_hidden_layers", "depth", "encoder_layers", "num_layers", "n_layers")
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "encoder_attention_heads")
_WIDTHS = ("embed_dim", "hidden_size", "d_model")  # the first that a config has; Qwen2-VL's tower has two
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_PICKS = ("num_experts_per_tok", "moe_topk", "moe_k", "n_group", "topk_group")


def load_config(path: str) -> Any:
    """The config at a folder made by `save_pretrained`, or of a name on a model hub; ModelError if there is none."""
    from transformers import AutoConfig

    require_source(path)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: transformers finds no config here: {first_line(error)}") from error


def tiny_config(config: Any) -> Any:
    """A copy of a transformers config with two layers and four heads in the decoder and in each encoder.

    Kept as they are: the vocabulary and its placeholder ids, head dims and with them rotary sections, the ratio of
    heads to key-value heads up to four, sliding windows, patch and image sizes. Of layers that differ, each kind keeps
    one, so that more than two are left where there are more than two kinds.
    """
    tiny = copy.deepcopy(config)
    text = tiny.get_text_config()
    parts = list(_parts(tiny))
    widths: dict[int, int] = {}  # old to new: projectors and other towers name a width again, and must follow
    for part in [text, *(part for part in parts if part is not text)]:
        _keep_few_layers(part)
        _narrow(part, widths)
        _keep_few_experts(part)
    for part in parts:
        for name, value in _fields(part):
            names_width = name.endswith(("hidden_size", "dim", "d_model", "output_dim")) and name != "head_dim"
            if names_width and isinstance(value, int) and value in widths:
                setattr(part, name, widths[value])
    return tiny


def tiny_model(config: Any, *, seed: int = 0) -> Any:
    """A model of `tiny_config(config)` with random weights, float32, in eval mode, on the CPU.

    Raises ModelError where transformers cannot build one.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as VISION_LANGUAGE
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if type(config) in VISION_LANGUAGE else AutoModelForCausalLM
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto.from_config(tiny_config(config), dtype=torch.float32)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=SPREAD)
    except (AttributeError, ImportError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{config.model_type}: no small model of this kind can be built ({first_line(error)}); "
            "use --no-tiny for the model itself"
        ) from error
    return model.eval()


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for _, value in _fields(config):
        if hasattr(value, "model_type"):
            yield from _parts(value)


def _fields(config: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(config).items() if not name.startswith("_")]


def _first(config: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(vars(config).get(name), int)), None)


def _keep_few_layers(config: Any) -> None:
    """Leave one layer of each kind, at least `LAYERS`, and make every list about layers follow."""
    count_name = _first(config, _LAYER_COUNTS)
    if count_name is None or getattr(config, count_name) <= LAYERS:
        return
    count = getattr(config, count_name)
    lists = {name: list(value) for name, value in _fields(config) if isinstance(value, list | tuple)}
    indices = {name: value for name, value in lists.items() if _lists_layers(name, value, count)}
    by_layer = {name: value for name, value in lists.items() if len(value) == count and name not in indices}
    kinds = [
        tuple(str(value[layer]) for value in by_layer.values())
        + tuple(layer in value for value in indices.values())
        + (layer < getattr(config, "first_k_dense_replace", 0),)
        for layer in range(count)
    ]
    kept = sorted({kinds.index(kind) for kind in kinds})
    kept = sorted({*kept, *[layer for layer in range(count) if layer not in kept][: max(0, LAYERS - len(kept))]})
    for name, value in by_layer.items():
        setattr(config, name, [value[layer] for layer in kept])
    for name, value in indices.items():
        setattr(config, name, [new for new, old in enumerate(kept) if old in value])
    if getattr(config, "first_k_dense_replace", 0):
        config.first_k_dense_replace = 1
    setattr(config, count_name, len(kept))


def _lists_layers(name: str, value: list[Any], count: int) -> bool:
    """Whether a field lists layers by number, as `fullatt_block_indexes` does."""
    if not name.endswith(("indexes", "indices", "idxs", "_layers")) or not value:
        return False
    return all(isinstance(entry, int) for entry in value) and value == sorted({*value} & {*range(count)})


def _narrow(config: Any, widths: dict[int, int]) -> None:
    """Leave four heads of the head dim that they had; `widths` learns what became of the width."""
    head_name, width_name = _first(config, _HEAD_COUNTS), _first(config, _WIDTHS)
    if head_name is None or width_name is None or getattr(config, head_name) <= HEADS:
        return
    heads, width = getattr(config, head_name), getattr(config, width_name)
    head_dim = getattr(config, "head_dim", None) or width // heads
    narrow = widths.get(width, HEADS * head_dim)
    if narrow % head_dim:
        return  # another part has this very width, and its heads do not fit ours
    few = narrow // head_dim
    widths[width] = narrow
    key_value_heads = getattr(config, "num_key_value_heads", None)
    if key_value_heads:
        config.num_key_value_heads = max(1, few * key_value_heads // heads)
    setattr(config, head_name, few)
    setattr(config, width_name, narrow)
    for name in ("intermediate_size", "mlp_dim", "encoder_ffn_dim", "intermediate_size_mlp"):
        if isinstance(vars(config).get(name), int):
            setattr(config, name, 2 * narrow)
    moe = vars(config).get("moe_intermediate_size")
    if moe is not None:
        config.moe_intermediate_size = [narrow] * len(moe) if isinstance(moe, list) else narrow


def _keep_few_experts(config: Any) -> None:
    for name in _EXPERT_COUNTS:
        if isinstance(vars(config).get(name), int) and getattr(config, name) > EXPERTS:
            setattr(config, name, EXPERTS)
    for name in _EXPERT_PICKS:
        if isinstance(vars(config).get(name), int):
            setattr(config, name, 1 if name.endswith("group") else min(2, getattr(config, name)))
