"""The threshold above which a detection counts, chosen for the least error of validation."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.metrics import PictureRows
from counting_zoo.models.region_clip.detections import best_threshold, counts_at
from counting_zoo.models.region_clip.network import above
from counting_zoo.module import CountingModule
from counting_zoo.types import Batch

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


class CalibratedModule(CountingModule):
    """Counts detections above a threshold, which each validation chooses, and scores itself at.

    Args:
        threshold: at first.
        calibrate: whether to choose it.
        options: those of :class:`~counting_zoo.module.CountingModule`.
    """

    threshold: Tensor

    def __init__(self, *, threshold: float, calibrate: bool, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold is {threshold}; expected 0 to 1")
        self.calibrate = calibrate
        self.register_buffer("threshold", torch.tensor(float(threshold)))
        self.threshold_errors = ThresholdErrors()
        self._calibrated: float | None = None
        self._calibrating = False
        self._waiting: list[tuple[Any, ...]] | None = None

    @property
    def floor(self) -> float:
        """Score above which detections are given: the threshold, or while it is chosen the lowest of the choice."""
        return min(float(self.threshold), float(THRESHOLDS[0])) if self._calibrating else float(self.threshold)

    def _set_threshold(self) -> None:
        """Weight averaging validates a copy, and averages thresholds as well: both copies have the calibrated one."""
        if self.calibrate and self._calibrated is not None:
            self.threshold.fill_(self._calibrated)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._set_threshold()

    def on_train_end(self) -> None:
        self._set_threshold()

    def on_validation_epoch_start(self) -> None:
        self._set_threshold()
        self.threshold_errors.reset()  # of one that was interrupted
        # The few pictures of a sanity check decide nothing.
        self._waiting = [] if self.calibrate and not self.trainer.sanity_checking else None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._calibrating = self._waiting is not None
        try:
            super().validation_step(batch, batch_idx)
        finally:
            self._calibrating = False  # what callbacks draw, or anybody counts after an error, is at the threshold

    def tally(
        self,
        outputs: list[Any],
        batch: Batch,
        sizes: list[tuple[int, int]],
        extra: list[list[str]] | None,
        split: Any,
    ) -> None:
        if self._waiting is None or split != "val":
            return super().tally(outputs, batch, sizes, extra, split)
        known: Any = {key: value for key, value in batch.items() if key != "image"}
        for output, image_id, target in zip(outputs, batch["image_id"], batch["counts"], strict=True):
            own = output.labels[0] < len(target)
            counts = counts_at(output.scores[0][own], output.labels[0][own], len(target), THRESHOLDS)
            self.threshold_errors.update(image_id, counts, target)
        # Only the detections are needed for another threshold, and densities of many names would fill the memory.
        light = [replace(o, density=o.density.new_empty(1, o.density.shape[1], 0, 0)) for o in outputs]
        self._waiting.append((light, known, sizes, extra))

    def on_validation_epoch_end(self) -> None:
        if self._waiting is not None:
            with warnings.catch_warnings():
                # A rank without pictures computes too, or the others would wait for it for ever.
                warnings.filterwarnings("ignore", message=".*compute.*before.*update.*")
                found = self.threshold_errors.compute()
            self.threshold_errors.reset()
            if found is not None:
                if abs(found - float(self.threshold)) > 1e-6:
                    self.drop_intervals(f"detections than those above the new threshold of {found:g}")
                self._calibrated = found
                self.threshold.fill_(found)
            waiting, self._waiting = self._waiting, None
            for outputs, known, sizes, extra in waiting:
                kept = [above(o, float(self.threshold), s) for o, s in zip(outputs, sizes, strict=True)]
                super().tally(kept, known, sizes, extra, "val")
            self.log("val/threshold", float(self.threshold))
        super().on_validation_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.calibrate and self._calibrated is not None and "current_model_state" in checkpoint:  # averaged weights
            checkpoint["state_dict"]["threshold"] = torch.tensor(self._calibrated)


__all__ = ["THRESHOLDS", "CalibratedModule", "ThresholdErrors"]
