"""The search on models whose heads are known: what it finds, what it leaves behind, and how it goes on.

Time is that of tiles here: what the clock of a busy machine says would make another table in every run.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mmcompile
from benchmarks.planted_model import planted_model
from mmcompile import HeadPattern, OptionError, PatternTable, Reason
from mmcompile.pattern_search import equal_time
from mmcompile.pattern_search.candidates import SPACES, Sizing
from mmcompile.pattern_search.record import SearchError
from mmcompile.pattern_search.score import LayerAttention
from mmcompile.tables import mean_error

ROOT = Path(__file__).parents[2]
KINDS = (("site", "local", "columns", "site"), ("columns", "local", "site", "local"))
DENSITY = 0.37  # which is what the grid of the planted video takes
CANDIDATES = (
    HeadPattern("a_shape", sink=128, local=1024),
    HeadPattern("vertical_slash", vertical=1000, slash=1024),
    HeadPattern("grid", lines="s"),
    HeadPattern("grid", lines="v"),
    HeadPattern("top_p", mass=1.0),
)


@pytest.fixture(autouse=True)
def tile_clock(monkeypatch):
    monkeypatch.setattr(equal_time, "attention_ms", by_tiles)


def by_tiles(attention, arranged):
    planned = arranged.plan()
    density = float(planned.of_heads(planned.density).mean())
    return 0.01 + 10 * density, density


def by_tiles_and_planning(attention, arranged):
    """As on an H200 at 16K tokens or so, where all tiles take 3 ms."""
    planning = {"dense": 0.0, "a_shape": 0.05, "grid": 0.5, "vertical_slash": 0.5, "columns": 1.5, "top_p": 1.5}
    tiles, density = by_tiles(attention, arranged)
    return 0.3 * tiles + max(planning[pattern.kind] for pattern in arranged.rows.patterns), density


def small(kinds, **changes):
    sizes = {"kv_heads": 2, "head_dim": 48, "hidden": 96, "grid": (31, 8, 8), "text": 32, "window": 224, "columns": 150}
    return planted_model(kinds, **(sizes | changes))


def search(planted, **options):
    with mmcompile.bind(planted.boundaries):
        return mmcompile.search(planted.model, planted.inputs, progress=False, **options)


@pytest.fixture(scope="module")
def planted():
    return small(KINDS)


@pytest.fixture(scope="module")
def tried():
    """Mean error over the heads of a layer of each pattern that was tried in all of them, by the pattern."""
    return {}


@pytest.fixture(scope="module")
def table(planted, tried):
    score = LayerAttention.score

    def spy(attention, patterns):
        pending = score(attention, patterns)
        if isinstance(patterns, HeadPattern):
            tried.setdefault(patterns, []).append(pending.read())
        return pending

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equal_time, "attention_ms", by_tiles)
        patch.setattr(LayerAttention, "score", spy)
        return search(planted, candidates=CANDIDATES, density=DENSITY, names=["planted"])


EXPECTED = {"site": ("grid", "site"), "local": ("a_shape", "raster"), "columns": ("vertical_slash", "raster")}


def test_the_planted_pattern_and_order_are_found(planted, table):
    found = [
        (pattern.kind, pattern.orders[0][1].base) == EXPECTED[kind]
        for patterns, kinds in zip(table.layers, planted.kinds, strict=True)
        for pattern, kind in zip(patterns, kinds, strict=True)
    ]
    assert sum(found) / len(found) >= 0.95, [[str(pattern) for pattern in heads] for heads in table.layers]


def test_the_planted_pattern_and_order_are_found_in_the_whole_space(monkeypatch):
    monkeypatch.setattr(equal_time, "attention_ms", by_tiles_and_planning)
    (kinds,) = planted = (KINDS[0] + KINDS[1],)
    table = search(small(planted), density=0.45)
    found = [
        (one.kind, one.orders[0][1].base) == EXPECTED[kind] for one, kind in zip(table.layers[0], kinds, strict=True)
    ]
    assert sum(found) / len(found) >= 0.95, [str(pattern) for pattern in table.layers[0]]


def test_no_single_pattern_of_the_same_cost_has_a_smaller_error(table, tried):
    budget = table.settings["budget ms"] / len(table.layers)
    singles = {
        pattern: sum(sum(score.error) / len(score.error) for score in scores) / len(scores)
        for pattern, scores in tried.items()
        if all(0.01 + 10 * sum(score.density) / len(score.density) <= 1.03 * budget for score in scores)
    }
    assert len(singles) >= len(CANDIDATES)
    assert mean_error(table) <= min(singles.values())
    assert mean_error(table) < 0.5 * min(singles.values())


def test_a_shared_budget_is_kept_and_beats_an_even_one(table):
    told = table.settings
    assert told["ms"] <= 1.03 * told["budget ms"]
    assert mean_error(table) == pytest.approx(told["mean error"])
    assert told["mean error"] <= told["mean error of a uniform budget"]


def test_what_was_found_stands_in_the_table(planted, table, tmp_path):
    assert table.architecture == mmcompile.Architecture.of(planted.model)
    (sample,) = table.samples
    assert (sample.name, sample.tokens) == ("planted", 2048)
    assert [(one.modality, one.tokens) for one in sample.segments] == [("text", 32), ("video", 1984), ("text", 32)]
    assert sample.segments[1].grid == (31, 8, 8)
    for patterns, heads in zip(table.layers, table.heads, strict=True):
        for pattern, head in zip(patterns, heads, strict=True):
            assert pattern in [point.pattern for point in head.front]
            times, errors = [p.ms for p in head.front], [p.error for p in head.front]
            assert times == sorted(times) and errors == sorted(errors, reverse=True)
            assert 0 < head.recall <= 1 and 0 < head.density <= 1.3
    table.save(tmp_path / "table.json")
    assert PatternTable.load(tmp_path / "table.json") == table


@torch.no_grad()
def test_a_saved_table_makes_the_same_plans_to_the_bit(planted, table, tmp_path):
    table.save(tmp_path / "table.json")
    outputs, densities = [], []
    for patterns in (table, str(tmp_path / "table.json")):
        torch.compiler.reset()
        mmcompile.compile(planted.model, patterns=patterns, min_tokens=0, inner="eager", strict=True)
        with mmcompile.bind(planted.boundaries):
            outputs.append(planted.model(**planted.inputs).logits)
        densities.append([[head.density for head in site.heads] for site in mmcompile.stats(planted.model)])
    torch.compiler.reset()
    planted.model._compiled_call_impl = None
    assert torch.equal(*outputs)
    assert densities[0] == densities[1]
    found = [[head.density for head in heads] for heads in table.heads]
    assert [pytest.approx(row, abs=1e-6) for row in found] == densities[0]
    report = mmcompile.explain(planted.model, **planted.inputs, options={"patterns": table, "min_tokens": 0})
    assert [site.reason for site in report.sites] == [Reason.SPARSE] * 2


SEARCHED = {"candidates": CANDIDATES[:3], "density": DENSITY}


def test_errors_on_held_out_samples_and_means_over_samples_are_in_the_table():
    first = small(KINDS[:1])
    other = {"input_ids": first.inputs["input_ids"].roll(512)}
    with mmcompile.bind(first.boundaries):
        table = mmcompile.search(
            first.model, [first.inputs, first.inputs], held_out=[other, first.inputs], progress=False, **SEARCHED
        )
        alone = mmcompile.search(first.model, first.inputs, held_out=first.inputs, progress=False, **SEARCHED)
    assert [sample.held_out for sample in table.samples] == [False, False, True, True]
    # A mean over one sample twice is the sample's.
    assert table.layers == alone.layers
    assert [head.error for head in table.heads[0]] == pytest.approx([head.error for head in alone.heads[0]])
    assert [head.held_out for head in alone.heads[0]] == [head.error for head in alone.heads[0]]
    assert any(head.held_out > head.error for head in table.heads[0])


def test_a_recall_is_reached_as_cheaply_as_may_be():
    table = search(small(KINDS[:1]), candidates=CANDIDATES[:3], recall=0.9)
    for head in table.heads[0]:
        assert head.recall >= 0.9
        assert all(point.recall < 0.9 for point in head.front if point.ms < head.ms)


def test_each_modality_and_each_pair_of_them_get_their_own(monkeypatch):
    tried = []
    score = LayerAttention.score

    def spy(attention, patterns):
        tried.extend([patterns] if isinstance(patterns, HeadPattern) else patterns)
        return score(attention, patterns)

    monkeypatch.setattr(LayerAttention, "score", spy)
    within = (HeadPattern("a_shape", local=512), HeadPattern("top_p", mass=1.0))
    grouped = [HeadPattern(one.kind, one.sink, one.local, mass=1.0, boundary=b) for b in ("q", "2d") for one in within]
    planted = small((("local", "columns"),), kv_heads=1, grid=(12, 8, 8), text=128, window=100, columns=80)
    table = search(planted, candidates=grouped, density=0.6)
    named = [pattern for pattern in tried if pattern.pairs]
    assert {pattern.boundary for pattern in named} == {"q", "2d"}
    pairs = {(query, key) for pattern in named if pattern.boundary == "2d" for query, key, _ in pattern.pairs}
    assert pairs == {(0, 0), (0, 2), (2, 0), (2, 2)}
    assert table.settings["mean error"] <= table.settings["mean error of a uniform budget"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0.0}, OptionError, r"density=0.0: must be a number in \(0, 1\]"),
        ({"recall": True}, OptionError, "recall=True: must be a number"),
        ({"density": 0.1, "recall": 0.9}, OptionError, "give one"),
        ({"candidates": "all"}, OptionError, "must be 'paper' or 'full'"),
        ({"candidates": []}, OptionError, "one HeadPattern or more"),
        ({"candidates": [HeadPattern()]}, OptionError, "dense is always one"),
    ],
)
def test_what_cannot_be_searched_is_one_clear_error(options, error, message):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(error, match=message):
        mmcompile.search(model, {"input": torch.ones(1, 2)}, progress=False, **options)


def test_a_model_without_causal_attention_is_refused():
    with pytest.raises(SearchError, match="0 attentions could be made sparse"):
        mmcompile.search(torch.nn.Linear(2, 2), {"input": torch.ones(1, 2)}, progress=False)


@pytest.mark.parametrize("pattern", dict.fromkeys(SPACES["full"]), ids=str)
def test_sizes_are_monotone_and_stay_within_the_prompt(pattern):
    sizing = Sizing(pattern, 4096)
    low, high = sizing.bounds
    assert low < sizing.first(0.1) <= high
    made = [sizing.at(low + (high - low) * step / 20) for step in range(21)]
    assert made[-1].density is None
    for name in ("local", "vertical", "slash", "columns"):
        values = [getattr(one, name) for one in made]
        assert values == sorted(values)
    caps = [one.density or 1.0 for one in made]
    assert caps == sorted(caps)


KILLED = """
import sys, torch, mmcompile
sys.path.insert(0, {root!r})
from tests.mmcompile.test_pattern_search import SEARCHED, by_tiles, small
from mmcompile.pattern_search import equal_time, layer_search
equal_time.attention_ms = by_tiles
planted = small((("site", "local"), ("columns", "site"), ("local", "columns")), kv_heads=1)
with mmcompile.bind(planted.boundaries):
    table = mmcompile.search(
        planted.model, planted.inputs, progress=False, partial={partial!r}, resume=True, **SEARCHED
    )
table.save({out!r})
"""


def run(partial, out):
    code = KILLED.format(root=str(ROOT), partial=str(partial), out=str(out))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT)


def test_a_search_that_was_killed_goes_on_and_ends_with_the_same_table(tmp_path):
    partial = tmp_path / "killed.partial"
    killed = run(partial, tmp_path / "killed.json")
    deadline = time.monotonic() + 600
    while not (partial / "sample-0-layer-000.json").exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "killed.json").exists()
    assert not (partial / "sample-0-layer-002.json").exists(), "the premise: it was not done"
    # Another search starts from what was measured, and runs through.
    whole = tmp_path / "whole.partial"
    whole.mkdir()
    for file in partial.glob("[sc]*.json"):
        if "layer" not in file.name:
            shutil.copy(file, whole)
    assert run(partial, tmp_path / "killed.json").wait() == 0
    assert run(whole, tmp_path / "whole.json").wait() == 0
    assert not partial.exists() and not whole.exists()
    assert (tmp_path / "killed.json").read_text() == (tmp_path / "whole.json").read_text()


def test_a_folder_of_another_search_is_refused_naming_what_differs(tmp_path):
    planted = small((("local", "local"),), kv_heads=1)
    partial = tmp_path / "x.partial"
    partial.mkdir()
    with pytest.raises(SearchError, match="resume it"):
        search(planted, partial=partial, **SEARCHED)
    settings = {"density": 0.1, "candidates": "full"}
    (partial / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SearchError, match=r"another search: it differs in .*density.*samples"):
        search(planted, partial=partial, resume=True, **SEARCHED)
    (partial / "settings.json").write_text("{")
    with pytest.raises(SearchError, match="not what a search leaves behind"):
        search(planted, partial=partial, resume=True, **SEARCHED)
