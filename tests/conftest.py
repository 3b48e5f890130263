"""Shared by all tests: no network and few threads. Real data beside the project: see ``fakes.shared_data``."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import torch

torch.set_num_threads(min(2, torch.get_num_threads()))
