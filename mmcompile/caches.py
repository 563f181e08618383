"""What caches need around a compiled call: static ones their addresses, offloaded ones their streams."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from transformers.cache_utils import StaticLayer


@contextmanager
def prefilled(cache: Any) -> Iterator[None]:
    """Around a compiled prefill that fills `cache`, which may be None or no cache of transformers."""
    if not getattr(cache, "offloading", False):
        yield
        _keep_addresses(cache)
        return
    with _updated_by(cache, _update_without_streams):
        yield
    # What the next call starts with has to be on its way to the device, as after an update of the last layer.
    _wait_for_copies(cache)
    cache.prefetch(0, cache.only_non_sliding)


@contextmanager
def decoded(cache: Any) -> Iterator[None]:
    """Around a compiled decode step on `cache`, as in `prefilled`."""
    if not getattr(cache, "offloading", False):
        yield
        return
    with _updated_by(cache, _update_in_eager_mode):
        yield


def _keep_addresses(cache: Any) -> None:
    """Say of the tensors of a static cache that they stay where they are: CUDA graphs of decode steps write to no
    others. transformers says it where it allocates them, but not inside of a prefill that is traced."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, StaticLayer):
            for tensor in vars(layer).values():
                if isinstance(tensor, torch.Tensor):
                    torch._dynamo.mark_static_address(tensor)


@contextmanager
def _updated_by(cache: Any, update: Any) -> Iterator[None]:
    """A cache that is offloaded to the host copies on a stream of its own, of which a compiled graph knows nothing."""
    cache.update = MethodType(update, cache)  # a method, so that a copy of the cache updates itself
    try:
        yield
    finally:
        del cache.update  # a cache that held itself would stay in memory for long


def _update_without_streams(
    cache: Any, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Cache.update` in one graph with the rest. Copies wait for each other, which in a prefill costs little."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    layer.prefetch()
    keys, values = layer.update(key_states, value_states, *args, **kwargs)
    cache.offload(layer_idx, cache.only_non_sliding)
    return keys, values


@torch.compiler.disable
def _update_in_eager_mode(cache: Any, *args: Any, **kwargs: Any) -> Any:
    """`Cache.update` as it is, with the copies of one layer beside the work of another."""
    _wait_for_copies(cache)
    return type(cache).update(cache, *args, **kwargs)


def _wait_for_copies(cache: Any) -> None:
    """Fetch nothing from the host before it has arrived there, nor into memory that is still read: early versions of
    transformers leave this out."""
    if isinstance(getattr(cache, "prefetch_stream", None), torch.Stream):
        cache.prefetch_stream.wait_stream(torch.cuda.current_stream())
