"""The model kept in examples/: it loads as any other, is small, and finds its needles, dense and sparse."""

import json
from functools import cache

import pytest
import torch
from transformers import AutoTokenizer

import mmcompile
from mmcompile.huggingface import load_model
from mmcompile.needle.layout import Layout
from mmcompile.needle.model import KEPT_MODEL, needle_config, preprocessing
from mmcompile.needle.task import sample

pytestmark = pytest.mark.skipif(not KEPT_MODEL.exists(), reason="no trained model is kept yet: make needle-model")
TOKENS, SAMPLES, SPARSE = 1100, 12, 4


@cache
def _kept():
    model = load_model(KEPT_MODEL, dtype="float32", device="cpu")
    return model, Layout.of(model.config, AutoTokenizer.from_pretrained(KEPT_MODEL))


@cache
def _sample(task, number):
    return sample(task, TOKENS, number / (SAMPLES - 1), number, _kept()[1])


@torch.no_grad()
def _answer(model, made):
    return int(model(**made.inputs(), logits_to_keep=1).logits[0, -1].argmax())


@cache
def _dense(task):
    return [_answer(_kept()[0], _sample(task, number)) for number in range(SAMPLES)]


def test_the_kept_files():
    model, layout = _kept()
    sizes = [file.stat().st_size for file in KEPT_MODEL.iterdir()]
    assert model.num_parameters() <= 6_000_000
    assert (KEPT_MODEL / "model.safetensors").stat().st_size <= 12 * 2**20
    assert sum(sizes) <= 13 * 2**20
    assert layout.frame_size == (96, 96)
    made, kept = needle_config().to_dict(), model.config.to_dict()
    for part, names in (
        ("text_config", ("hidden_size", "num_key_value_heads", "rope_parameters")),
        ("vision_config", ("depth", "window_size")),
    ):
        assert {name: made[part][name] for name in names} == {name: kept[part][name] for name in names}
    assert json.loads((KEPT_MODEL / "preprocessor_config.json").read_text()) == preprocessing()


def test_the_training_ended_well():
    recall = json.loads((KEPT_MODEL / "training.json").read_text())["recall"]
    final = [one for one in recall if one["seconds"] == recall[-1]["seconds"]]
    assert {one["tokens"] for one in final} >= {4096, 8192, 16384, 32768, 65536}
    assert min(one["recall"] for one in final) >= 0.98


@pytest.mark.parametrize("task", ["video", "mixed"])
def test_it_finds_its_needles(task):
    right = [answer == _sample(task, number).answer_id for number, answer in enumerate(_dense(task))]
    assert sum(right) >= 0.98 * SAMPLES


@pytest.mark.parametrize("task", ["video", "mixed"])
def test_sparse_it_finds_them_too(task):
    model = load_model(KEPT_MODEL, dtype="float32", device="cpu")
    mmcompile.compile(model, min_tokens=0, inner="eager")
    numbers = range(0, SAMPLES, SAMPLES // SPARSE)
    assert [_answer(model, _sample(task, number)) for number in numbers] == [_dense(task)[number] for number in numbers]
    assert mmcompile.stats(model)[0].density < 1
