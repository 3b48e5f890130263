"""A run that is stopped and taken up again is the same run, whatever the number of loader processes (R6)."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import data, model, run, trainer
from torch import Tensor

from counting_zoo.training import TrainingModule

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
    options: dict[str, Any],
    name: str,
    epochs: int,
    *words: str,
    workers: int = 0,
    callbacks: Any = (),
    code: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """Train with the command line into ``runs/<name>`` until it exits with a code; the last checkpoint."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "", "version": name}}
    last = {"class_path": "ModelCheckpoint", "init_args": tiny.LAST}
    settings = trainer(max_epochs=epochs, logger=[logger], callbacks=[*callbacks, last], **more)
    assert run("fit", *settings, *MODEL, *data("fsc147", options | {"num_workers": workers}), *words) == code
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


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_from_any_step(options: dict[str, Any], workers: int) -> None:
    """Checkpoints written inside an epoch: no image is seen twice, and none is left out."""
    every = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1, "save_top_k": -1}}
    one = options | {"batch_size": 1}
    whole = fit(one, "whole", 2, callbacks=[every, EMA], workers=workers)
    steps = {int(path.stem.partition("step=")[2]): path for path in place("whole").parent.glob("*step=*.ckpt")}
    assert sorted(steps) == list(range(1, whole["global_step"] + 1))
    assert len(steps) >= 6
    for step in sorted(steps)[: -1 if workers == 0 else 2]:
        resumed = fit(one, f"from{step}", 2, "--ckpt_path", str(steps[step]), callbacks=[EMA], workers=workers)
        assert_same_run(whole, resumed)
        assert_same(*(run["callbacks"]["EMAWeightAveraging"] for run in (whole, resumed)))


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


def column(name: str, metric: str) -> list[float]:
    """Logged values of the steps that a run took itself."""
    with Path("runs", name, "metrics.csv").open(encoding="utf-8") as file:
        return [float(row[metric]) for row in csv.DictReader(file) if row.get(metric)]


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
    whole, longer = (column(name, "lr-AdamW/pg1") for name in ("whole", "longer"))
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


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, sent: signal.Signals) -> None:
    """Send this process a signal in the middle of a step of training."""

    def training_step(module: Any, *args: Any) -> Tensor:
        if module.global_step == step:
            monkeypatch.undo()
            os.kill(os.getpid(), sent)
        return original(module, *args)

    original = TrainingModule.training_step
    monkeypatch.setattr(TrainingModule, "training_step", training_step)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_ended_by_the_system_it_goes_on_where_it_stopped(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """SIGTERM, as a scheduler sends it: neither finished (exit code 143) nor thrown back to the last epoch."""
    one = options | {"batch_size": 1}
    whole = fit(one, "whole", 2)
    with monkeypatch.context() as patch:
        signal_at(patch, step, signal.SIGTERM)
        stopped = fit(one, "stopped", 2, code=143)
    assert stopped["global_step"] == step + 1
    assert_same_run(whole, fit(one, "resumed", 2, "--ckpt_path", str(place("stopped"))))
    scores = [column(name, "val/mae") for name in ("whole", "resumed")]
    assert scores[1] == scores[0][-len(scores[1]) :]
    assert len(scores[1]) == (2 if step < 4 else 1)


def test_interrupted_by_hand(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        with monkeypatch.context() as patch:
            signal_at(patch, 3, signal.SIGINT)
            stopped = fit(options, "stopped", 2, code=130)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on
    assert stopped["global_step"] == 2


def test_the_best_of_the_whole_run_stays_the_best(options: dict[str, Any]) -> None:
    """A run taken up again in another folder had the best of its remaining epochs as its best."""
    best = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/mae", "filename": "best"}}
    first = fit(options, "first", 1, callbacks=[best])
    (key,) = (key for key in first["callbacks"] if "val/mae" in key)
    state = first["callbacks"][key]
    state["best_model_score"] = torch.tensor(0.0)  # nothing will be better
    state["best_k_models"] = {path: torch.tensor(0.0) for path in state["best_k_models"]}
    state["kth_value"] = torch.tensor(0.0)
    torch.save(first, place("first"))
    second = fit(options, "second", 2, "--ckpt_path", str(place("first")), callbacks=[best])
    assert place("second").with_name("best.ckpt").read_bytes() == place("first").with_name("best.ckpt").read_bytes()
    assert float(second["callbacks"][key]["best_model_score"]) == 0
    place("first").with_name("best.ckpt").unlink()
    third = fit(options, "third", 2, "--ckpt_path", str(place("first")), callbacks=[best])
    assert float(third["callbacks"][key]["best_model_score"]) > 0, "what is gone is not the best"
