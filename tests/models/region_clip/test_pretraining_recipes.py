"""Pretraining from the command line: recipes of configs/pretraining in small, exports, runs taken up again."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import fakes
import pytest
import tiny
import torch
from test_resume import EMA, assert_same_run
from tiny import run, words

from counting_zoo import CLIPCount, RegionCLIPPretraining, load
from counting_zoo.errors import InputError
from counting_zoo.nn.pretrained import load_vision, read_pretrained
from counting_zoo.nn.vision import DenseViT

RECIPES = sorted((tiny.CONFIGS / "pretraining").glob("*.yaml"))
SMALL_TEXTS = {"concept_count": 1, "cache": "concepts", "n_regions": 4, "templates": ["{}", "a photo of {}"]}
#: What shrinks the model of each recipe; a new one without an entry fails, which says so.
SHRUNK: dict[str, dict[str, Any]] = {
    "small_clip": {"clip": tiny.clip_config() | {"attn_implementation": "eager"}, "n_regions": 10},
    "region_clip": SMALL_TEXTS | {"clip": tiny.resnet_config(), "preprocess": {"resize": "short", "size": 40}},
    "region_clip_vit": SMALL_TEXTS | {"clip": tiny.clip_config(), "preprocess": {"resize": "short", "size": 40}},
}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTING_ZOO_DEBUG", "1")


def data_options(name: str, root: Path) -> dict[str, Any]:
    """A small copy of what a recipe reads, and the options that lead to it."""
    options: dict[str, Any] = tiny.SMALL | {"root": str(root)}
    if name == "small_clip":
        return options | {"sizes": {"train": 4, "val": 2, "test": 2}, "processes": 1}
    if name == "region_clip_vit":
        fakes.coco_captions(root)
        return options | {"augmentation": {"class_path": "PlainAugmentation", "init_args": {"crop": 32}}}
    rows = []
    for i in range(6):  # of different shapes, one of them never downloaded
        fakes.write_image(root / f"{i}.jpg", fakes.draw_points(3, 48, 64, i), height=48, width=50 + 7 * i, seed=i)
        rows.append(f"{i} white discs on grey\t{i}.jpg\n")
    (root / "train.tsv").write_text("".join([*rows, "a picture that is gone\tgone.jpg\n"]))
    return options | {"batch_size": 3, "sizes": {"val": 2}}


def trainer_options(version: str = "a", **options: Any) -> dict[str, Any]:
    last = {"class_path": "ModelCheckpoint", "init_args": tiny.LAST}
    return {
        "accelerator": "cpu",
        "devices": 1,
        "precision": "32-true",
        "max_steps": -1,
        "max_epochs": 1,
        "check_val_every_n_epoch": 1,
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [last],
        "logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "", "version": version}}],
    } | options


@pytest.mark.filterwarnings("ignore:.*pictures are not there.*")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path, tmp_path: Path) -> None:
    """Fit, validate alone, export, and a counter's encoder out of the export."""
    assert path.stem in SHRUNK, f"{path.name} is new: say here what shrinks it"
    root = tmp_path / "data"
    root.mkdir()
    common = ["--config", str(path), *words("data", data_options(path.stem, root))]
    model = words("model", SHRUNK[path.stem])
    assert run("fit", *common, *model, *words("trainer", trainer_options())) == 0
    with Path("runs/a/metrics.csv").open(encoding="utf-8", newline="") as file:
        found = {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}
    assert all(math.isfinite(value) for value in found.values())
    assert {"train/region_text", "train/image_text", "train/kept_fraction", "val/agreement"} <= found.keys()
    checkpoint = "runs/a/checkpoints/last.ckpt"
    assert run("validate", *common, *model, *words("trainer", trainer_options("b")), "--ckpt_path", checkpoint) == 0
    assert run("export-encoder", checkpoint, "clip.safetensors") == 0
    stored = load(checkpoint)
    assert isinstance(stored, RegionCLIPPretraining)
    pretrained = read_pretrained("clip.safetensors")
    again = RegionCLIPPretraining(stored.hparams["clip"], stem=stored.settings["stem"], text_pool=stored.text.pool)
    load_vision(again.encoder, pretrained)
    found_state, expected = again.encoder.state_dict(), stored.encoder.state_dict()
    assert all(torch.equal(value, found_state[key]) for key, value in expected.items())


def scenes(root: Path) -> list[str]:
    preset = {"preset": "common", "sizes": {"train": 6, "val": 2, "test": 2}, "processes": 1, "prompts": 3}
    return [
        "--data=SyntheticScenes",
        *words("data", tiny.SMALL | preset | {"root": str(root), "augmentation": tiny.CROP}),
    ]


def fit(root: Path, version: str, epochs: int, model: dict[str, Any], *more: str, callbacks: Any = ()) -> Any:
    """Into ``runs/<version>``; the last checkpoint."""
    last = {"class_path": "ModelCheckpoint", "init_args": tiny.LAST}
    options = trainer_options(version, max_epochs=epochs, callbacks=[last, *callbacks])
    settings = ["--model=RegionCLIPPretraining", *words("model", model), *words("trainer", options)]
    assert run("fit", *settings, *scenes(root), *more) == 0
    return torch.load(Path("runs", version, "checkpoints/last.ckpt"), weights_only=True)


NAMED = {
    "clip": tiny.clip_config(),
    "stem": "conv",
    "labels": "boxes",
    "regions": "boxes",
    "concepts": "classes",
    "distractors": [],
    "train_text": True,
    "text_pool": "words",
    "n_regions": 3,
    "templates": ["{}"],
}
TAUGHT = {
    "clip": tiny.clip_config(),
    "concepts": "captions",
    "concept_count": 1,
    "n_regions": 5,
    "threshold": 0.01,
    "templates": ["{}"],
}


@pytest.mark.parametrize(("model", "averaged"), [(NAMED, True), (TAUGHT, False)], ids=["boxes, averaged", "teacher"])
def test_resumed_equals_uninterrupted(model: dict[str, Any], averaged: bool, tmp_path: Path) -> None:
    """All that is drawn: boxes, captions, names, crops; to the last bit, with a new pool only where there is none."""
    callbacks = [EMA] if averaged else []
    whole = fit(tmp_path / "data", "whole", 2, model, callbacks=callbacks)
    first = fit(tmp_path / "data", "first", 1, model, callbacks=callbacks)
    again = fit(
        tmp_path / "data", "again", 2, model, "--ckpt_path", "runs/first/checkpoints/last.ckpt", callbacks=callbacks
    )
    assert (first["epoch"], again["epoch"]) == (0, 1)
    assert_same_run(whole, again)
    key = next(key for key in whole["state_dict"] if key.startswith("encoder.") and key.endswith("weight"))
    assert not torch.equal(first["state_dict"][key], whole["state_dict"][key])


def test_a_counter_trains_from_an_export(tmp_path: Path) -> None:
    """By ``pretrained_encoder`` on the command line, and tests from its checkpoint without the file."""
    fit(tmp_path / "data", "a", 1, NAMED)
    for command in ("test", "predict"):
        options = [*scenes(tmp_path / "data"), *words("trainer", trainer_options(command, callbacks=[]))]
        with pytest.raises(InputError, match="RegionCLIPPretraining"):
            run(command, *options, "--ckpt_path", "runs/a/checkpoints/last.ckpt")
    run("export-encoder", "runs/a/checkpoints/last.ckpt", "clip.safetensors", "--half")
    start = {
        "pretrained_encoder": "clip.safetensors",
        "stem": "conv",
        "text_pool": "words",
        "contrast_epochs": 0,
        "contrast": "none",
        "n_context": 0,
        "train_vision": True,
    }
    assert (
        run(
            "fit",
            *tiny.model("clip_count_small", **start),
            *words("trainer", trainer_options("b")),
            *scenes(tmp_path / "data"),
        )
        == 0
    )
    Path("clip.safetensors").rename("gone.safetensors")
    checkpoint = ["--ckpt_path", "runs/b/checkpoints/last.ckpt"]
    assert (
        run("test", *scenes(tmp_path / "data"), *words("trainer", trainer_options("c", callbacks=[])), *checkpoint) == 0
    )
    counter = load("runs/b/checkpoints/last.ckpt")
    assert isinstance(counter, CLIPCount)
    assert isinstance(counter.network.vision, DenseViT)
    assert counter.network.text.tokenizer is not None
    stored = load("runs/a/checkpoints/last.ckpt").text.tokenizer
    assert counter.network.text.tokenizer.to_json() == stored.to_json()
