"""What the kernels ask of the strides of their inputs."""

from torch import Tensor


def unit_columns(rows: Tensor) -> Tensor:
    """[B, H, S, D] with its last dimension contiguous; a copy only where it is not."""
    return rows if rows.stride(3) == 1 else rows.contiguous()
