"""What caches need around a compiled call: static ones their addresses, offloaded ones their layers on the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import StaticLayer


def is_offloaded(cache: Any) -> bool:
    """Whether a cache keeps its layers on the host: it copies on a stream of its own, which torch cannot trace."""
    return bool(getattr(cache, "offloading", False))


@contextmanager
def prefilled(cache: Any) -> Iterator[None]:
    """Around a compiled prefill that fills `cache`, which may be None or no cache of transformers.

    An offloaded one is whole on the device meanwhile, and goes to the host afterwards.
    """
    if not is_offloaded(cache):
        yield
        _keep_addresses(cache)
        return
    if _has_stream(cache):
        torch.cuda.current_stream().wait_stream(cache.prefetch_stream)
    for layer in cache.layers:
        layer.prefetch()
    cache.offloading = False
    try:
        yield
    finally:
        cache.offloading = True
    for index in range(len(cache.layers)):
        cache.offload(index, cache.only_non_sliding)
    # What the next call starts with has to be on its way to the device, as after an update of the last layer.
    with fetching_in_order(cache):
        cache.prefetch(0, cache.only_non_sliding)


@contextmanager
def fetching_in_order(cache: Any) -> Iterator[None]:
    """Fetch nothing from the host before it has arrived there, and into no memory that is still read.

    Early versions of transformers fetch on a stream of their own without waiting: keys of a layer then turn into those
    of the next one where the device is behind the host.
    """
    if not _has_stream(cache):
        yield
        return
    fetch = cache.prefetch

    def fetch_after(*args: Any, **kwargs: Any) -> None:
        cache.prefetch_stream.wait_stream(torch.cuda.current_stream())
        fetch(*args, **kwargs)

    cache.prefetch = fetch_after
    try:
        yield
    finally:
        del cache.prefetch


def _has_stream(cache: Any) -> bool:
    return isinstance(getattr(cache, "prefetch_stream", None), torch.Stream)


def _keep_addresses(cache: Any) -> None:
    """Say of the tensors of a static cache that they stay where they are: CUDA graphs of decode steps write to no
    others. transformers says it where it allocates them, but not inside of a prefill that is traced."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, StaticLayer):
            for tensor in vars(layer).values():
                if isinstance(tensor, torch.Tensor):
                    torch._dynamo.mark_static_address(tensor)
