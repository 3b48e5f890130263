"""A run that is stopped and taken up again is the same run, whatever the number of loader processes (R6)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import data, model, run, trainer
from torch import Tensor

RATES = {"class_path": "LearningRateMonitor", "init_args": {"logging_interval": "step"}}
EMA = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
# All randomness there is: order, mosaic, jitter, prompts, dropout of visual prompts, density mask.
MODEL = model("clip_count", density_mask="pixel", contrast_epochs=1)


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTING_ZOO_DEBUG", "1")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """FSC-147 in small, with the augmentation of CLIP-Count."""
    return tiny.write_data("fsc147", tmp_path_factory.mktemp("data"))


def fit(
    options: dict[str, Any], name: str, epochs: int, *words: str, workers: int = 0, callbacks: Any = (), **more: Any
) -> dict[str, Any]:
    """Train with the command line into ``runs/<name>``; the last checkpoint."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "", "version": name}}
    last = {"class_path": "ModelCheckpoint", "init_args": tiny.LAST}
    settings = trainer(max_epochs=epochs, logger=[logger], callbacks=[last, *callbacks], **more)
    run("fit", *settings, *MODEL, *data("fsc147", options | {"num_workers": workers}), *words)
    return torch.load(place(name), weights_only=True)


def place(name: str) -> Path:
    return Path("runs", name, "checkpoints", "last.ckpt")


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit, through all levels."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "counting_zoo"):
        assert_same(a[key], b[key], key)


def test_resumed_equals_uninterrupted(options: dict[str, Any]) -> None:
    """Epoch 0 contrasts, epochs 1 and 2 count; stopped after the first of each stage."""
    whole = fit(options, "whole", 3)
    first = fit(options, "first", 1)
    second = fit(options, "second", 2, "--ckpt_path", str(place("first")))
    third = fit(options, "third", 3, "--ckpt_path", str(place("second")))
    assert (first["epoch"], second["epoch"], third["epoch"]) == (0, 1, 2)
    assert not torch.equal(*(c["state_dict"]["network.decoder.out.weight"] for c in (second, third)))
    assert_same_run(whole, third)


def test_contrast_is_not_started_again(options: dict[str, Any]) -> None:
    """The contrastive stage trains no decoder, so a resumed run that moved it has gone on to density."""
    first = fit(options, "first", 1)
    second = fit(options, "second", 2, "--ckpt_path", str(place("first")))
    weights = [c["state_dict"]["network.decoder.out.weight"] for c in (first, second)]
    assert not torch.equal(*weights)
    header = Path("runs/second/metrics.csv").read_text().splitlines()[0].split(",")
    assert "train/density" in header
    assert "train/contrast" not in header


def test_workers_change_nothing(options: dict[str, Any]) -> None:
    """R6: the same run twice, and with another number of loader processes, is the same to the bit."""
    runs = [fit(options, f"w{i}", 1, workers=n) for i, n in enumerate((0, 0, 1, 2))]
    for other in runs[1:]:
        assert_same_run(runs[0], other)


def test_another_seed_is_another_run(options: dict[str, Any]) -> None:
    one, two = (fit(options, f"s{seed}", 1, f"--seed_everything={seed}", f"--data.seed={seed}") for seed in (1, 2))
    key = "network.vision.prompts.embeddings"
    assert not torch.equal(one["state_dict"][key], two["state_dict"][key])


def test_a_schedule_goes_on(options: dict[str, Any]) -> None:
    """A schedule over the whole run continues at its step, and knows the run's new length."""
    words = [
        "--model.scheduler=counting_zoo.schedules.WarmupHoldDecay",
        "--model.scheduler.warmup=1",
        "--model.scheduler.hold=0.1",
        "--model.optimizer=torch.optim.AdamW",
        "--model.optimizer.lr=0.01",
    ]
    whole = fit(options, "whole", 2, *words)
    fit(options, "half", 2, *words, limit_train_batches=2, max_steps=2)
    resumed = fit(options, "resumed", 2, *words, "--ckpt_path", str(place("half")))
    (a,), (b,) = whole["lr_schedulers"], resumed["lr_schedulers"]
    assert a["last_epoch"] == b["last_epoch"] == whole["global_step"] == 4
    assert a["_last_lr"] == b["_last_lr"]
    assert a["_last_lr"][0] < 0.01


def rates(name: str) -> list[float]:
    """Learning rates of the steps that a run took itself."""
    with Path("runs", name, "metrics.csv").open(encoding="utf-8") as file:
        return [float(row["lr-AdamW/pg1"]) for row in csv.DictReader(file) if row.get("lr-AdamW/pg1")]


def test_a_longer_run_decays_over_its_own_length(options: dict[str, Any]) -> None:
    """The rate of a run resumed with more epochs stayed at the end of the schedule of the shorter one."""
    words = [
        "--model.scheduler=counting_zoo.schedules.WarmupHoldDecay",
        "--model.scheduler.warmup=1",
        "--model.scheduler.hold=0.1",
        "--model.optimizer=torch.optim.AdamW",
        "--model.optimizer.lr=0.01",
    ]
    more = {"callbacks": [RATES], "log_every_n_steps": 1}
    fit(options, "short", 2, *words, **more)
    fit(options, "longer", 4, *words, "--ckpt_path", str(place("short")), **more)
    fit(options, "whole", 4, *words, **more)
    whole, longer = rates("whole"), rates("longer")
    assert (len(whole), len(longer)) == (8, 4)
    assert longer == whole[4:]
    assert len(set(longer)) == 4, "it still falls"


def test_averaged_weights(options: dict[str, Any]) -> None:
    """Lightning's moving average of weights: it is what the checkpoint counts with, and it resumes."""
    whole = fit(options, "whole", 2, callbacks=[EMA])
    fit(options, "first", 1, callbacks=[EMA])
    resumed = fit(options, "resumed", 2, "--ckpt_path", str(place("first")), callbacks=[EMA])
    plain = fit(options, "plain", 2)
    assert_same(whole["state_dict"], resumed["state_dict"])
    assert whole["state_dict"].keys() == plain["state_dict"].keys()
    key = "network.vision.prompts.embeddings"
    assert not torch.equal(whole["state_dict"][key], plain["state_dict"][key])
    import counting_zoo

    assert torch.equal(counting_zoo.load(place("whole")).state_dict()[key], whole["state_dict"][key])
