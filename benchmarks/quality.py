"""What sparsity costs in quality: the needle evaluation of the kept model, for README's section of that name.

Rounds of all lengths, depths and tasks follow one another until every cell has its samples or the time is up; each
round asks six questions of each prompt. --search makes a pattern table first, on other prompts; --table takes one.
"""

import argparse
import time
from pathlib import Path

from mmcompile.needle.decoder import Decoder
from mmcompile.needle.evaluate import Plan
from mmcompile.needle.methods import choose_methods
from mmcompile.needle.model import KEPT_MODEL
from mmcompile.needle.prompts import Prompts
from mmcompile.needle.run import ask, begin, load
from mmcompile.pattern_search.search import search
from mmcompile.tables import PatternTable

METHODS = (
    "dense,auto,auto-q,auto-2d,a-shape@auto,tri-shape@auto,sf-fixed@auto,sf-strided@auto,vertical-slash@auto,"
    "block-top-p@auto,columns@auto"
)
TABLES = ",table,table-none"
QUESTIONS = 6
DEPTHS = 11
SEARCHED = 16384, 0.5, 10**6  # tokens, depth and seed of the prompts that a table is searched on


def search_table(decoder: Decoder, prompts: Prompts, tasks: tuple[str, ...], density: float) -> PatternTable:
    """A table for the time of an A-shape of this density, from one prompt of each task that nothing else asks."""
    tokens, depth, seed = SEARCHED
    samples = [prompts.batch(task, tokens, [(depth, seed)]).inputs for task in tasks]
    decoder.use(None)
    return search(decoder.model, samples, density=density, names=tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="where the JSON goes; what is there is gone on with")
    parser.add_argument("--plot", type=Path, help="the heat maps, PNG or SVG; needs matplotlib")
    parser.add_argument("--model", help="folder made by save_pretrained; the kept model by default")
    parser.add_argument("--table", type=Path, help="a searched pattern table of the model")
    parser.add_argument("--search", type=float, help="search a table, for the time of an A-shape of this density")
    parser.add_argument("--tokens", default="4096,8192,16384,32768,65536")
    parser.add_argument("--tasks", default="video,mixed")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--samples", type=int, default=50, help="questions of each length and depth")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no round begins later than this")
    parser.add_argument("--check", type=float, default=0.1, help="share of the query tiles compared with dense")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if arguments.model is None and not KEPT_MODEL.exists():
        print(f"{KEPT_MODEL}: no model is kept, nothing was measured; python -m mmcompile.needle.training makes one")
        return
    begun = time.monotonic()
    tasks = tuple(arguments.tasks.split(","))
    decoder, prompts = load(arguments.model, None, QUESTIONS, arguments.dtype, arguments.device)
    table = None if arguments.table is None else PatternTable.load(arguments.table)
    if arguments.search is not None:
        table = search_table(decoder, prompts, tasks, arguments.search)
        table.save(arguments.out.with_name("quality_table.json"))
        print(f"table after {time.monotonic() - begun:.0f} s: {table.settings}", flush=True)
    methods = choose_methods(arguments.methods + TABLES * (table is not None), table, None, None)
    lengths = tuple(int(tokens) for tokens in arguments.tokens.split(","))
    depths = tuple(place / (DEPTHS - 1) for place in range(DEPTHS))
    for samples in range(QUESTIONS, arguments.samples + QUESTIONS, QUESTIONS):
        if time.monotonic() - begun > arguments.seconds:
            break
        plan = Plan(tasks, lengths, depths, samples, methods, arguments.check)
        results = begin(plan, decoder, prompts, arguments.out, resume=True)
        ask(plan, decoder, prompts, results, arguments.out)
        print(f"{samples} questions a cell after {time.monotonic() - begun:.0f} s", flush=True)
    for row in results.rows():
        print(row)
    for head in results.worst_heads():
        print(head)
    if arguments.plot is not None:
        from mmcompile.drawing import save_drawing
        from mmcompile.needle.heat_map import draw_heat_maps

        save_drawing(draw_heat_maps(results), arguments.plot)


if __name__ == "__main__":
    main()
