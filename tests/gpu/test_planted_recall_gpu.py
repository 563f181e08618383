"""`patterns="auto"` finds what planted heads look at, at the length that it is for.

MMCOMPILE_PLANTS=200 draws as many plants of each kind instead of 10, MMCOMPILE_PLANT_TOKENS=32768 makes them shorter.
"""

import os

import pytest

from benchmarks.planted_heads import PLANT_KINDS
from tests.kernels.planted_recall import check_kind

PLANTS = int(os.environ.get("MMCOMPILE_PLANTS", "10"))
TOKENS = int(os.environ.get("MMCOMPILE_PLANT_TOKENS", "131072"))
pytestmark = pytest.mark.gpu


# Half of these plants do not tell their grid, and queries that look at everything show no distance to find it by.
_MISSED = {"grid h": 0.6}


@pytest.mark.parametrize("kind", PLANT_KINDS)
def test_recall_of_the_planted_mass(kind):
    check_kind(kind, TOKENS, PLANTS, of_plants=_MISSED.get(kind, 0.95), device="cuda")
