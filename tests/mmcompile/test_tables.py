"""Pattern tables: what survives a file, what is refused and how it is said, slices for tensor parallelism."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmcompile
from mmcompile import Architecture, HeadPattern, OptionError, Options, PatternTable, TableError
from mmcompile.table_file import SCHEMA, problems
from mmcompile.tables import FrontPoint, HeadFinding, Sample, Segment
from mmcompile.tiny_qwen import tiny_qwen2_5_vl

GRID = HeadPattern("grid", boundary="2d", pairs=((2, 0, HeadPattern("grid", lines="v")),))
LOCAL = HeadPattern("a_shape", sink=1, local=64)
SMALL = Architecture("tiny_text", layers=2, heads=4, kv_heads=2, head_dim=16, hidden_size=64, rope="rope_theta 1e6")
DOCS = Path(__file__).parents[2] / "docs"


def finding(error=0.25):
    front = (FrontPoint(LOCAL, 0.5, 0.1, 2 * error), FrontPoint(GRID, 1.0 / 3, 0.2, error))
    return HeadFinding(error, 0.2, 1.0 / 3, recall=0.9, held_out=None, front=front)


def table(layers=2, heads=4):
    patterns = [[GRID if head % 2 else replace(LOCAL, local=64 + head) for head in range(heads)] for _ in range(layers)]
    return replace(
        PatternTable.of(patterns),
        architecture=SMALL if (layers, heads) == (2, 4) else None,
        heads=tuple(tuple(finding(0.1 * head) for head in range(heads)) for _ in range(layers)),
        samples=(Sample("a.mp4", 25000, (Segment("text", 8), Segment("video", 24992, (71, 16, 22)))),),
        versions={"torch": "2.13"},
        device="CPU",
        settings={"density": None, "candidates": ["grid"]},
    )


@pytest.mark.parametrize("saved", [table(), PatternTable.of([[LOCAL, HeadPattern()]])], ids=["searched", "by hand"])
def test_a_table_survives_its_file(tmp_path, saved):
    saved.save(tmp_path / "table.json")
    loaded = PatternTable.load(tmp_path / "table.json")
    assert loaded == saved
    assert hash(loaded) == hash(saved)
    assert Options(patterns=str(tmp_path / "table.json")).head_patterns == saved.layers
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


def test_a_file_has_a_line_for_each_layer_and_each_head(tmp_path):
    table().save(tmp_path / "table.json")
    lines = (tmp_path / "table.json").read_text().splitlines()
    assert sum("a_shape(1, 64)" in line and "grid" in line and "error" not in line for line in lines) == 2
    assert sum('"held_out": null' in line for line in lines) == 8


def test_patterns_that_read_alike_keep_apart(tmp_path):
    pair = [HeadPattern("top_p", sink=1), HeadPattern("top_p", sink=2)]
    assert str(pair[0]) == str(pair[1])
    PatternTable.of([pair]).save(tmp_path / "table.json")
    assert PatternTable.load(tmp_path / "table.json").layers == (tuple(pair),)


def edited(content, *path, to):
    target = content
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = to
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "other", 'no "format": "mmcompile.PatternTable" in it'),
        (("version",), 1, "has version 1; this release reads 2"),
        (("layers",), 3, "layers is 3; must be array"),
        (("layers", 0, 1), 7, r"layers\[0\]\[1\] is 7; must be string"),
        (("layers", 1), [], r"layers\[1\] has 0 entries; must have 1 or more"),
        (("heads", 1, 2, "error"), "small", r'heads\[1\]\[2\]\.error is "small"; must be number'),
        (("heads", 1, 2, "error"), True, r"heads\[1\]\[2\]\.error is true; must be number"),
        (("heads", 1, 2, "ms"), -1, r"heads\[1\]\[2\]\.ms is -1; must be at least 0"),
        (("heads", 0, 0, "front", 1, "cost"), 1, r"heads\[0\]\[0\]\.front\[1\]\.cost is not known"),
        (("architecture", "heads"), 4.5, r"architecture\.heads is 4\.5; must be integer"),
        (("patterns", "a_shape(1, 64)", "kind"), "b_shape", r"patterns\['a_shape\(1, 64\)'\]\.kind is 'b_shape'"),
        (("samples", 0, "segments", 1, "grid"), [1], r"samples\[0\]\.segments\[1\]\.grid has 1 entries; must have 3"),
        (("checksum",), "sha256:0", "checksum is 'sha256:0'"),
        (("heads", 1, 2, "error"), 0.001, "was changed after it was written"),
        (("layers", 0, 0), "a_shape(1, 66)", "was changed after it was written"),
    ],
)
def test_an_edited_file_is_refused_naming_the_place(tmp_path, path, value, message):
    file = tmp_path / "table.json"
    table().save(file)
    file.write_text(json.dumps(edited(json.loads(file.read_text()), *path, to=value)))
    with pytest.raises(TableError, match=message):
        PatternTable.load(file)
    with pytest.raises(OptionError, match=message):
        Options(patterns=str(file))


def test_a_file_that_lacks_something_is_refused_naming_it(tmp_path):
    file = tmp_path / "table.json"
    table().save(file)
    content = json.loads(file.read_text())
    del content["heads"][0][1]["density"]
    file.write_text(json.dumps(content))
    with pytest.raises(TableError, match=r"heads\[0\]\[1\]\.density is missing"):
        PatternTable.load(file)


def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path):
    file = tmp_path / "table.json"
    table().save(file)
    text = file.read_text().rstrip()
    for length in range(0, len(text), 97):
        file.write_text(text[:length])
        with pytest.raises(TableError, match="is not a pattern table: not JSON"):
            PatternTable.load(file)
    file.write_text(text[:-40])
    with pytest.raises(TableError, match="it ends in the middle"):
        PatternTable.load(file)


@pytest.mark.parametrize("content", [b"\x80\x81", b"[1, 2]", b'{"a": NaN}', b"null", b"not json"])
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "table.json").write_bytes(content)
    with pytest.raises(TableError, match="is not a pattern table"):
        PatternTable.load(tmp_path / "table.json")


def test_a_table_that_breaks_the_schema_is_not_written(tmp_path):
    wrong = replace(table(), device=7)
    with pytest.raises(TableError, match="device is 7; must be string"):
        wrong.save(tmp_path / "table.json")
    assert not list(tmp_path.iterdir())


def test_a_table_of_other_shapes_than_its_findings_or_architecture_is_none():
    with pytest.raises(TableError, match=r"heads: findings of \[4\] heads a layer, patterns of \[4, 4\]"):
        replace(table(), heads=table().heads[:1])
    with pytest.raises(TableError, match=r"architecture: \(3, 4\) layers and heads, patterns of \(2, 4\)"):
        replace(table(), architecture=replace(SMALL, layers=3))


def test_the_schema_in_the_docs_is_the_one_that_files_are_checked_against(tmp_path):
    spec = importlib.util.spec_from_file_location("make_table_schema", DOCS / "make_table_schema.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.TARGET.read_text() == script.text(), "run `python docs/make_table_schema.py`"
    table().save(tmp_path / "table.json")
    assert list(problems(json.loads((tmp_path / "table.json").read_text()), SCHEMA)) == []


def test_slices_hold_every_head_once_and_whole_kv_groups():
    whole = table()
    parts = [whole.slice_heads(rank, 2) for rank in range(2)]
    for layer in range(2):
        assert parts[0].layers[layer] + parts[1].layers[layer] == whole.layers[layer]
        assert parts[0].heads[layer] + parts[1].heads[layer] == whole.heads[layer]
    quarters = [whole.slice_heads(rank, 4) for rank in range(4)]  # each KV head is on two ranks
    assert [part.layers[0][0] for part in quarters] == list(whole.layers[0])
    parts[1].require(SMALL)
    parts[1].require_geometry(2, 1, 16)
    quarters[3].require_geometry(1, 1, 16)


def test_a_slice_survives_its_file(tmp_path):
    part = table().slice_heads(1, 2)
    part.save(tmp_path / "rank1.json")
    assert PatternTable.load(tmp_path / "rank1.json") == part


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        (2, 2, "rank=2: must be from 0 to 1"),
        (0, 3, "4 heads on 2 KV heads cannot be divided over 3 ranks"),
        (0, 0, "world_size=0"),
    ],
)
def test_a_slice_that_cannot_be_is_refused(rank, world_size, message):
    with pytest.raises(TableError, match=message):
        table().slice_heads(rank, world_size)


def test_a_kv_group_is_never_cut_between_ranks():
    uneven = replace(SMALL, heads=12, kv_heads=3, layers=1)
    whole = replace(PatternTable.of([[LOCAL] * 12]), architecture=uneven)
    with pytest.raises(TableError, match="12 heads on 3 KV heads cannot be divided over 2 ranks"):
        whole.slice_heads(0, 2)
    with pytest.raises(TableError, match="rank 0 already"):
        whole.slice_heads(0, 3).slice_heads(0, 1)


def small_table(model, **changes):
    architecture = replace(Architecture.of(model), **changes)
    shape = architecture.layers, architecture.heads
    return replace(PatternTable.of([[LOCAL] * shape[1]] * shape[0]), architecture=architecture)


def test_an_architecture_is_that_of_the_text_decoder():
    model = tiny_qwen2_5_vl()
    assert Architecture.of(model) == Architecture.of(model.get_decoder())
    assert Architecture.of(model).model_type == "qwen2_5_vl_text"
    assert Architecture.of(torch.nn.Linear(1, 1)) is None


def test_compiling_with_a_table_of_another_architecture_says_what_differs():
    model = tiny_qwen2_5_vl()
    mmcompile.compile(model, patterns=small_table(model), inner="eager")
    other = small_table(model, model_type="qwen2", head_dim=32)
    with pytest.raises(TableError, match=r"model_type is 'qwen2_5_vl_text' here and 'qwen2' in the.*; head_dim is 16"):
        mmcompile.compile(model, patterns=other, inner="eager")


@torch.no_grad()
def test_a_graph_of_another_geometry_than_the_tables_is_refused_where_no_model_is_known():
    model = tiny_qwen2_5_vl().get_decoder()
    tokens = torch.arange(300)[None]
    options = {"inner": "eager", "min_tokens": 0}
    model.compile(backend="mminference", options=options | {"patterns": small_table(model)})
    model(input_ids=tokens, use_cache=False)
    torch.compiler.reset()
    wrong = small_table(model, heads=8)
    model.compile(backend="mminference", options=options | {"patterns": wrong})
    with pytest.raises(TableError, match=r"4 heads on 2 KV heads of dim 16 here, and 8 on 2 of dim 16 in the table"):
        model(input_ids=tokens, use_cache=False)
    torch.compiler.reset()
