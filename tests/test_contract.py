"""Every shipped model on every shipped data set, through every command: it works, or says why in one named error."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
import tiny
from tiny import DATA, MODELS, UNCOUNTED, data, model, run, trainer

from counting_zoo import Prediction, load
from counting_zoo.data.base import CountingDataModule
from counting_zoo.errors import InputError, NamesError, SupervisionError

QUIET = trainer(callbacks=[])


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTING_ZOO_DEBUG", "1")  # errors are raised, not printed


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Small copies of all data sets, written once; the words that read them."""
    root = tmp_path_factory.mktemp("data")
    return {path.stem: data(path.stem, tiny.write_data(path.stem, root / path.stem)) for path in DATA}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def copies_of(image: str, words: list[str]) -> Iterator[Path]:
    """The file of a picture below the data's root; nothing for a pack."""
    (root,) = (Path(word.partition("=")[2]) for word in words if word.startswith("--data.root="))
    return root.rglob(image) if root.is_dir() else iter(())


@pytest.mark.parametrize("data_name", [path.stem for path in DATA])
@pytest.mark.parametrize("model_name", [path.stem for path in MODELS])
def test_fit_test_predict(model_name: str, data_name: str, copies: dict[str, list[str]], tmp_path: Path) -> None:
    words = copies[data_name]
    try:
        assert run("fit", *trainer(), *model(model_name), *words) == 0
    except NamesError as error:
        return refuses_other_names(model_name, words, copies["folder"], str(error))
    except SupervisionError as error:
        assert data_name in UNCOUNTED
        return predicts_only(model_name, words, copies["folder"], str(error))
    assert data_name not in UNCOUNTED
    best = tmp_path / "runs" / "a" / "checkpoints" / "best.ckpt"
    scored = rows(tmp_path / "runs" / "a" / "metrics.csv")
    assert all(math.isfinite(float(r["train/loss"])) for r in scored if r["train/loss"])
    assert any(math.isfinite(float(r["val/mae"])) for r in scored if r["val/mae"])

    assert run("test", *QUIET, *words, "--ckpt_path", best) == 0  # no model: the checkpoint knows
    per_image = rows(tmp_path / "runs" / "a" / "test_counts.csv")
    assert (tmp_path / "runs" / "a" / "report.html").stat().st_size > 1000
    library = load(best)
    for row in per_image[:2]:
        if picture := next(copies_of(row["image"], words), None):
            # loading the checkpoint and calling it gives the number that the test reported
            found = library.count(picture, row["name"])
            assert isinstance(found, Prediction)
            assert found[row["name"]] == pytest.approx(float(row["predicted"]), rel=1e-5)

    name = "figs" if library.vocabulary is None else library.vocabulary[0]
    assert run("predict", *QUIET, *words, f"--data.classes=[{name}]", "--ckpt_path", best, "--predictions.dir=out") == 0
    predicted = rows(tmp_path / "out" / "counts.csv")
    ids = {row["image"] for row in predicted}
    assert ids
    assert len(ids) == len(predicted)  # one name, so each picture once
    assert not rows(tmp_path / "out" / "errors.csv")
    # The first two predict every picture below the root, the third those whose counts only the benchmark knows.
    if data_name not in ("folder", "vgg_cells", "nwpu_crowd"):
        assert ids == {row["image"] for row in per_image}
    with h5py.File(tmp_path / "out" / "densities.h5") as file:
        for row in predicted:
            assert file[row["density"]][:].sum() == pytest.approx(float(row["count"]), rel=1e-5, abs=1e-5)
            assert (tmp_path / "out" / row["overlay"]).is_file()


def refuses_other_names(model_name: str, words: list[str], folder: list[str], said: str) -> None:
    """A model with a fixed list refuses data with other names in the same words, whatever it is asked to do."""
    assert "no name in common" in said
    assert not list(Path.cwd().rglob("*.ckpt"))  # before the first step
    run("fit", *trainer(), *model(model_name), *folder)
    best = next(Path.cwd().rglob("best.ckpt"))
    for command in (["test"], ["predict", "--data.classes=[plums]"]):
        with pytest.raises(NamesError, match="no name in common"):
            run(*command, *QUIET, *words, "--ckpt_path", best)


def predicts_only(model_name: str, words: list[str], folder: list[str], said: str) -> None:
    """A counter refuses to fit or to be scored on pictures that nothing is counted in, and predicts on them."""
    assert "captions" in said
    assert not list(Path.cwd().rglob("*.ckpt"))  # before the first step
    run("fit", *trainer(), *model(model_name), *folder)
    best = next(Path.cwd().rglob("best.ckpt"))
    with pytest.raises(InputError, match="no counts"):
        run("test", *QUIET, *words, "--ckpt_path", best)
    assert run("predict", *QUIET, *words, "--data.classes=[figs]", "--ckpt_path", best, "--predictions.dir=out") == 0
    assert len(rows(Path("out") / "counts.csv")) == 2
    assert not rows(Path("out") / "errors.csv")


@pytest.mark.parametrize("model_name", [path.stem for path in MODELS])
def test_counts_alone(model_name: str, copies: dict[str, list[str]], tmp_path: Path) -> None:
    """Image-level counts: a model that needs more refuses to fit before the first step, and is still tested on them."""
    words = data("folder", tiny.write_counts_folder(tmp_path / "counted"))
    try:
        run("fit", *trainer(), *model(model_name), *words)
    except SupervisionError as error:
        said = str(error)
        assert "points" in said
        assert "ImageFolder" in said
        assert "counts" in said
        assert not list(tmp_path.rglob("*.ckpt"))
    run("fit", *trainer(), *model(model_name), *copies["folder"])
    best = tmp_path / "runs" / "a" / "checkpoints" / "best.ckpt"
    assert run("test", *QUIET, *words, "--ckpt_path", best) == 0
    assert len(rows(tmp_path / "runs" / "a" / "test_counts.csv")) == 2
    assert run("predict", *QUIET, *words, "--data.classes=[figs]", "--ckpt_path", best, "--predictions.dir=out") == 0


def test_no_annotation_at_all_still_predicts(copies: dict[str, list[str]], tmp_path: Path) -> None:
    run("fit", *trainer(), *model("clip_count_small"), *copies["scenes_easy"])
    best = tmp_path / "runs" / "a" / "checkpoints" / "best.ckpt"
    tiny.fakes.write_picture(tmp_path / "photos" / "one.jpg", tiny.fakes.draw_points(3, 48, 64, 0))
    names = ["--data=ImageFolder", f"--data.root={tmp_path / 'photos'}", "--data.num_workers=0"]
    assert run("predict", *QUIET, *names, "--data.classes=[plums, kiwis]", "--ckpt_path", best) == 0
    found = rows(tmp_path / "predictions" / "counts.csv")
    assert [(row["image"], row["name"]) for row in found] == [("one.jpg", "plums"), ("one.jpg", "kiwis")]
    library = load(best).count(tmp_path / "photos" / "one.jpg", ["plums", "kiwis"])
    assert isinstance(library, Prediction)
    for row, count in zip(found, library.counts.tolist(), strict=True):
        assert float(row["count"]) == pytest.approx(count, rel=1e-5)  # the command and the library agree


def test_every_data_module_has_a_configuration() -> None:
    import counting_zoo

    shipped = "".join(path.read_text(encoding="utf-8") for path in DATA)
    for name in counting_zoo.__all__:
        kind = getattr(counting_zoo, name)
        if isinstance(kind, type) and issubclass(kind, CountingDataModule) and kind is not CountingDataModule:
            assert f"class_path: {name}\n" in shipped, f"{name} has no YAML in configs/data"
