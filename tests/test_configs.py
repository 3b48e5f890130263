"""Every shipped YAML file, found by globbing, read by the real parser."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from tiny import CONFIGS, DATA, MODELS, TRAINERS, WHOLE, run

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.synthetic import SceneSet
from counting_zoo.lightning_cli import made_from_config
from counting_zoo.quickstart import config_or_path

ALL = sorted(CONFIGS.rglob("*.yaml"))
COMBINATIONS = list(
    itertools.islice(
        zip(itertools.cycle(TRAINERS), itertools.cycle(MODELS), DATA, strict=False), max(len(DATA), len(MODELS))
    )
)


def words(*paths: Path) -> list[str]:
    return [word for path in paths for word in ("--config", str(path))]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What ``--print_config`` shows."""
    capsys.readouterr()
    assert run(*arguments, "--print_config") == 0
    return yaml.safe_load(capsys.readouterr().out)


def stem(value: Any) -> str | None:
    return value.stem if isinstance(value, Path) else None


def test_there_are_configurations() -> None:
    assert TRAINERS
    assert MODELS
    assert DATA
    assert sorted([*TRAINERS, *MODELS, *DATA, *WHOLE]) == ALL, "a YAML in another folder is not tested"


@pytest.mark.parametrize(("trainer", "model", "data"), COMBINATIONS, ids=stem)
def test_combinations_parse(trainer: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, "fit", *words(trainer, model, data))
    for path in (trainer, model, data):
        _holds(yaml.safe_load(path.read_text(encoding="utf-8")), shown, path.stem)


@pytest.mark.parametrize("path", WHOLE, ids=stem)
def test_whole_recipes_parse(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trainer, model and data in one file."""
    _holds(yaml.safe_load(path.read_text(encoding="utf-8")), printed(capsys, "fit", *words(path)), path.stem)


def _holds(wanted: Any, shown: Any, where: str) -> None:
    """Every setting of a file arrives (class paths may be written out)."""
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            if key == "class_path":
                assert shown[key].split(".")[-1] == value.split(".")[-1], where
            else:
                assert key in shown, f"{where}.{key}"
                _holds(value, shown[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(wanted) == len(shown), where
        for i, (a, b) in enumerate(zip(wanted, shown, strict=True)):
            _holds(a, b, f"{where}[{i}]")
    else:
        assert shown == wanted, where


@pytest.mark.parametrize("path", [p for p in TRAINERS if p.stem != "cpu"], ids=stem)
def test_trainers_compose(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, "fit", *words(CONFIGS / "trainer" / "cpu.yaml", path, MODELS[0], DATA[0]))
    _holds(yaml.safe_load(path.read_text(encoding="utf-8")), shown, path.stem)
    assert shown["trainer"]["callbacks"], f"{path.name} lost the callbacks of the file before it"


@pytest.mark.parametrize("path", DATA, ids=stem)
def test_data_parses_for_every_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("test", "predict"):
        assert printed(capsys, command, *words(MODELS[0], path))["data"]["class_path"].startswith("counting_zoo.")


def test_short_names_and_the_last_word_wins(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(
        capsys,
        "fit",
        *words(MODELS[-1]),
        "--data=SyntheticScenes",
        "--data.preset=low",
        "--data.preset=full",
        "--model=CLIPCount",
    )
    assert shown["model"]["class_path"] == "counting_zoo.CLIPCount"
    assert shown["data"]["class_path"].endswith("SyntheticScenes")
    assert shown["data"]["init_args"]["preset"] == "full"


def test_no_optimizer_leaks_into_another(capsys: pytest.CaptureFixture[str]) -> None:
    """A default AdamW would hand its weight decay to whatever optimizer the user names."""
    published = CONFIGS / "model" / "clip_count.yaml"
    shown = printed(capsys, "fit", *words(published, DATA[0]))
    assert shown["model"]["init_args"]["optimizer"] is None
    sgd = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"]
    shown = printed(capsys, "fit", *words(published, DATA[0]), *sgd)
    optimizer = shown["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.SGD"
    assert optimizer["init_args"]["lr"] == 0.1
    assert not optimizer["init_args"]["weight_decay"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("model: {init_args: {windw: 3}}", "windw"),
        ("data: {init_args: {bach_size: 3}}", "bach_size"),
        ("trainer: {max_epoch: 3}", "max_epoch"),
        ("modle: {a: 1}", "modle"),
        ("model: {init_args: {window: many}}", "window"),
        ("data: {init_args: {batch_size: 2.5}}", "batch_size"),
        ("model: {class_path: NoSuchModel}", "NoSuchModel"),
        ("data: {class_path: Counting}", "Counting"),
        ("model: [", "wrong.yaml"),
    ],
)
def test_unknown_keys_and_wrong_values_are_errors(
    wrong: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text(wrong)
    assert run("fit", *words(MODELS[0], DATA[0], tmp_path / "wrong.yaml"), "--print_config") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "word", ["--model.windw=3", "--data.bach_size=3", "--trainer.max_epoch=3", "--modle=CLIPCount"]
)
def test_unknown_options_are_errors(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", *words(MODELS[0], DATA[0]), word) == 2
    assert word.split("=")[0].lstrip("-").split(".")[-1] in capsys.readouterr().err


def test_a_missing_file_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "--config", "no/such.yaml") == 2
    assert "no/such.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("path", TRAINERS, ids=lambda p: p.stem)
def test_the_last_checkpoint_is_the_last(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever validation says: with ``save_last`` Lightning would keep that of the last best epoch."""
    monkeypatch.chdir(tmp_path)
    found = yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"].get("callbacks")
    if found is None:
        pytest.skip(f"{path.name} names no callbacks")
    chosen = [callback for callback in found if callback["class_path"].endswith("ModelCheckpoint")]
    words = tiny.data("folder", tiny.write_counts_folder(tmp_path / "counted"))
    best = chosen[0]["init_args"] | {"monitor": "epoch"}  # the first epoch is the best
    settings = [{"class_path": "ModelCheckpoint", "init_args": a} for a in (best, chosen[1]["init_args"])]
    options = tiny.trainer(max_epochs=3, check_val_every_n_epoch=2, callbacks=settings)
    assert tiny.run("fit", *options, *tiny.model("lower_count_small"), *words) == 0
    last = torch.load(tmp_path / "runs" / "a" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 2


@pytest.mark.parametrize(
    "names",
    [
        ("quick", "clip_count_small", "scenes_easy"),
        ("trainer/quick", "model/clip_count_small", "data/scenes_easy"),
        ("configs/trainer/quick.yaml", "configs/model/clip_count_small.yaml", "configs/data/scenes_easy.yaml"),
    ],
    ids=["names", "folders", "paths"],
)
def test_shipped_configurations_are_found_from_any_folder(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer, model, data = names
    shown = printed(capsys, "fit", "--config", trainer, f"--config={model}", "-c", data)
    for path in (
        CONFIGS / "trainer/quick.yaml",
        CONFIGS / "model/clip_count_small.yaml",
        CONFIGS / "data/scenes_easy.yaml",
    ):
        _holds(yaml.safe_load(path.read_text(encoding="utf-8")), shown, path.stem)


def test_a_file_of_the_working_directory_wins_over_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(config_or_path("quick")) == CONFIGS / "trainer/quick.yaml"
    Path("quick").write_text("trainer: {max_epochs: 3}\n", encoding="utf-8")
    assert config_or_path("quick") == "quick"
    for unknown in ("quicker", "trainer/clip_count", "configs/elsewhere/quick.yaml", "../trainer/quick.yaml", "a: 1"):
        assert config_or_path(unknown) == unknown


def test_shipped_names_are_unique() -> None:
    assert len({path.stem for path in ALL}) == len(ALL)


@pytest.mark.parametrize(
    ("kind", "options", "attribute", "expected"),
    [
        ("ImageFolder", {"picture": "{stem}cell.png", "root": "."}, "image", "{stem}cell.png"),
        ("counting_zoo.data.folder.CaptionedPictures", {"pictures": "train", "root": "."}, "images", "train"),
        ("SyntheticScenes", {"preset": "easy", "split_by": "picture"}, "scenes", SceneSet("easy", "image")),
    ],
)
def test_data_under_the_names_of_the_first_edition(
    tmp_path: Path, kind: str, options: dict[str, Any], attribute: str, expected: Any
) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"data": {"class_path": kind, "init_args": options}}))
    found = getattr(made_from_config(CountingDataModule, "data", path, {}), attribute)
    assert (found["train"] if isinstance(found, dict) else found) == expected


def test_scenes_keep_the_folder_of_the_first_edition() -> None:
    assert SceneSet("low", "image").folder_name == "low-a67da378ca"
