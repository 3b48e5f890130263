"""Names in annotation files that a model with a fixed list does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import data, model, run, trainer, write_counts_folder

from counting_zoo.errors import InputError, NamesError


def write(root: Path, rows: str) -> list[str]:
    options = write_counts_folder(root)
    (root / "counts.csv").write_text(rows)
    return data("folder", options)


ROWS = "image,label,count\n" + "".join(f"{i}.png,figs,{i % 3}\n" for i in range(8))


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTING_ZOO_DEBUG", "1")


def test_a_slip_of_the_pen_is_no_new_class(tmp_path: Path) -> None:
    words = write(tmp_path / "d", ROWS + "".join(f"{i}.png,fgis,1\n" for i in range(8)))
    with pytest.raises(NamesError, match="fgis"):
        run("fit", *trainer(), *model("lower_count_small", classes=["figs"]), *words)
    with pytest.raises(InputError, match="fgis"):  # with the names in the data, the file and row are named
        run("fit", *trainer(), *model("lower_count_small", classes=["figs"]), *words, "--data.classes=[figs]")


@pytest.mark.parametrize(
    ("row", "said"), [("0.png,figs,-1", "-1"), ("0.png,figs,1.5", "1.5"), ("0.png,figs,many", "many")]
)
def test_counts_that_are_none(row: str, said: str, tmp_path: Path) -> None:
    words = write(tmp_path / "d", "image,label,count\n" + row + "\n" + "".join(ROWS.splitlines(True)[2:]))
    with pytest.raises(InputError, match=rf"counts.csv.*(line|row) 2[\s\S]*{said}"):
        run("fit", *trainer(), *model("lower_count_small"), *words)
