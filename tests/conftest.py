"""Shared by all tests: no network, few threads, and the real data beside the project where they are."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real public data, from COUNTING_ZOO_DATA or ../shared/data; skips where there is none."""
    root = Path(os.environ.get("COUNTING_ZOO_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no real data: neither COUNTING_ZOO_DATA nor {root} is a folder")
    return root
