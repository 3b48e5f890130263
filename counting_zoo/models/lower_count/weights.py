"""Weights of the Lower-Count reference (GuoleiSun/CountSeg) in the zoo's LowerCount."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from counting_zoo.class_lists import COCO_CLASSES, VOC_CLASSES
from counting_zoo.errors import WeightsError
from counting_zoo.models.lower_count.module import LowerCount
from counting_zoo.models.lower_count.network import LowerCountConfig
from counting_zoo.nn.backbones import resnet_to_transformers
from counting_zoo.nn.weights import load_tensors

_KNOWN = {len(names): list(names) for names in (VOC_CLASSES, COCO_CLASSES)}


# torchvision's ResNet as the reference's nn.Sequential numbers its parts.
_PARTS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


_BRANCHES = {"branch1": "class_branch", "branch2": "density_branch"}


def from_official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowerCount:
    """Build a LowerCount with the reference's weights, predicting as it does.

    Args:
        state: the reference's state dict, without ``module.`` prefixes: ``backbond.features.*`` (its spelling),
            ``backbond.classifier.0.*`` and ``addedmodule.branch{1,2}.*``.
        config: ``classes``, the names in the order of the maps; VOC's for 20 classes and COCO's for 80 if not given.

    Raises:
        WeightsError: keys are unknown or missing (listed), have another shape, or the classes are not known.
    """
    last = "addedmodule.branch1.2.weight"
    if last not in state or "backbond.classifier.0.weight" not in state:
        raise WeightsError(f"no Lower-Count state dict: it has no {last} but {sorted(state)[:6]}")
    n_classes, width = int(state[last].shape[0]), int(state[last].shape[1])
    classes = [str(name) for name in config.get("classes", _KNOWN.get(n_classes, []))]
    if len(classes) != n_classes:
        raise WeightsError(
            f"these weights count {n_classes} classes, and config names {len(classes)}; give their names in the order "
            "of training, config={'classes': [...]}"
        )
    tensors = {_renamed(key): value for key, value in state.items()}
    depth = 50 if any(".conv3." in key for key in state) else 34
    blocks = len({key.split(".")[3] for key in state if key.startswith("backbond.features.6.")})
    name = {(34, 2): "resnet18", (34, 6): "resnet34", (50, 6): "resnet50", (50, 23): "resnet101"}.get(
        (depth, blocks), "resnet152"
    )
    module = LowerCount(
        name,
        classes=classes,
        limit=int(config.get("tl", 4)),
        spatial_norm="pooled",
        network=LowerCountConfig(hidden=width, peak_gradient="sum"),
        round_counts=True,
        decay="all",
    )
    # torch 0.4 did not count batches; nothing that is predicted depends on it.
    load_tensors(
        module,
        tensors,
        f"Lower-Count's {name}",
        optional=lambda key: key in ("network.mean", "network.std") or key.endswith("num_batches_tracked"),
    )
    return module.eval()


def _renamed(key: str) -> str:
    """Map one of the reference's names to the zoo's; itself where there is none."""
    if found := re.fullmatch(r"backbond\.features\.([0-9])\.(.+)", key):
        part = _PARTS.get(found[1])
        plain = f"{part}.{found[2]}"
        if part is None:
            return key
        return "network.encoder.body." + next(iter(resnet_to_transformers({plain: None})))  # type: ignore[dict-item]
    if found := re.fullmatch(r"backbond\.classifier\.0\.(\w+)", key):
        return f"network.neck.{found[1]}"
    if found := re.fullmatch(r"addedmodule\.(branch[12])\.(.+)", key):
        return f"network.{_BRANCHES[found[1]]}.{found[2]}"
    return key
