"""Callbacks that write files while a trainer runs: predictions, density images, and the report of a test."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from counting_zoo.errors import ImageError, InputError
from counting_zoo.evaluation.counting import count_again
from counting_zoo.evaluation.predictions import PartWriter, merge_parts
from counting_zoo.evaluation.report import Drawing, class_rows, read_curve, write_report
from counting_zoo.io import write_table, write_whole
from counting_zoo.metrics.counts import CountTable
from counting_zoo.module import CountingModule
from counting_zoo.queries import wrong_prompts
from counting_zoo.types import Batch

log = logging.getLogger(__name__)


class PredictionWriter(L.Callback):
    """Writes what ``predict`` finds: ``counts.csv``, ``points.csv``, ``errors.csv``, ``densities.h5``, ``pictures/``.

    And ``boxes.csv``, where the model detects. Every process writes its part as it goes; at the end the first one
    joins them, ordered by image and each image once, so that the files do not depend on the number of processes.
    Files appear complete or not at all. On several machines ``dir`` must lie on a disk they share. See
    :mod:`counting_zoo.evaluation.predictions` for columns.

    Args:
        dir: the folder; files of an earlier run in it are replaced.
        images: draw overlays.
        densities: write density maps.
        max_images: how many images to draw at most, the first of the data; ``None`` for all.
        fail_on_error: raise at the very end, after everything is written, if an image could not be read.
    """

    def __init__(
        self,
        dir: str = "predictions",
        images: bool = True,
        densities: bool = True,
        max_images: int | None = 1000,
        fail_on_error: bool = False,
    ) -> None:
        if max_images is not None and max_images < 0:
            raise InputError(f"predictions.max_images is {max_images}; expected at least 0, or null for all")
        self.dir = Path(dir).expanduser()
        self.images = images
        self.densities = densities
        self.max_images = max_images
        self.fail_on_error = fail_on_error
        self._part: PartWriter | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        limit = self.max_images if self.images else 0
        self._part = PartWriter(self.dir, trainer.global_rank, densities=self.densities, max_images=limit)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._part is not None  # opened in on_predict_start
        for image_id, reason in batch.get("failed", []):
            log.error("%s could not be read and has no prediction: %s", image_id, reason)
            self._part.fail(image_id, reason)
        for prediction in outputs or []:
            if bool(torch.isfinite(prediction.counts).all()):
                self._part.add(prediction)
            else:
                log.error("the count of %s is not finite", prediction.image_id)
                self._part.fail(prediction.image_id, f"the count is not finite: {prediction.counts.tolist()}")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._part is not None  # opened in on_predict_start
        self._part.close()
        self._part = None
        trainer.strategy.barrier("predictions written")
        done = merge_parts(self.dir, trainer.world_size, self.max_images) if trainer.is_global_zero else None
        done = trainer.strategy.broadcast(done)
        assert done is not None  # the first process has made it
        if trainer.is_global_zero:
            rank_zero_info(f"{done.images} images counted, {done.errors} could not be read: see {self.dir}")
        if done.errors and self.fail_on_error:
            raise ImageError(
                f"{done.errors} of {done.images + done.errors} images could not be read; the others are in "
                f"{str(self.dir)!r}, the reasons in errors.csv"
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None


class DensityImages(L.Callback):
    """Draws the first validation images, always the same ones, to see where the model counts.

    They go to TensorBoard where that logs images, and else into ``pictures/`` of the log folder. The first process
    draws; each image costs one more prediction.

    Args:
        every_n_epochs: how often.
        max_images: how many.
    """

    def __init__(self, every_n_epochs: int = 1, max_images: int = 4) -> None:
        if every_n_epochs < 1 or max_images < 0:
            raise InputError(
                f"DensityImages: every_n_epochs={every_n_epochs}, max_images={max_images}; "
                "expected at least 1 and at least 0"
            )
        self.every_n_epochs = every_n_epochs
        self.max_images = max_images
        self._drawn = 0

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._drawn = 0

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking or trainer.current_epoch % self.every_n_epochs:
            return
        assert isinstance(pl_module, CountingModule)
        for i in range(min(self.max_images - self._drawn, len(batch["image_id"]))):
            prediction = count_again(pl_module, batch, i)
            name = prediction.names[0]
            tag = f"val_pictures/{self._drawn:02d}"
            _show(trainer, tag, prediction.overlay(name), f"{batch['image_id'][i]}: {name}")
            self._drawn += 1


class SaveOnTermination(L.Callback):
    """Writes ``last.ckpt`` when the system ends a training run (SIGTERM), to go on from at that step.

    Into the folder of the run's checkpoints, where there is one. Nothing is written between accumulated gradients, nor
    where a validation is on averaged weights: neither could be taken up again exactly. Of several processes, all end
    behind the same step, whichever of them is told.
    """

    def __init__(self) -> None:
        self._told = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning's handler sends to the other processes at once, where they are in the middle of other messages.
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_told", True))

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self._told, all=False):
            trainer._signal_connector.received_sigterm = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        folder = next((folder for c in trainer.checkpoint_callbacks if (folder := getattr(c, "dirpath", None))), None)
        averaged = trainer.validating and any(isinstance(c, WeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
        whole = not (averaged or trainer.sanity_checking or trainer.fit_loop.epoch_loop._should_accumulate())
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit" and folder is not None and whole:
            if trainer.validating:  # Lightning goes back to a validation only from inside one of its batches
                validated: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
                validated.processed = validated.completed = validated.started - 1
            path = Path(folder, "last.ckpt")
            trainer.save_checkpoint(path)
            rank_zero_info(f"ended by SIGTERM behind step {trainer.global_step}; to go on: --ckpt_path {path}")


class TestReport(L.Callback):
    """Leaves ``test_counts.csv`` (every image) and ``report.html`` (one file, with images) in the log folder.

    And ``test_classes.csv``, the error of each class with its interval, where all images ask about the same names.

    Args:
        images: how many images the report shows, spread evenly over the test data; each costs one more
            prediction, and for text-guided models the report shows the same image asked about an absent name.
        title: of the report; model and data if ``None``.
    """

    __test__ = False  # not a test class, whatever its name says to pytest

    def __init__(self, images: int = 8, title: str | None = None) -> None:
        if images < 0:
            raise InputError(f"report.images is {images}; expected at least 0")
        self.images = images
        self.title = title
        self._names: dict[str, list[str]] = {}
        self._shown: list[Drawing] = []
        self._table = CountTable()
        self._batches: dict[int, int] = {}

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._names, self._shown, self._table = {}, [], CountTable()
        n_batches = int(trainer.num_test_batches[0]) if np.isfinite(trainer.num_test_batches[0]) else 1
        chosen = np.linspace(0, n_batches - 1, self.images).round().astype(int).tolist() if n_batches else []
        self._batches = {batch: chosen.count(batch) for batch in chosen}

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, CountingModule)
        self._names.update((i, list(q.names)) for i, q in zip(batch["image_id"], batch["queries"], strict=True))
        if not trainer.is_global_zero:
            return
        for i in range(min(self._batches.get(batch_idx, 0), len(batch["image_id"]))):
            asked = list(batch["queries"][i].names)
            absent = _absent_name(pl_module, trainer, batch, i)
            names = asked[:1] if absent is None else [asked[0], absent]
            if pl_module.class_blind or not pl_module.text_guided:
                names = asked
            prediction = count_again(pl_module, batch, i, names)
            true = batch["counts"][i]
            for k, name in enumerate(prediction.names[:2]):
                if len(prediction.names) == 1 and len(asked) > 1:
                    target = float(true.sum())
                else:
                    target = float(true[k]) if k < len(asked) and name == asked[k] else 0.0
                text = f"{name}: {float(prediction.counts[k]):.1f} counted, {target:g} true"
                self._shown.append(Drawing(prediction.overlay(name), batch["image_id"][i], text))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CountingModule)
        table = pl_module.test_counts  # the module forgets it next
        mine = list(
            zip(table.image, table.name, table.column("target", "predicted", "low", "high").tolist(), strict=True)
        )
        everyone: list[Any] = [mine]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, mine)
        counted: dict[str, dict[str, list[float]]] = {}
        for image, name, numbers in (row for rows in everyone for row in rows):
            counted.setdefault(image, {})[name] = numbers
        self._table = CountTable.of((i, n, *numbers) for i in sorted(counted) for n, numbers in counted[i].items())

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked of all processes: it is broadcast
        if not trainer.is_global_zero:
            return
        self._table.write(folder / "test_counts.csv")
        classes = self._class_rows(pl_module)
        if classes:
            write_table(folder / "test_classes.csv", tuple(classes[0]), (tuple(row.values()) for row in classes))
        datamodule = getattr(trainer, "datamodule", None)
        path = write_report(
            folder / "report.html",
            title=self.title or f"{type(pl_module).__name__} on {type(datamodule).__name__}",
            scores={name: float(value) for name, value in trainer.callback_metrics.items()},
            counts=self._table,
            images=self._shown,
            classes=classes,
            curve=read_curve(getattr(trainer, "ckpt_path", None)),
            settings={
                "checkpoint": str(getattr(trainer, "ckpt_path", None) or "none: weights as initialised"),
                "precision": str(trainer.precision),
                "processes": trainer.world_size,
                **{f"data.{name}": value for name, value in sorted(getattr(datamodule, "hparams", {}).items())},
                **{f"model.{name}": value for name, value in sorted(pl_module.hparams.items())},
            },
        )
        rank_zero_info(f"report: {path}")

    def _class_rows(self, module: L.LightningModule) -> list[dict[str, Any]]:
        """Compute the errors of each class where all images were asked about the same names."""
        assert isinstance(module, CountingModule)
        lists = {tuple(names) for names in self._names.values()}
        if len(lists) != 1 or module.class_blind or len(names := lists.pop()) < 2:
            return []
        constants = {
            name: dict(zip(names, value if isinstance(value, list) else [value] * len(names), strict=True))
            for name, value in module.test_counts.constants.items()
        }
        return class_rows(self._table, constants)


def _absent_name(module: CountingModule, trainer: L.Trainer, batch: Batch, index: int) -> str | None:
    """Choose a name that is not in the image, for models that read names."""
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None or not module.text_guided or len(batch["queries"][index].names) != 1:
        return None
    one: dict[str, Any] = {key: batch[key][index : index + 1] for key in ("image_id", "queries")}  # type: ignore[literal-required]
    if "present" in batch:
        one["present"] = batch["present"][index : index + 1]
    wrong = wrong_prompts(one, list(datamodule.class_names("test")))  # type: ignore[arg-type]
    return None if wrong is None or wrong[0][0] == batch["queries"][index].names[0] else wrong[0][0]


def _show(trainer: L.Trainer, tag: str, drawing: np.ndarray, caption: str) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, drawing, trainer.global_step, dataformats="HWC")
            logger.experiment.add_text(f"{tag}/name", caption, trainer.global_step)
            return
    folder = trainer.loggers[0].log_dir if trainer.loggers else None
    name = f"{Path(tag).name}_epoch{trainer.current_epoch:04d}.png"
    path = Path(folder or trainer.default_root_dir) / "pictures" / name
    write_whole(path, cv2.imencode(".png", cv2.cvtColor(drawing, cv2.COLOR_RGB2BGR))[1].tobytes())
