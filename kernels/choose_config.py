"""Which launch shape the portable attention kernel takes: the table's, or one that was measured on this device.

The table is right on the GPU and the Triton version that it was measured on, and nothing is measured there. Elsewhere
the first call for a dtype and head dim measures a few shapes (`measure_configs.py`) and keeps the fastest, on disk too
(`tuned_configs.py`). Unlike `triton.autotune`, never with the caller's tensors, and never anew for a new length.

MMCOMPILE_AUTOTUNE=0 takes the table everywhere, =force measures where the table was measured too; 1 is the default.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from threading import Lock

import torch
import triton
from torch import Tensor

from mmcompile.kernels.attention_config import MEASURED_ON, Config, padded_head_dim, table_config
from mmcompile.kernels.measure_configs import shapes_to_try
from mmcompile.kernels.tuned_configs import TuningKey, cached_config, keep_config

VARIABLE = "MMCOMPILE_AUTOTUNE"
OFF, ON, FORCE = MODES = ("0", "1", "force")
log = logging.getLogger(__name__)

# Milliseconds of each launch shape on a device, for a dtype, a padded head dim, and the shape of the table.
Measure = Callable[[torch.device, torch.dtype, int, Config], dict[Config, float]]

_known: dict[TuningKey, Config] = {}
_lock = Lock()  # one thread measures, the others take what it found


def choose_config(query: Tensor, measure: Measure) -> Config:
    """The launch shape for queries [B, H, S, D]. A first call may measure, and waits for the device then.

    Raises ValueError for an unknown value of MMCOMPILE_AUTOTUNE.
    """
    device, dtype, head_dim = query.device, query.dtype, query.shape[3]
    table = table_config(device, dtype, head_dim)
    if _why_table(device) is not None:
        return table
    key = _key(device, dtype, padded_head_dim(head_dim))
    with _lock:
        found = _find(key, dtype)
        if found is None:
            if not _may_measure():
                return table
            found = _known[key] = _fastest(key, device, dtype, table, measure)
        return found


def describe_config(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What `choose_config` gives there, and where it comes from, in words. Measures nothing."""
    config, origin = table_config(device, dtype, head_dim), _why_table(device)
    if origin is None:
        found = _find(_key(device, dtype, padded_head_dim(head_dim)), dtype)
        config = config if found is None else found
        origin = "measured on this device" if found else "from a table until a first call measures others"
    return f"{config.block_m} x {config.block_n} scores a step, {config.warps} warps, {config.stages} stages, {origin}"


def _why_table(device: torch.device) -> str | None:
    """Why the table's shape is taken, in words; None where a measured one is."""
    mode = os.environ.get(VARIABLE, ON)
    if mode not in MODES:
        raise ValueError(f"{VARIABLE}={mode}: must be one of {', '.join(MODES)}")
    if device.type != "cuda":  # the interpreter
        return "from a table"
    name, version = _device_name(device), _triton_version()
    if (name, version) in MEASURED_ON and mode != FORCE:
        return "from a table measured on this device"
    return f"from a table not measured on {name} with Triton {version}: {VARIABLE}={OFF}" if mode == OFF else None


def _find(key: TuningKey, dtype: torch.dtype) -> Config | None:
    """What this process, or an earlier one, found for the key."""
    if key not in _known:
        kept = cached_config(key, shapes_to_try(dtype.itemsize, key.head_dim))
        if kept is None:
            return None
        _known[key] = kept
    return _known[key]


def _may_measure() -> bool:
    """Not while CUDA records a graph or torch traces: the table serves that call, and a later one measures."""
    return not (torch.cuda.is_current_stream_capturing() or torch.compiler.is_compiling())


def _fastest(key: TuningKey, device: torch.device, dtype: torch.dtype, table: Config, measure: Measure) -> Config:
    milliseconds = measure(device, dtype, key.head_dim, table)
    if not milliseconds:
        log.warning("no launch shape of the attention kernel could be measured on %s: %s stays", key.device, table)
        return table
    config = min(milliseconds, key=milliseconds.__getitem__)
    log.info("attention kernel on %s, %s, head dim %d: %s of %s", *key[:3], config, milliseconds)
    # Another process may have been faster: then both go on with one result.
    kept = cached_config(key, milliseconds)
    if kept is None:
        keep_config(key, config, milliseconds)
    return kept or config


@lru_cache
def _key(device: torch.device, dtype: torch.dtype, padded: int) -> TuningKey:
    source = files("mmcompile.kernels").joinpath("block_sparse.py").read_bytes()
    tried = repr(shapes_to_try(dtype.itemsize, padded)).encode()
    digest = hashlib.sha256(source + tried).hexdigest()
    return TuningKey(_device_name(device), str(dtype).removeprefix("torch."), padded, triton.__version__, digest)


@lru_cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _triton_version() -> str:
    return ".".join(triton.__version__.split(".")[:2])
