"""The training: every prompt of its schedule can be made, steps are taken, and what it writes can be loaded."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mmcompile.huggingface import load_model
from mmcompile.needle.layout import Layout
from mmcompile.needle.model import needle_config
from mmcompile.needle.training.batches import make_batch
from mmcompile.needle.training.curve import main
from mmcompile.needle.training.master_weights import MasterWeights
from mmcompile.needle.training.schedule import PEAK_RATE, PHASES, learning_rate, phases_within, training_prompts
from mmcompile.needle.training.train import train
from mmcompile.needle.vocabulary import word_tokenizer

LAYOUT = Layout.of(needle_config(), word_tokenizer())


def test_every_phase_can_be_laid_out():
    for phase in PHASES:
        for tokens in phase.lengths[:4]:
            only = replace(phase, lengths=(tokens,), step_tokens=min(phase.step_tokens, 8 * tokens))
            for step in range(4):
                batch = make_batch(LAYOUT, training_prompts(only, step, 0))
                assert batch.ids.shape[1] == tokens
                assert batch.positions.shape == (3, *batch.ids.shape)
                for row, position, answer in batch.questions:
                    assert answer in LAYOUT.words.answers
                    assert position == tokens - 1 or batch.ids[row, position + 1] == answer


def test_the_schedule():
    rates = [learning_rate(progress) for progress in np.linspace(0, 1, 101)]
    assert rates[0] == 0 and rates[100] == 0
    assert max(rates) == PEAK_RATE
    ends = [phase.until for phase in PHASES]
    assert ends == sorted(ends) and ends[-1] == 1
    assert max(length for phase in phases_within(1000, 500) for length in phase.lengths) <= 1000


def test_master_weights_learn_what_bfloat16_would_round_away():
    layer = torch.nn.Linear(4, 4, bias=False).bfloat16()
    torch.nn.init.ones_(layer.weight)
    weights = MasterWeights(layer)
    for _ in range(30):
        layer.weight.grad = torch.ones_like(layer.weight)
        assert weights.step(1e-3)  # a step of 0.001 is less than half of what bfloat16 tells from 1
    assert layer.weight.float().max() < 0.98
    before = layer.weight.clone()
    layer.weight.grad = torch.full_like(layer.weight, float("nan"))
    assert not weights.step(1e-3)
    assert torch.equal(layer.weight, before)


def test_a_short_training_writes_a_model(tmp_path):
    settings = {"minutes": 0.05, "seed": 0, "device": "cpu", "workers": 1, "longest": 96, "step_tokens": 96}
    train(tmp_path, **settings, samples=1, evaluate=[])
    written = json.loads((tmp_path / "training.json").read_text())
    assert written["settings"]["parameters"] <= 6_000_000
    model = load_model(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "qwen2_5_vl"
    assert len(AutoTokenizer.from_pretrained(tmp_path)) <= model.config.text_config.vocab_size


def test_the_curve_is_drawn_from_the_log(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    curve = [
        {"seconds": 10.0 * step, "step": step, "longest": 96 * step, "loss": 1 / step, "naming": 2 / step, "right": 0.5}
        for step in (1, 2, 3)
    ]
    recall = [{"seconds": 30.0, "task": task, "tokens": 4096, "recall": 0.99} for task in ("video", "mixed")]
    log = tmp_path / "training.json"
    log.write_text(json.dumps({"curve": curve, "recall": recall}))
    monkeypatch.setattr("sys.argv", ["curve", str(log)])
    main()
    assert log.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
