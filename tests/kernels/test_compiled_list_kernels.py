"""What the compiler makes of the list kernels for a Hopper GPU, and for an older one, read without any."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmcompile.kernels import (
    a_shape_kernel,
    levels_kernel,
    lines_kernel,
    tile_bounds_kernel,
    tile_list_kernel,
    top_keys_kernel,
)
from mmcompile.kernels.levels import MASS_LEVELS, OCTAVE
from mmcompile.kernels.patterns import MODALITIES, TILE
from mmcompile.kernels.tile_classes import CHOSEN, FULL, MANDATORY, NON_EMPTY

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes the place of the compiler"
)
# All else is int32 or, where the kernel does not name it as a size, a pointer to it.
LONG = (
    "pair",
    "keys",
    "slots",
    "group_keys",
    "group_slots",
    "last_level",
    "rest",
    "following_count",
)
TYPES = dict.fromkeys(LONG, "*i64") | dict.fromkeys(("hot_tiles", "row_lines", "column_lines"), "*i1")
TYPES |= {"classes": "*u8", "plane": "*i16", "levels": "*i16", "mass": "*fp32"}
TYPES |= dict.fromkeys(("mass", "held", "weight", "log_mass", "of_columns"), "*fp32") | {"cold": "*i1"}
TYPES |= {"column_share": "*fp32", "recall": "fp32", "whole": "fp32"}
ALL = {"NON_EMPTY": NON_EMPTY, "FULL": FULL, "MANDATORY": MANDATORY, "CHOSEN": CHOSEN, "TILE": TILE}
ALL |= {"OCTAVE": OCTAVE, "MODALITIES": MODALITIES, "QUERIES": a_shape_kernel.QUERIES, "REACH": True, "EVERY": False}
ALL |= {"QUERY_TILES": tile_list_kernel.QUERY_TILES, "SUMMED": tile_list_kernel.SUMMED}
MASK = {"WINDOW": True, "SEGMENTS": True, "SPANS": True}
PLANE = dict.fromkeys(("diagonals", "own", "row_lines", "column_lines"))
RINGS = dict.fromkeys(("plane", "diagonals", "own", "weights", "column_share", "of_tile", "rest", "following_count"))
PUT, COUNT, LIST = (step._asdict() for step in (levels_kernel.PUT, tile_list_kernel.COUNT, tile_list_kernel.LIST))
BOUNDS = {"key_tiles": tile_bounds_kernel.KEY_TILES, "warps": tile_bounds_kernel.OPTIONS["num_warps"]}
RUNS = {"key_tiles": 0, "warps": a_shape_kernel.OPTIONS["num_warps"]}
EVERY_RUN = {"GROUPS": MODALITIES, "WINDOW": True, "LOCAL": True, "LAST": True}
KEYS = {name: getattr(top_keys_kernel, name) for name in ("DIGITS", "DIGIT", "KEYS", "ROWS")}
DIAGONALS = {name: getattr(lines_kernel, name) for name in ("DISTANCES", "AT_ONCE", "RANKED", "OTHERS")}
CASES: dict[str, tuple[Any, dict[str, int], dict[str, Any]]] = {
    "classes": (tile_bounds_kernel._classify_kernel, BOUNDS, MASK),
    "runs": (a_shape_kernel._runs_kernel, RUNS, EVERY_RUN | {"after": None}),
    "runs of one segment": (a_shape_kernel._runs_kernel, RUNS, EVERY_RUN),
    "keys listed": (top_keys_kernel._list_top_keys_kernel, {"key_tiles": 0, "warps": 16}, KEYS),
    "diagonals summed": (lines_kernel._sum_diagonals_kernel, {"key_tiles": 0, "warps": 1}, DIAGONALS),
    "diagonals ranked": (lines_kernel._rank_diagonals_kernel, {"key_tiles": 0, "warps": 4}, DIAGONALS),
    "levels of mass": (levels_kernel._put_mass_kernel, PUT, {"LEVELS": MASS_LEVELS}),
    "levels of samples": (levels_kernel._put_samples_kernel, PUT, {"LEVELS": MASS_LEVELS, "SAMPLES": 3, "PADDED": 4}),
    "levels counted": (tile_list_kernel._count_levels_kernel, COUNT, PLANE | {"LEVELS": MASS_LEVELS}),
    "rings counted": (tile_list_kernel._count_levels_kernel, COUNT, RINGS | {"LEVELS": 1}),
    "lists": (tile_list_kernel._list_tiles_kernel, LIST, PLANE | {"WRITE": True}),
    "lists of rings": (tile_list_kernel._list_tiles_kernel, LIST, RINGS | {"WRITE": True, "following": None}),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_registers_do_not_spill(name: str, capability: int, tmp_path: Path) -> None:
    kernel, steps, values = CASES[name]
    values = ALL | values | {"KEY_TILES": steps["key_tiles"]}
    constants = {argument: values[argument] for argument in kernel.arg_names if argument in values}
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        size = argument in kernel.do_not_specialize or argument.endswith("stride")
        signature[argument] = TYPES.get(argument, "i32" if size else "*i32")
        if argument in constants:
            signature[argument] = "constexpr"
        elif signature[argument].startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    made = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": steps["warps"], "enable_fp_fusion": False},
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"STACK:(\d+)", usage).group(1)) <= 16
