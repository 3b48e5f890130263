"""The tree passes the linter, the formatter and the type checker, with the settings of pyproject.toml."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from places import ROOT


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=["lint", "format", "types"]
)
def test_the_tree_passes(command: list[str]) -> None:
    if importlib.util.find_spec(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed; the extra 'dev' has it")
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-2000:]}"
