"""Any models on any data under one protocol, through the library and the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from places import TESTS
from tiny_zoo import TinyCounter, TinyImages

from counting_zoo import benchmark, save
from counting_zoo.cli import main
from counting_zoo.data.records import Record, Split
from counting_zoo.errors import InputError
from counting_zoo.evaluation.benchmark_report import read_results
from counting_zoo.evaluation.counting import count_split
from counting_zoo.geometry import Preprocess
from counting_zoo.metrics.counts import CountTable
from counting_zoo.metrics.intervals import fit_intervals

COMMAND = ("benchmark", "--allow_packages", "tiny_zoo")


class Known(TinyCounter):
    """A fixed list of names."""

    @property
    def vocabulary(self) -> list[str]:
        return ["dots"]


def model(seed: int = 0, kind: type[TinyCounter] = TinyCounter) -> TinyCounter:
    torch.manual_seed(seed)
    return kind(scale=0.2).eval()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that two equal runs share."""
    kept = [p for p in folder.rglob("*") if p.is_file() and "parts" not in p.parts and not p.name.startswith("costs.")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def by_name(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    results = read_results(folder)
    return {(run["model"], entry["name"]): run for entry in results["data"] for run in entry["models"]}


def test_runs_every_model_on_every_data_set(tmp_path: Path) -> None:
    models = {"a": model(0), "b": model(1)}
    found = benchmark(models, {"few": TinyImages(n=3), "more": TinyImages(n=5)}, tmp_path, accelerator="cpu")
    runs = by_name(tmp_path)
    assert set(runs) == {("a", "few"), ("a", "more"), ("b", "few"), ("b", "more")}
    assert [(run.model, run.data) for run in found.runs] == [("a", "few"), ("a", "more"), ("b", "few"), ("b", "more")]
    table = CountTable.read(tmp_path / "counts" / "b--more.csv")
    error = np.abs(table.predicted - table.target).mean()
    assert runs["b", "more"]["figures"]["mae"] == pytest.approx(error, rel=1e-5)
    assert {p.name for p in tmp_path.glob("benchmark.*")} == {f"benchmark.{e}" for e in ("json", "csv", "md", "html")}
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert costs["a on few"]["pictures_per_second"] > 0


def test_twice_the_same_bytes_and_nothing_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "costs": False, "images": 2}
    benchmark({"a": model()}, {"d": TinyImages()}, tmp_path / "one", **options)
    benchmark({"a": model()}, {"d": TinyImages()}, tmp_path / "two", **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    monkeypatch.setattr(TinyCounter, "forward", lambda *_: pytest.fail("counted again"))
    options["images"] = 0
    benchmark({"a": model()}, {"d": TinyImages()}, tmp_path / "one", **options)
    monkeypatch.undo()
    assert json.loads((tmp_path / "one" / "benchmark.json").read_text())["data"][0]["models"][0]["figures"]["mae"] > 0


def test_another_model_or_protocol_is_counted_anew(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "costs": False, "images": 0}
    for n, (made, data) in enumerate(
        [
            (model(0), TinyImages()),
            (model(1), TinyImages()),
            (model(0), TinyImages(prompts="all")),
            (model(0), TinyImages(n=4)),
        ],
        1,
    ):
        benchmark({"a": made}, {"d": data}, tmp_path, **options)
        assert len(list((tmp_path / "parts").iterdir())) == n


class Repainted(TinyImages):
    """The same annotation, other pictures."""

    def read_bytes(self, record: Record) -> bytes:
        return cv2.imencode(".png", np.full((32, 40, 3), 200, np.uint8))[1].tobytes()


class Renamed(TinyImages):
    """The same test pictures, and another name in training, which ``prompts: all`` asks about."""

    def read_split(self, split: Split) -> list[Record]:
        found = super().read_split(split)
        return [replace(r, classes=["apples", *r.classes[1:]]) for r in found] if split == "train" else found


def test_counts_of_other_images_names_or_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "costs": False, "images": 0}
    data = {"clean": TinyImages(prompts="all"), "noisy": Repainted(prompts="all"), "more": Renamed(prompts="all")}
    counter = TinyCounter(scale=0.2, preprocess=Preprocess("warp", 32)).eval()
    together = benchmark({"a": counter}, data, tmp_path, **options).runs
    for run, (name, alone) in zip(together, data.items(), strict=True):
        expected = count_split(counter, alone).table
        assert run.table.name == expected.name
        np.testing.assert_array_equal(run.table.predicted, expected.predicted, name)
    counter.preprocess = Preprocess("warp", 64)  # after it was made
    again = benchmark({"a": counter}, {"clean": data["clean"]}, tmp_path, **options).runs[0].table.predicted
    np.testing.assert_array_equal(again, count_split(counter, data["clean"]).table.predicted)
    assert (again != together[0].table.predicted).all()


def test_names_that_differ_in_signs_only_have_files_of_their_own(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "costs": False, "images": 0}
    found = benchmark({"a b": model(0), "A_b": model(1), 7: model(2)}, {"d": TinyImages()}, tmp_path, **options)  # type: ignore[dict-item]
    tables = [CountTable.read(tmp_path / "counts" / f"{name}--d.csv") for name in ("a_b", "A_b_2", "7")]
    for run, table in zip(found.runs, tables, strict=True):
        np.testing.assert_array_equal(table.predicted.astype(np.float32), run.table.predicted.astype(np.float32))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"split": "predict"}, "split"),
        ({"precision": "fp16"}, "precision"),
        ({"images": -1}, "images"),
        ({"devices": "2"}, "devices"),
        ({"resamples": 0}, "resamples"),
        ({"costs": "no"}, "costs"),
        ({"accelerator": "gpuu"}, "gpuu"),
    ],
)
def test_options_out_of_range(tmp_path: Path, option: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        benchmark({"a": model()}, {"d": TinyImages()}, tmp_path, **{"accelerator": "cpu", **option})


def test_what_is_no_counter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Linear"):
        benchmark({"a": torch.nn.Linear(1, 1)}, {"d": TinyImages()}, tmp_path, accelerator="cpu")  # type: ignore[dict-item]


class Blind(TinyCounter):
    """Counts without names."""

    class_blind = True


class Mixed(TinyImages):
    """Dots and stars in turns."""

    def read_split(self, split: Split) -> list[Record]:
        return [replace(r, labels=np.arange(len(r.points)) % 2) for r in super().read_split(split)]


def test_the_protocol_says_what_a_model_was_not_asked_about(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "costs": False, "images": 0, "precision": "16-mixed"}
    models = {"blind": model(0, Blind), "fixed": model(0, Known)}
    found = benchmark(models, {"target": Mixed(), "all": Mixed(prompts="all")}, tmp_path, **options)
    said = {(run.model, run.data): " ".join(run.protocol) for run in found.runs}
    assert "6 of 15" in said["blind", "target"]
    assert "of 15" not in said["blind", "all"]
    assert "=stars" in said["fixed", "all"]
    assert all("bf16-mixed" in text for text in said.values())  # which processors have instead


def test_the_protocol_says_what_intervals_promise(tmp_path: Path) -> None:
    calibrated = model()
    calibrated.interval_calibration = fit_intervals(np.arange(100.0), np.arange(100.0) + 1, level=0.8)
    found = benchmark({"sure": calibrated}, {"d": TinyImages()}, tmp_path, accelerator="cpu", costs=False, images=0)
    assert any("80 %" in text and "'residual'" in text for text in found.runs[0].protocol)
    assert by_name(tmp_path)["sure", "d"]["figures"]["coverage"]["rows"] == 5


@pytest.mark.parametrize("prompts", ["target", "all"])
def test_the_worst_and_the_best_images_are_drawn(tmp_path: Path, prompts: Any) -> None:
    data = Mixed(n=6, prompts=prompts)
    (run,) = benchmark({"a": model()}, {"d": data}, tmp_path, accelerator="cpu", costs=False, images=2).runs
    ids, index = run.table.images()
    error = np.bincount(index, np.abs(run.table.predicted - run.table.target))
    true = np.bincount(index, run.table.target)
    by_error = sorted(range(len(ids)), key=lambda i: -error[i])
    rest = [i for i in by_error[2:] if true[i]]
    by_share = sorted(rest, key=lambda i: error[i] / true[i])
    drawn = [(image.group, image.caption.partition(",")[0]) for image in run.images]
    assert drawn == [("worst", ids[i]) for i in by_error[:2]] + [("best", ids[i]) for i in by_share[:2]]
    assert len(list((tmp_path / "pictures").glob("*.jpg"))) == 4


def test_totals_from_elsewhere_stand_beside_constants_of_totals(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("image,count\n" + "".join(f"{i:02d} ü.png,{i}\n" for i in range(5)))
    (run,) = benchmark(
        {"theirs": tmp_path / "c.csv"}, {"d": Mixed(prompts="all")}, tmp_path / "out", accelerator="cpu"
    ).runs
    assert run.constants == {"train_mean": 3.0, "train_median": 3.0}  # not the sum of the names' medians, 2 + 1


def test_what_does_not_fit_together_is_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    data = {"dots": TinyImages(prompts="all"), "figs": TinyImages(classes=["figs"], prompts="all")}
    found = benchmark({"fixed": model(0, Known), "free": model()}, data, tmp_path, accelerator="cpu")
    assert [entry[:2] for entry in found.skipped] == [("fixed", "figs")]
    assert ("fixed", "figs") not in by_name(tmp_path)
    assert "Known" in (tmp_path / "benchmark.md").read_text()
    assert "Known" in (tmp_path / "benchmark.html").read_text()
    with pytest.raises(InputError, match="Known"):
        benchmark({"fixed": model(0, Known)}, {"figs": data["figs"]}, tmp_path / "none", accelerator="cpu")


def test_counts_from_elsewhere_take_part(tmp_path: Path) -> None:
    (tmp_path / "theirs.csv").write_text("image,count\n" + "".join(f"{i:02d} ü.png,{i + 1}\n" for i in range(5)))
    benchmark(
        {"ours": model(), "theirs": tmp_path / "theirs.csv"},
        {"d": TinyImages()},
        tmp_path / "out",
        accelerator="cpu",
        costs=False,
    )
    assert by_name(tmp_path / "out")["theirs", "d"]["figures"]["mae"] == 0


class Wrong(TinyImages):
    """Finds a mistake where a loader's process reads."""

    def read_bytes(self, record: Record) -> bytes:
        raise InputError("what is wrong")


def test_a_reason_is_a_sentence_and_no_traceback_of_a_worker(tmp_path: Path) -> None:
    found = benchmark(
        {"a": model()},
        {"d": TinyImages(), "wrong": Wrong(num_workers=1)},
        tmp_path,
        accelerator="cpu",
        costs=False,
        images=0,
    )
    assert found.skipped == [("a", "wrong", "what is wrong")]


class OneTooSmall(TinyImages):
    """The first picture is smaller than a cell of the model."""

    def read_split(self, split: Split) -> list[Record]:
        first, *others = super().read_split(split)
        return [replace(first, size=(4, 4), points=np.ones((1, 2), np.float32)), *others]

    def read_bytes(self, record: Record) -> bytes:
        shape = (4, 4, 3) if record.size == (4, 4) else (32, 40, 3)
        return cv2.imencode(".png", np.zeros(shape, np.uint8))[1].tobytes()


def test_a_image_that_cannot_be_counted_ends_neither_counting_nor_the_costs(tmp_path: Path) -> None:
    found = benchmark({"a": model()}, {"d": OneTooSmall()}, tmp_path, accelerator="cpu")
    assert [image_id for image_id, _ in found.runs[0].failed] == ["test/00 ü.png"]
    assert json.loads((tmp_path / "costs.json").read_text())["a on d"]["pictures"] == 4


def test_a_missing_file_is_an_error_before_anything_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for models, out, message in (
        ({"a": model(), "b": tmp_path / "b.ckpt"}, tmp_path / "o", "'b'"),
        ({"a": model()}, tmp_path / "file", r"\bout\b"),
    ):
        with pytest.raises(InputError, match=message):
            benchmark(models, {"d": TinyImages()}, out, accelerator="cpu")  # type: ignore[arg-type]
    assert not (tmp_path / "o").exists()


def test_nothing_to_do_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 models"):
        benchmark({}, {"d": TinyImages()}, tmp_path)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save(model(), tmp_path / "ours.ckpt")
    data = {"data": {"class_path": "tiny_zoo.TinyImages", "init_args": {"n": 4}}}
    (tmp_path / "dots.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "bench.yaml").write_text(
        yaml.safe_dump(
            {
                "models": {
                    "ours": str(tmp_path / "ours.ckpt"),
                    "more": {"checkpoint": str(tmp_path / "ours.ckpt"), "set": {"scale": 0.4}},
                },
                "data": {"few": {"config": str(tmp_path / "dots.yaml"), "set": {"n": 3}}},
                "title": "Of dots",
                "costs": False,
            }
        )
    )
    return tmp_path


def test_the_command_reads_its_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*COMMAND, "--config", str(files / "bench.yaml"), "--out", str(files / "o")]
    assert main([*words, "--accelerator", "cpu", "--images", "0"]) == 0
    printed = capsys.readouterr().out
    assert "# Of dots" in printed
    assert set(by_name(files / "o")) == {("ours", "few"), ("more", "few")}
    assert read_results(files / "o")["data"][0]["facts"]["pictures"] == 3
    assert not (files / "o" / "costs.json").exists()


def test_the_command_takes_names_and_files(files: Path) -> None:
    words = [
        *COMMAND,
        "--models",
        f"m={files / 'ours.ckpt'}",
        "--data",
        str(files / "dots.yaml"),
        "--out",
        str(files / "o"),
        "--accelerator",
        "cpu",
        "--no-costs",
    ]
    assert main(words) == 0
    assert set(by_name(files / "o")) == {("m", "dots")}


def test_the_command_takes_files_with_the_names_that_lightning_gives(files: Path) -> None:
    path = (files / "ours.ckpt").rename(files / "epoch=3-step=10.ckpt")
    words = ["--models", str(path), f"b={path}", "--data", str(files / "dots.yaml"), "--out", str(files / "o")]
    assert main([*COMMAND, *words, "--accelerator", "cpu", "--no-costs", "--images", "0"]) == 0
    assert set(by_name(files / "o")) == {("epoch=3-step=10", "dots"), ("b", "dots")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modles": {}}, "holds modles"),
        ({"models": ["a"]}, r"models is \['a'\]"),
        ({"models": {"a": {"checkpoint": "x.ckpt", "sets": {}}}}, "a is .*expected a file, or"),
        ({"models": {"a": "missing.ckpt"}}, "no checkpoint at"),
        ({"models": {"a": {"counts": "a.csv", "set": {"x": 1}}}}, "counts from a file have no options"),
        ({"models": {"a": {"counts": "a.txt"}}}, "a: counts are read from .csv files, got 'a.txt'"),
        ({"data": {"d": "missing.yaml"}}, "missing.yaml"),
        ({"data": {"d": {"config": "{dots}", "set": {"m": 1}}}}, "dots.yaml: .*'m' is not accepted"),
    ],
)
def test_a_mistake_in_the_file_is_named(files: Path, change: dict[str, Any], message: str, capsys) -> None:
    content = yaml.safe_load((files / "bench.yaml").read_text()) | change
    (files / "bench.yaml").write_text(yaml.safe_dump(content).replace("{dots}", str(files / "dots.yaml")))
    words = [*COMMAND, "--config", str(files / "bench.yaml"), "--out", str(files / "o")]
    assert main(words) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error


@pytest.mark.slow
def test_two_processes_share_the_images(files: Path) -> None:
    (files / "other.csv").write_text("image,count\nnone of these.png,1\n")  # is left out, by both
    words = [
        *COMMAND,
        "--config",
        str(files / "bench.yaml"),
        "--accelerator",
        "cpu",
        "--models",
        f"other={files / 'other.csv'}",
        "--pictures",
        "1",
    ]
    assert main([*words, "--out", str(files / "one")]) == 0
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "counting_zoo.cli", *words, "--devices", "2", "--out", str(files / "two")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((files / "two").glob("parts/*/1.jsonl"))) == 2
    assert contents(files / "two") == contents(files / "one")
