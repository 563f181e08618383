"""Which launch shape the portable kernel takes, with times that the tests make up, and what is kept on disk."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton.errors import TritonError

from mmcompile.kernels import attention_config, choose_config, measure_configs, reference, tuned_configs
from mmcompile.kernels.attention_config import LARGE, SMALL, Config
from mmcompile.kernels.measure_configs import SHAPES, may_fit, race, shapes_to_try, synthetic_walk
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tuned_configs import TuningKey, cached_config, keep_config

FAST, SLOW = Config(64, 32, 4, 2), Config(64, 64, 4, 2)
KEY = TuningKey("NVIDIA L40S", "bfloat16", 128, "3.6.0", "0123")
ROOT = Path(__file__).parents[2]


class Measure:
    """In place of a GPU; counts."""

    def __init__(self, milliseconds: dict[Config, float]) -> None:
        self.milliseconds, self.calls = milliseconds, []

    def __call__(self, device, dtype, padded, table) -> dict[Config, float]:
        self.calls.append((dtype, padded))
        return self.milliseconds


@pytest.fixture(autouse=True)
def another_gpu(tmp_path, monkeypatch) -> Iterator[None]:
    """One that the table was not measured on, in a process that has chosen nothing yet, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(choose_config.VARIABLE, raising=False)
    monkeypatch.setattr(choose_config, "_device_name", lambda device: KEY.device)
    monkeypatch.setattr(choose_config, "_known", {})
    monkeypatch.setattr(attention_config, "_large_shared_memory", lambda device: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # torch for CPUs lacks it
    choose_config._key.cache_clear()
    yield
    choose_config._key.cache_clear()


def query(length: int = 1000, width: int = 128, dtype: torch.dtype = torch.bfloat16, heads: int = 2) -> SimpleNamespace:
    """What the choice reads of a tensor on a GPU."""
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, heads, length, width))


def kept_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_fastest_is_taken_and_kept(tmp_path):
    measure = Measure({SLOW: 2.0, FAST: 1.0})
    assert choose_config.choose_config(query(), measure) == FAST
    (file,) = kept_files(tmp_path)
    content = json.loads(file.read_text())
    assert content["config"] == FAST._asdict()
    assert [one["median"] for one in content["milliseconds"]] == [2.0, 1.0]
    choose_config._known.clear()  # another process
    assert choose_config.choose_config(query(), measure) == FAST
    assert len(measure.calls) == 1


def test_no_length_and_no_number_of_heads_is_measured_anew():
    measure = Measure({SLOW: 2.0, FAST: 1.0})
    for length in (1, 128, 5000, 2**20):
        for heads in (1, 28):
            assert choose_config.choose_config(query(length, heads=heads), measure) == FAST
    assert measure.calls == [(torch.bfloat16, 128)]
    assert TuningKey._fields == ("device", "dtype", "head_dim", "triton", "kernel")


def test_every_dtype_and_padded_head_dim_by_itself():
    measure = Measure({SLOW: 2.0, FAST: 1.0})
    for width in (80, 128, 64):
        for dtype in (torch.bfloat16, torch.float16):
            choose_config.choose_config(query(width=width, dtype=dtype), measure)
    assert measure.calls == [(dtype, width) for width in (128, 64) for dtype in (torch.bfloat16, torch.float16)]


def test_another_kernel_or_triton_is_measured_anew(monkeypatch):
    key = choose_config._key(torch.device("cuda", 0), torch.bfloat16, 128)
    choose_config._key.cache_clear()
    monkeypatch.setattr(choose_config, "shapes_to_try", lambda *_: (FAST,))
    other = choose_config._key(torch.device("cuda", 0), torch.bfloat16, 128)
    assert key.kernel != other.kernel
    keep_config(key, FAST, {})
    assert cached_config(key, [FAST]) == FAST
    assert cached_config(other, [FAST]) is None
    assert cached_config(key._replace(triton="3.5.0"), [FAST]) is None


def test_the_table_serves_where_it_was_measured(monkeypatch, tmp_path):
    name, version = next(iter(attention_config.MEASURED_ON))
    monkeypatch.setattr(choose_config, "_device_name", lambda device: name)
    monkeypatch.setattr(choose_config, "_triton_version", lambda: version)
    measure = Measure({SLOW: 2.0, FAST: 1.0})
    assert choose_config.choose_config(query(), measure) == SMALL[2, 128]
    assert "from a table measured on this device" in choose_config.describe_config(*described())
    assert not measure.calls and not kept_files(tmp_path)
    monkeypatch.setenv(choose_config.VARIABLE, "force")
    assert choose_config.choose_config(query(), measure) == FAST
    assert "measured on this device" in choose_config.describe_config(*described())


def described() -> tuple[torch.device, torch.dtype, int]:
    return torch.device("cuda", 0), torch.bfloat16, 128


def test_switched_off(monkeypatch, tmp_path):
    measure = Measure({SLOW: 2.0, FAST: 1.0})
    choose_config.choose_config(query(), measure)
    monkeypatch.setenv(choose_config.VARIABLE, "0")
    assert choose_config.choose_config(query(), measure) == SMALL[2, 128]  # kept ones are not read either
    assert "not measured on NVIDIA L40S" in choose_config.describe_config(*described())
    assert "MMCOMPILE_AUTOTUNE=0" in choose_config.describe_config(*described())
    monkeypatch.setenv(choose_config.VARIABLE, "yes")
    with pytest.raises(ValueError, match="MMCOMPILE_AUTOTUNE=yes: must be one of 0, 1, force"):
        choose_config.choose_config(query(), measure)


@pytest.mark.parametrize("busy", ["torch.cuda.is_current_stream_capturing", "torch.compiler.is_compiling"])
def test_nothing_is_measured_while_recording_or_tracing(busy, monkeypatch, tmp_path):
    measure = Measure({SLOW: 2.0, FAST: 1.0})
    with monkeypatch.context() as patched:
        patched.setattr(busy, lambda: True)
        assert choose_config.choose_config(query(), measure) == SMALL[2, 128]
        assert not measure.calls and not kept_files(tmp_path)
    assert choose_config.choose_config(query(), measure) == FAST  # the next call does
    choose_config._known.clear()
    monkeypatch.setattr(busy, lambda: True)
    assert choose_config.choose_config(query(), measure) == FAST  # what is kept serves then too


def test_reports_measure_nothing_and_say_where_a_shape_is_from(tmp_path):
    before = choose_config.describe_config(*described())
    assert before == "128 x 32 scores a step, 8 warps, 2 stages, from a table until a first call measures others"
    assert not kept_files(tmp_path)
    choose_config.choose_config(query(), Measure({FAST: 1.0}))
    choose_config._known.clear()
    after = choose_config.describe_config(*described())
    assert (
        after == f"{FAST.block_m} x {FAST.block_n} scores a step, {FAST.warps} warps, 2 stages, measured on this device"
    )


def test_nothing_could_be_measured(caplog, tmp_path):
    measure = Measure({})
    for _ in range(2):
        assert choose_config.choose_config(query(), measure) == SMALL[2, 128]
    assert len(measure.calls) == 1 and not kept_files(tmp_path)
    assert "no launch shape of the attention kernel could be measured on NVIDIA L40S" in caplog.text


GOOD = {"format": 1, "key": KEY._asdict(), "config": FAST._asdict()}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "\x00\xff",
        "{}",
        json.dumps(GOOD | {"format": 2}),
        json.dumps(GOOD | {"key": KEY._asdict() | {"device": "another"}}),
        json.dumps(GOOD | {"config": [64, 64, 4, 2]}),
        json.dumps(GOOD | {"config": FAST._asdict() | {"block_m": 1024}}),
        json.dumps(GOOD | {"config": FAST._asdict() | {"extra": 1}}),
    ],
)
def test_a_broken_or_foreign_file_is_named_and_replaced(text, caplog, tmp_path):
    keep_config(KEY, FAST, {FAST: 1.0})
    (file,) = kept_files(tmp_path)
    file.write_bytes(text.encode("latin-1"))
    assert cached_config(KEY, [FAST, SLOW]) is None
    assert file.name in caplog.text
    keep_config(KEY, SLOW, {SLOW: 1.0})
    assert cached_config(KEY, [FAST, SLOW]) == SLOW


def test_a_good_file_is_read(tmp_path):
    keep_config(KEY, FAST, {})
    (file,) = kept_files(tmp_path)
    file.write_text(json.dumps(GOOD))
    assert cached_config(KEY, [FAST]) == FAST


@pytest.mark.parametrize("blocked", ["file", "folder", "no home"])
def test_a_folder_that_cannot_be_used(blocked, caplog, tmp_path, monkeypatch):
    """Here a file lies in the way: permissions would not stop root."""
    if blocked == "no home":

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(tuned_configs.Path, "home", no_home)
    elif blocked == "folder":
        (tmp_path / "mmcompile").write_text("in the way")
    else:
        keep_config(KEY, FAST, {})
        (file,) = kept_files(tmp_path)
        file.unlink()
        (file / "in the way").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        keep_config(KEY, FAST, {FAST: 1.0})
    assert "not kept" in caplog.text
    assert cached_config(KEY, [FAST]) is None
    measure = Measure({FAST: 1.0})
    for _ in range(2):
        assert choose_config.choose_config(query(), measure) == FAST
    assert len(measure.calls) == 1


PROCESS = """
import sys, time
import torch
from types import SimpleNamespace
from mmcompile.kernels import attention_config, choose_config
from mmcompile.kernels.measure_configs import shapes_to_try

shapes = shapes_to_try(2, 128)
choose_config._device_name = lambda device: "NVIDIA L40S"
attention_config._large_shared_memory = lambda device: False
torch.cuda.is_current_stream_capturing = lambda: False

def measure(device, dtype, padded, table):
    print("measures", flush=True)
    sys.stdin.readline()
    return {shape: (index - int(sys.argv[1])) ** 2 for index, shape in enumerate(shapes)}

query = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(1, 2, 1000, 128))
print(*choose_config.choose_config(query, measure))
"""


def test_several_processes_agree_afterwards(tmp_path):
    """Two measure at once, with unlike results; whichever is written last is what all later ones read."""

    def start(best: int) -> subprocess.Popen:
        command = [sys.executable, "-c", PROCESS, str(best)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, **pipes)

    racing = [start(1), start(2)]
    assert [process.stdout.readline() for process in racing] == ["measures\n"] * 2
    chosen = {process.communicate("\n", timeout=120)[0] for process in racing}
    shapes = shapes_to_try(2, 128)
    assert chosen <= {" ".join(map(str, shapes[best])) + "\n" for best in (1, 2)}
    assert len(kept_files(tmp_path)) == 1
    later = start(0).communicate("\n", timeout=120)[0]
    assert later in chosen  # and it measured nothing


def test_every_shape_that_may_be_tried_is_one_the_kernel_takes():
    for table in (LARGE, SMALL):
        for element_size, padded in table:
            shapes = shapes_to_try(element_size, padded)
            assert (
                shapes[0] == next(one for one in (LARGE, SMALL) if (element_size, padded) in one)[element_size, padded]
            )
            assert len(set(shapes)) == len(shapes)
            for config in shapes:
                assert TILE % config.block_m == 0 and TILE % config.block_n == 0
                assert config.warps in (4, 8) and config.block_m >= 16


def test_what_cannot_fit_is_not_compiled():
    a_turing = {"shared": 64 * 1024, "warp": 32}
    assert may_fit(Config(64, 64, 4, 2), 2, 128, **a_turing)
    assert not may_fit(Config(64, 128, 8, 2), 2, 256, **a_turing)  # 128 KiB of keys and values
    assert not may_fit(Config(128, 64, 4, 3), 2, 256, shared=227 * 1024, warp=32)  # 320 registers of sums
    assert may_fit(Config(128, 64, 4, 3), 2, 256, shared=227 * 1024, warp=64)  # of a wavefront half as many
    assert not may_fit(Config(64, 32, 4, 1), 4, 256, shared=227 * 1024, warp=32)  # compiles for more than a minute
    for element_size, padded in SMALL:
        fitting = [shape for shape in SHAPES[element_size] if may_fit(shape, element_size, padded, **a_turing)]
        assert fitting, (element_size, padded)


SHAPE = st.builds(Config, *(st.integers(1, 8) for _ in range(4)))


@given(
    st.lists(st.tuples(SHAPE, st.sampled_from(["runs", "spills", "fails"]), st.floats(0.1, 5)), max_size=12), st.data()
)
def test_races_are_bounded(entrants, data):
    """However long compiling takes, and whatever fails or spills."""
    seconds = data.draw(st.sampled_from([0.0, 4.0, 100.0]))
    now = 0.0
    begun = []
    behaviour = {shape: (kind, time) for shape, kind, time in entrants}

    def spills(shape: Config) -> int:
        nonlocal now
        assert now <= measure_configs.SECONDS
        begun.append(shape)
        now += seconds
        kind = behaviour[shape][0]
        if kind == "fails":
            raise TritonError
        return 100 if kind == "spills" else measure_configs.MOST_SPILLS

    def milliseconds(shape: Config) -> float:
        nonlocal now
        now += 1.0
        return behaviour[shape][1]

    times = race(behaviour, spills, milliseconds, lambda: now)
    assert len(times) <= measure_configs.MOST
    runs = [shape for shape in begun if behaviour[shape][0] != "fails"]
    kept = runs[:1] + [shape for shape in runs[1:] if behaviour[shape][0] == "runs"]
    assert times == {shape: behaviour[shape][1] for shape in kept}


def test_the_median_counts_and_turns_alternate():
    order = []
    values = {FAST: iter([9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0]), SLOW: iter([2.0] * 7)}

    def milliseconds(shape: Config) -> float:
        order.append(shape)
        return next(values[shape])

    assert race([SLOW, FAST], lambda shape: 0, milliseconds) == {SLOW: 2.0, FAST: 1.0}
    assert order == [SLOW, FAST] * measure_configs.TURNS


def test_the_walk_is_a_plan_and_small():
    walk = synthetic_walk(16, torch.device("cpu"))
    mask = reference.plan_mask(*walk[:8], walk.window)[0, 0]  # [Sq, Sk]
    full, partial = measure_configs.FULL, 1
    queries = torch.arange(measure_configs.QUERY_TILES * TILE)
    assert torch.equal(mask.sum(-1), full * TILE + queries % TILE + 1 + measure_configs.COLUMNS)
    assert (
        walk.counts[0, 0, :, 1:].tolist() == [[full, partial, 0, measure_configs.COLUMNS]] * measure_configs.QUERY_TILES
    )
    assert walk.key_head == (0,) * measure_configs.GROUP + (1,) * measure_configs.GROUP
    for element_size, padded in SMALL:
        dtype = torch.float32 if element_size == 4 else torch.float16
        heads = measure_configs._Walk.on(torch.device("cpu"), dtype, padded)
        size = sum(x.untyped_storage().nbytes() for x in (heads.query, heads.key, heads.value, heads.output))
        assert heads.query.shape[1] >= 16 and size <= measure_configs.MEBIBYTES * 2**20
