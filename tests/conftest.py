"""Shared by all tests: no network and few threads. Real data beside the project: see ``fakes.shared_data``."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import torch

# Some tests fork processes, and OpenMP threads that ran before a fork hang the child's first convolution.
torch.set_num_threads(1)
