"""The training: every prompt of its schedule can be made, steps are taken, and what it writes can be loaded."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mmcompile.huggingface import load_model
from mmcompile.needle.layout import Layout
from mmcompile.needle.model import needle_config
from mmcompile.needle.vocabulary import word_tokenizer

FOLDER = Path(__file__).parents[2] / "training"
LAYOUT = Layout.of(needle_config(), word_tokenizer())


@pytest.fixture(autouse=True)
def _training_on_path(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def test_every_phase_can_be_laid_out():
    schedule, batches = import_module("schedule"), import_module("batches")
    for phase in schedule.PHASES:
        for tokens in phase.lengths[:4]:
            only = schedule.replace(phase, lengths=(tokens,), step_tokens=min(phase.step_tokens, 8 * tokens))
            for step in range(4):
                batch = batches.make_batch(LAYOUT, schedule.training_prompts(only, step, 0))
                assert batch.ids.shape[1] == tokens
                assert batch.positions.shape == (3, *batch.ids.shape)
                for row, position, answer in batch.questions:
                    assert answer in LAYOUT.words.answers
                    assert position == tokens - 1 or batch.ids[row, position + 1] == answer


def test_the_schedule():
    schedule = import_module("schedule")
    rates = [schedule.learning_rate(progress) for progress in np.linspace(0, 1, 101)]
    assert rates[0] == 0 and rates[100] == 0
    assert max(rates) == schedule.PEAK_RATE
    ends = [phase.until for phase in schedule.PHASES]
    assert ends == sorted(ends) and ends[-1] == 1
    assert max(length for phase in schedule.phases_within(1000, 500) for length in phase.lengths) <= 1000


def test_master_weights_learn_what_bfloat16_would_round_away():
    layer = torch.nn.Linear(4, 4, bias=False).bfloat16()
    torch.nn.init.ones_(layer.weight)
    weights = import_module("master_weights").MasterWeights(layer)
    for _ in range(30):
        layer.weight.grad = torch.ones_like(layer.weight)
        assert weights.step(1e-3)  # a step of 0.001 is less than half of what bfloat16 tells from 1
    assert layer.weight.float().max() < 0.98
    before = layer.weight.clone()
    layer.weight.grad = torch.full_like(layer.weight, float("nan"))
    assert not weights.step(1e-3)
    assert torch.equal(layer.weight, before)


def test_a_short_training_writes_a_model(tmp_path):
    train = import_module("train_needle_model").train
    settings = {"minutes": 0.05, "seed": 0, "device": "cpu", "workers": 1, "longest": 96, "step_tokens": 96}
    train(tmp_path, **settings, samples=1, evaluate=[])
    written = json.loads((tmp_path / "training.json").read_text())
    assert written["settings"]["parameters"] <= 6_000_000
    model = load_model(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "qwen2_5_vl"
    assert len(AutoTokenizer.from_pretrained(tmp_path)) <= model.config.text_config.vocab_size
