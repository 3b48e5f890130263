"""Writing checkpoints in one piece, and taking a run up again where another one stopped."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from counting_zoo.errors import listed
from counting_zoo.io import replacing

log = logging.getLogger(__name__)


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> Path:
    """Write a checkpoint in one piece; the file that was there stays until the new one is complete on the disk.

    Raises:
        OutputError: the disk is full, or does not let it be written; what was there stays.
    """
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        try:
            torch.save(dict(checkpoint), file)
        except RuntimeError as error:  # of torch's writer, in whose place stands what went wrong
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    return Path(path)


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints of a trainer, written by :func:`write_checkpoint`; weights that are not finite replace none.

    Lightning writes to ``$TMPDIR`` and copies over the file that was there, which a kill or a full disk then destroys
    where the two are on different disks.

    Attributes:
        finite: the last file written, whose weights were all finite; ``None`` before the first.
    """

    finite: Path | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):  # not a file of this machine
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        state = checkpoint.get("state_dict", {})  # none where processes hand over weights alone
        bad = [name for name, value in state.items() if isinstance(value, Tensor) and not torch.isfinite(value).all()]
        if bad:
            raise FloatingPointError(
                f"{path}: not written, as {len(bad)} weights are not finite ({listed(bad, 3)}); "
                + ("this run has no checkpoint yet" if self.finite is None else f"those in {str(self.finite)!r} are")
            )
        self.finite = write_checkpoint(checkpoint, path)


def take_over_best(
    callback: ModelCheckpoint, state: dict[str, Any], resumed: Path, *, copy: bool = True
) -> dict[str, Any]:
    """Bring the best checkpoints of a run so far into the folder of the run that takes it up again.

    Lightning forgets them where the folder is another one: the best of the remaining epochs would pass for the best.

    Args:
        callback: of the new run, whose folder is known.
        state: of the same callback in the checkpoint.
        resumed: the checkpoint, beside which its best ones are looked for where the run's folder has moved.
        copy: of several processes, one copies the files.

    Returns:
        The state to restore.
    """
    if callback.monitor is None or callback.dirpath is None or state.get("dirpath") == callback.dirpath:
        return state
    kept: dict[str, Tensor] = {}
    for stored, score in state.get("best_k_models", {}).items():
        places = (Path(stored), resumed.with_name(Path(stored).name))
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            log.warning(
                "the best checkpoint so far (%s, %s %.4g) is gone: it is not among the best of this run",
                stored,
                callback.monitor,
                float(score),
            )
            continue
        kept[str(Path(callback.dirpath, found.name))] = score
        if copy:
            with replacing(Path(callback.dirpath, found.name)) as temporary:
                shutil.copyfile(found, temporary)
    if not kept:
        return state
    first, last = (min, max) if callback.mode == "min" else (max, min)
    best, worst = first(kept, key=lambda path: float(kept[path])), last(kept, key=lambda path: float(kept[path]))
    full = len(kept) == callback.save_top_k
    return state | {
        "dirpath": callback.dirpath,
        "best_k_models": kept,
        "best_model_path": best,
        "best_model_score": kept[best],
        "kth_best_model_path": worst if full else "",
        "kth_value": kept[worst] if full else torch.tensor(math.inf if callback.mode == "min" else -math.inf),
        "last_model_path": "",
    }
