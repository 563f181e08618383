"""Which kernel attends to a plan on a device, and in which launch shape, in words, for reports."""

import torch


def which_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What `block_sparse_attention` runs there."""
    if device.type == "cpu":
        return "torch operations on the CPU"
    from mmcompile.kernels import choose_config, hopper_support  # here, because Triton is absent where there is no GPU

    why_not = hopper_support.why_not(device, dtype, head_dim)
    if why_not is None:
        most = f"{hopper_support.MOST_COLUMNS:,} single keys, or one in {1 / hopper_support.COLUMNS_SHARE:g},"
        return f"the Hopper kernel (its table's launch shape; lists of over {most} on the portable one)"
    if head_dim == 0:  # not known while tracing
        return f"the portable kernel ({why_not})"
    return f"the portable kernel ({why_not}; {choose_config.describe_config(device, dtype, head_dim)})"
