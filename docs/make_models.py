"""Run every check of every model family and print docs/models.md: `python docs/make_models.py` (or `make models`).

Results go to docs/models.json as they come in, so that a run that was cut short goes on where it was; `--again` begins
anew. Whatever the source, transformers and torch were when a result was made stands in the file.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.progress import track

from mmcompile.bench.figure import commit, versions
from mmcompile.diagnosis import Status
from mmcompile.doctor import CHECKS, WAYS, Doctor

ROOT = Path(__file__).parents[1]
COMMAND = "python docs/make_models.py"
HOW = {
    "mmcompile.compile": "`mmcompile.compile(model)`, the way to use it",
    "text model": '`model.get_decoder().compile(backend="mminference")`, the text decoder alone',
    "torch.compile": '`model.compile(backend="mminference")`, the whole model',
}
ABOUT = """\
Each family of `tests/models/families.py` is transformers' own model class (LongVILA and VideoChat-Flash are built from
transformers' parts), with two decoder layers, a small vision tower and fixed random weights, in float32 on the CPU. The
prompts hold an image or a video. `python -m mmcompile doctor --model PATH` runs the same checks on your model.

- **no cache**, **cache + decode**, **padded batch**: with every tile computed, the logits of a prefill, of a prefill
  and four decode steps on its cache, and of the real tokens of a left-padded batch of two are eager's, to 1e-4.
- **second length**: so are those of three lengths, and the third compiles nothing.
- **generate**: eight greedy tokens are eager's.
- **sparse**: at `density=0.1` the logits are finite, and `mmcompile.stats` tells of every rewritten attention.

A cell says works, dense (right, and nothing became sparse) or fails, and how many of the decoder's attentions ran on
our kernels. Numbers in brackets are the notes below the table.
"""


def main() -> int:
    """Run what is missing, write both files, and say what is in them; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "models.md")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "models.json")
    parser.add_argument("--again", action="store_true", help="run everything, whatever the results hold")
    parser.add_argument("--family", action="append", help="run this family alone, again; may be repeated")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.models.families import FAMILIES

    unknown = set(arguments.family or ()) - set(FAMILIES)
    if unknown:
        parser.error(f"no family {', '.join(sorted(unknown))}; choose from {', '.join(FAMILIES)}")
    results = [] if arguments.again or not arguments.results.exists() else json.loads(arguments.results.read_text())
    results = [one for one in results if one["family"] in FAMILIES and one["family"] not in (arguments.family or ())]
    done = {(one["family"], one["way"]) for one in results}
    missing = [(name, way) for way in HOW for name in FAMILIES if (name, way) not in done]
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    # Of the code that is loaded now, whatever is edited meanwhile.
    source = {"versions": versions("cpu"), "commit": commit()}
    for name, way in track(missing, "checking"):
        model = FAMILIES[name].model()
        diagnosis = Doctor(model, FAMILIES[name].prompts(model), inner="eager").diagnose([way], CHECKS)
        results += [{"family": name} | source | one.to_dict() for one in diagnosis.results]
        lines = ",\n".join(json.dumps(result) for result in results)  # a line each, so that changes can be read
        arguments.results.write_text(f"[\n{lines}\n]\n")
    arguments.out.write_text(page(results, FAMILIES))
    failed = sum(one["status"] == Status.FAILS for one in results)
    print(f"wrote {arguments.out}: {len(results)} checks of {len(FAMILIES)} families, {failed} fail")
    return int(failed > 0)


def page(results: list[dict[str, Any]], families: Iterable[str]) -> str:
    """The Markdown page: a table for each way of compiling, with its notes."""
    made_with = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in one["versions"].items()) + f", commit {one['commit']}"
        for one in results
    )
    lines = [
        "# Model families",
        "",
        f"Made by `{COMMAND}` with {'; '.join(made_with)}.",
        "",
        ABOUT,
    ]
    found = {(one["way"], one["family"], one["check"]): one for one in results}
    for way in HOW:
        lines += [f"## {HOW[way]}", "", line(["family", *CHECKS]), line(["---"] * (1 + len(CHECKS)))]
        notes: dict[str, int] = {}
        for family in families:
            lines.append(line([family, *(cell(found.get((way, family, check)), notes) for check in CHECKS)]))
        lines += ["", *(f"{number}. {note}" for note, number in notes.items()), ""]
    return "\n".join(lines).rstrip() + "\n"


def cell(result: dict[str, Any] | None, notes: dict[str, int]) -> str:
    """One check in a few words; `notes` learns why it does not work."""
    if result is None:
        return "not run"
    sites = f"{result['rewritten']}/{result['causal']}"
    if result["status"] == Status.WORKS and result["rewritten"] == result["causal"]:
        return f"works {sites}"
    why = result["detail"] if result["status"] != Status.WORKS else "; ".join(result["dense"])
    number = notes.setdefault(why.replace("|", "\\|"), len(notes) + 1)
    return f"{ {'works': 'works', 'stays dense': 'dense', 'fails': '**fails**'}[result['status']] } {sites} [{number}]"


def line(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    assert set(HOW) == set(WAYS)
    sys.exit(main())
