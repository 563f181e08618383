"""Launch shapes that were measured on this machine, one small JSON file each, in the user's cache folder.

The folder is $XDG_CACHE_HOME/mmcompile/attention, ~/.cache where that is not set, as torch.hub has it. It is neither
TORCHINDUCTOR_CACHE_DIR nor TRITON_CACHE_DIR: Inductor sets both by itself, to a folder under /tmp.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from mmcompile.kernels.attention_config import Config

FORMAT = 1  # of a file; one of another format is not read
log = logging.getLogger(__name__)


class TuningKey(NamedTuple):
    """What a measured launch shape is good for. No length is part of it: that of the walk does not matter."""

    device: str  # its name, as torch has it
    dtype: str
    head_dim: int  # padded
    triton: str  # version
    kernel: str  # digest of the kernel's source and of the shapes it was tried in


def cached_config(key: TuningKey, shapes: Iterable[Config]) -> Config | None:
    """The one of these shapes that was kept for the key; None where none was, with a warning if a file is broken."""
    try:
        content = json.loads(_path(key).read_text())
        if content["format"] != FORMAT or content["key"] != key._asdict():
            raise ValueError("it is of another format, or for another key")
        for config in shapes:
            if content["config"] == config._asdict():
                return config
        raise ValueError("its shape is not one that would be tried")
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        log.warning("measured launch shape not read, it is measured anew: %s: %r", _name(key), error)
        return None


def keep_config(key: TuningKey, config: Config, milliseconds: Mapping[Config, float]) -> None:
    """Writes what was measured; where that is impossible, with a warning, the next process will measure again.

    Whole or not at all: other processes may write the same file, or read it.
    """
    content = {
        "format": FORMAT,
        "key": key._asdict(),
        "config": config._asdict(),
        "milliseconds": [one._asdict() | {"median": median} for one, median in milliseconds.items()],
    }
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder) / path.name
            written.write_text(json.dumps(content, indent=2) + "\n")
            written.replace(path)
    except (OSError, RuntimeError) as error:  # a user without a home is a RuntimeError
        log.warning("measured launch shape not kept: %s: %r", _name(key), error)


def _path(key: TuningKey) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "mmcompile" / "attention" / _name(key)


def _name(key: TuningKey) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32] + ".json"
