"""Intervals of models: measured, kept in checkpoints, given by ``count``, ``predict``, ``test`` and the command."""

from __future__ import annotations

import csv
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import tiny as tiny_models
import torch
import yaml
from asking import ask
from tiny_zoo import BlockCounter, TinyCounter, TinyImages

import counting_zoo
from counting_zoo import EBC, CountingModule, Prediction, RegionCLIPCounter, load, save
from counting_zoo.callbacks import PredictionWriter, TestReport
from counting_zoo.cli import main
from counting_zoo.errors import CheckpointError, InputError
from counting_zoo.evaluation.calibrate import Calibrated, calibrate, write_calibrated
from counting_zoo.evaluation.counting import count_split
from counting_zoo.lightning_cli import _recipe
from counting_zoo.loading import read_checkpoint
from counting_zoo.metrics.intervals import IntervalCalibration, fit_intervals
from counting_zoo.models.clip_ebc.heads import EBCOutput, ZIPOutput
from counting_zoo.models.region_clip.network import RegionCLIPConfig

BLACK = np.zeros((32, 40, 3), np.uint8)
ONE = IntervalCalibration(0.9, "residual", (5.0,), (-0.1, -0.2), (0.3, 0.4), (100, 100), True)


def tiny(**options: Any) -> TinyCounter:
    torch.manual_seed(0)
    return TinyCounter(**options)


def ebc(**options: Any) -> EBC:
    torch.manual_seed(0)
    made = EBC("small", width=4, representatives="middle", granularity="fine", max_count=3, **options)
    return made.eval()


def one(found: Any) -> Prediction:
    assert isinstance(found, Prediction)
    return found


def bounds(model: CountingModule, image: Any = BLACK, **options: Any) -> torch.Tensor:
    found = one(model.count(image, "dots", **options)).interval
    assert found is not None
    return found


def quiet(folder: Path) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        default_root_dir=folder,
        enable_model_summary=False,
        logger=False,
    )


def test_a_calibrated_model_gives_intervals() -> None:
    model, data = tiny(), TinyImages(n=30)
    model.train()
    assert one(model.count(BLACK, "dots")).interval is None
    done = calibrate(model, data, split="val")
    assert isinstance(done, Calibrated)
    assert model.training, "left as it was"
    assert model.interval_calibration == done.calibration
    table = count_split(model.eval(), data, "val").table
    expected = fit_intervals(table.predicted, table.target)
    assert done.calibration == expected
    assert done.calibration.rows == (30,)
    assert np.array_equal(table.interval, expected.bounds(table.predicted)), "the benchmark's table has them"
    inside = (table.interval[:, 0] <= table.target) & (table.target <= table.interval[:, 1])
    assert inside.mean() >= 0.9
    found = one(model.count(BLACK, ["dots", "=stars"]))
    assert found.interval is not None
    assert found.interval.dtype == torch.float32
    assert np.allclose(found.interval, expected.bounds(found.counts.numpy()))
    assert counting_zoo.calibrate is calibrate


def test_every_row_counts_where_all_names_are_asked_about() -> None:
    done = calibrate(tiny(), TinyImages(n=12, prompts="all"))
    assert len(done.counts) == 24
    text = done.describe()
    assert "24 counts of 12 images" in text
    assert "coverage*" in text
    assert "* of the counts that the intervals were fitted to" in text


def test_the_description_is_right_by_stratum() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.uniform(0, 100, 1000)
    target = np.round(predicted * rng.uniform(0.8, 1.2, 1000))
    made = fit_intervals(predicted, target)
    rows = [
        (str(i), "figs", t, p, *b)
        for i, (t, p, b) in enumerate(zip(target, predicted, made.bounds(predicted).tolist(), strict=True))
    ]
    lines = Calibrated(made, counting_zoo.metrics.counts.CountTable.of(rows)).describe().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2 + len(made.rows) + 2
    assert sum(int(line[16:23]) for line in lines[2:-2]) == 1000
    last = predicted >= made.edges[-1]
    inside = (made.bounds(predicted)[:, 0] <= target) & (target <= made.bounds(predicted)[:, 1])
    assert f"{inside[last].mean():.1%}" in lines[-3]
    assert "from 31.62" in lines[-3]


def test_the_bounds_are_of_what_is_reported() -> None:
    class Rounds(TinyCounter):
        def reported(self, counts: torch.Tensor) -> torch.Tensor:
            return counts.round()

    torch.manual_seed(0)
    model = Rounds()
    model.interval_calibration = ONE
    found = one(model.count(BLACK, "dots"))
    assert found.interval is not None
    assert np.allclose(found.interval, ONE.bounds(found.counts.numpy()))
    assert float(found.counts) == round(float(found.counts))


def test_other_windows_than_those_calibrated_with_have_no_interval() -> None:
    model = BlockCounter(window=16)
    model.interval_calibration = ONE
    assert bounds(model).tolist() == bounds(model, window=16).tolist() == bounds(model, window=16, stride=16).tolist()
    for options in ({"window": 8}, {"window": 0}, {"window": 16, "stride": 8}):
        assert one(model.count(BLACK, "dots", **options)).interval is None  # type: ignore[arg-type]


def test_a_model_without_names_has_intervals_of_totals() -> None:
    model, data = ebc(), TinyImages(n=25, prompts="all")
    done = calibrate(model, data)
    assert set(done.counts.name) == {"=stars + dots"}
    assert done.counts.target.tolist() == [i + 1.0 for i in range(25)]
    found = one(model.count(BLACK, ["dots", "=stars"]))
    assert found.interval is not None
    assert found.interval.shape == (1, 2)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_carry_the_calibration(tmp_path: Path) -> None:
    model = tiny()
    before = save(model, tmp_path / "before.ckpt")
    assert "intervals" not in read_checkpoint(before)["counting_zoo"], "files of models without are as they were"
    keys = set(model.state_dict())
    calibrate(model, TinyImages(n=30))
    again = load(save(model, tmp_path / "after.ckpt"))
    assert set(again.state_dict()) == keys
    assert again.interval_calibration == model.interval_calibration
    assert torch.equal(bounds(again), bounds(model))
    old = load(before)
    assert old.interval_calibration is None
    assert one(old.count(BLACK, "dots")).interval is None


def test_a_checkpoint_is_copied_with_all_that_is_in_it(tmp_path: Path) -> None:
    run, data = quiet(tmp_path), TinyImages(n=25)
    run.fit(tiny(), data)
    run.save_checkpoint(source := tmp_path / "last.ckpt")
    model = load(source)
    done = calibrate(model, data)
    content = read_checkpoint(write_calibrated(source, tmp_path / "new" / "calibrated.ckpt", done.calibration))
    assert load(tmp_path / "new" / "calibrated.ckpt").interval_calibration == done.calibration
    before = read_checkpoint(source)
    assert content.keys() == before.keys()
    assert content["global_step"] == before["global_step"]
    assert len(content["optimizer_states"]) == 1
    # Through Lightning, into a model that was built anew.
    fresh = tiny()
    run.test(fresh, data, ckpt_path=tmp_path / "new" / "calibrated.ckpt", verbose=False, weights_only=True)
    assert fresh.interval_calibration == done.calibration
    # Trained on, the model is another.
    more = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        enable_checkpointing=False,
    )
    with pytest.warns(UserWarning, match="weights"):
        more.fit(trained := tiny(), data, ckpt_path=tmp_path / "new" / "calibrated.ckpt", weights_only=True)
    assert trained.interval_calibration is None


def test_other_settings_than_those_calibrated_with_drop_it(tmp_path: Path) -> None:
    model = BlockCounter(window=16)
    calibrate(model, TinyImages(n=25))
    path = save(model, tmp_path / "a.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(path, window_batch_size=3).interval_calibration is not None
    for change in ({"window": 32}, {"preprocess": {"resize": "short", "size": 64}}):
        with pytest.warns(UserWarning, match=next(iter(change))):
            assert load(path, **change).interval_calibration is None  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [path.stem for path in tiny_models.MODELS])
def test_every_shipped_model_keeps_its_intervals(name: str, tmp_path: Path) -> None:
    """Its settings are the same when they come back from a file, through the library and through the command line."""
    model: CountingModule = tiny_models.build("model", *tiny_models.model(name))
    model.interval_calibration = ONE
    path = save(model, tmp_path / "a.ckpt")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": _recipe(path)}))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the intervals of this model.*")
        assert load(path).interval_calibration == ONE
        again: CountingModule = tiny_models.build("model", "--config", str(tmp_path / "recipe.yaml"))
        again.on_load_checkpoint(read_checkpoint(path))
        assert again.interval_calibration == ONE


def test_a_new_threshold_drops_the_intervals_of_detections() -> None:
    model = RegionCLIPCounter(tiny_models.clip_config(), threshold=0.4, network=RegionCLIPConfig(width=8))
    model.interval_calibration = ONE
    model._waiting = []
    model.log = model.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    model.trainer = L.Trainer(logger=False, enable_checkpointing=False)
    counts = torch.zeros(99, 1)
    counts[:70] = 5  # right below a threshold of 0.7
    model.threshold_errors.update("a", counts, torch.tensor([5.0]))
    with pytest.warns(UserWarning, match="threshold"):
        model.on_validation_epoch_end()
    assert model.interval_calibration is None


def test_a_damaged_calibration_is_a_checkpoint_error(tmp_path: Path) -> None:
    model = tiny()
    model.interval_calibration = ONE
    content = read_checkpoint(save(model, tmp_path / "a.ckpt"))
    content["counting_zoo"]["intervals"]["high"] = [1.0]
    torch.save(content, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match=r"b\.ckpt"):
        load(tmp_path / "b.ckpt")


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [True, False])
def test_predict_writes_bounds(tmp_path: Path, calibrated: bool) -> None:
    model = tiny()
    model.interval_calibration = ONE if calibrated else None
    run = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PredictionWriter(str(tmp_path / "out"))],
    )
    run.predict(model, TinyImages(n=2, classes=["dots", "=stars"]), return_predictions=False)
    with (tmp_path / "out" / "counts.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:6] == ["image", "name", "target", "predicted", "low", "high"]
    for row in rows:
        expected = ONE.bounds(np.array(float(row["predicted"]))).tolist() if calibrated else ["", ""]
        assert [float(v) if v else v for v in (row["low"], row["high"])] == expected


def test_the_test_report_has_coverage_and_width(tmp_path: Path) -> None:
    model, data = tiny(), TinyImages(n=30)
    calibrate(model, data, split="test", level=0.8)
    run = L.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[TestReport(images=1)],
        logger=False,
    )
    scores = run.test(model, data, verbose=False)[0]
    table = count_split(model, data, "test").table
    inside = (table.interval[:, 0] <= table.target) & (table.target <= table.interval[:, 1])
    assert scores["test/interval_coverage"] == pytest.approx(inside.mean())
    assert scores["test/interval_width"] == pytest.approx(np.diff(table.interval).mean())
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"Calibrated to hold 0.8 of the true counts (both ends inside); here they hold {inside.mean():.3f}" in report
    model.interval_calibration = None
    assert "test/interval_coverage" not in run.test(model, data, verbose=False)[0]


def test_drawings_say_the_interval() -> None:
    from counting_zoo.prediction import _said

    made = Prediction(torch.tensor([12.34]), ["figs"], torch.zeros(1, 2, 2))
    assert _said(made, 0) == "12.3"
    assert _said(replace(made, interval=torch.tensor([[10.0, 15.0]])), 0) == "12.3 [10, 15]"
    assert _said(replace(made, interval=torch.tensor([[0.0, 15.25]])), 0) == "12.3 [0, 15.2]"
    plain, wide = made.overlay(), replace(made, interval=torch.tensor([[10.0, 15.0]])).overlay()
    assert not np.array_equal(plain[:28], wide[:28])


# -- bins -------------------------------------------------------------------------------------------------------------


def naive_deviation(model: EBC, output: EBCOutput) -> float:
    """Block by block and bin by bin."""
    total = 0.0
    values = model.network.head.representatives.values.tolist()  # type: ignore[union-attr, operator]
    for chances in output.logits[0].flatten(1).double().softmax(0).T.tolist():
        mean = sum(p * v for p, v in zip(chances, values, strict=True))
        total += sum(p * (v - mean) ** 2 for p, v in zip(chances, values, strict=True))
    return total**0.5


@pytest.mark.parametrize("size", [(32, 40), (37, 51)])
def test_the_deviation_of_bins_adds_up_over_blocks(size: tuple[int, int]) -> None:
    model = ebc()
    with torch.no_grad():
        output = model(torch.rand(1, 3, *size), ask([["dots"]]))
    assert isinstance(output, EBCOutput)
    assert float(output.deviation) == pytest.approx(naive_deviation(model, output), rel=1e-5)


def test_the_deviation_of_a_zero_inflated_law() -> None:
    model = ebc(head="zip")
    output = model(torch.rand(1, 3, 8, 8), ask([["dots"]]))
    assert isinstance(output, ZIPOutput)
    chance, rate = float(output.zero_logits.detach().softmax(1)[0, 1]), float(output.rate.detach())
    rng = np.random.default_rng(0)
    drawn = rng.poisson(rate, 400_000) * (rng.random(400_000) < chance)
    assert float(output.deviation.detach()) == pytest.approx(drawn.std(), rel=0.02)


def test_bins_are_calibrated_in_tiles_as_in_one_piece() -> None:
    """Windows side by side see other borders than the whole picture, so the tiles' own maps are added up here."""
    data = TinyImages(n=25)
    for options in ({}, {"window": 16}, {"window": 16, "stride": 8}):
        model = ebc(**options)
        done = calibrate(model, data, width="bins")
        assert done.calibration.width == "bins"
        with torch.no_grad():
            found = model.count_images([torch.rand(3, 32, 40)], ask([["dots"]]))
        assert found[0].density.shape == (1, 1, 4, 5)
        with torch.no_grad():
            expected = done.calibration.bounds(found[0].counts.numpy(), found[0].deviation.numpy())
        interval = model.interval(found[0])
        assert interval is not None
        assert np.allclose(interval, expected)
        assert bounds(model).shape == (1, 2)
        table = count_split(model, data, "val").table
        assert np.allclose(table.interval, done.counts.interval)


@pytest.mark.parametrize("window", [None, 16])
def test_no_calibration_takes_part_in_making_one(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = ebc(window=window), TinyImages(n=25)
    model.interval_calibration = ONE
    known: list[IntervalCalibration | None] = []
    reported = model.reported
    monkeypatch.setattr(model, "reported", lambda counts: known.append(model.interval_calibration) or reported(counts))
    done = calibrate(model, data, width="bins")
    assert set(known) == {None}
    deviation = done.counts.column("deviation")
    assert (deviation > 0).all()
    np.testing.assert_array_equal(done.counts.interval, done.calibration.bounds(done.counts.predicted, deviation))
    blank = count_split(ebc(window=window, head="regression"), data, "val").table
    assert np.isnan(blank.column("deviation")).all(), "a count without a distribution has no deviation"


def test_variances_of_tiles_are_joined_as_densities_are() -> None:
    model = ebc(window=16)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        joined = model.count_images(list(images), ask([["dots"]] * 2))
        total = torch.zeros(2, 1)
        for y in (0, 16):
            for x in (0, 16):
                total += model(images[:, :, y : y + 16, x : x + 16], ask([["dots"]] * 2)).deviation ** 2
    for output, expected in zip(joined, total, strict=True):
        assert output.variance.shape == output.density.shape == (1, 1, 4, 4)
        assert torch.allclose(output.deviation[0] ** 2, expected, rtol=1e-4)


@pytest.mark.parametrize("model", [tiny(), BlockCounter(window=16), ebc(head="regression", count_loss="mse")])
def test_bins_need_a_model_of_bins(model: CountingModule) -> None:
    model.interval_calibration = ONE
    with pytest.raises(InputError, match=type(model).__name__):
        calibrate(model, TinyImages(n=20), width="bins")
    with pytest.raises(InputError, match="'val'"):
        calibrate(model, TinyImages(n=5))
    assert model.interval_calibration == ONE, "an attempt that fails changes nothing"
    model.interval_calibration = replace(ONE, width="bins")
    with pytest.raises(InputError, match="bins"):
        model.count(BLACK, "dots")


def test_training_images_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    calibrate(tiny(), TinyImages(n=20), split="train")
    assert "train" in caplog.text


# -- the command ------------------------------------------------------------------------------------------------------


def words(source: Path, n: int) -> list[str]:
    return [
        "calibrate",
        "--allow_packages",
        "tiny_zoo",
        "--ckpt_path",
        str(source),
        "--data",
        "tiny_zoo.TinyImages",
        "--data.n",
        str(n),
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = save(tiny(), tmp_path / "a.ckpt"), tmp_path / "calibrated.ckpt"
    assert main([*words(source, 40), "--out", str(out), "--level", "0.8", "--split", "test"]) == 0
    said = capsys.readouterr().out
    assert "0.8" in said
    assert "40 counts" in said
    assert f"wrote {out}" in said
    model: CountingModule = load(out)
    expected = tiny()
    done = calibrate(expected, TinyImages(n=40), split="test", level=0.8)
    assert model.interval_calibration == done.calibration
    assert done.describe() in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data.n", "18"], "has 18 known counts, .* at least 19"),
        (["--level", "0.99"], "at least 199"),
        (["--level", "1"], "level is 1"),
        (["--width", "bins"], "bins"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = save(tiny(), tmp_path / "a.ckpt"), tmp_path / "b.ckpt"
    assert main([*words(source, 30), "--out", str(out), *change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not out.exists()
