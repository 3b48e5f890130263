"""Folders that tests read from."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
BENCHMARKS = ROOT / "benchmarks"
SHARED = Path(os.environ["COUNTING_ZOO_DATA"]).parent if "COUNTING_ZOO_DATA" in os.environ else ROOT.parent / "shared"
"""Material that lies beside a checkout and is not part of it: real annotation, reference outputs."""
