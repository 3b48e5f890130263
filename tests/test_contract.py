"""Every shipped model on every shipped data set: it trains, is tested and predicts, or says why in one named error.

All pairs are run through the library, since a pair meets only there: the command line reads the two configurations
apart, and reading them costs more than training these small models. ``PAIRS`` go through the commands: every data set
once and every model at least once.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import lightning as L
import pytest
import tiny
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny import DATA, MODELS, OUTSIDE, data, model, run, trainer

from counting_zoo import Prediction, load
from counting_zoo.callbacks import PredictionWriter, TestReport
from counting_zoo.data.base import CountingDataModule
from counting_zoo.errors import InputError, NamesError, QueryError, SupervisionError

QUIET = trainer(callbacks=[])
MODEL_NAMES, DATA_NAMES = [path.stem for path in (*MODELS, *OUTSIDE)], [path.stem for path in DATA]
#: What each model and data set is run with through the commands.
PAIRS = [
    (MODEL_NAMES[i % len(MODEL_NAMES)], DATA_NAMES[i % len(DATA_NAMES)])
    for i in range(max(len(MODEL_NAMES), len(DATA_NAMES)))
]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTING_ZOO_DEBUG", "1")  # errors are raised, not printed
    monkeypatch.setenv("COUNTING_ZOO_ALLOW", "tiny_zoo")  # the models elsewhere


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


class Commands:
    """``fit``, ``test`` and ``predict`` as commands; no model for the last two: the checkpoint knows."""

    def fit(self, model_name: str, words: list[str]) -> None:
        assert run("fit", *trainer(), *model(model_name), *words) == 0

    def test(self, words: list[str], checkpoint: Path) -> None:
        assert run("test", *QUIET, *words, "--ckpt_path", checkpoint) == 0

    def predict(self, words: list[str], checkpoint: Path, name: str) -> None:
        asked = [*words, f"--data.classes=[{name}]"]
        assert run("predict", *QUIET, *asked, "--ckpt_path", checkpoint, "--predictions.dir=out") == 0


class Library:
    """The same with a trainer, on what the configurations build."""

    def fit(self, model_name: str, words: list[str]) -> None:
        best = ModelCheckpoint(monitor="val/mae", filename="best")
        L.seed_everything(0, verbose=False)
        self._trainer(best).fit(tiny.build("model", *model(model_name)), tiny.build("data", *words))

    def test(self, words: list[str], checkpoint: Path) -> None:
        self._trainer(TestReport()).test(load(checkpoint), tiny.build("data", *words), verbose=False)

    def predict(self, words: list[str], checkpoint: Path, name: str) -> None:
        datamodule = tiny.build("data", *words, f"--data.classes=[{name}]")
        self._trainer(PredictionWriter("out")).predict(load(checkpoint), datamodule, return_predictions=False)

    @staticmethod
    def _trainer(callback: L.Callback) -> L.Trainer:
        return L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_model_summary=False,
            enable_progress_bar=False,
            enable_checkpointing=isinstance(callback, ModelCheckpoint),
            default_root_dir="runs",
            logger=CSVLogger("runs", name="", version="a"),
            callbacks=[callback],
        )


@pytest.mark.parametrize("data_name", DATA_NAMES)
@pytest.mark.parametrize("model_name", MODEL_NAMES)
def test_library(model_name: str, data_name: str, copies: dict[str, list[str]]) -> None:
    fit_test_predict(Library(), model_name, data_name, copies)


@pytest.mark.parametrize(("model_name", "data_name"), PAIRS)
def test_commands(model_name: str, data_name: str, copies: dict[str, list[str]]) -> None:
    fit_test_predict(Commands(), model_name, data_name, copies)


def fit_test_predict(how: Commands | Library, model_name: str, data_name: str, copies: dict[str, list[str]]) -> None:
    words = copies[data_name]
    kind, own = tiny.build("model", *model(model_name)), tiny.build("data", *words)
    learns = any(keys <= own.provides for keys in kind.trains_on)
    # Data to train on where these do not serve: with example boxes where the model cannot do without.
    other = copies["fsc147" if "exemplars" in kind.asks_for else "folder"]
    try:
        how.fit(model_name, words)
    except NamesError as error:
        return refuses_other_names(how, model_name, words, other, str(error))
    except SupervisionError:
        assert not learns
        if "exemplars" in kind.asks_for:
            return refuses_without_examples(how, model_name, words, other)
        return None if own.provides & {"points", "counts"} else predicts_only(how, model_name, words, other)
    assert learns
    run_folder = Path("runs") / "a"
    best = run_folder / "checkpoints" / "best.ckpt"
    scored = rows(run_folder / "metrics.csv")
    assert all(math.isfinite(float(r["train/loss"])) for r in scored if r["train/loss"])
    assert any(math.isfinite(float(r["val/mae"])) for r in scored if r["val/mae"])

    how.test(words, best)
    per_image = rows(run_folder / "test_counts.csv")
    assert (run_folder / "report.html").stat().st_size > 1000
    library = load(best)
    for row in per_image[:2]:
        if image := next(copies_of(row["image"], words), None):
            # loading the checkpoint and calling it gives the number that the test reported
            found = library.count(image, row["name"], exemplars=examples_of(own, row["image"]))
            assert isinstance(found, Prediction)
            assert found[row["name"]] == pytest.approx(float(row["predicted"]), rel=1e-5)

    name = "figs" if library.vocabulary is None else library.vocabulary[0]
    if "exemplars" in kind.asks_for:  # which show the data's own names
        with pytest.raises(QueryError, match="exemplars"):
            how.predict(words, best, name)
        return None
    how.predict(words, best, name)
    predicted = rows(Path("out") / "counts.csv")
    ids = {row["image"] for row in predicted}
    assert ids
    assert len(ids) == len(predicted)  # one name, so each image once
    assert not rows(Path("out") / "errors.csv")
    # The first two predict every image below the root, the third those whose counts only the benchmark knows.
    if data_name not in ("folder", "vgg_cells", "nwpu_crowd"):
        assert ids == {row["image"] for row in per_image}
    with h5py.File(Path("out") / "densities.h5") as file:
        for row in predicted:
            assert file[row["density"]][:].sum() == pytest.approx(float(row["predicted"]), rel=1e-5, abs=1e-5)
            assert (Path("out") / row["overlay"]).is_file()


def refuses_other_names(
    how: Commands | Library, model_name: str, words: list[str], folder: list[str], said: str
) -> None:
    """A model with a fixed list refuses data with other names in the same words, whatever it is asked to do."""
    assert "common" in said
    assert not list(Path.cwd().rglob("*.ckpt"))  # before the first step
    how.fit(model_name, folder)
    best = next(Path.cwd().rglob("best.ckpt"))
    with pytest.raises(NamesError, match="common"):
        how.test(words, best)
    with pytest.raises(NamesError, match="common"):
        how.predict(words, best, "plums")


def examples_of(datamodule: CountingDataModule, image_id: str) -> Any:
    """The example boxes of an image in the test split, which the model was shown too; ``None`` without any."""
    record = next(record for record in datamodule.records("test") if record.image_id == image_id)
    return record.exemplars


def refuses_without_examples(how: Commands | Library, model_name: str, words: list[str], shown: list[str]) -> None:
    """A model that cannot do without example boxes is neither trained, scored nor asked without any."""
    assert not list(Path.cwd().rglob("*.ckpt"))  # before the first step
    how.fit(model_name, shown)
    best = next(Path.cwd().rglob("best.ckpt"))
    with pytest.raises(QueryError, match="exemplars"):
        how.test(words, best)
    with pytest.raises(QueryError, match="exemplars"):
        how.predict(words, best, "figs")


def predicts_only(how: Commands | Library, model_name: str, words: list[str], folder: list[str]) -> None:
    """A counter refuses to fit or to be scored on pictures that nothing is counted in, and predicts on them."""
    assert not list(Path.cwd().rglob("*.ckpt"))  # before the first step
    how.fit(model_name, folder)
    best = next(Path.cwd().rglob("best.ckpt"))
    with pytest.raises(InputError, match="counts"):
        how.test(words, best)
    how.predict(words, best, "figs")
    assert len(rows(Path("out") / "counts.csv")) == 2
    assert not rows(Path("out") / "errors.csv")


@pytest.mark.parametrize("model_name", MODEL_NAMES)
def test_counts_alone(model_name: str, copies: dict[str, list[str]], tmp_path: Path) -> None:
    """Image-level counts: a model that needs more refuses to fit before the first step, and is still tested on them."""
    words, how = data("folder", tiny.write_counts_folder(tmp_path / "counted")), Library()
    try:
        how.fit(model_name, words)
    except SupervisionError as error:
        said = str(error)
        assert "points" in said
        assert "ImageFolder" in said
        assert "counts" in said
        assert not list(tmp_path.rglob("*.ckpt"))
    if "exemplars" in tiny.build("model", *model(model_name)).asks_for:
        return refuses_without_examples(how, model_name, words, copies["fsc147"])
    how.fit(model_name, copies["folder"])
    best = tmp_path / "runs" / "a" / "checkpoints" / "best.ckpt"
    how.test(words, best)
    assert len(rows(tmp_path / "runs" / "a" / "test_counts.csv")) == 2
    how.predict(words, best, "figs")


def test_no_annotation_at_all_still_predicts(copies: dict[str, list[str]], tmp_path: Path) -> None:
    run("fit", *trainer(), *model("clip_count_small"), *copies["scenes_easy"])
    best = tmp_path / "runs" / "a" / "checkpoints" / "best.ckpt"
    tiny.fakes.write_image(tmp_path / "photos" / "one.jpg", tiny.fakes.draw_points(3, 48, 64, 0))
    names = ["--data=ImageFolder", f"--data.root={tmp_path / 'photos'}", "--data.num_workers=0"]
    assert run("predict", *QUIET, *names, "--data.classes=[plums, kiwis]", "--ckpt_path", best) == 0
    found = rows(tmp_path / "predictions" / "counts.csv")
    assert [(row["image"], row["name"]) for row in found] == [("one.jpg", "plums"), ("one.jpg", "kiwis")]
    library = load(best).count(tmp_path / "photos" / "one.jpg", ["plums", "kiwis"])
    assert isinstance(library, Prediction)
    for row, count in zip(found, library.counts.tolist(), strict=True):
        assert float(row["predicted"]) == pytest.approx(count, rel=1e-5)  # the command and the library agree


def test_every_data_module_has_a_configuration() -> None:
    import counting_zoo

    shipped = "".join(path.read_text(encoding="utf-8") for path in DATA)
    for name in counting_zoo.__all__:
        kind = getattr(counting_zoo, name)
        if isinstance(kind, type) and issubclass(kind, CountingDataModule) and kind is not CountingDataModule:
            assert f"class_path: {name}\n" in shipped, f"{name} has no YAML in configs/data"
