"""Write docs/pattern_table.schema.json, the JSON Schema of pattern tables, from the package: no arguments."""

import json
from pathlib import Path

from mmcompile.table_file import SCHEMA

TARGET = Path(__file__).with_name("pattern_table.schema.json")


def text() -> str:
    return json.dumps(SCHEMA, indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text())
    print(f"wrote {TARGET}")
