"""Results that others have published, to stand beside measured ones: each with where it was read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Published:
    """One published result; nothing in it was measured by this package.

    Args:
        model: its name, and which weights where there are several.
        data: the class of the data module, such as ``FSC147``.
        settings: arguments of the data module that the result belongs to, such as ``{"part": "A"}``.
        split: ``val`` or ``test``.
        metrics: by the names of :mod:`counting_zoo.metrics`: ``mae``, ``rmse``, ``nae`` (a share, not per cent),
            ``mrmse``, ...
        source: where it was read.
        url: of the source, empty where none is on record.
        arxiv: id of the model's paper, empty where none is on record.
        protocol: what else it depends on.
    """

    model: str
    data: str
    settings: Mapping[str, Any]
    split: str
    metrics: Mapping[str, float]
    source: str
    url: str
    arxiv: str
    protocol: str


def published(data: str, split: str, settings: Mapping[str, Any] | None = None) -> list[Published]:
    """What is published for a data set, best first by MAE or mRMSE.

    Figures that were not read at a source, and those on which sources disagree, are not in the list.

    Args:
        data: the class of the data module.
        split: ``train``, ``val`` or ``test``.
        settings: arguments of the data module: a result for other settings is left out. ``None`` takes all.

    Example:
        >>> [(r.model, r.metrics["mae"]) for r in published("ShanghaiTech", "test", {"part": "B"})][0]
        ('ZIP-B, 105.6 M parameters', 5.51)
    """
    return [
        result
        for result in _all()
        if (result.data, result.split) == (data, split)
        and (settings is None or all(settings.get(key) == value for key, value in result.settings.items()))
    ]


def deciding_settings(data: str) -> list[str]:
    """The arguments of a data module that decide which published results belong to it.

    Example:
        >>> deciding_settings("ShanghaiTech"), deciding_settings("FSC147")
        (['part'], [])
    """
    return sorted({key for result in _all() if result.data == data for key in result.settings})


@cache
def _all() -> tuple[Published, ...]:
    text = resources.files("counting_zoo.evaluation").joinpath("published.json").read_text(encoding="utf-8")
    found = [Published(**entry) for entry in json.loads(text)]
    return tuple(sorted(found, key=lambda r: (r.metrics.get("mae", r.metrics.get("mrmse", 0.0)), r.model)))


__all__ = ["Published", "deciding_settings", "published"]
