"""Run the encoders before the model's forward, as transformers' `generate` does, so that the rest is one graph.

Encoders of images and videos hold what Dynamo cannot trace (sizes read from tensors), and so do multimodal rotary
positions. Run beforehand, they leave a forward of `input_ids`, `mm_encoder_outputs` and `position_ids`, which traces
whole.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, NamedTuple

import torch
import transformers.utils
from torch import nn

from mmcompile.input_boundaries import IMAGE, VIDEO, placeholder_ids

_MODALITIES = {"image": IMAGE, "video": VIDEO}
_PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_patches")
# Once the positions are made, nothing reads these any more; lists of frame times would be compiled in as constants.
_POSITION_INPUTS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "video_second_per_grid")


class Encoded(NamedTuple):
    """A call whose encoders have run.

    inputs: the keyword arguments of the model's forward. fits: whether each placeholder token has its feature; None
    where that cannot be told here, or there are no features.
    """

    inputs: dict[str, Any]
    fits: bool | None


class EncodeFirst:
    """Runs a model's encoders, and makes its multimodal rotary positions, before its forward.

    model: one from transformers whose forward takes `mm_encoder_outputs`; see `encodes_first`. Where it checks features
    against placeholders in a `get_placeholder_mask`, that method is put on the model itself, for tracing alone.
    """

    def __init__(self, model: nn.Module) -> None:
        base: Any = model.base_model
        self._encode: Callable[[dict[str, Any]], dict[str, Any]] = getattr(model, _ENCODE)
        self._make_positions: Any = getattr(base, "compute_3d_position_ids", None)
        self._tokens = placeholder_ids(model.config)
        self._forward = inspect.signature(base.forward).parameters
        takes = inspect.signature(model.forward).parameters
        self._optional = {name for name, parameter in takes.items() if parameter.default is None}
        if hasattr(type(base), get_placeholder_mask.__name__) and not _picks_embeddings(base):
            # A method of the class's name: a copy keeps it, and a pickle finds the class's own.
            base.get_placeholder_mask = MethodType(get_placeholder_mask, base)

    def __call__(self, inputs: Mapping[str, Any]) -> Encoded:
        """Replace pixels by `mm_encoder_outputs` and add `position_ids`.

        inputs: the arguments of a call by name, which stay as they are. Raises what the model's encoders raise.
        """
        ready = dict(inputs)
        # Counted first: what the encoders do takes time, and reading the count would wait for it.
        counts = self._count_placeholders(ready)
        if self._make_positions is not None and ready.get("position_ids") is None:
            ready["position_ids"] = self._positions(ready)
        if any(ready.get(name) is not None for name in _PIXELS):
            given = {name: value for name, value in ready.items() if value is not None}
            if "mm_encoder_outputs" in given:
                given["mm_encoder_outputs"] = dict(given["mm_encoder_outputs"])  # the results are added to it
            ready = self._encode(given)
        fits = None
        outputs = ready.get("mm_encoder_outputs")
        if isinstance(outputs, Mapping) and any(output is not None for output in outputs.values()):
            ready["mm_encoder_outputs"] = outputs = {name: _joined(output) for name, output in outputs.items()}
            _drop_compressed(ready, outputs)
            fits = None if counts is None else _fit(outputs, self._tokens, counts)
        if ready.get("position_ids") is not None:
            ready = {name: value for name, value in ready.items() if name not in _POSITION_INPUTS}
        # A None that says nothing would be a form of the call of its own, with a graph of its own.
        ready = {name: value for name, value in ready.items() if value is not None or name not in self._optional}
        return Encoded(ready, fits)

    def _positions(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """What the forward would make of the same inputs; None leaves them to it."""
        tokens = inputs.get("inputs_embeds")
        if tokens is None:
            tokens = inputs.get("input_ids")
        if not isinstance(tokens, torch.Tensor) or inputs.get("input_features") is not None:
            return None  # where there is sound, its lengths are made inside the forward
        # Sizes and device are all that is read of the embeddings.
        known = {**inputs, "inputs_embeds": tokens.new_empty((*tokens.shape[:2], 0), dtype=torch.float32)}
        arguments = {}
        for name, parameter in inspect.signature(self._make_positions).parameters.items():
            if name in known:
                arguments[name] = known[name]
            elif parameter.default is parameter.empty:
                arguments[name] = self._forward[name].default
        return self._make_positions(**arguments)

    def _count_placeholders(self, inputs: Mapping[str, Any]) -> dict[int, int] | None:
        """How often each placeholder token stands in a prompt with features; None where there are no ids."""
        ids = inputs.get("input_ids")
        names = (*_PIXELS, "mm_encoder_outputs")
        if not isinstance(ids, torch.Tensor) or all(inputs.get(name) is None for name in names):
            return None
        tokens = set(self._tokens.values())
        counts = torch.stack([(ids == token).sum() for token in tokens]).tolist() if tokens else ()
        return dict(zip(tokens, counts, strict=True))


_ENCODE = "_prepare_multimodal_encoder_kwargs_for_generation"


def encodes_first(model: nn.Module) -> bool:
    """Whether `EncodeFirst` takes this model: transformers has the way since 5.18, for most families."""
    from transformers import PreTrainedModel

    return (
        isinstance(model, PreTrainedModel)
        and hasattr(model, _ENCODE)
        and "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    )


def get_placeholder_mask(self: Any, input_ids: Any, inputs_embeds: Any, *features: Any, **named: Any) -> Any:
    """The model's own `get_placeholder_mask`; where Dynamo leaves out its checks, with the features' sizes hidden.

    Features are compared in number with placeholders and nothing else, and the text of that error holds their sizes,
    which would make each size a constant of the graph.
    """
    if torch.compiler.is_compiling() and _leaves_out_checks():
        features = tuple(_one_row(one) for one in features)
        named = {name: _one_row(one) for name, one in named.items()}
    return type(self).get_placeholder_mask(self, input_ids, inputs_embeds, *features, **named)


@torch.compiler.assume_constant_result
def _leaves_out_checks() -> bool:
    """Whether Dynamo traces with `without_checks()` now."""
    return bool(_CHECKS & getattr(torch._dynamo.config, "ignore_logging_functions", set()))


# transformers' checks that features and placeholder tokens agree in number.
_CHECKS = {getattr(transformers.utils, "torch_compilable_check", None)} - {None}


def without_checks() -> dict[str, Any]:
    """Dynamo's settings that leave out transformers' checks of features against placeholder tokens, each of which
    breaks the graph and waits for the device. Empty where torch or transformers lack the means."""
    ignored = getattr(torch._dynamo.config, "ignore_logging_functions", None)
    return {} if ignored is None else {"ignore_logging_functions": {*ignored, *_CHECKS}}


def _picks_embeddings(base: nn.Module) -> bool:
    """Whether a forward picks embeddings out by a mask, as Molmo 2's to add features to them: how many is known to the
    data alone, and Dynamo can add features to so many only where their own number is a constant."""
    try:
        source = inspect.getsource(inspect.unwrap(type(base).forward))
    except (OSError, TypeError):
        return False
    return re.search(r"inputs_embeds\[\w*mask\w*\]", source) is not None


def _one_row(features: Any) -> Any:
    return features.reshape(1, 1, 1, -1) if isinstance(features, torch.Tensor) else features


def _joined(output: Any) -> Any:
    """The same output with the features of all images or videos in one tensor, so that a graph serves any number."""
    features = getattr(output, "pooler_output", None)
    if not isinstance(features, list | tuple) or not features or not dataclasses.is_dataclass(output):
        return output
    if any(one.dim() != 2 or one.shape[1] != features[0].shape[1] for one in features):
        return output
    joined = torch.cat(list(features)) if len(features) > 1 else features[0]
    return dataclasses.replace(output, pooler_output=(joined,))  # type: ignore[type-var]


def _drop_compressed(inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    """Leave out the video features that VideoLLaMA 3 leaves out: how many are left is known to the data alone."""
    mask, video = inputs.get("video_compression_mask"), outputs.get("video")
    if mask is None or video is None or not isinstance(video.pooler_output, tuple) or len(video.pooler_output) != 1:
        return
    features = video.pooler_output[0]
    outputs["video"] = dataclasses.replace(video, pooler_output=(features[mask.to(features.device)],))
    del inputs["video_compression_mask"]


def _fit(outputs: Mapping[str, Any], tokens: Mapping[int, int], counts: Mapping[int, int]) -> bool | None:
    """Whether there is one feature for each placeholder token; None where one of the two is unknown.

    tokens: the placeholder of each modality. counts: how often each of them stands in the prompt.
    """
    found: dict[int, int] = {}
    for name, output in outputs.items():
        if output is None:
            continue
        features: Any = getattr(output, "pooler_output", None)
        parts = features if isinstance(features, list | tuple) else [features]
        token = tokens.get(_MODALITIES.get(name, -1))
        if token is None or not counts.get(token, 0):
            token = tokens.get(IMAGE)  # videos of GLM and InternVL fill image tokens
        if token is None or not all(isinstance(part, torch.Tensor) for part in parts):
            return None
        found[token] = found.get(token, 0) + sum(part.numel() // part.shape[-1] for part in parts)
    return all(counts[token] == number for token, number in found.items())
