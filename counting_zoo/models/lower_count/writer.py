"""Instance masks written while ``predict`` runs, and their drawing."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Sequence
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
from counting_zoo.io import write_whole
from counting_zoo.models.lower_count.instances import Instances
from counting_zoo.models.lower_count.module import LowerCount
from counting_zoo.models.lower_count.proposals import Proposals, encode_mask, segment_proposals
from counting_zoo.prediction import DARK, WHITE, ascii_text

OPACITY = 0.45


TURN = 0.618034  # of the hue circle: neighbours in the list never look alike


def draw_instances(image: np.ndarray, instances: Instances, names: Sequence[str]) -> np.ndarray:
    """Draw each instance in a colour of its own, with its outline, class and score; the best on top.

    Args:
        image: ``(H, W, 3)`` uint8 RGB, as it is stored; it is not changed.
        instances: in its pixels.
        names: of the classes.

    Returns:
        ``(H, W, 3)`` uint8 RGB.

    Raises:
        InputError: masks of another size, or a label without a name.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"a image of {image.dtype} {image.shape}; expected uint8 RGB (H, W, 3)")
    if len(instances) and tuple(instances.masks.shape[1:]) != image.shape[:2]:
        raise InputError(
            f"masks of {tuple(instances.masks.shape[1:])} on a image of {image.shape[:2]}; give the image as it "
            "is stored, whose pixels masks are in"
        )
    labels, scores = instances.labels.tolist(), instances.scores.tolist()
    if labels and not 0 <= min(labels) <= max(labels) < len(names):
        raise InputError(
            f"labels {min(labels)} to {max(labels)} for {len(names)} names; expected one name for each class"
        )
    canvas = image.copy()
    size = max(0.35, min(image.shape[:2]) / 900)
    captions = []
    for i in reversed(range(len(labels))):
        mask = instances.masks[i].cpu().numpy()
        if not mask.any():
            continue
        colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(i * TURN % 1, 0.85, 1))
        canvas[mask] = np.rint(canvas[mask] * (1 - OPACITY) + np.array(colour) * OPACITY)
        outline, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(canvas, outline, -1, colour, 1 + min(image.shape[:2]) // 400, cv2.LINE_AA)
        text = f"{ascii_text(names[labels[i]])} {scores[i]:.2f}"
        captions.append((text, _inside(mask)))
    for text, centre in captions:  # over all masks
        (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
        x = max(1, min(centre[0] - width // 2, image.shape[1] - width - 1))
        y = max(height + 1, min(centre[1] + height // 2, image.shape[0] - 2))
        for colour, thickness in ((DARK, 3), (WHITE, 1)):
            cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, colour, thickness, cv2.LINE_AA)
    return canvas


def _inside(mask: np.ndarray) -> tuple[int, int]:
    """Find the x, y that is farthest from the border of the mask: a centre that is inside, whatever the shape."""
    depth = cv2.distanceTransform(np.pad(mask.view(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(x), int(y)


class InstanceWriter(L.Callback):
    """Writes what :meth:`LowerCount.instances` finds: ``instances.json`` and one drawing for each image.

    The file is a list of COCO results, ``{image_id, category, score, segmentation: {size, counts}}``, with run lengths
    in the pixels of the stored image.

    Args:
        dir: the folder; files of an earlier run in it are replaced.
        proposals: a file or folder of proposals in the pixels of the stored images; found in the images if
            ``None``.
        by_count: as many instances of a class as it is counted; otherwise every peak above the reference's thresholds.
        max_images: how many images to draw at most on each process.

    Example:
        On the command line: ``--trainer.callbacks+=counting_zoo.models.lower_count.writer.InstanceWriter``.
    """

    def __init__(
        self, dir: str = "predictions", proposals: str | None = None, by_count: bool = True, max_images: int = 1000
    ) -> None:
        self.dir = Path(dir).expanduser()
        self.proposals = None if proposals is None else Proposals(proposals)
        self.by_count = by_count
        self.max_images = max_images
        self._rows: list[dict[str, Any]] = []
        self._drawn = 0

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, LowerCount):
            raise InputError(
                f"InstanceWriter reads peaks of LowerCount, and this model is a {type(pl_module).__name__}"
            )
        self._rows, self._drawn = [], 0

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
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
            write_whole(path, json.dumps(rows))
            rank_zero_info(f"{len(rows)} instances: see {path}")
        self._rows = []

    def _find(
        self, module: LowerCount, image_id: str, size: tuple[int, int] | None, names: list[str], seen: Tensor
    ) -> None:
        assert size is not None  # predictions of images have one
        if self.proposals is not None:
            masks = self.proposals(image_id, size)
        else:
            masks = segment_proposals(seen)
            if tuple(masks.shape[1:]) != size and len(masks):
                masks = interpolate(masks[:, None].to(torch.uint8), size, mode="nearest-exact")[:, 0].bool()
        found = module.instances_of(seen, names, masks, by_count=self.by_count)
        self._rows += [
            {"image_id": image_id, "category": names[label], "score": score, "segmentation": encode_mask(mask)}
            for mask, label, score in zip(found.masks.cpu(), found.labels.tolist(), found.scores.tolist(), strict=True)
        ]
        if self._drawn >= self.max_images:
            return
        self._drawn += 1
        image = np.ascontiguousarray(seen.permute(1, 2, 0).cpu().numpy())
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        found.masks = found.masks.cpu()
        drawn = cv2.cvtColor(draw_instances(image, found, names), cv2.COLOR_RGB2BGR)
        path = self.dir / "instances" / f"{image_id.replace('/', '_')}.jpg"
        write_whole(path, cv2.imencode(".jpg", drawn)[1].tobytes())
