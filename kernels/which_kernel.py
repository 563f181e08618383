"""Which kernel attends to a plan on a device, in which launch shape, and from how many keys on it pays to make one."""

import torch

# Keys from which a prefill was measured to be faster sparse than dense: "auto" at its cap, on random weights, which are
# its worst case. On an H200, with the portable kernel, which stands for what was not measured: prefill_auto.json in
# docs/figures. With the Hopper kernel 16384 is too short (prefill_short.json), and what lies between was not measured.
SPARSE_FROM_HOPPER = 32768
SPARSE_FROM = 32768


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


def sparse_from(device: torch.device, dtype: torch.dtype, head_dim: int) -> int:
    """The number of keys from which a sparse prefill was measured to be faster there than a dense one."""
    if device.type == "cpu":
        return SPARSE_FROM
    from mmcompile.kernels import hopper_support

    return SPARSE_FROM_HOPPER if hopper_support.why_not(device, dtype, head_dim) is None else SPARSE_FROM
