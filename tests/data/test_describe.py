"""What a data set holds, as plain data, as tables and from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from rich.console import Console

from counting_zoo.cli import main
from counting_zoo.data.checks import fingerprint
from counting_zoo.data.describe import SplitDescription, constant_scores, describe, print_description
from counting_zoo.data.folder import ImageFolder
from counting_zoo.data.fsc147 import FSC147
from counting_zoo.data.synthetic import SyntheticScenes
from counting_zoo.errors import InputError


def described(data: Any, split: str) -> SplitDescription:
    found = describe(data)[split]  # type: ignore[index]
    assert isinstance(found, SplitDescription)
    return found


def test_numbers_of_a_split(tmp_path: Path) -> None:
    fakes.fsc147(tmp_path)  # image n has n points
    data = FSC147(tmp_path)
    found = described(data, "test")
    assert (found.annotated, found.there, found.objects, found.names) == (3, 3, 24, 1)
    assert found.counts == {"min": 7, "median": 8, "mean": 8, "max": 9}
    assert found.sha256 == fingerprint(data.records("test"))["sha256"]
    assert found.constants["mean"]["mae"] == np.mean([4.5, 5.5, 6.5])  # training has 1, 2, 3 and 4
    assert found.constants["median"]["rmse"] == pytest.approx(np.sqrt(np.mean([4.5**2, 5.5**2, 6.5**2])))


def test_images_without_their_file_count_too(tmp_path: Path) -> None:
    fakes.fsc147(tmp_path)
    complete = describe(FSC147(tmp_path))
    for name in ("1", "5", "6", "8"):
        (tmp_path / "images_384_VarV2" / f"{name}.jpg").unlink()
    data = FSC147(tmp_path, missing="skip", constants={"mean": 2.5, "median": 2.5})
    with pytest.warns(UserWarning, match=r"data\.missing"):
        partial = describe(data)
    for split, there in (("train", 3), ("val", 0), ("test", 2)):
        before, after = complete[split], partial[split]  # type: ignore[index]
        assert isinstance(before, SplitDescription)
        assert isinstance(after, SplitDescription)
        assert (before.annotated, before.counts, before.constants) == (after.annotated, after.counts, after.constants)
        assert after.there == there
        assert (after.sha256 is None) == (there == 0)
    assert constant_scores(data, "val")["mean"]["mae"] == 3
    refused = describe(FSC147(tmp_path))["val"]
    assert isinstance(refused, InputError)
    assert "2 of 2" in str(refused)


def test_every_class_has_its_own_constant(tmp_path: Path) -> None:
    sizes = {"train": 5, "val": 2, "test": 4}
    data = SyntheticScenes(tmp_path / "s", preset="low", sizes=sizes, num_workers=0)
    counts = np.array([record.counts for record in data.records("train")])
    target = np.array([record.counts for record in data.records("test")])
    assert target.shape == (4, 12)
    found = described(data, "test")
    assert found.constants["mean"]["mae"] == pytest.approx(np.abs(counts.mean(0) - target).mean())
    assert found.constants["median"]["mae"] == pytest.approx(np.abs(np.median(counts, axis=0) - target).mean())
    assert found.counts["max"] == target.sum(1).max()
    assert found.objects == target.sum()


def test_printed(tmp_path: Path) -> None:
    fakes.fsc147(tmp_path)
    console = Console(width=80, record=True, quiet=False)
    found = describe(FSC147(tmp_path))
    found["val"] = InputError("[red]data.root[/red] is not set")
    print_description(found, console)
    lines = console.export_text().splitlines()
    assert any(line.split("│")[1:4] == [" test  ", "      3 ", "     3 "] for line in lines)
    assert sum(" mean " in line for line in lines) == 3  # a head, and a row each of train and test
    assert "val: [red]data.root[/red] is not set" in lines
    assert f"test: sha256 {described(FSC147(tmp_path), 'test').sha256}" in lines
    nothing = Console(width=80, record=True)
    print_description({"test": InputError("gone")}, nothing)
    assert nothing.export_text() == "test: gone\n"


def test_the_protocol_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.voc(tmp_path)
    words = ["describe", "--data", "VOCCounts", "--data.root", str(tmp_path)]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "protocol: folder VOC2007, difficult exclude, train_split train" in first
    assert main([*words, "--data.difficult", "include"]) == 0
    second = capsys.readouterr().out
    assert "difficult include" in second
    assert second != first.replace("exclude", "include")  # so are the numbers


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fakes.folder(tmp_path / "cells", {"a.png": [(1, 2), (3, 4)], "b.png": [(1, 2)]})
    words = ["describe", "--data", "ImageFolder", "--data.root"]
    assert main([*words, "cells"]) == 0
    said = capsys.readouterr().out
    assert "constant" in said  # all images are the test split
    assert "data.splits" in said
    assert described(ImageFolder("cells"), "test").sha256 in said  # type: ignore[operator]
    assert main([*words, "cells", "--data.constants", "{mean: 1}"]) == 0
    assert " 0.50 " in capsys.readouterr().out
    assert main([*words, "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().out
