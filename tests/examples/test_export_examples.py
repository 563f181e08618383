"""The examples of export, each in a process of its own; the package is loaded in another."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _run(name, *arguments):
    quick = {"OMP_NUM_THREADS": "1", "AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O0"}
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | quick
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / f"{name}.py"), *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return " ".join(ran.stdout.split())


def test_a_program_of_torch_export_becomes_sparse():
    shown = _run("export_then_transform")
    assert "2 sparse, 0 dense" in shown and shown.count("exact") == 3 and "Next:" in shown


def test_a_package_is_made_and_served_by_a_process_without_the_model():
    shown = _run("export_aoti", "--tiny")
    assert "1 sparse, 0 dense" in shown and shown.count("next token") == 3
    difference = float(shown.split("differ by at most ")[1].split()[0])
    assert difference < 1e-4
