from __future__ import annotations

import csv
import logging
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import fakes
import h5py
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from pages import Page
from tiny_zoo import TinyCounter, TinyImages

from counting_zoo import VOCCounts
from counting_zoo.callbacks import DensityImages, PredictionWriter, TestReport
from counting_zoo.errors import ImageError, InputError
from counting_zoo.evaluation.predictions import BOX_COLUMNS, COUNT_COLUMNS, PartWriter, merge_parts
from counting_zoo.io import safe_cell, write_table
from counting_zoo.prediction import Prediction


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def trainer(folder: Path, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    settings = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**settings | {"default_root_dir": folder, "callbacks": list(callbacks)} | kwargs)


def predict(
    folder: Path, model: TinyCounter, ranks: int = 1, writer: dict[str, Any] | None = None, batch: int = 1
) -> None:
    data = TinyImages(n=7, bad=2, prompts="all", classes=["dots", "=stars"], eval_batch_size=batch)
    one = PredictionWriter(str(folder), **(writer or {}))
    strategy = "ddp_fork" if ranks > 1 else "auto"
    made = trainer(folder, one, devices=ranks, strategy=strategy, use_distributed_sampler=False)
    made.predict(model, data, return_predictions=False)


def files_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes()
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                found[name] = {
                    f"{group}/{k}": (np.asarray(value).tolist(), sorted((a, str(b)) for a, b in value.attrs.items()))
                    for group in file
                    for k, value in file[group].items()
                }
    return found


@pytest.fixture
def model() -> TinyCounter:
    torch.manual_seed(0)
    return TinyCounter()


def test_predictions_agree_with_the_model(tmp_path: Path, model: TinyCounter) -> None:
    predict(tmp_path, model)
    rows = table(tmp_path / "counts.csv")
    assert tuple(rows[0]) == COUNT_COLUMNS
    assert [row["image"] for row in rows] == [f"predict/{i:02d} ü.png" for i in range(2, 7) for _ in range(2)]
    assert [row["name"] for row in rows[:2]] == ["dots", "'=stars"]
    expected = model.count(np.zeros((32, 40, 3), np.uint8), ["dots", "=stars"])
    assert isinstance(expected, Prediction)
    points = table(tmp_path / "points.csv")
    with h5py.File(tmp_path / "densities.h5") as file:
        for row in rows:
            k = int(row["name"] != "dots")
            assert float(row["predicted"]) == pytest.approx(float(expected.counts[k]), rel=1e-6)
            density = file[row["density"]]
            assert density.fletcher32
            assert density.attrs["image"] == row["image"]
            assert np.array_equal(density, expected.density[k].numpy())
            assert (row["width"], row["height"]) == ("40", "32")
            assert sum((p["image"], p["name"]) == (row["image"], row["name"]) for p in points) == int(row["points"])
            assert cv2.imdecode(np.fromfile(tmp_path / row["overlay"], np.uint8), cv2.IMREAD_COLOR) is not None
    assert not list(tmp_path.glob(".*")), "no parts are left"


def test_a_count_that_is_not_finite_costs_one_row(tmp_path: Path, model: TinyCounter) -> None:
    for p in model.parameters():
        p.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="finite"):
        assert torch.isnan(model.count(np.zeros((32, 40, 3), np.uint8), ["dots"]).counts).all()
    predict(tmp_path, model)
    errors = table(tmp_path / "errors.csv")
    assert sum("finite" in row["error"] for row in errors) == 5
    assert table(tmp_path / "counts.csv") == []


def test_a_broken_image_costs_one_logged_error(
    tmp_path: Path, model: TinyCounter, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        predict(tmp_path, model, batch=3)
    errors = table(tmp_path / "errors.csv")
    assert [row["image"] for row in errors] == ["predict/00 ü.png", "predict/01 ü.png"]
    assert all("ImageError" in row["error"] for row in errors)
    assert len([record for record in caplog.records if "ü.png" in record.message]) == 2
    with pytest.raises(ImageError, match="2 of 7"):
        predict(tmp_path, model, writer={"fail_on_error": True})


@pytest.mark.parametrize("max_images", [None, 3])
def test_files_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, model: TinyCounter, max_images: int | None
) -> None:
    for ranks in (1, 2):
        predict(tmp_path / str(ranks), model, ranks, {"max_images": max_images})
    one, two = (files_of(tmp_path / str(ranks)) for ranks in (1, 2))
    assert len([name for name in one if name.startswith("pictures/")]) == 2 * (max_images or 5)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name] == two[name], name


class TinyDetector(TinyCounter):
    """Says a box beside its counts, for each name."""

    def to_prediction(self, *args: Any) -> Prediction:
        made = super().to_prediction(*args)
        boxes = [torch.tensor([[1.0, 2.0, 20.0 + k, 30.0]]) for k in range(len(made.names))]
        return replace(made, boxes=boxes, scores=[torch.tensor([0.75])] * len(boxes))


def test_boxes_of_a_model_are_written_and_drawn(tmp_path: Path) -> None:
    detector = TinyDetector()
    for ranks in (1, 2):
        predict(tmp_path / str(ranks), detector, ranks)
    one = files_of(tmp_path / "1")
    assert one == files_of(tmp_path / "2")
    rows = table(tmp_path / "1" / "boxes.csv")
    assert [row["x2"] for row in rows] == ["20", "21"] * 5
    drawing = cv2.cvtColor(cv2.imread(str(next((tmp_path / "1" / "pictures").iterdir()))), cv2.COLOR_BGR2RGB)[28:]
    scale = drawing.shape[1] / 40
    line = drawing[round(10 * scale), round(scale)].astype(int)
    assert line[0] - line[1:].max() > 40, "red, as far as JPEG keeps it"


def test_options_leave_files_out(tmp_path: Path, model: TinyCounter) -> None:
    predict(tmp_path, model, writer={"images": False, "densities": False})
    assert sorted(files_of(tmp_path)) == ["counts.csv", "errors.csv", "points.csv"]
    assert {(row["overlay"], row["density"]) for row in table(tmp_path / "counts.csv")} == {("", "")}
    with pytest.raises(InputError, match="max_images"):
        PredictionWriter(max_images=-1)


def prediction(image_id: str, count: float = 1.0) -> Prediction:
    return Prediction(
        torch.tensor([count]), ["a"], torch.full((1, 1, 1), count), points=[torch.zeros(0, 2)], image_id=image_id
    )


def detected(image_id: str, n: int, scored: bool = True) -> Prediction:
    """``n`` boxes of the first name and one of the second."""
    boxes = [torch.arange(4.0 * n).reshape(-1, 4) + len(image_id) / 3, torch.tensor([[0.1, 0.2, 30.5, 1e-7]])]
    return Prediction(
        torch.tensor([float(n), 1.0]),
        ["a", "=b"],
        torch.zeros(2, 1, 1),
        points=[b[:, :2] for b in boxes],
        boxes=boxes,
        scores=[torch.linspace(0.9, 0.1, n), torch.tensor([0.3])] if scored else None,
        image_id=image_id,
        size=(40, 40),
    )


def write_parts(folder: Path, *parts: list[Prediction]) -> None:
    for rank, predictions in enumerate(parts):
        part = PartWriter(folder, rank, densities=False, max_images=None)
        for one in predictions:
            part.add(one)
        part.close()
    merge_parts(folder, len(parts), None)


def test_boxes_of_one_process_and_of_two(tmp_path: Path) -> None:
    found = [detected("b.jpg", 2), detected("=a.jpg", 3), detected("none.jpg", 0)]
    write_parts(tmp_path / "1", found)
    write_parts(tmp_path / "2", [found[0], found[2]], [found[1], found[0]])  # one image was dealt to both
    one, two = files_of(tmp_path / "1"), files_of(tmp_path / "2")
    assert one == two
    rows = table(tmp_path / "1" / "boxes.csv")
    assert tuple(rows[0]) == BOX_COLUMNS
    assert [(row["image"], row["name"]) for row in rows] == [
        *[("'=a.jpg", "a")] * 3,
        ("'=a.jpg", "'=b"),
        *[("b.jpg", "a")] * 2,
        ("b.jpg", "'=b"),
        ("none.jpg", "'=b"),
    ]
    for image, n in (("'=a.jpg", 3), ("b.jpg", 2)):
        mine = [row for row in rows if (row["image"], row["name"]) == (image, "a")]
        made = detected(image.removeprefix("'"), n)
        assert made.boxes is not None
        assert made.scores is not None
        read = np.array([[row[column] for column in BOX_COLUMNS[2:]] for row in mine], np.float32)
        assert np.array_equal(read[:, :4], made.boxes[0].numpy())
        assert np.array_equal(read[:, 4], made.scores[0].numpy())
    assert [row["points"] for row in table(tmp_path / "1" / "counts.csv")] == ["3", "1", "2", "1", "0", "1"]


def test_boxes_without_scores_and_none_at_all(tmp_path: Path) -> None:
    write_parts(tmp_path, [detected("a.jpg", 2, scored=False)], [prediction("b.jpg")])
    assert [row["score"] for row in table(tmp_path / "boxes.csv")] == [""] * 3
    nothing = replace(detected("a.jpg", 0), boxes=[torch.zeros(0, 4)] * 2, scores=[torch.zeros(0)] * 2)
    write_parts(tmp_path, [nothing])
    assert (tmp_path / "boxes.csv").read_text().strip() == ",".join(BOX_COLUMNS), "a model that detects found nothing"
    write_parts(tmp_path, [prediction("a.jpg")], [])
    assert not (tmp_path / "boxes.csv").exists(), "of an earlier run"


def test_every_image_gets_a_file_of_its_own(tmp_path: Path) -> None:
    nasty = [
        "a/b.jpg",
        "a_b.jpg",
        "A_B.jpg",
        "../../etc/passwd",
        "/etc/passwd",
        "x" * 300,
        "苹果 1.png",
        "",
        "..",
        "a_b.png",
        "=1+1.jpg",
    ]
    part = PartWriter(tmp_path, 0, densities=True, max_images=None)
    for image_id in nasty:
        part.add(prediction(image_id))
    part.close()
    assert merge_parts(tmp_path, 1, None).images == len(nasty)
    rows = table(tmp_path / "counts.csv")
    overlays = {row["overlay"] for row in rows}
    assert len({overlay.casefold() for overlay in overlays}) == len({row["density"] for row in rows}) == len(nasty)
    for overlay in overlays:
        assert (tmp_path / overlay).resolve().parent == (tmp_path / "pictures").resolve()
    assert "'=1+1.jpg" in {row["image"] for row in rows}


def test_merging_holds_one_image_at_a_time(tmp_path: Path) -> None:
    """100,000 points are 15 MB as numbers of Python; they pass through in the rows of one picture after another."""
    points = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)) * 100
    part = PartWriter(tmp_path, 0, densities=False, max_images=0)
    for i in range(100):
        part.add(replace(prediction(f"{i}.jpg"), points=[points]))
    part.close()
    tracemalloc.start()
    try:
        merge_parts(tmp_path, 1, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6
    rows = table(tmp_path / "points.csv")
    assert len(rows) == 100_000
    assert [float(rows[-1][axis]) for axis in "xy"] == pytest.approx(points[-1].tolist(), rel=1e-6)


def test_a_image_that_came_twice_counts_once(tmp_path: Path) -> None:
    for rank, image_ids in enumerate([["b", "a", "b"], ["a", "c"]]):
        part = PartWriter(tmp_path, rank, densities=True, max_images=None)
        for image_id in image_ids:
            part.add(prediction(image_id))
        part.close()
    assert merge_parts(tmp_path, 2, None).images == 3
    assert [row["image"] for row in table(tmp_path / "counts.csv")] == ["a", "b", "c"]


def test_no_image_at_all(tmp_path: Path) -> None:
    PartWriter(tmp_path, 0, densities=True, max_images=None).close()
    assert merge_parts(tmp_path, 1, None).images == 0
    assert (tmp_path / "counts.csv").read_text().strip() == ",".join(COUNT_COLUMNS)


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", "\tx", "\rx", "\nx"])
def test_cells_that_a_spreadsheet_would_run_are_neutralised(tmp_path: Path, text: str) -> None:
    assert safe_cell(text) == f"'{text}"
    write_table(tmp_path / "t.csv", ("a", "b", "c"), [(text, -1.5, -2)])
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1] == [f"'{text}", "-1.5", "-2"]


@pytest.mark.parametrize("value", [0.1, 1e-30, 123456.789, -7.25, 1e20])
def test_numbers_survive_the_table(value: float) -> None:
    assert np.float32(safe_cell(value)) == np.float32(value)


def test_density_images_are_capped_and_written_where_the_logger_takes_none(tmp_path: Path, model: TinyCounter) -> None:
    callback = DensityImages(every_n_epochs=2, max_images=3)
    logger = CSVLogger(tmp_path)
    made = trainer(
        tmp_path,
        callback,
        logger=logger,
        max_epochs=3,
        num_sanity_val_steps=2,
        log_every_n_steps=1,
        enable_checkpointing=False,
    )
    made.fit(model, TinyImages())
    found = sorted(path.name for path in (Path(logger.log_dir) / "pictures").iterdir())
    assert found == [f"{i:02d}_epoch{epoch:04d}.png" for i in range(3) for epoch in (0, 2)]


def test_density_images_go_to_tensorboard(tmp_path: Path, model: TinyCounter) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    made = trainer(
        tmp_path,
        DensityImages(max_images=2),
        logger=[CSVLogger(tmp_path), logger],
        max_epochs=1,
        log_every_n_steps=1,
        enable_checkpointing=False,
    )
    made.fit(model, TinyImages())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["val_pictures/00", "val_pictures/01"]
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_report_of_a_test(tmp_path: Path, model: TinyCounter, ranks: int) -> None:
    strategy = "ddp_fork" if ranks > 1 else "auto"
    made = trainer(tmp_path, TestReport(images=3), devices=ranks, strategy=strategy, use_distributed_sampler=False)
    made.test(model, TinyImages(), verbose=False)
    rows = table(tmp_path / "test_counts.csv")
    assert [row["image"] for row in rows] == [f"test/{i:02d} ü.png" for i in range(5)]
    assert [float(row["target"]) for row in rows] == [1, 2, 3, 4, 5]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "always the training median" in page
    assert page.count('r="3.5"') == 5
    assert page.count("data:image/jpeg") == 6, "each picture with a name that is not in it"
    assert "=stars: " in page


def test_the_protocol_of_the_data_is_kept_with_checkpoint_and_report(tmp_path: Path, model: TinyCounter) -> None:
    fakes.voc(tmp_path / "data")
    data = VOCCounts(tmp_path / "data", difficult="include", num_workers=0, classes=["cat", "dog", "person"])
    made = trainer(tmp_path, TestReport(images=0), max_epochs=1, limit_train_batches=1)
    made.fit(model, data)
    stored = torch.load(made.checkpoint_callback.best_model_path, weights_only=True)
    assert stored["datamodule_hyper_parameters"]["difficult"] == "include"
    made.test(model, data, verbose=False)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ["data.difficult", "include"] in Page(page).rows
    assert ["data.folder", "VOC2007"] in Page(page).rows


@pytest.mark.parametrize("make", [lambda: DensityImages(0), lambda: DensityImages(1, -1), lambda: TestReport(-1)])
def test_options_out_of_range(make: Any) -> None:
    with pytest.raises(InputError, match=r"every_n_epochs|report"):
        make()
