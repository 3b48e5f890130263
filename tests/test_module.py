"""The training base: refusals, losses that are not finite, resuming, and scores of a real run."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from asking import ask
from tiny_clip import NAMES, config, counter, training_batch
from torch import Tensor
from torch.utils.data import DataLoader

from counting_zoo import CLIPCount, load, save
from counting_zoo.errors import CheckpointError, InputError, SupervisionError
from counting_zoo.module import wrong_prompts
from counting_zoo.schedules import WarmupHoldDecay
from counting_zoo.types import Batch


class Batches(L.LightningDataModule):
    """Ready-made batches; training pictures as one tensor, others as lists."""

    def __init__(self, *, provides: tuple[str, ...] = ("points", "labels"), empty: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.provides = frozenset(provides)
        self.batches = [training_batch([[NAMES[i]], [NAMES[i + 1]]], seed=i, empty=empty) for i in range(3)]
        for i, batch in enumerate(self.batches):
            batch["image_id"] = [f"{i}{name}" for name in batch["image_id"]]

    def class_names(self, split: str) -> list[str]:
        return NAMES

    def constant_predictors(self, **_: Any) -> dict[str, float]:
        return {"mean": 3.0}

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        lists: list[Any] = [{**batch, "image": list(batch["image"])} for batch in self.batches]
        return DataLoader(lists, batch_size=None)

    test_dataloader = predict_dataloader = val_dataloader


def trainer(root: Path, **options: Any) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": root,
    }
    return L.Trainer(**{**quiet, **options})


class Faulty(CLIPCount):
    """Its loss is NaN in one step of the run."""

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().training_losses(batch)
        return {"density": terms["density"] * (float("nan") if self.global_step == 1 else 1.0)}


def faulty(kind: type[CLIPCount] = Faulty, **options: Any) -> CLIPCount:
    torch.manual_seed(0)
    small = {"window": 32, "prompt_width": 2, "prompt_depth": 2, "heads": 4, "contrast": "none"}
    return kind(config(), **kind.nested({**small, **options}))


def test_fit_test_and_predict(tmp_path: Path) -> None:
    model, data, run = counter(tokens=False), Batches(), trainer(tmp_path)
    run.fit(model, data)
    assert {"train/loss", "val/mae", "val/absent_ratio"} <= set(run.callback_metrics)
    (scores,) = run.test(model, data, verbose=False)
    assert scores["test/train_mean_mae"] == 0.0  # every image holds three objects
    assert all(torch.isfinite(torch.tensor(value)) for value in scores.values())
    predictions = [p for batch in run.predict(model, data) or [] for p in batch]
    assert len(predictions) == 6
    error = torch.stack([abs(p.counts[0] - 3) for p in predictions]).mean()
    assert scores["test/mae"] == pytest.approx(float(error), rel=1e-5)


def test_a_loaded_model_trains_in_training_mode(tmp_path: Path) -> None:
    model = load(save(counter(), tmp_path / "a.ckpt"))
    assert not model.training
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*in eval mode at the start of training.*")
        trainer(tmp_path, max_epochs=1).fit(model, Batches())


def test_saved_without_a_trainer_tests_with_one(tmp_path: Path) -> None:
    model, data, run = counter(), Batches(), trainer(tmp_path)
    (direct,) = run.test(model, data, verbose=False)
    path = save(model, tmp_path / "a.ckpt")
    (loaded,) = run.test(counter(seed=1), data, ckpt_path=str(path), verbose=False)
    assert loaded == direct
    run.save_checkpoint(tmp_path / "b.ckpt")
    (again,) = run.test(load(tmp_path / "b.ckpt"), data, verbose=False)
    assert again == direct


def test_images_without_objects_train_and_score(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(counter(), Batches(empty=(0, 1)))
    assert all(torch.isfinite(v) for k, v in run.callback_metrics.items() if k in ("train/loss", "val/mae", "val/rmse"))


def test_data_without_points_are_refused_before_the_first_step(tmp_path: Path) -> None:
    message = "Batches"
    with pytest.raises(SupervisionError, match=message):
        trainer(tmp_path).fit(counter(), Batches(provides=("counts",)))
    trainer(tmp_path).test(counter(), Batches(provides=("counts",)), verbose=False)  # testing needs only counts


def test_lowered_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bf16-true"):
        trainer(tmp_path, precision="bf16-true").test(counter(), Batches(), verbose=False)


def test_a_schedule_that_watches_validation(tmp_path: Path) -> None:
    model = counter(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, Batches())
    assert run.lr_scheduler_configs[0].monitor == "val/mae"


def test_a_loss_that_is_not_finite_stops_and_names_the_images(tmp_path: Path) -> None:
    model = faulty()
    with pytest.raises(FloatingPointError, match=r"10\.png"):
        trainer(tmp_path).fit(model, Batches())
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_loss_that_is_not_finite_is_left_out_and_counted(tmp_path: Path) -> None:
    model = faulty(non_finite="skip")
    run = trainer(tmp_path)
    run.fit(model, Batches())
    assert model.skipped_steps == 1
    assert run.global_step == 6
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Normalised(CLIPCount):
    """A batch norm sees the images, which are NaN in one step of the run."""

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        images = self.norm(batch["image"] * (float("nan") if self.global_step == 1 else 1.0))
        return {"density": super().training_losses(batch)["density"] + 0 * images.sum()}


def test_a_step_that_is_left_out_leaves_no_trace(tmp_path: Path) -> None:
    """NaN stayed in the statistics of batch norms, and with it in every score that followed."""
    model = faulty(Normalised, non_finite="skip")
    model.norm = torch.nn.BatchNorm2d(3)
    run = trainer(tmp_path)
    run.fit(model, Batches())
    assert model.skipped_steps == 1
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert model.norm.num_batches_tracked == run.global_step - 1


def test_too_many_steps_left_out_in_a_row(tmp_path: Path) -> None:
    model = faulty(non_finite="skip", max_skipped_steps=0)
    with pytest.raises(FloatingPointError, match="in a row"):
        trainer(tmp_path).fit(model, Batches())


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    path = save(faulty(), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="Faulty"):
        trainer(tmp_path).test(counter(), Batches(), ckpt_path=str(path), verbose=False)
    torch.save({"state_dict": {}, "pytorch-lightning_version": L.__version__}, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="counting_zoo"):
        trainer(tmp_path).test(counter(), Batches(), ckpt_path=str(tmp_path / "b.ckpt"), verbose=False)


def test_batches_without_counts_cannot_be_scored(tmp_path: Path) -> None:
    data = Batches()
    for batch in data.batches:
        del batch["counts"]
    with pytest.raises(InputError, match="counts"):
        trainer(tmp_path).test(counter(), data, verbose=False)


def test_predicting_without_any_name(tmp_path: Path) -> None:
    data = Batches()
    for batch in data.batches:
        batch["queries"] = ask([[], []])
    with pytest.raises(InputError, match=r"data\.classes"):
        trainer(tmp_path).predict(counter(), data)
    found = trainer(tmp_path).predict(counter(default_classes=["forks"]), data) or []
    assert {tuple(p.names) for batch in found for p in batch} == {("forks",)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 64}, "stride"),
        ({"non_finite": "ignore"}, "non_finite"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        counter(**options)


# -- optimizers -------------------------------------------------------------------------------------------------------


def test_published_optimizer_and_weight_decay() -> None:
    found = counter().configure_optimizers()
    matrices, rest = found["optimizer"].param_groups
    assert found["optimizer"].defaults["betas"] == (0.9, 0.95)
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    model = counter()
    assert (
        {id(model.network.text.context), id(model.network.vision.prompts.embeddings)}
        <= {  # type: ignore[union-attr]
            id(p) for group in model.configure_optimizers()["optimizer"].param_groups[1:] for p in group["params"]
        }
    )
    everything = counter(decay="all").configure_optimizers()["optimizer"].param_groups
    assert len(everything) == 1
    assert len(everything[0]["params"]) == sum(p.requires_grad for p in model.parameters())


def test_given_optimizer_leaves_no_trace_of_the_default(tmp_path: Path) -> None:
    model = counter(
        optimizer=partial(torch.optim.SGD, lr=0.5), scheduler=partial(WarmupHoldDecay, warmup=2, hold=0.5, final=0.1)
    )
    assert not {"optimizer", "scheduler"} & set(model.hparams)
    run = trainer(tmp_path, max_epochs=4)
    run.fit(model, Batches())
    assert isinstance(run.optimizers[0], torch.optim.SGD)
    assert run.lr_scheduler_configs[0].interval == "step"
    assert run.lr_scheduler_configs[0].scheduler.total_steps == 12  # type: ignore[attr-defined]


def test_a_run_without_a_length_never_decays(tmp_path: Path) -> None:
    model = counter(scheduler=partial(WarmupHoldDecay, warmup=2))
    run = trainer(tmp_path, max_epochs=-1, max_time={"seconds": 1})
    run.fit(model, Batches())
    assert run.lr_scheduler_configs[0].scheduler.total_steps is None  # type: ignore[attr-defined]


def test_warmup_hold_decay() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupHoldDecay(optimizer, total_steps=100, warmup=10, hold=0.6, final=0.02)
    assert [schedule.factor(step) for step in (0, 4, 9, 10, 60)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert [schedule.factor(step) for step in (80, 99, 100, 500)] == pytest.approx([0.5, 0.025, 0.02, 0.02])
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(12):
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step()
    assert rates == pytest.approx([0.2 * min(10, i + 1) for i in range(12)])


# -- wrong prompts ----------------------------------------------------------------------------------------------------


def test_wrong_prompts_are_absent_hard_and_anothers() -> None:
    names = ["red cups", "blue cups", "red forks", "spoons"]
    batch: Batch = {
        "image": [],
        "queries": ask([["red cups"]]),
        "image_id": ["7.jpg"],
        "present": [["red cups", "red forks"]],
    }
    (found,) = wrong_prompts(batch, names) or []
    absent, hard, other = found
    assert absent in ("blue cups", "spoons")
    assert hard == "blue cups"  # shares a word, and is not there
    assert other in names[1:]
    assert wrong_prompts(batch, names) == [found]
    assert wrong_prompts(batch, ["red cups"]) is None


def test_a_image_without_wrong_names_does_not_silence_the_others() -> None:
    """Its own name stands in, so that what is asked of one picture does not depend on its batch."""
    names = ["red cups", "blue cups", "red forks", "spoons"]
    batch: Batch = {
        "image": [],
        "queries": ask([["red cups"], ["spoons"]]),
        "image_id": ["7.jpg", "8.jpg"],
        "present": [names, ["spoons"]],
    }
    crowded, plain = wrong_prompts(batch, names) or []
    assert crowded[:2] == ["red cups", "red cups"]
    assert crowded[2] in names[1:]
    assert plain[0] in names[:3]
    assert plain[1] == "spoons"  # no other name shares a word with it
