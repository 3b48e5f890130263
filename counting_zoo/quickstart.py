"""``counting-zoo quickstart``: the zoo's main job from an empty folder to a report, through its own commands."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from counting_zoo.errors import InputError

UNSEEN = "the shape-colour pairs that training never showed"
MARKER = ".counting-zoo-quickstart"  # in every folder it wrote, and may therefore replace


def run(arguments: list[str], main: Callable[[list[str]], int]) -> int:
    """Render scenes, train CLIP-Count from the zoo's small CLIP, test it on unseen classes, predict a folder."""
    parser = argparse.ArgumentParser(
        "counting-zoo quickstart",
        description="Train, test and predict on the built-in scenes, in minutes on two cores.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything it writes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="default: 10 with bfloat16 instructions, 7 without")
    parser.add_argument("--sizes", type=json.loads, help='number of scenes, e.g. {"train": 64, "val": 8, "test": 8}')
    options = parser.parse_args(arguments)

    from counting_zoo.data.synthetic import SyntheticScenes
    from counting_zoo.ops import bfloat16_instructions

    out: Path = options.out
    for name in ("train", "test", "photos", "predictions"):
        check_own(out / name)
    fast = bfloat16_instructions()
    epochs = options.epochs if options.epochs is not None else 10 if fast else 7
    if epochs < 1:
        raise InputError(f"--epochs is {epochs}; expected 1 or more")
    data = ["--config", str(config("data/scenes_easy.yaml")), "--data.prompts", "3"]
    data += ["--data.num_workers", "0"]  # on two cores loader processes would only slow down training
    if options.sizes:
        data += ["--data.sizes", json.dumps(options.sizes)]

    def step(title: str, words: list[str]) -> None:
        print(f"\n== {title}\n   counting-zoo {' '.join(words)}", flush=True)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*exists and is not empty")  # the marker is in it, and nothing else
            code = main(words)
        if code:
            raise SystemExit(code)  # the step has said why
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)

    def logger(name: str) -> list[str]:
        folder = {"class_path": "CSVLogger", "init_args": {"save_dir": str(out), "name": name, "version": ""}}
        return ["--trainer.logger", json.dumps([folder])]

    renew(out / "train")
    step(
        "train on 48 kinds of object",
        [
            "fit",
            "--config",
            str(config("trainer/quick.yaml")),
            "--config",
            str(config("model/clip_count_small.yaml")),
            "--model.pretrained_encoder",
            "small",
            "--model.contrast_epochs",
            "0",
            *data,
            *logger("train"),
            "--seed_everything",
            str(options.seed),
            "--data.seed",
            str(options.seed),
            "--trainer.max_epochs",
            str(epochs),
            "--trainer.check_val_every_n_epoch",
            "1" if epochs % 2 else "2",
        ],  # the last epoch is always validated
    )
    best = out / "train" / "checkpoints" / "best.ckpt"
    renew(out / "test")
    step(
        f"test on 12 others: {UNSEEN}",
        [
            "test",
            "--ckpt_path",
            str(best),
            *data,
            *logger("test"),
            "--trainer.accelerator",
            "cpu",
            "--trainer.enable_progress_bar",
            "false",
        ],
    )
    scenes = SyntheticScenes(sizes=options.sizes)
    names = scenes.class_names("test")
    photos = renew(out / "photos")
    for record in scenes.records("test")[:12]:
        assert record.path is not None  # scenes are files
        shutil.copy(record.path, photos / record.path.name)
    renew(out / "predictions")
    step(
        f"predict a folder of 12 images, {len(names)} names in each",
        [
            "predict",
            "--ckpt_path",
            str(best),
            "--data",
            "ImageFolder",
            "--data.root",
            str(photos),
            "--data.classes",
            json.dumps(names),
            "--predictions.dir",
            str(out / "predictions"),
            "--trainer.accelerator",
            "cpu",
            "--trainer.logger",
            "false",
            "--trainer.enable_progress_bar",
            "false",
        ],
    )
    print(f"\nreport: {out / 'test' / 'report.html'}\ncounts: {out / 'predictions' / 'counts.csv'}\nmodel:  {best}")
    return 0


def check_own(folder: Path) -> None:
    """Refuse a folder that holds what no quickstart wrote.

    Raises:
        InputError: names it.
    """
    nothing = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if folder.is_symlink() or not (nothing or (folder / MARKER).is_file()):
        raise InputError(
            f"{str(folder)!r} would be replaced, but it is not from a quickstart (it holds no {MARKER}); "
            "give another --out, or move it away"
        )


def renew(folder: Path) -> Path:
    """Put an empty folder of the quickstart in place of the one that an earlier quickstart wrote."""
    check_own(folder)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return folder


def config(name: str) -> Path:
    """Find a shipped configuration file, in an installed package or in a checkout.

    Raises:
        InputError: it is in neither.
    """
    packaged = Path(str(resources.files("counting_zoo"))) / "configs" / name
    checkout = Path(__file__).resolve().parent.parent / "configs" / name
    for path in (packaged, checkout):
        if path.is_file():
            return path
    raise InputError(f"configs/{name} is neither in the package nor beside it; install counting-zoo again")


def config_or_path(name: str) -> str:
    """Find the shipped configuration of a name, unless a file has that name.

    ``quick``, ``trainer/quick`` and ``configs/trainer/quick.yaml`` are one shipped file. A name that fits none is
    returned as it is, for the parser to tell.
    """
    match = re.fullmatch(r"(?:configs/)?(?:(\w+)/)?(\w+)(?:\.yaml)?", name)
    if match is None or Path(name).is_file():
        return name
    for folder in [match[1]] if match[1] else ("trainer", "model", "data", "pretraining"):
        with contextlib.suppress(InputError):
            return str(config(f"{folder}/{match[2]}.yaml"))
    return name
