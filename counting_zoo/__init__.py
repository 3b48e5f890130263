"""counting_zoo: counting models that share their data, training, evaluation and prediction.

Names are imported when they are first used, so ``import counting_zoo`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from counting_zoo.version import __version__

_HOME = {
    "Batch": "counting_zoo.types",
    "CountOutput": "counting_zoo.types",
    "Prediction": "counting_zoo.prediction",
    "Preprocess": "counting_zoo.geometry",
    "CountingModule": "counting_zoo.module",
    "CountingDataModule": "counting_zoo.data.base",
    "CLIPCount": "counting_zoo.models.clip_count",
    "CLIPEBC": "counting_zoo.models.clip_ebc",
    "EBC": "counting_zoo.models.clip_ebc",
    "LowerCount": "counting_zoo.models.lower_count",
    "RegionCLIPCounter": "counting_zoo.models.region_clip",
    "RegionCLIPPretraining": "counting_zoo.models.region_clip",
    "SyntheticScenes": "counting_zoo.data.synthetic",
    "FSC147": "counting_zoo.data.fsc147",
    "CARPK": "counting_zoo.data.crowds",
    "ShanghaiTech": "counting_zoo.data.crowds",
    "UCFQNRF": "counting_zoo.data.crowds",
    "NWPUCrowd": "counting_zoo.data.crowds",
    "JHUCrowd": "counting_zoo.data.crowds",
    "VOCCounts": "counting_zoo.data.boxes",
    "COCOCounts": "counting_zoo.data.boxes",
    "ImageFolder": "counting_zoo.data.folder",
    "CaptionedImages": "counting_zoo.data.folder",
    "PackedCounts": "counting_zoo.data.pack",
    "pack": "counting_zoo.data.pack",
    "audit": "counting_zoo.evaluation.audit",
    "benchmark": "counting_zoo.evaluation.benchmark",
    "calibrate": "counting_zoo.evaluation.calibrate",
    "export": "counting_zoo.exporting",
    "load": "counting_zoo.loading",
    "load_official": "counting_zoo.loading",
    "save": "counting_zoo.loading",
}

if TYPE_CHECKING:
    from counting_zoo.data.base import CountingDataModule
    from counting_zoo.data.boxes import COCOCounts, VOCCounts
    from counting_zoo.data.crowds import CARPK, UCFQNRF, JHUCrowd, NWPUCrowd, ShanghaiTech
    from counting_zoo.data.folder import CaptionedImages, ImageFolder
    from counting_zoo.data.fsc147 import FSC147
    from counting_zoo.data.pack import PackedCounts, pack
    from counting_zoo.data.synthetic import SyntheticScenes
    from counting_zoo.evaluation.audit import audit
    from counting_zoo.evaluation.benchmark import benchmark
    from counting_zoo.evaluation.calibrate import calibrate
    from counting_zoo.exporting import export
    from counting_zoo.geometry import Preprocess
    from counting_zoo.loading import load, load_official, save
    from counting_zoo.models.clip_count import CLIPCount
    from counting_zoo.models.clip_ebc import CLIPEBC, EBC
    from counting_zoo.models.lower_count import LowerCount
    from counting_zoo.models.region_clip import RegionCLIPCounter, RegionCLIPPretraining
    from counting_zoo.module import CountingModule
    from counting_zoo.prediction import Prediction
    from counting_zoo.types import Batch, CountOutput


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"counting_zoo has no {name!r}; it has {sorted(_HOME)}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "CARPK",
    "CLIPEBC",
    "EBC",
    "FSC147",
    "UCFQNRF",
    "Batch",
    "CLIPCount",
    "COCOCounts",
    "CaptionedImages",
    "CountOutput",
    "CountingDataModule",
    "CountingModule",
    "ImageFolder",
    "JHUCrowd",
    "LowerCount",
    "NWPUCrowd",
    "PackedCounts",
    "Prediction",
    "Preprocess",
    "RegionCLIPCounter",
    "RegionCLIPPretraining",
    "ShanghaiTech",
    "SyntheticScenes",
    "VOCCounts",
    "__version__",
    "audit",
    "benchmark",
    "calibrate",
    "export",
    "load",
    "load_official",
    "pack",
    "save",
]  # fmt: skip
