"""The three floors: what may import what, and that our folder names trip nobody else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOVE = {"kernels": ("mmcompile.kernels",), "passes": ("mmcompile.passes", "mmcompile.kernels")}


def _run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_transformers_imports_from_our_root():
    """It probes for an installed package `kernels`, and from here finds ours on the path."""
    version = _run("import transformers; from transformers import Qwen2_5_VLModel; print(transformers.__version__)")
    assert version


def test_importing_us_starts_no_cuda_and_loads_no_transformers_model():
    loaded = _run(
        "import sys, torch, mmcompile; print(torch.cuda.is_initialized(), "
        "any(name.startswith('transformers.models.') for name in sys.modules))"
    )
    assert loaded.startswith("False")


@pytest.mark.parametrize("floor", ["passes", "kernels"])
def test_floor_packages_do_nothing(floor):
    statements = ast.parse((ROOT / floor / "__init__.py").read_text()).body
    assert all(isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in statements)


@pytest.mark.parametrize("file", sorted((*ROOT.glob("kernels/**/*.py"), *ROOT.glob("passes/**/*.py"))), ids=str)
def test_imports_go_down_only_and_are_absolute(file):
    allowed = ABOVE[file.relative_to(ROOT).parts[0]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            ours = name.split(".")[0] in ("mmcompile", "passes", "kernels")
            assert not ours or name.startswith(allowed), f"line {node.lineno}: {name} is above this floor"
