"""Instance masks of many pictures, written while ``predict`` runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn.functional import interpolate

from counting_zoo.errors import InputError
from counting_zoo.evaluation.tables import replacing
from counting_zoo.models.lower_count.drawing import draw_instances
from counting_zoo.models.lower_count.module import LowerCount
from counting_zoo.models.lower_count.proposals import Proposals, encode_mask
from counting_zoo.models.lower_count.segments import segment_proposals


class InstanceWriter(L.Callback):
    """Writes what :meth:`LowerCount.instances` finds: ``instances.json`` and one drawing for each picture.

    The file is a list of COCO results, ``{image_id, category, score, segmentation: {size, counts}}``, with run lengths
    in the pixels of the stored picture.

    Args:
        dir: the folder; files of an earlier run in it are replaced.
        proposals: a file or folder of proposals in the pixels of the stored pictures; found in the pictures if
            ``None``.
        by_count: as many instances of a class as it is counted; otherwise every peak above the reference's thresholds.
        max_pictures: how many pictures to draw at most on each process.

    Example:
        On the command line: ``--trainer.callbacks+=counting_zoo.models.lower_count.instance_files.InstanceWriter``.
    """

    def __init__(
        self, dir: str = "predictions", proposals: str | None = None, by_count: bool = True, max_pictures: int = 1000
    ) -> None:
        self.dir = Path(dir).expanduser()
        self.proposals = None if proposals is None else Proposals(proposals)
        self.by_count = by_count
        self.max_pictures = max_pictures
        self._rows: list[dict[str, Any]] = []
        self._drawn = 0

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, LowerCount):
            raise InputError(
                f"InstanceWriter reads peaks of LowerCount, and this model is a {type(pl_module).__name__}"
            )
        self._rows, self._drawn = [], 0

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        assert isinstance(pl_module, LowerCount)
        for prediction, seen in zip(outputs or [], batch["image"], strict=True):
            self._find(pl_module, prediction.image_id, prediction.size, prediction.names, seen)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        everyone: list[Any] = [self._rows]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, self._rows)
        if trainer.is_global_zero:
            rows = sorted((row for rows in everyone for row in rows), key=lambda row: (row["image_id"], -row["score"]))
            path = self.dir / "instances.json"
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(rows), encoding="utf-8")
            rank_zero_info(f"{len(rows)} instances: see {path}")
        self._rows = []

    def _find(
        self, module: LowerCount, image_id: str, size: tuple[int, int] | None, names: list[str], seen: Tensor
    ) -> None:
        assert size is not None  # predictions of pictures have one
        if self.proposals is not None:
            masks = self.proposals(image_id, size)
        else:
            masks = segment_proposals(seen)
            if tuple(masks.shape[1:]) != size and len(masks):
                masks = interpolate(masks[:, None].to(torch.uint8), size, mode="nearest-exact")[:, 0].bool()
        found = module.instances_of(seen, names, masks, by_count=self.by_count)
        self._rows += [
            {"image_id": image_id, "category": names[label], "score": score, "segmentation": encode_mask(mask)}
            for mask, label, score in zip(
                found.masks.cpu(), found.labels.tolist(), found.scores.tolist(), strict=True
            )
        ]  # fmt: skip
        if self._drawn >= self.max_pictures:
            return
        self._drawn += 1
        picture = np.ascontiguousarray(seen.permute(1, 2, 0).cpu().numpy())
        picture = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_LINEAR)
        found.masks = found.masks.cpu()
        drawn = cv2.cvtColor(draw_instances(picture, found, names), cv2.COLOR_RGB2BGR)
        path = self.dir / "instances" / f"{image_id.replace('/', '_')}.jpg"
        with replacing(path) as temporary:
            temporary.write_bytes(cv2.imencode(".jpg", drawn)[1].tobytes())


__all__ = ["InstanceWriter"]
