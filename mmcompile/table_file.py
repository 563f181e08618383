"""The file of a pattern table: JSON that says what it is, follows a schema, and carries a checksum of itself."""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmcompile.errors import TableError
from mmcompile.kernels.patterns import BOUNDARIES, KINDS, ORDERS, SCORES, HeadPattern

FORMAT = "mmcompile.PatternTable"
VERSION = 2


def _object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Every property must be there, and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }


def _list(items: dict[str, Any], least: int = 0, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, **more}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 1}
_FIGURE = {"type": "number", "minimum": 0}
_CHOICES = {"kind": KINDS, "boundary": BOUNDARIES, "order": ORDERS, "scores": SCORES}


def _pattern_schema() -> dict[str, Any]:
    """Of a `HeadPattern`, field by field as its defaults are; the class itself checks what goes with what."""
    properties: dict[str, Any] = {}
    for name, value in HeadPattern().to_dict().items():
        if name in _CHOICES:
            properties[name] = {"enum": list(_CHOICES[name])}
        elif name == "pairs":
            properties[name] = _list(_list({}, 3, maxItems=3, description="query modality, key modality, pattern"))
        else:
            kinds = {int: {"type": "integer", "minimum": 0}, float: _FIGURE, str: _TEXT}
            properties[name] = _or_null(_FIGURE) if value is None else kinds[type(value)]
    properties["columns"] = _FIGURE  # a number of keys, or a share of them
    return _object(properties)


_POINT = _object({"pattern": _TEXT, "ms": _FIGURE, "density": _FIGURE, "error": _FIGURE, "recall": _or_null(_FIGURE)})
_HEAD = _object(
    {
        "error": _FIGURE,
        "density": _FIGURE,
        "ms": _FIGURE,
        "recall": _or_null(_FIGURE),
        "held_out": _or_null(_FIGURE),
        "front": _list(_POINT),
    }
)
_SEGMENT = _object(
    {"modality": _TEXT, "tokens": _COUNT, "grid": _list({"type": "integer", "minimum": 0}, 3, maxItems=3)}
)
_SAMPLE = _object({"name": _TEXT, "tokens": _COUNT, "segments": _list(_SEGMENT), "held_out": {"type": "boolean"}})
_ARCHITECTURE = _object(
    {
        "model_type": _TEXT,
        "layers": _COUNT,
        "heads": _COUNT,
        "kv_heads": _COUNT,
        "head_dim": _COUNT,
        "hidden_size": _COUNT,
        "rope": _TEXT,
    }
)
_SHARD = _object({"rank": {"type": "integer", "minimum": 0}, "world_size": _COUNT})

# What a file holds; docs/pattern_table.schema.json is this, for other programs.
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Pattern table of mmcompile",
    "description": "One head pattern for every layer and head of a model, and what the search for them found. "
    "mmcompile.tables says what each field means.",
    **_object(
        {
            "format": {"const": FORMAT},
            "version": {"const": VERSION},
            "checksum": {
                "type": "string",
                "pattern": "^sha256:[0-9a-f]{64}$",
                "description": "of everything else, as JSON with sorted keys and no spaces",
            },
            "architecture": _or_null(_ARCHITECTURE),
            "shard": _or_null(_SHARD),
            "layers": _list(_list({"type": "string", "description": "a name in patterns"}, 1), 1),
            "heads": _or_null(_list(_list(_HEAD, 1), 1)),
            "patterns": {"type": "object", "additionalProperties": _pattern_schema()},
            "samples": _list(_SAMPLE),
            "versions": {"type": "object", "additionalProperties": _TEXT},
            "device": _TEXT,
            "settings": {"type": "object"},
        }
    ),
}


def write(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a table's values, in a file that is whole or not there. Raises TableError."""
    sealed: dict[str, Any] = {"format": FORMAT, "version": VERSION, "checksum": "", **content}
    sealed["checksum"] = _checksum(sealed)
    problem = next(problems(sealed, SCHEMA), None)
    if problem is not None:
        raise TableError(f"{path}: not written: {problem}")
    write_whole(path, _text(sealed))


def write_whole(path: str | Path, text: str) -> None:
    """Replace a file in one step, so that whoever is interrupted leaves the old one. Raises TableError."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).chmod(0o644)
        Path(file.name).replace(target)
    except OSError as error:
        raise TableError(f"{path}: cannot be written ({error.strerror})") from error


def read(path: str | Path) -> dict[str, Any]:
    """The values of a table's file, checked. Raises TableError naming what is wrong and where, OSError."""
    try:
        text = Path(path).read_text()
        content = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        cut = "; it ends in the middle" if text.startswith("{") and not text.endswith("}\n") else ""
        raise TableError(f"{path} is not a pattern table: not JSON ({error}){cut}") from error
    except ValueError as error:
        raise TableError(f"{path} is not a pattern table: not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TableError(f'{path} is not a pattern table: no "format": "{FORMAT}" in it')
    if content.get("version") != VERSION:
        raise TableError(f"{path} has version {content.get('version')!r}; this release reads {VERSION}")
    problem = next(problems(content, SCHEMA), None)
    if problem is not None:
        raise TableError(f"{path}: {problem}")
    if content["checksum"] != _checksum(content):
        raise TableError(
            f"{path} was changed after it was written: its checksum is {content['checksum'][7:19]}..., that of what it "
            f"holds {_checksum(content)[7:19]}...; make changes with PatternTable.load, dataclasses.replace and save"
        )
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != "checksum"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _text(content: Mapping[str, Any]) -> str:
    """JSON with a line for each layer's patterns, each head, each pattern, so that it reads and diffs well."""
    lines = []
    for name, value in content.items():
        if name == "layers":
            text = _lines([json.dumps(row) for row in value], "[]")
        elif name == "heads" and value is not None:
            text = _lines([_lines([json.dumps(head) for head in row], "[]", 2) for row in value], "[]")
        elif isinstance(value, dict) and value:
            text = _lines([f"{json.dumps(key)}: {json.dumps(one)}" for key, one in value.items()], "{}")
        else:
            text = json.dumps(value)
        lines.append(f"{json.dumps(name)}: {text}")
    return _lines(lines, "{}", 0) + "\n"


def _lines(entries: list[str], brackets: str, depth: int = 1) -> str:
    indent = "\n" + " " * (depth + 1)
    return brackets[0] + indent + ("," + indent).join(entries) + "\n" + " " * depth + brackets[1]


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def problems(value: Any, schema: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Where and how a JSON value breaks a schema: the part of JSON Schema that `SCHEMA` uses."""
    where = place or "the file"
    if "anyOf" in schema:  # of one schema and null
        yield from () if value is None else problems(value, schema["anyOf"][0], place)
        return
    if "const" in schema and value != schema["const"]:
        yield f"{where} is {value!r}; must be {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where} is {value!r}; must be one of {schema['enum']}"
    wanted = schema.get("type")
    if wanted is not None and (
        not isinstance(value, _TYPES[wanted]) or (isinstance(value, bool) and wanted != "boolean")
    ):
        yield f"{where} is {_shown(value)}; must be {wanted}"
    elif isinstance(value, dict):
        yield from _object_problems(value, schema, place)
    elif isinstance(value, list):
        least, most = schema.get("minItems", 0), schema.get("maxItems", math.inf)
        if not least <= len(value) <= most:
            yield f"{where} has {len(value)} entries; must have {least}{' or more' if most > least else ''}"
        for index, item in enumerate(value):
            yield from problems(item, schema.get("items", {}), f"{place}[{index}]")
    elif isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{where} is {value!r}; must match {schema['pattern']}"
    elif wanted in ("integer", "number") and not schema.get("minimum", -math.inf) <= value < math.inf:
        yield f"{where} is {value}; must be at least {schema.get('minimum')}"


def _object_problems(value: Mapping[str, Any], schema: Mapping[str, Any], place: str) -> Iterator[str]:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    prefix = f"{place}." if place else ""
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{prefix}{name} is missing"
    for name, item in value.items():
        if name in properties:
            yield from problems(item, properties[name], prefix + name)
        elif others is False:
            yield f"{prefix}{name} is not known; {place or 'the file'} has {', '.join(properties)}"
        elif isinstance(others, dict):
            yield from problems(item, others, f"{place}[{name!r}]")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
