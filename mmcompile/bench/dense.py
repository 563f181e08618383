"""Torch's dense causal attention by each of its fast libraries: what everything is measured against."""

from functools import partial

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mmcompile.bench.timing import Call

CUDNN, FLASH, CPU = "torch SDPA, cuDNN", "torch SDPA, flash", "torch SDPA"
_BACKENDS = {
    "cuda": {CUDNN: [SDPBackend.CUDNN_ATTENTION], FLASH: [SDPBackend.FLASH_ATTENTION]},
    "cpu": {CPU: [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]},
}
BASELINE = {"cuda": CUDNN, "cpu": CPU}  # what rates and speed-ups are relative to


DENSE = tuple(name for backends in _BACKENDS.values() for name in backends)


def dense_names(device: str) -> list[str]:
    """The names of `dense_calls`."""
    return list(_BACKENDS[device])


def dense_calls(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Call]:
    """Each library's causal attention; query: [B, H, S, D], key and value: [B, KV, S, D]."""
    backends = _BACKENDS[query.device.type]
    return {name: partial(_dense, query, key, value, backend) for name, backend in backends.items()}


def _dense(query: Tensor, key: Tensor, value: Tensor, backends: list[SDPBackend]) -> Tensor:
    with sdpa_kernel(backends):
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
