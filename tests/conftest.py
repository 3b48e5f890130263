"""Shared by all tests: no network and few threads. Real data beside the project: see ``fakes.shared_data``."""

from __future__ import annotations

import faulthandler
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import pytest
import torch

# Some tests fork processes, and OpenMP threads that ran before a fork hang the child's first convolution.
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Slow tests train for longer than what ends a test that hangs (``faulthandler_timeout``), but not for an hour."""
    if item.get_closest_marker("slow"):
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback_later(3600, exit=True)
