"""What a search has finished, kept in a folder, so that an interrupted one goes on and ends with the same table."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmcompile.pattern_search.equal_time import Costs
from mmcompile.pattern_search.layer_search import Evaluation
from mmcompile.pattern_search.record import SearchError
from mmcompile.table_file import write_whole

_SETTINGS = "settings.json"


class Finished:
    """Measured costs and finished layers; every file is whole or not there.

    Measured times are kept too: a search that measured them again would weigh heads differently.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], *, resume: bool) -> None:
        """folder: None keeps nothing. settings: JSON values; another search's folder is refused.

        Raises SearchError where the folder holds something else, or something at all without `resume`.
        """
        self._folder = folder
        if folder is None:
            return
        if not resume and folder.exists():
            raise SearchError(f"{folder} holds a search that did not end: resume it (--resume), or remove the folder")
        kept = _read(folder / _SETTINGS)
        if kept is not None and kept != settings:
            names = sorted(name for name in {*kept, *settings} if kept.get(name) != settings.get(name))
            raise SearchError(f"{folder} holds another search: it differs in {', '.join(names)}")
        write_whole(folder / _SETTINGS, json.dumps(settings))

    def costs(self, key: str) -> Costs | None:
        """What attention of one geometry was measured to cost."""
        values = self._load(f"costs-{_short(key)}")
        return None if values is None else Costs.from_dict(values)

    def keep_costs(self, key: str, costs: Costs) -> None:
        self._save(f"costs-{_short(key)}", costs.to_dict())

    def layer(self, run: str, layer: int) -> list[Evaluation] | None:
        """What a run over a sample found of a layer; None where it has not been there."""
        values = self._load(f"{run}-layer-{layer:03}")
        return None if values is None else [Evaluation.from_dict(one) for one in values]

    def keep_layer(self, run: str, layer: int, evaluations: Sequence[Evaluation]) -> None:
        self._save(f"{run}-layer-{layer:03}", [one.to_dict() for one in evaluations])

    def remove(self) -> None:
        """Drop everything: the table is made."""
        if self._folder is not None:
            shutil.rmtree(self._folder)

    def _load(self, name: str) -> Any:
        return None if self._folder is None else _read(self._folder / f"{name}.json")

    def _save(self, name: str, values: Any) -> None:
        if self._folder is not None:
            write_whole(self._folder / f"{name}.json", json.dumps(values))


def digest(inputs: Mapping[str, Any]) -> str:
    """Of a sample's values, to know it again."""
    found = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name]
        found.update(name.encode())
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SearchError(f"{path}: not what a search leaves behind ({error}); remove its folder") from error


def _short(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:12]
