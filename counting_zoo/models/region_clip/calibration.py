"""The threshold above which a detection counts, chosen for the least error of validation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from counting_zoo.metrics import PictureRows
from counting_zoo.models.region_clip.detections import best_threshold

THRESHOLDS = torch.arange(1, 100) / 100
"""What is chosen from."""


class ThresholdErrors(PictureRows):
    """Absolute errors of every picture at every threshold."""

    def __init__(self, **options: Any) -> None:
        super().__init__(("error",), **options)

    def update(self, image_id: str, counts: Tensor, target: Tensor) -> None:
        """Add ``(T, K)`` counts of one picture and its ``(K,)`` true ones."""
        self.append([image_id], error=(counts - target).abs().sum(1)[None])

    def compute(self) -> float | None:
        """The threshold of the least mean error; ``None`` without a picture."""
        errors = self.rows()["error"].reshape(-1, len(THRESHOLDS), 1)
        return best_threshold(errors, errors.new_zeros(len(errors), 1), THRESHOLDS.to(errors)) if len(errors) else None


__all__ = ["THRESHOLDS", "ThresholdErrors"]
