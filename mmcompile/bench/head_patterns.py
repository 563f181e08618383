"""The head patterns that prefills are measured with, by the name that `--patterns` takes."""

from pathlib import Path
from typing import Any

from mmcompile.bench.video_prompt import PATTERNS
from mmcompile.errors import OptionError
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.tables import PatternTable

PAPER = "paper"
# A third of each layer's heads has each (arXiv 2504.16083): Grid by frame, Vertical-Slash (1000, 4096), A-shape
# (128, 4096).
_THIRDS = ("grid", "vertical_slash", "a_shape")


def patterns_of(name: str, config: Any) -> str | HeadPattern | PatternTable:
    """What the option `patterns` takes. name: "auto", "paper", a kind in PATTERNS, or the path of a table.

    config: of the text decoder. Raises OptionError where it is none of these.
    """
    if name == "auto":
        return name
    if name in PATTERNS:
        return PATTERNS[name]
    if name == PAPER:
        heads = config.num_attention_heads
        layer = [PATTERNS[_THIRDS[head * len(_THIRDS) // heads]] for head in range(heads)]
        return PatternTable.of([layer] * config.num_hidden_layers)
    if not Path(name).exists():
        known = ", ".join((PAPER, *PATTERNS))
        raise OptionError(f"--patterns {name}: must be one of {known}, or the path of a pattern table")
    return PatternTable.load(name)
