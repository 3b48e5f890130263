"""The file that the NWPU-Crowd benchmark's server takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from counting_zoo.errors import ImageError
from counting_zoo.evaluation.tables import replacing


class NWPUSubmission(L.Callback):
    """Writes ``<id> <count>`` for every predicted picture, by ascending id, to be uploaded to crowdbenchmark.com.

    On the command line: ``counting-zoo predict --config configs/data/nwpu_crowd.yaml --ckpt_path best.ckpt
    --trainer.callbacks+ counting_zoo.evaluation.submission.NWPUSubmission``.

    Args:
        path: the file; replaced if it exists.

    Raises:
        ImageError: a picture could not be read, and the server refuses a file without it; nothing is written.
    """

    def __init__(self, path: str = "nwpu_submission.txt") -> None:
        self.path = Path(path).expanduser()
        self._counts: dict[str, float] = {}
        self._failed: list[str] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._counts, self._failed = {}, []

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._failed += [image_id for image_id, _ in batch.get("failed", [])]
        for prediction in outputs or []:
            self._counts[Path(prediction.image_id).stem] = float(prediction.counts.sum())

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parts = [(self._counts, self._failed)]
        if trainer.world_size > 1:
            parts *= trainer.world_size
            torch.distributed.all_gather_object(parts, (self._counts, self._failed))
        failed = sorted(name for _, names in parts for name in names)
        if failed:
            raise ImageError(
                f"{self.path} is not written: {len(failed)} pictures could not be read ({', '.join(failed[:5])}), and "
                "the benchmark needs a count for each; see errors.csv"
            )
        if trainer.is_global_zero:
            counts = {name: count for found, _ in parts for name, count in found.items()}
            order = sorted(counts, key=lambda name: (int(name) if name.isdigit() else 0, name))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                temporary.write_text("\n".join(f"{name} {counts[name]}" for name in order), encoding="utf-8")
            rank_zero_info(f"{len(order)} counts for the NWPU-Crowd benchmark: see {self.path}")


__all__ = ["NWPUSubmission"]
