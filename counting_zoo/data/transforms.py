"""Augmentation of training pictures: picture, points, boxes and exemplars move together."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from counting_zoo.data.records import Sample


class Augmentation(ABC):
    """What is done to a training sample; all randomness comes from the generator it is handed."""

    @abstractmethod
    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the augmented sample; the one given stays as it is."""


class PlainAugmentation(Augmentation):
    """Crop, flip and brightness (to be filled in)."""

    def __init__(self, crop: int | tuple[int, int] | None = None, flip: bool = True, rot90: bool = False) -> None:
        self.crop = crop

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return sample


__all__ = ["Augmentation", "PlainAugmentation"]
