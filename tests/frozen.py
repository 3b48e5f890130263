"""The numbers of the package at a fixed point in time, recalculated through its public entry points alone.

``golden/freeze.py`` writes them and ``test_frozen.py`` compares them. Everything starts from the checkpoints in
``golden/frozen``, so that neither names of options nor the order of initialisation enter.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import fakes
import lightning as L
import numpy as np
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import counting_zoo
from counting_zoo.cli import main

FROZEN = Path(__file__).resolve().parent / "golden" / "frozen"
#: The models by the names of their checkpoints: the shipped configuration, what differs in it, and the data.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "clip_count_film": ("clip_count_small", {"interaction": "film"}, "scenes_easy"),
    "clip_count_similarity": ("clip_count_small", {"interaction": "similarity"}, "scenes_easy"),
    "clip_count_published": ("clip_count", {}, "scenes_easy"),
    "ebc_bins": ("ebc_small", {"width": 4}, "scenes_easy"),
    "ebc_zip": ("ebc_small", {"width": 4, "head": "zip"}, "scenes_easy"),
    "ebc_density": ("density_small", {"width": 4}, "scenes_easy"),
    "clip_ebc_vit": ("clip_ebc", {}, "scenes_easy"),
    "clip_ebc_resnet": ("clip_ebc_resnet50", {}, "scenes_easy"),
    "lower_count_small": ("lower_count_small", {"width": 4}, "scenes_low"),
    "lower_count_resnet": ("lower_count", {}, "scenes_low"),
    "region_clip_counter_stem": ("region_clip_counter_small", {}, "scenes_easy"),
    "region_clip_counter_resnet": ("region_clip_counter", {}, "scenes_easy"),
}
#: RegionCLIPPretraining, by the name of its checkpoint.
PRETRAINING: dict[str, dict[str, Any]] = {
    "region_clip_pretraining_stem": {
        "stem": "conv",
        "labels": "boxes",
        "regions": "boxes",
        "train_text": True,
        "text_pool": "words",
        "temperature": 0.07,
    },
    "region_clip_pretraining_teacher": {"regions": "random", "threshold": 0.0, "temperature": 0.1},
}
#: Of detectors whose own training is too short for any box to count.
THRESHOLDS = {"region_clip_counter_resnet": 0.0003}
#: Written by Lightning's own ModelCheckpoint, with the state of the optimizer, to go on from.
TRAINED = "ebc_trained"
NAMES = {
    "scenes_easy": ["red discs", "striped blue stars"],
    "scenes_low": ["striped white stars", "striped orange rings"],
}


# -- entry points whose arguments or files may change: adapt these, and nothing else ----------------------------------

#: Names of columns since renamed: as they were written, and as they are stored here.
COLUMNS = {"count": "predicted", "true": "target"}
COUNTS = ("target", "predicted", "low", "high")


def asked(batch: Any, i: int) -> tuple[list[str], Tensor | None]:
    """The names asked about one picture of a batch, and the example boxes."""
    query = batch["queries"][i]
    return list(query.names), query.exemplars


def read_counts(path: Path) -> dict[str, dict[str, float]]:
    """A table of counts by picture and name."""
    table: dict[str, dict[str, float]] = {}
    for row in _rows(path):
        named = {COLUMNS.get(key, key): value for key, value in row.items()}
        key = f"{named['image']}|{named['name']}"
        assert key not in table, f"{key} twice in {path.name}"
        table[key] = {column: float(named[column]) for column in COUNTS if named.get(column)}
    return table


def read_places(path: Path, columns: tuple[str, ...]) -> dict[str, list[list[float]]]:
    """A table of points or boxes by picture and name, in the order of the file."""
    table: dict[str, list[list[float]]] = {}
    for row in _rows(path):
        values = [float(row[column]) for column in columns if row[column]]
        table.setdefault(f"{row['image']}|{row['name']}", []).append(values)
    return table


def read_benchmark(folder: Path) -> dict[str, Any]:
    """The scores of a benchmark, without recipes, hashes and sentences."""
    content = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {"skipped": content["skipped"], "bootstrap": content["bootstrap"]}
    for data in content["data"]:
        models = {
            model["model"]: {key: model[key] for key in ("figures", "largest_errors", "failed", "all_names_together")}
            | {key: model["facts"][key] for key in ("class", "parameters", "class_blind", "text_guided")}
            for model in data["models"]
        }
        facts = {key: data["facts"][key] for key in ("class", "names", "objects", "pictures", "split")}
        found[data["name"]] = {"models": models, "comparisons": data["comparisons"], "facts": facts}
    table = {}
    for row in _rows(folder / "benchmark.csv"):
        key = "|".join(row.pop(column) for column in ("data", "name", "kind", "rows_of"))
        table[key] = {column: float(value) for column, value in row.items() if value}
    counts = {path.stem: read_counts(path) for path in sorted((folder / "counts").glob("*.csv"))}
    return {"json": found, "csv": table, "counts": counts}


def read_audit(folder: Path) -> dict[str, Any]:
    """The figures of an audit, without hashes and sentences."""
    content = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    content["verdict"].pop("sentence")
    protocol = content.pop("protocol")
    content["asked"] = {key: protocol[key] for key in ("tests", "empty", "nonsense", "paraphrases", "pictures")}
    mosaics = [{key: _number(value) for key, value in row.items()} for row in _rows(folder / "audit_mosaics.csv")]
    return {"json": content, "counts": read_counts(folder / "audit_counts.csv"), "mosaics": mosaics}


def pretraining(**options: Any) -> Any:
    """A new RegionCLIPPretraining; called only to write checkpoints."""
    small = {"concepts": "classes", "distractors": ["forks"], "templates": ["{}"], "n_regions": 6}
    return counting_zoo.RegionCLIPPretraining(tiny.clip_config(), **{**small, **options})


# -- data -------------------------------------------------------------------------------------------------------------


@cache
def words(name: str, root: Path) -> tuple[str, ...]:
    """Words of the command line that read a small copy of a data set, which is written once, without augmentation."""
    copy = root / name
    options = tiny.write_data(name, copy)
    return tuple(tiny.data(name, {**options, "augmentation": None}))


def module(name: str, root: Path, **options: Any) -> Any:
    """A data module on a small copy."""
    made = tiny.build("data", *words(name, root), *tiny.words("data", options))
    made.prepare_data()
    return made


@cache
def folder(root: Path) -> Path:
    """A folder of 24 small pictures with points of two names."""
    place = root / "pictures"
    labels = ("red discs", "green stars")
    rows = {
        f"{i:02d}.png": [(3 + 5 * x + i % 3, 4 + (7 * x + i) % 40, labels[x % 2]) for x in range(1 + (5 * i) % 11)]
        for i in range(24)
    }
    fakes.folder(place, rows, header="image,x,y,label")
    return place


def folder_module(root: Path) -> Any:
    """The folder's data module: 6 training, 12 validation and 6 test pictures."""
    splits = {"train": [0, 6], "val": [6, 18], "test": [18, 24]}
    return counting_zoo.ImageFolder(folder(root), splits=splits, batch_size=2, num_workers=0)


def made_image(height: int, width: int) -> np.ndarray:
    """``(H, W, 3)`` uint8: smooth waves with bright discs, made of whole numbers alone."""
    y, x, channel = np.ogrid[:height, :width, :3]
    waves = (x * x // 9 + 3 * y * (channel + 1) + 40 * channel) % 97
    discs = (x % 23 - 11) ** 2 + (y % 19 - 9) ** 2 < 20
    return np.where(discs & (channel != 1), 230, waves).astype(np.uint8)


# -- what is frozen ---------------------------------------------------------------------------------------------------


def digest(values: Tensor | np.ndarray | None) -> list[Any] | None:
    """Shape, sum, a sum that depends on the order, and a checksum of every bit."""
    if values is None:
        return None
    array = np.ascontiguousarray(values.numpy() if isinstance(values, Tensor) else values)
    if array.dtype.kind == "f":
        array = array.astype("<f4")
    elif array.dtype != np.uint8:
        array = array.astype("<i8")
    flat = array.ravel().astype(np.float64)
    weighted = flat * (1 + np.arange(len(flat)) % 97)
    return [list(array.shape), math.fsum(flat), math.fsum(weighted), f"crc:{zlib.crc32(array.tobytes()):08x}"]


def samples(loader: Any, batches: int | None = None) -> dict[str, Any]:
    """Everything in the batches of a loader, by picture."""
    found: dict[str, Any] = {}
    for number, batch in enumerate(loader):
        if number == batches:
            break
        for i, image_id in enumerate(batch["image_id"]):
            names, exemplars = asked(batch, i)
            one: dict[str, Any] = {"names": names, "image": digest(batch["image"][i])}
            if "counts" in batch:
                one["counts"] = batch["counts"][i].tolist()
            for key in ("points", "labels", "boxes", "box_labels"):
                if key in batch:
                    one[key] = digest(batch[key][i])
            if exemplars is not None:
                one["exemplars"] = exemplars.tolist()
            for key in ("captions", "present", "original_size"):
                if key in batch:
                    one[key] = list(batch[key][i])
            # A mosaic and other crops of one image may come under one name.
            found[f"{image_id}#{sum(key.partition('#')[0] == image_id for key in found)}"] = one
    return found


def data(name: str, root: Path) -> dict[str, Any]:
    """Every sample that evaluation sees of a small copy, and facts that models take from its training split."""
    made = module(name, root)
    found: dict[str, Any] = {"provides": sorted(made.provides)}
    for split in ("train", "val", "test", "predict"):
        found[f"{split}_names"] = list(made.class_names(split))
    if "points" in found["provides"]:
        found["train_points"] = [digest(points) for points in made.train_points()]
    found["constants"] = made.constant_predictors()
    for split in ("val", "test", "predict"):
        made.setup({"val": "validate"}.get(split, split))
        found[split] = samples(getattr(made, f"{split}_dataloader")())
    return found


#: Augmentations, by the data they are applied to.
AUGMENTED: dict[str, tuple[str, dict[str, Any]]] = {
    "crop_flip": ("scenes_easy", {"augmentation": tiny.CROP}),
    "scenes": (
        "scenes_easy",
        {
            "augmentation": {
                "class_path": "PlainAugmentation",
                "init_args": {"flip": True, "rot90": True, "brightness": 0.15, "offset": 8},
            }
        },
    ),
    "several_names": ("scenes_easy", {"augmentation": tiny.CROP, "prompts": 3}),
    "low": (
        "scenes_low",
        {
            "augmentation": {
                "class_path": "PlainAugmentation",
                "init_args": {"flip": True, "vflip": True, "rot90": True},
            }
        },
    ),
    "scale": (
        "carpk",
        {
            "augmentation": {
                "class_path": "PlainAugmentation",
                "init_args": {"crop": 32, "flip": True, "scale": [0.75, 1.25], "brightness": 0.2},
            }
        },
    ),
    "mosaic": ("fsc147", {"augmentation": tiny.MOSAIC}),
    "crowd": ("shanghaitech_a", {"augmentation": {"class_path": "CrowdAugmentation", "init_args": {"crop": 32}}}),
    "captions": ("captions", {"augmentation": tiny.CROP}),
}


def augmented(root: Path) -> dict[str, Any]:
    """The first training batch of each augmentation."""
    found = {}
    for name, (source, options) in AUGMENTED.items():
        made = module(source, root, **options)
        made.setup("fit")
        found[name] = samples(made.train_dataloader(), batches=1)
    return found


def initialised() -> dict[str, Any]:
    """Weights of every shipped model, shrunk, under one seed; neither their names nor their order enter."""
    found = {}
    for path in tiny.MODELS:
        options = {"classes": NAMES["scenes_low"]} if path.stem.startswith("lower_count") else {}
        with _seeded():
            made = tiny.build("model", *tiny.model(path.stem, **options))
        parts = sorted(zlib.crc32(p.detach().contiguous().numpy().tobytes()) for p in made.parameters())
        total = math.fsum(float(p.detach().double().square().sum()) for p in made.parameters())
        found[path.stem] = [
            sum(p.numel() for p in made.parameters()),
            total,
            f"crc:{zlib.crc32(repr(parts).encode()):08x}",
        ]
    return found


class _Steps(L.Callback):
    """Loss terms and gradient norm of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._norm = math.nan

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        squares = (float(p.grad.double().square().sum()) for p in pl_module.parameters() if p.grad is not None)
        self._norm = math.sqrt(math.fsum(squares))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        terms = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("train/")}
        self.steps.append({"gradient": self._norm, **terms})


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        **options,
    )


def training(model: Any, datamodule: Any, *, ckpt_path: Path | None = None, epochs: int = 1) -> dict[str, Any]:
    """Two steps, and validation with the weights they lead to."""
    steps = _Steps()
    with _seeded():
        runner = trainer(steps, max_epochs=epochs)
        runner.fit(model, datamodule, ckpt_path=ckpt_path)
    scores = {key: float(value) for key, value in runner.callback_metrics.items() if key.startswith("val/")}
    return {"steps": steps.steps, "val": scores}


def counted(prediction: Any) -> dict[str, Any]:
    """A prediction: counts, density, and the first points."""
    found: dict[str, Any] = {"names": list(prediction.names), "counts": prediction.counts.tolist()}
    found["density"] = digest(prediction.density)
    found["samples"] = [
        float(value) for value in prediction.density.flatten()[:: max(1, prediction.density.numel() // 7)]
    ]
    found["points"] = [points[:4].tolist() for points in prediction.points]
    if prediction.boxes is not None:
        found["boxes"] = [boxes[:4].tolist() for boxes in prediction.boxes]
        found["scores"] = [scores[:4].tolist() for scores in prediction.scores]
    if prediction.interval is not None:
        found["interval"] = prediction.interval.tolist()
    return found


#: Options that a checkpoint is also loaded with.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "CLIPCount": {"official_tiles": {"window": 32, "stride": 16, "blend": "official", "pad": "official"}},
    "LowerCount": {
        "ungated": {"gated": False},
        "rounded": {"gated": False, "round_counts": True, "clamp_counts": True},
    },
    "RegionCLIPCounter": {
        "softmax": {"score": "softmax", "negatives": ["green rings"], "threshold": 0.1},
        "soft": {"suppression": "soft"},
        "best": {"assign": "best"},
    },
}


def counts(checkpoint: Path, names: list[str]) -> dict[str, Any]:
    """What ``count`` says of small pictures, whole and in tiles; a detector cuts its tiles itself."""
    model = counting_zoo.load(checkpoint)
    found = {
        "whole": counted(model.count(made_image(96, 128), names)),
        "one_name": counted(model.count(made_image(75, 61), names[0])),
        "no_tiles": counted(model.count(made_image(128, 128), names, window=0)),
    }
    if isinstance(model, counting_zoo.RegionCLIPCounter):
        variants = {**VARIANTS["RegionCLIPCounter"], "tiles": {"tile_depth": 2}}
    else:
        found["tiles"] = counted(model.count(made_image(192, 256), names, window=64, stride=32))
        found["apart"] = counted(model.count(made_image(150, 200), names, window=64))
        variants = VARIANTS.get(type(model).__name__, {})
    for variant, options in variants.items():
        other = counting_zoo.load(checkpoint, **options)
        sides = (192, 256) if variant.endswith("tiles") else (96, 128)
        found[variant] = counted(other.count(made_image(*sides), names))
    return found


def predicted(checkpoint: Path, source: tuple[str, ...], place: Path) -> dict[str, Any]:
    """The tables of the command ``predict``."""
    out = place / "predictions"
    shutil.rmtree(out, ignore_errors=True)
    flags = [
        "--predictions.images=false",
        "--predictions.densities=false",
        f"--predictions.dir={out}",
        "--ckpt_path",
        str(checkpoint),
    ]
    run("predict", *tiny.trainer(callbacks=[]), *source, *flags)
    found: dict[str, Any] = {
        "counts": read_counts(out / "counts.csv"),
        "points": read_places(out / "points.csv", ("x", "y")),
    }
    if (out / "boxes.csv").exists():
        found["boxes"] = read_places(out / "boxes.csv", ("x1", "y1", "x2", "y2", "score"))
    return found


def tested(checkpoint: Path, source: tuple[str, ...], place: Path) -> dict[str, Any]:
    """The counts that the command ``test`` writes."""
    logger = [{"class_path": "CSVLogger", "init_args": {"save_dir": str(place), "name": "", "version": "tested"}}]
    run("test", *tiny.trainer(callbacks=[], logger=logger), *source, "--ckpt_path", checkpoint, "--report.images=0")
    return read_counts(place / "tested" / "test_counts.csv")


def counter(name: str, root: Path) -> dict[str, Any]:
    """A counter of the zoo: counts, scores, tables and training, all from its checkpoint."""
    source = MODELS[name][2]
    checkpoint = unpacked(name, root)
    scores = trainer().test(counting_zoo.load(checkpoint), module(source, root), verbose=False)[0]
    found: dict[str, Any] = {"class": type(counting_zoo.load(checkpoint)).__name__}
    found["count"] = counts(checkpoint, NAMES[source])
    found["test"] = {key: float(value) for key, value in scores.items()}
    found["test_counts"] = tested(checkpoint, words(source, root), root / name)
    found["predict"] = predicted(checkpoint, words(source, root), root / name)
    extra = {"prompts": 3} if name.startswith("region_clip") else {}
    # The first epoch of some is a stage of its own.
    epochs = 2 if name in ("clip_count_film", "clip_count_published", "lower_count_small") else 1
    found["fit"] = training(counting_zoo.load(checkpoint), module(source, root, **extra), epochs=epochs)
    return found


def pretrained(name: str, root: Path) -> dict[str, Any]:
    """Steps and validation of a pretraining."""
    model = counting_zoo.load(unpacked(name, root))
    return {"class": type(model).__name__, "fit": training(model, module("scenes_easy", root, prompts=3))}


def resumed(root: Path) -> dict[str, Any]:
    """A run taken up again from Lightning's own checkpoint, and what its model counts."""
    checkpoint = unpacked(TRAINED, root)
    found = {"count": counts(checkpoint, NAMES["scenes_easy"])}
    datamodule = module("scenes_easy", root)
    return found | {"fit": training(counting_zoo.load(checkpoint), datamodule, ckpt_path=checkpoint, epochs=2)}


def benchmarked(root: Path) -> dict[str, Any]:
    """Three models on two data sets."""
    named = {name: unpacked(name, root) for name in ("clip_count_film", "clip_count_similarity", "ebc_bins")}
    sets = {"easy": module("scenes_easy", root), "pictures": folder_module(root)}
    out = root / "benchmark"
    shutil.rmtree(out, ignore_errors=True)
    counting_zoo.benchmark(named, sets, out, accelerator="cpu", costs=False, images=0, resamples=200)
    return read_benchmark(out)


def audited(root: Path) -> dict[str, Any]:
    """The command ``audit``."""
    found = {}
    for name in ("clip_count_film", "clip_count_similarity"):
        out = root / "audit" / name
        shutil.rmtree(out, ignore_errors=True)
        flags = ["--ckpt_path", unpacked(name, root), "--out", out, "--examples=0", "--mosaics=2"]
        run("audit", *words("scenes_easy", root), *flags)
        found[name] = read_audit(out)
    return found


def calibrated(root: Path) -> dict[str, Any]:
    """Intervals of counts."""
    found: dict[str, Any] = {}
    for name, width in (
        ("clip_count_film", "residual"),
        ("ebc_bins", "residual"),
        ("ebc_bins", "bins"),
        ("ebc_zip", "bins"),
    ):
        model, place = counting_zoo.load(unpacked(name, root)), root / "calibrated" / f"{name}_{width}"
        datamodule = folder_module(root)
        counting_zoo.calibrate(model, datamodule, split="val", level=0.6, width=width)
        checkpoint = counting_zoo.save(model, place / "model.ckpt")
        one: dict[str, Any] = {
            f"{h}x{w}": counted(model.count(made_image(h, w), "red discs")) for h, w in ((48, 64), (96, 70))
        }
        scores = trainer().test(counting_zoo.load(checkpoint), datamodule, verbose=False)[0]
        one["test"] = {key: float(value) for key, value in scores.items()}
        one["predict"] = predicted(checkpoint, words("scenes_easy", root), place)["counts"]
        found[f"{name}_{width}"] = one
    return found


def exported(root: Path) -> dict[str, Any]:
    """Densities of graphs that run without the package."""
    found = {}
    for name in ("clip_count_film", "ebc_bins"):
        model = counting_zoo.load(unpacked(name, root))
        path = counting_zoo.export(model, root / f"{name}.pt2", NAMES[MODELS[name][2]])
        image = torch.from_numpy(made_image(64, 96)).permute(2, 0, 1)[None].float() / 255
        density = torch.export.load(path).module()(image).detach()
        found[name] = {"density": digest(density), "samples": [float(value) for value in density.flatten()[::5][:8]]}
    return found


SECTIONS: dict[str, Callable[[Path], Any]] = {
    **{name: lambda root, name=name: counter(name, root) for name in MODELS},  # type: ignore[misc]
    **{name: lambda root, name=name: pretrained(name, root) for name in PRETRAINING},  # type: ignore[misc]
    TRAINED: resumed,
    "data": lambda root: {path.stem: data(path.stem, root) for path in tiny.DATA},
    "scenes": lambda root: {preset: scenes(preset, root) for preset in ("easy", "low", "full", "common")},
    "augmented": augmented,
    "initialised": lambda root: initialised(),
    "benchmark": benchmarked,
    "audit": audited,
    "calibrated": calibrated,
    "exported": exported,
}


def scenes(preset: str, root: Path) -> dict[str, Any]:
    """Scenes of another seed than the configurations', split by pictures where the preset can be."""
    split_by = "class" if preset == "common" else "image"
    made = counting_zoo.SyntheticScenes(
        root / f"{preset}_{split_by}",
        preset=preset,
        split_by=split_by,
        sizes={"train": 1, "val": 2, "test": 1},
        scene_seed=3,
        num_workers=0,
    )
    made.prepare_data()
    made.setup("fit")
    made.setup("test")
    names = {split: made.class_names(split) for split in ("train", "val", "test")}
    loaders = {"train": made.train_dataloader(), "val": made.val_dataloader(), "test": made.test_dataloader()}
    return {"names": names, **{split: samples(loader) for split, loader in loaders.items()}}


def calculate(section: str, root: Path) -> Any:
    """A section as plain data."""
    root.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with contextlib.chdir(root), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return json.loads(json.dumps(SECTIONS[section](root)))


# -- files ------------------------------------------------------------------------------------------------------------


def machine() -> str:
    """What must be the same for the last bit to be: the processor, and the libraries that calculate."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else platform.processor()
    lines = sorted(set(re.findall(r"(?m)^(?:flags|model name|Features|CPU part)\s*:.*$", flags))) or [flags]
    text = json.dumps([platform.machine(), lines, torch.__version__, np.__version__])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stored(section: str) -> Any:
    """A section as it was written."""
    return json.loads((FROZEN / f"{section}.json").read_text(encoding="utf-8"))


def write(section: str, content: Any) -> None:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    (FROZEN / f"{section}.json").write_text(text + "\n", encoding="utf-8")


def unpacked(name: str, root: Path) -> Path:
    """A stored checkpoint as a file that can be loaded."""
    path = root / "checkpoints" / f"{name}.ckpt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.decompress((FROZEN / f"{name}.ckpt.gz").read_bytes()))
    return path


def pack(path: Path, name: str) -> None:
    (FROZEN / f"{name}.ckpt.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))


def write_checkpoints(root: Path) -> None:
    """Train small models and store them; large weights repeat a few, so that the files are small, and do not train."""
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(root), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (config, options, source) in MODELS.items():
            with _seeded():
                model = tiny.build("model", *tiny.model(config, **options))
            extra = {"prompts": 3} if name.startswith("region_clip") else {}
            _train_and_pack(model, module(source, root, **extra), name, root)
        for name, options in PRETRAINING.items():
            with _seeded():
                model = pretraining(**options)
            _train_and_pack(model, module("scenes_easy", root, prompts=3), name, root)
        with _seeded():
            model = tiny.build("model", *tiny.model("ebc_small", width=2))
            last = ModelCheckpoint(root / "trained", filename="last")
            trainer(last, max_epochs=1).fit(model, module("scenes_easy", root))
        pack(root / "trained" / "last.ckpt", TRAINED)


def _train_and_pack(model: Any, datamodule: Any, name: str, root: Path) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() > 2048:
                block = p.flatten()[:509].bfloat16().float()
                p.copy_(block.repeat(-(-p.numel() // 509))[: p.numel()].view_as(p))
                p.requires_grad_(False)
    with _seeded():
        trainer(max_epochs=30, limit_val_batches=0).fit(model, datamodule)
        trainer(max_epochs=1).validate(model, datamodule, verbose=False)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
    checkpoint = counting_zoo.save(model, root / f"{name}.ckpt")
    if name in THRESHOLDS:
        counting_zoo.save(counting_zoo.load(checkpoint, threshold=THRESHOLDS[name], calibrate=False), checkpoint)
    pack(checkpoint, name)


def run(*arguments: Any) -> None:
    """A command of the command line, whose errors are raised."""
    before = os.environ.get("COUNTING_ZOO_DEBUG")
    os.environ["COUNTING_ZOO_DEBUG"] = "1"
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        _restore("COUNTING_ZOO_DEBUG", before)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Lightning's seed for what follows; other tests do not see it."""
    before = os.environ.get("PL_GLOBAL_SEED")
    L.seed_everything(7, verbose=False)
    try:
        yield
    finally:
        _restore("PL_GLOBAL_SEED", before)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
