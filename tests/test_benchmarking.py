"""Any models on any data under one protocol, through the library and the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_zoo import TinyCounter, TinyPictures

from counting_zoo import benchmark, save
from counting_zoo.cli import main
from counting_zoo.errors import InputError
from counting_zoo.evaluation.benchmark_report import read_results
from counting_zoo.evaluation.count_table import CountTable

COMMAND = ("benchmark", "--allow_packages", "tiny_zoo")
TESTS = Path(__file__).resolve().parent


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
    found = benchmark(models, {"few": TinyPictures(n=3), "more": TinyPictures(n=5)}, tmp_path, accelerator="cpu")
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
    options: dict[str, Any] = {"accelerator": "cpu", "costs": False, "pictures": 2}
    benchmark({"a": model()}, {"d": TinyPictures()}, tmp_path / "one", **options)
    benchmark({"a": model()}, {"d": TinyPictures()}, tmp_path / "two", **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    monkeypatch.setattr(TinyCounter, "forward", lambda *_: pytest.fail("counted again"))
    options["pictures"] = 0
    benchmark({"a": model()}, {"d": TinyPictures()}, tmp_path / "one", **options)
    monkeypatch.undo()
    assert json.loads((tmp_path / "one" / "benchmark.json").read_text())["data"][0]["models"][0]["figures"]["mae"] > 0


def test_another_model_or_protocol_is_counted_anew(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "costs": False, "pictures": 0}
    for n, (made, data) in enumerate(
        [(model(0), TinyPictures()), (model(1), TinyPictures()), (model(0), TinyPictures(prompts="all")),
         (model(0), TinyPictures(n=4))], 1,
    ):  # fmt: skip
        benchmark({"a": made}, {"d": data}, tmp_path, **options)
        assert len(list((tmp_path / "parts").iterdir())) == n


def test_what_does_not_fit_together_is_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    data = {"dots": TinyPictures(prompts="all"), "figs": TinyPictures(classes=["figs"], prompts="all")}
    found = benchmark({"fixed": model(0, Known), "free": model()}, data, tmp_path, accelerator="cpu")
    assert [entry[:2] for entry in found.skipped] == [("fixed", "figs")]
    assert ("fixed", "figs") not in by_name(tmp_path)
    assert "no name in common" in (tmp_path / "benchmark.md").read_text()
    assert "no name in common" in (tmp_path / "benchmark.html").read_text()
    with pytest.raises(InputError, match="nothing could be scored"):
        benchmark({"fixed": model(0, Known)}, {"figs": data["figs"]}, tmp_path / "none", accelerator="cpu")


def test_counts_from_elsewhere_take_part(tmp_path: Path) -> None:
    (tmp_path / "theirs.csv").write_text("image,count\n" + "".join(f"{i:02d} ü.png,{i + 1}\n" for i in range(5)))
    benchmark({"ours": model(), "theirs": tmp_path / "theirs.csv"}, {"d": TinyPictures()}, tmp_path / "out",
              accelerator="cpu", costs=False)  # fmt: skip
    assert by_name(tmp_path / "out")["theirs", "d"]["figures"]["mae"] == 0


def test_nothing_to_do_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 models on 1 data sets"):
        benchmark({}, {"d": TinyPictures()}, tmp_path)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save(model(), tmp_path / "ours.ckpt")
    data = {"data": {"class_path": "tiny_zoo.TinyPictures", "init_args": {"n": 4}}}
    (tmp_path / "dots.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "bench.yaml").write_text(
        yaml.safe_dump(
            {
                "models": {"ours": str(tmp_path / "ours.ckpt"),
                           "more": {"checkpoint": str(tmp_path / "ours.ckpt"), "set": {"scale": 0.4}}},
                "data": {"few": {"config": str(tmp_path / "dots.yaml"), "set": {"n": 3}}},
                "title": "Of dots", "costs": False,
            }
        )
    )  # fmt: skip
    return tmp_path


def test_the_command_reads_its_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*COMMAND, "--config", str(files / "bench.yaml"), "--out", str(files / "o")]
    assert main([*words, "--accelerator", "cpu", "--pictures", "0"]) == 0
    printed = capsys.readouterr().out
    assert "# Of dots" in printed
    assert set(by_name(files / "o")) == {("ours", "few"), ("more", "few")}
    assert read_results(files / "o")["data"][0]["facts"]["pictures"] == 3
    assert not (files / "o" / "costs.json").exists()


def test_the_command_takes_names_and_files(files: Path) -> None:
    words = [*COMMAND, "--models", f"m={files / 'ours.ckpt'}", "--data",
             str(files / "dots.yaml"), "--out", str(files / "o"), "--accelerator", "cpu", "--no-costs"]  # fmt: skip
    assert main(words) == 0
    assert set(by_name(files / "o")) == {("m", "dots")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modles": {}}, "holds modles"),
        ({"models": ["a"]}, r"models is \['a'\]"),
        ({"models": {"a": {"checkpoint": "x.ckpt", "sets": {}}}}, "a is .*expected a file, or"),
        ({"models": {"a": "missing.ckpt"}}, "no checkpoint at"),
        ({"models": {"a": {"counts": "a.csv", "set": {"x": 1}}}}, "counts from a file have no options"),
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
def test_two_processes_share_the_pictures(files: Path) -> None:
    words = [*COMMAND, "--config", str(files / "bench.yaml"), "--accelerator", "cpu",
             "--pictures", "1"]  # fmt: skip
    assert main([*words, "--out", str(files / "one")]) == 0
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "counting_zoo.cli", *words, "--devices", "2", "--out", str(files / "two")],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((files / "two").glob("parts/*/1.jsonl"))) == 2
    assert contents(files / "two") == contents(files / "one")
