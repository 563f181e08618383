"""Every family of the table through the backend, by the checks that `python -m mmcompile doctor` runs.

By default each family runs the three checks that cover most, and a few families others, so that each check and each way
of compiling is run; `python docs/make_models.py` prints what all of them give.
`MMCOMPILE_FAMILIES=all` runs every check of every family in every way.
"""

import os
from functools import lru_cache

import pytest

from mmcompile.diagnosis import Status
from mmcompile.doctor import CHECKS, WAYS, Doctor
from tests.models.families import FAMILIES

EVERYTHING = os.environ.get("MMCOMPILE_FAMILIES") == "all"
QUICK = {("mmcompile.compile", "second length"), ("mmcompile.compile", "padded batch"), ("text model", "sparse")}
QUICK_WHOLE = {
    ("qwen2_5_vl", "mmcompile.compile", "generate"),
    ("qwen3_vl", "text model", "generate"),
    ("llava", "torch.compile", "cache + decode"),
    ("llava", "mmcompile.compile", "sparse"),
    ("lfm2_vl", "mmcompile.compile", "generate"),
    ("longvila", "mmcompile.compile", "no cache"),
}


def cases():
    for family in FAMILIES.values():
        for way in WAYS:
            for check in CHECKS:
                if EVERYTHING or (way, check) in QUICK or (family.name, way, check) in QUICK_WHOLE:
                    reason = family.why_not(way, check)
                    marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
                    yield pytest.param(family.name, way, check, id=f"{family.name}-{way}-{check}", marks=marks)


@lru_cache(maxsize=1)  # the cases of one family follow each other
def doctor_for(name):
    model = FAMILIES[name].model()
    return Doctor(model, FAMILIES[name].prompts(model), inner="eager")


@pytest.mark.parametrize(("name", "way", "check"), list(cases()))
def test_family(name, way, check):
    result = doctor_for(name).check(way, check)
    assert result.status is Status.WORKS, result.cell()
    assert result.rewritten == result.causal, result.dense


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_differ_in_length_and_pad_on_the_left(name):
    prompts = FAMILIES[name].prompts(FAMILIES[name].model())
    lengths = [inputs["input_ids"].shape for inputs in (prompts.first, prompts.longer, prompts.longest)]
    assert lengths == sorted(set(lengths))
    mask = prompts.padded["attention_mask"]
    assert mask.shape[0] == 2
    assert mask[:, -1].all()
    assert not mask[:, 0].all()
