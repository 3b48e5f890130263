"""``counting-zoo quickstart`` from an empty folder to its report, with a handful of scenes; the real one is slow."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from counting_zoo.cli import main
from counting_zoo.quickstart import config, renew


@pytest.mark.parametrize("epochs", [1, 2])
def test_quickstart_leaves_model_report_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    monkeypatch.setenv("COUNTING_ZOO_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    sizes = '{"train": 16, "val": 4, "test": 6}'
    assert main(["quickstart", "--out", str(out), "--epochs", str(epochs), "--sizes", sizes]) == 0
    assert (out / "train" / "checkpoints" / "best.ckpt").is_file()
    report = (out / "test" / "report.html").read_text(encoding="utf-8")
    assert "always the training median" in report
    with open(out / "predictions" / "counts.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 12  # every image, every unseen class
    assert len({row["name"] for row in rows}) == 12
    for name in ("train", "test", "photos", "predictions"):  # may be replaced by the next quickstart
        (out / name / "old").touch()
        assert not any(renew(out / name).glob("[!.]*"))


@pytest.mark.parametrize("name", ["train", "test", "photos", "predictions"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_no_quickstart_wrote_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    monkeypatch.setattr("counting_zoo.cli._lightning", lambda *words: pytest.fail("it trains"))
    ours, theirs, own = tmp_path / ("train" if name != "train" else "photos"), tmp_path / name, tmp_path / "own"
    renew(ours)
    if kind == "folder":
        theirs.mkdir()
    elif kind == "link":
        theirs.symlink_to(renew(own))
    kept = theirs if kind == "file" else theirs / "mine.txt"
    kept.write_text("mine")
    (ours / "old.txt").touch()
    assert main(["quickstart", "--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(theirs) in lines[0]
    assert "--out" in lines[0]
    assert kept.read_text() == "mine"
    assert (ours / "old.txt").is_file()


@pytest.mark.parametrize("epochs", ["0", "-1"])
def test_no_epochs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], epochs: str) -> None:
    assert main(["quickstart", "--out", str(tmp_path / "out"), "--epochs", epochs]) == 2
    assert "--epochs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shipped_configurations_are_found() -> None:
    assert config("model/clip_count_small.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_bars_of_the_quick_start(tmp_path: Path, seed: int) -> None:
    """Unseen shape-colour pairs: far better than the median, and only for the name asked about."""
    out = tmp_path / "out"
    assert main(["quickstart", "--out", str(out), "--seed", str(seed)]) == 0
    with open(out / "test" / "metrics.csv", encoding="utf-8") as file:
        scores = {key: float(value) for key, value in list(csv.DictReader(file))[-1].items() if value}
    assert scores["test/mae"] <= 0.45 * scores["test/train_median_mae"]
    assert scores["test/absent_ratio"] <= 0.05
    assert scores["test/shuffled_mae"] > scores["test/train_median_mae"]
