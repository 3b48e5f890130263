"""What RegionCLIP's counter learns of the built-in scenes in minutes: the bars that it is held to."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from counting_zoo import SyntheticScenes, load
from counting_zoo.cli import main
from counting_zoo.quickstart import config


@pytest.mark.slow
@pytest.mark.parametrize("start", ["small", "null"])
def test_bars_of_counting_by_detection(tmp_path: Path, start: str) -> None:
    """Unseen shape-colour pairs: half the median's error, and less than one object of an absent kind."""
    data = ["--config", str(config("data/scenes_easy.yaml")), "--data.prompts", "5", "--data.num_workers", "0"]
    logger = ["--trainer.logger.save_dir", str(tmp_path), "--trainer.logger.version", ""]
    quiet = ["--trainer.enable_progress_bar", "false"]
    model_yaml = str(config("model/region_clip_counter_small.yaml"))
    epochs = "6" if start == "small" else "16"
    assert (
        main(
            [
                "fit",
                "--config",
                str(config("trainer/quick.yaml")),
                "--config",
                model_yaml,
                *data,
                *logger,
                *quiet,
                "--model.pretrained_encoder",
                start,
                "--model.boxes",
                "examples",
                "--trainer.max_epochs",
                epochs,
            ]
        )
        == 0
    )
    (best,) = tmp_path.rglob("best.ckpt")
    assert main(["test", "--ckpt_path", str(best), *data, *logger, "--trainer.logger.name", "test"]) == 0
    with (tmp_path / "test" / "metrics.csv").open(encoding="utf-8") as file:
        scores = {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}
    assert scores["test/mae"] <= 0.5 * scores["test/train_median_mae"]

    model, scenes = load(best), SyntheticScenes()
    names = scenes.class_names("test")
    absent = []
    for record in scenes.records("test")[:60]:
        others = [name for name in names if name not in record.classes]
        absent.append(float(model.count(record.path, others).counts.mean()))
    assert sum(absent) / len(absent) <= 1
