"""What the compiler makes of the Hopper kernel of the estimate, read without a GPU."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from mmcompile.kernels import hopper_support
from mmcompile.kernels.attention_config import padded_head_dim
from mmcompile.kernels.patterns import TILE

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no Gluon"),
    pytest.mark.skipif(
        not triton.__version__.startswith(hopper_support.MEASURED_ON), reason="the kernel runs on no other Triton"
    ),
]
INTEGERS = dict.fromkeys(
    ("query_order", "query_tags", "query_row", "key_row", "head", "key_head", "bounds", "counter"), "*i32"
)
POINTERS = INTEGERS | {"slots": "*i64", "walk": "*i64", "output": "*fp32"}
PARTS = ("WINDOW", "SEGMENTS", "SPANS")


def compiled(width: int, dtype: str, walk: bool, cold: bool, parts: tuple[str, ...]):
    """The kernel as its launch specialises it for aligned, contiguous inputs."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from mmcompile.kernels import tile_mass_hopper

    kernel = tile_mass_hopper._log_mass_kernel
    padded = padded_head_dim(width)
    shape = tile_mass_hopper.SHAPES[padded]
    of_rows = gl.NVMMASharedLayout.get_default_for([1, TILE], gl.int32)
    of_keys = gl.NVMMASharedLayout.get_default_for([1, 1, TILE, padded], gl.float16)
    types = POINTERS | {
        "query": f"*{dtype}",
        "key": f"tensordesc<{dtype}[1, 1, {TILE}, {padded}],{of_keys!r}>",
        "bias": f"tensordesc<fp32[1, {TILE}],{of_rows!r}>",
        "scale_log2": "fp32",
    }
    types |= dict.fromkeys(("key_positions", "key_tags"), f"tensordesc<i32[1, {TILE}],{of_rows!r}>")
    constants = {"D": width, "BLOCK_D": padded, "STAGES": shape.stages}
    constants |= {"QUERIES": shape.queries, "WALK": walk, "COLD": cold} | {part: part in parts for part in PARTS}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name.endswith("stride")]
    source = GluonASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def run_tool(tool: str, cubin: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments, cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("width", "dtype", "walk", "cold", "parts"),
    [
        (64, "bf16", True, True, ()),
        (80, "fp16", False, False, ()),
        (128, "bf16", False, False, ()),
        (128, "bf16", True, True, ()),
        (128, "bf16", True, True, PARTS),
        (256, "bf16", True, True, ()),
    ],
)
def test_scores_stay_where_they_are_made(width, dtype, walk, cold, parts, tmp_path):
    """No register is spilled but for a mask of many parts, and none of a product's is touched before it is done."""
    kernel = compiled(width, dtype, walk, cold, parts)
    assert kernel.metadata.shared <= 227 * 1024
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = run_tool(knobs.nvidia.cuobjdump.path, cubin, "-res-usage")
    assert int(re.search(r"STACK:(\d+)", usage).group(1)) <= (128 if parts else 64)
    code = run_tool(knobs.nvidia.nvdisasm.path, cubin, "-c")
    assert code.count("HGMMA") == 4 * padded_head_dim(width) // 16  # a product for each of four groups
    in_flight: set[int] = set()
    for line in code.splitlines():
        product = re.search(r"HGMMA\.64x(\d+)x16\S* R(\d+), gdesc", line)
        if product:
            keys, first = map(int, product.groups())
            in_flight |= set(range(first, first + keys // 2))
        elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line:
            in_flight.clear()
        elif in_flight:
            assert not in_flight & {int(register) for register in re.findall(r"\bR(\d+)\b", line)}, line
