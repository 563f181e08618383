"""Which kernel attends to a plan on a device, in words, for reports."""

import torch


def which_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What `block_sparse_attention` runs there. Lists of more single keys than the Hopper kernel gathers, and tensors
    that bulk copies cannot read, take the portable one all the same."""
    if device.type == "cpu":
        return "torch operations on the CPU"
    from mmcompile.kernels import block_sparse_hopper  # here, because Triton is absent where there is no GPU

    why_not = block_sparse_hopper.why_not(device, dtype, head_dim)
    return "the Hopper kernel" if why_not is None else f"the portable kernel ({why_not})"
