"""What the compiler makes of the attention kernel for a Hopper GPU, read without one."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmcompile.kernels.attention_config import LARGE, SMALL, Config, padded_head_dim
from mmcompile.kernels.block_sparse import _attention_kernel
from mmcompile.kernels.compare_with_dense_kernel import _dense_kernel
from mmcompile.kernels.patterns import TILE

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes the place of the compiler"
)
POINTERS = dict.fromkeys(
    ("query_tags", "key_tags", "query_row", "key_row", "counts", "tiles", "columns", "head_plan", "key_head"), "*i32"
) | {"cold": "*i1"}


def compiled(width: int, dtype: str, config: Config, descriptors: bool, columns: bool, capability: int):
    """The kernel as `launch` specialises it for aligned, contiguous inputs and a causal mask."""
    padded = padded_head_dim(width)
    constants = {"D": width, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": padded, "TILE": TILE}
    constants |= {"DESCRIPTORS": descriptors, "COLUMNS": columns, "WINDOW": False, "SEGMENTS": False, "SPANS": False}
    pointers = POINTERS | dict.fromkeys(("query", "key", "value", "output"), f"*{dtype}")
    source = f"tensordesc<{dtype}[1, 1, {config.block_n}, {padded}]>" if descriptors else f"*{dtype}"
    signature, attributes = {}, {}
    for position, name in enumerate(_attention_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("key_descriptor", "value_descriptor") and descriptors:
            signature[name] = source
        elif name in ("key_descriptor", "value_descriptor") or name in pointers:
            signature[name] = pointers.get(name, source)
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale_log2" else "i32"
            if name.endswith("stride"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(_attention_kernel, signature, constants, attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(kernel, folder: Path) -> int:
    """Bytes of local memory a thread, which is where spilled registers go."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


@pytest.mark.parametrize("columns", [False, True], ids=["tiles", "columns"])
@pytest.mark.parametrize(("width", "dtype"), [(64, "bf16"), (80, "bf16"), (128, "bf16"), (128, "fp16"), (256, "bf16")])
def test_hopper_runs_on_its_matrix_units_fed_by_bulk_copies(width, dtype, columns, tmp_path):
    kernel = compiled(width, dtype, LARGE[2, padded_head_dim(width)], True, columns, 90)
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert kernel.metadata.shared <= 227 * 1024
    assert stack_bytes(kernel, tmp_path) <= 64


@pytest.mark.parametrize("columns", [False, True], ids=["tiles", "columns"])
@pytest.mark.parametrize(
    ("width", "dtype", "instruction"),
    [(64, "bf16", "mma.sync"), (128, "bf16", "mma.sync"), (256, "bf16", "mma.sync"), (128, "fp32", "fma.rn")],
)
def test_any_other_gpu_has_the_shared_memory_for_it(width, dtype, instruction, columns, tmp_path):
    kernel = compiled(width, dtype, SMALL[4 if dtype == "fp32" else 2, padded_head_dim(width)], False, columns, 80)
    assert instruction in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 64 * 1024
    assert stack_bytes(kernel, tmp_path) <= 64


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("width", [64, 128])
def test_the_comparison_with_dense_does_not_spill(width, capability, tmp_path):
    config = SMALL[2, width]
    constants = {"D": width, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": width, "TILE": TILE}
    constants |= dict.fromkeys(("WINDOW", "SEGMENTS", "SPANS"), False)
    types = dict.fromkeys(("query", "key", "value"), "*bf16") | dict.fromkeys(("result", "held"), "*fp32")
    types |= dict.fromkeys(("batch_of", "head_of", "copy_of", "key_row_of", "token"), "*i64")
    types |= {"query_tags": "*i32", "key_tags": "*i32", "computed": "*i1", "scale_log2": "fp32"}
    signature, attributes = {}, {}
    for position, name in enumerate(_dense_kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name].startswith("*") or name.endswith("stride"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(_dense_kernel, signature, constants, attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert kernel.metadata.shared <= 64 * 1024
    assert stack_bytes(kernel, tmp_path) <= 64
