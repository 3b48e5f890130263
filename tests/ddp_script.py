"""Run by ``test_ddp.py`` in a process of its own: every command once in one process and once in several.

The parent only forks and never runs autograd, which does not survive a fork; results are files.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # pytest imports every file here, and must not catch these
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["COUNTING_ZOO_DEBUG"] = "1"

import cv2
import fakes
import lightning as L
import numpy as np
import tiny
import tiny_clip
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import data, model, run
from torch.utils.data import DataLoader

from counting_zoo import LowerCount, RegionCLIPPretraining
from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.dataset import collate
from counting_zoo.data.records import Record, Split
from counting_zoo.types import Batch

torch.set_num_threads(1)
SIZES = {"train": 8, "val": 3, "test": 5}
STEP = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1.0"]


def trainer(name: str, world: int, **options: object) -> list[str]:
    """The shipped trainer with as many processes, logging into ``runs/<name>``."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "", "version": name}}
    many = {"devices": world, "strategy": "ddp_fork", "use_distributed_sampler": False}
    return tiny.trainer(**{"logger": [logger]} | many | options)


def last(name: str) -> str:
    return f"runs/{name}/checkpoints/last.ckpt"


def scenes() -> list[str]:
    return data("scenes_easy", tiny.SCENES | {"root": str(Path("scenes").resolve()), "sizes": SIZES})


def train_and_score(name: str, *worlds: int) -> None:
    """Both stages on two processes, then the test on as many as are asked for."""
    run("fit", *trainer(f"fit_{name}", 2, max_epochs=2), *model(name), *scenes())
    for world in worlds:
        words = trainer(f"test_{name}_{world}", world, callbacks=[])
        run("test", *words, *scenes(), "--data.eval_batch_size=1", "--ckpt_path", last(f"fit_{name}"))


def predict(n: int, best: str) -> None:
    """``n`` good pictures and a broken one."""
    folder = Path(f"photos{n}").resolve()
    for i in range(n):
        fakes.write_image(folder / f"{i}.png", fakes.draw_points(3, 48, 64, i), seed=i)
    folder.mkdir(exist_ok=True)
    (folder / "broken.png").write_bytes(b"no picture")
    for world in (1, 2):
        found = ["--data=ImageFolder", f"--data.root={folder}", "--data.num_workers=0", "--data.classes=[kiwis, plums]"]
        words = trainer(f"predict{n}_{world}", world, callbacks=[])
        run("predict", *words, *found, f"--predictions.dir=predicted{n}_{world}", "--ckpt_path", best)


def short() -> None:
    """What every run of the tests looks at."""
    train_and_score("clip_count", 1, 2)
    predict(0, last("fit_clip_count"))


def long() -> None:
    """The rest."""
    train_and_score("clip_count_small", 1, 2, 4)
    best = last("fit_clip_count_small")
    predict(1, best)
    predict(5, best)
    fsc = data("fsc147", tiny.write_data("fsc147", Path("fsc147").resolve()))  # 3 test images for 4 processes
    for world in (1, 4):
        run("test", *trainer(f"fsc_{world}", world, callbacks=[]), *fsc, "--ckpt_path", best)
    # One step on the same eight images. SGD with a rate of 1 makes weights show gradients; nothing is random.
    for contrast in ("patch", "region"):
        for stage, epochs in (("contrast", 1), ("density", 0)):
            more: dict[str, Any] = {
                "contrast": contrast,
                "contrast_epochs": epochs,
                "prompt_width": 0,
                "interaction": "none",
            }
            more |= {"count_weight": 0.1, "contrast_weight_after": int(contrast == "region")}
            for world in (1, 2):
                equal = [f"--data.batch_size={8 // world}", "--data.augmentation=null", "--data.prompts=2"]
                words = trainer(f"{contrast}_{stage}_{world}", world, limit_val_batches=1)
                run("fit", *words, *model("clip_count", **more), *STEP, *scenes(), *equal)


def blocks() -> None:
    """One step of blockwise models on the same eight pictures, in one process and in two."""
    # Without the decoder, whose batch norm sees the images of its own process; on GPUs sync_batchnorm is the cure.
    for name, options in (("clip_ebc", {"decoder": []}), ("ebc_small", {})):
        for loss in ("dm", "multiscale"):
            for world in (1, 2):
                equal = [f"--data.batch_size={8 // world}", "--data.augmentation=null", "--data.prompts=all"]
                words = trainer(f"{name}_{loss}_{world}", world, limit_val_batches=1)
                run("fit", *words, *model(name, count_loss=loss, **options), *STEP, *scenes(), *equal)


class Recorded(LowerCount):
    """Leaves the terms of its loss in ``terms/``, one file for each process."""

    name: str

    def training_losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        terms = super().training_losses(batch)
        Path("terms").mkdir(exist_ok=True)
        low = ((batch["counts"] > 0) & (batch["counts"] <= 4)).sum()
        kept = {name: float(value.detach()) for name, value in terms.items()} | {"low": int(low)}
        torch.save(kept, f"terms/{self.name}_{self.global_rank}.pt")
        return terms


class Baskets(CountingDataModule):
    """Eight pictures that every process deals out alike; those at odd places have no count of 1 to 4."""

    def read_split(self, split: Split) -> list[Record]:
        counts = [[0, 1, 3], [9, 0, 0], [2, 0, 4], [0, 0, 7], [0, 3, 0], [0, 0, 0], [1, 0, 9], [6, 5, 0]]
        names = ["figs", "dates", "plums"]
        return [
            Record(f"{split}/{i}.png", classes=names, counts=np.array(row, np.float32), size=(32, 32))
            for i, row in enumerate(counts)
        ]

    def read_bytes(self, record: Record) -> bytes:
        image = np.random.default_rng(int(record.image_id[-5])).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        return cv2.imencode(".png", image)[1].tobytes()

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        data = self._dataset("train", training=True)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        mine = [(i, 0) for i in range(rank, 8, world)]
        return DataLoader(data, batch_size=8 // world, sampler=mine, collate_fn=partial(collate, training=True))


#: One step of Lower-Count each; the last one in the first stage.
LOWER_COUNT: dict[str, dict[str, Any]] = {
    "pooled": {"spatial_norm": "pooled"},
    "per_class": {},
    "negatives": {"negatives": 0.4, "negatives_share": 0.6, "spatial_norm": "pooled"},
    "modulated": {"density_branch": "modulated", "counted_classes": ["figs", "dates"]},
    "first": {"first_stage": 1},
}


def low_counts() -> None:
    """One step of Lower-Count on the same eight pictures, in one process and in two, of which one has no low count."""
    # Without batch norm, which sees the images of its own process.
    small: dict[str, Any] = {
        "encoder": "small",
        "width": 4,
        "reduction": 8,
        "branch_norm": "none",
        "first_stage": 0,
        "preprocess": {"resize": "none"},
        "backbone_lr": 1.0,
    }
    for name, options in LOWER_COUNT.items():
        for world in (1, 2):
            torch.manual_seed(0)
            model = Recorded(**Recorded.nested(small | options), optimizer=partial(torch.optim.SGD, lr=1.0))
            model.name = f"{name}_{world}"
            run = L.Trainer(
                accelerator="cpu",
                devices=world,
                strategy="ddp_fork" if world > 1 else "auto",
                max_epochs=1,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
                use_distributed_sampler=False,
                callbacks=[ModelCheckpoint(".", model.name)],
            )
            run.fit(model, Baskets(num_workers=0, prompts="all", duplicates="ignore"))


class Boxed(Baskets):
    """Eight pictures of one caption each; those at odd places have no box."""

    def read_split(self, split: Split) -> list[Record]:
        records = []
        for i in range(8):
            n = 0 if i % 2 else 1 + i // 2
            corners = np.random.default_rng(i).uniform(0, 16, (n, 2)).astype(np.float32)
            known = {"boxes": np.concatenate([corners, corners + 14], 1), "box_labels": np.arange(n) % 3}
            names, size = ["figs", "dates", "plums"], (32, 32)
            records.append(
                Record(f"{split}/{i}.png", classes=names, captions=[f"{i // 3} figs"], size=size, **known)  # type: ignore[arg-type]
            )
        return records


class RecordedPretraining(RegionCLIPPretraining):
    """Leaves the terms of its loss in ``terms/``, one file for each process."""

    name: str

    def training_losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        terms = super().training_losses(batch)
        Path("terms").mkdir(exist_ok=True)
        kept = {name: float(value.detach()) for name, value in terms.items()}
        torch.save(kept | {"boxes": sum(map(len, batch["boxes"]))}, f"terms/{self.name}_{self.global_rank}.pt")
        return terms


#: What labels regions, and what of it trains along.
LABELS: dict[str, dict[str, Any]] = {
    "teacher": {"labels": "teacher"},
    "boxes": {"labels": "boxes", "train_text": True},
}


def pretraining() -> None:
    """One step of RegionCLIP's pretraining on the same eight pictures; in two processes one sees no box."""
    small: dict[str, Any] = {
        "regions": "boxes",
        "concepts": "classes",
        "distractors": ["forks"],
        "templates": ["{}"],
        "threshold": 0.0,
        "temperature": 0.2,
        "n_regions": 5,
    }
    for name, options in LABELS.items():
        for gather in ("all", "image_text", "none"):
            for world in (1, 2):
                torch.manual_seed(0)
                model = RecordedPretraining(
                    tiny_clip.config(), gather=gather, **small | options, optimizer=partial(torch.optim.SGD, lr=1.0)
                )  # type: ignore[arg-type]
                model.name = f"{name}_{gather}_{world}"
                run = L.Trainer(
                    accelerator="cpu",
                    devices=world,
                    strategy="ddp_fork" if world > 1 else "auto",
                    max_epochs=1,
                    logger=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    limit_val_batches=0,
                    use_distributed_sampler=False,
                    callbacks=[ModelCheckpoint(".", model.name)],
                )
                run.fit(model, Boxed(num_workers=0, prompts="all", duplicates="ignore"))


def detectors() -> None:
    """A detector that finds much, fitted on two processes and scored on one, two and four, of which one has nothing."""
    found = {"peak_floor": 0.0, "scale": 1.0, "bias": 0.0, "tile_depth": 0}
    run("fit", *trainer("fit_detector", 2), *model("region_clip_counter_small", **found), *scenes())
    for world in (1, 2, 4):
        for command in ("validate", "test"):
            words = trainer(f"{command}_detector_{world}", world, callbacks=[])
            run(command, *words, *scenes(), "--data.eval_batch_size=1", "--ckpt_path", last("fit_detector"))


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    parts = {
        "short": short,
        "long": long,
        "blocks": blocks,
        "low_counts": low_counts,
        "pretraining": pretraining,
        "detectors": detectors,
    }
    parts[sys.argv[2]]()
