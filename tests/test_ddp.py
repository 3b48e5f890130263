"""Several processes give what one gives: metrics, files and gradients (D1-D3), from the command line."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("ddp_script.py")


def launch(folder: Path, part: str) -> Path:
    """Run a part of ``ddp_script.py`` in a folder."""
    path = os.pathsep.join([str(SCRIPT.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("short"), "short")


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("long"), "long")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("blocks"), "blocks")


@pytest.fixture(scope="module")
def low_counts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("low_counts"), "low_counts")


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("pretraining"), "pretraining")


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("detectors"), "detectors")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def scores(folder: Path) -> dict[str, float]:
    """The last value of every column of ``metrics.csv``."""
    return {key: float(value) for row in rows(folder / "metrics.csv") for key, value in row.items() if value}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def check_scores(results: Path, name: str, world: int) -> None:
    """D1: five test pictures on several processes score as on one, and each appears once."""
    one, many = (scores(results / "runs" / f"test_{name}_{n}") for n in (1, world))
    assert one["test/n"] == 5
    assert many == pytest.approx(one, rel=1e-9)
    assert "test/shuffled_mae" in one  # wrong prompts too
    tables = [rows(results / "runs" / f"test_{name}_{n}" / "test_counts.csv") for n in (1, world)]
    assert len(tables[0]) == 5
    assert tables[0] == tables[1]


def check_stages(results: Path, name: str) -> None:
    """Contrast, then density, without searching for unused parameters; validation counts each of 3 pictures once."""
    found = scores(results / "runs" / f"fit_{name}")
    assert found["val/n"] == 3
    assert {"train/contrast", "train/density"} <= found.keys()
    trained = weights(results / "runs" / f"fit_{name}" / "checkpoints" / "last.ckpt")
    assert all(torch.isfinite(value).all() for value in trained.values())


def check_predictions(results: Path, n: int) -> None:
    """``n`` pictures and a broken one on two processes leave the same files as on one."""
    for name in ("counts.csv", "points.csv", "errors.csv"):
        one, two = (rows(results / f"predicted{n}_{world}" / name) for world in (1, 2))
        assert one == two, name
        assert len(one) == {"counts.csv": 2 * n, "errors.csv": 1}.get(name, len(one))


def test_two_processes(short: Path) -> None:
    """D1, and one (broken) picture for two processes."""
    check_stages(short, "clip_count")
    check_scores(short, "clip_count", 2)
    check_predictions(short, 0)


@pytest.mark.slow
def test_small_configuration(long: Path) -> None:
    """D1 with the configuration of the quick start, on two and on four processes."""
    check_stages(long, "clip_count_small")
    check_scores(long, "clip_count_small", 2)
    check_scores(long, "clip_count_small", 4)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 5])
def test_predictions(long: Path, n: int) -> None:
    check_predictions(long, n)


@pytest.mark.slow
def test_fewer_images_than_processes(long: Path) -> None:
    """D2: three pictures on four processes."""
    one, four = (scores(long / "runs" / f"fsc_{n}") for n in (1, 4))
    assert one["test/n"] == 3
    assert four == pytest.approx(one, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["contrast", "density"])
@pytest.mark.parametrize("contrast", ["patch", "region"])
def test_gradients_do_not_depend_on_processes(long: Path, contrast: str, stage: str) -> None:
    """D3: one step on the same eight pictures, in one batch or as two halves, ends at the same weights."""
    one, two = (weights(long / "runs" / f"{contrast}_{stage}_{n}" / "checkpoints" / "last.ckpt") for n in (1, 2))
    for key, value in one.items():
        scale = max(1.0, float(value.abs().max()))  # of the gradient, beside which a weight is small
        assert float((value - two[key]).abs().max()) < 1e-5 * scale, key
    other = weights(long / "runs" / "patch_contrast_1" / "checkpoints" / "last.ckpt")
    if (contrast, stage) != ("patch", "contrast"):
        assert any(not torch.equal(one[key], other[key]) for key in one)  # each combination is another step


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dm", "multiscale"])
@pytest.mark.parametrize("name", ["clip_ebc", "ebc_small"])
def test_blockwise_gradients_do_not_depend_on_processes(blocks: Path, name: str, loss: str) -> None:
    """D3 for sums over blocks and for the transport."""
    one, two = (weights(blocks / "runs" / f"{name}_{loss}_{n}" / "checkpoints" / "last.ckpt") for n in (1, 2))
    for key, value in one.items():
        scale = max(1.0, float(value.abs().max()))
        assert float((value - two[key]).abs().max()) < 1e-4 * scale, key
    others = {"dm": "multiscale", "multiscale": "dm"}
    other = weights(blocks / "runs" / f"{name}_{others[loss]}_1" / "checkpoints" / "last.ckpt")
    assert any(not torch.equal(one[key], other[key]) for key in one)  # each loss is another step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pooled", "per_class", "negatives", "modulated", "first"])
def test_lower_count_does_not_depend_on_processes(low_counts: Path, name: str) -> None:
    """D3, D5: losses and gradients of eight pictures, four of them on a process that sees no count of 1 to 4."""
    (one,), two = ([torch.load(low_counts / f"terms/{name}_{n}_{r}.pt") for r in range(n)] for n in (1, 2))
    assert [terms["low"] for terms in two] == [one["low"], 0]
    assert one["low"] > 0
    for term, value in one.items():
        if term != "low":
            assert sum(terms[term] for terms in two) / 2 == pytest.approx(value, rel=1e-5), term  # as DDP averages
    one_step, two_steps = (weights(low_counts / f"{name}_{n}.ckpt") for n in (1, 2))
    assert one_step.keys() == two_steps.keys()
    for key, value in one_step.items():
        scale = max(1.0, float(value.abs().max()))  # a rate of 1 makes weights show gradients
        assert float((value - two_steps[key]).abs().max()) < 1e-5 * scale, key
    if name != "pooled":
        other = weights(low_counts / "pooled_1.ckpt")
        assert any(not torch.equal(one_step[key], other.get(key, value)) for key, value in one_step.items())


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["teacher", "boxes"])
def test_pretraining_that_gathers_all_does_not_depend_on_processes(pretraining: Path, labels: str) -> None:
    """D3: three losses and all gradients of eight pictures, although one of two processes sees no box."""
    (one,), two = ([torch.load(pretraining / f"terms/{labels}_all_{n}_{r}.pt") for r in range(n)] for n in (1, 2))
    assert [terms.pop("boxes") for terms in two] == [one.pop("boxes"), 0]
    assert one.keys() == {"region_text", "distillation", "image_text"}
    assert min(one.values()) > 1e-3
    for terms in two:
        assert terms == pytest.approx(one, rel=1e-5)
    one_step, two_steps = (weights(pretraining / f"{labels}_all_{n}.ckpt") for n in (1, 2))
    for key, value in one_step.items():
        scale = max(1.0, float(value.abs().max()))  # a rate of 1 makes weights show gradients
        assert float((value - two_steps[key]).abs().max()) < 1e-5 * scale, key


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["teacher", "boxes"])
def test_pretraining_that_gathers_less(pretraining: Path, labels: str) -> None:
    """``image_text`` has pictures and captions of all processes and regions of its own, ``none`` nothing of others."""
    whole = torch.load(pretraining / f"terms/{labels}_all_1_0.pt")
    ranks = {
        g: [torch.load(pretraining / f"terms/{labels}_{g}_2_{r}.pt") for r in (0, 1)] for g in ("image_text", "none")
    }
    for i, (gathered, alone) in enumerate(zip(*ranks.values(), strict=True)):
        assert gathered["image_text"] == pytest.approx(whole["image_text"], rel=1e-5)
        assert alone["image_text"] != pytest.approx(whole["image_text"], rel=1e-3)
        for term in ("region_text", "distillation"):
            # All boxes are those of the first process, so what it calculates alone is the whole.
            expected = 0.0 if i else whole[term]
            assert gathered[term] == alone[term] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    one, *others = (weights(pretraining / f"{labels}_{g}_2.ckpt") for g in ("all", "image_text", "none"))
    for other in others:
        assert any(not torch.allclose(value, other[key], atol=1e-4) for key, value in one.items() if value.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_processes_calibrate_as_one(detectors: Path, world: int) -> None:
    """D1 for the threshold, which all pictures of validation choose: also by a process that has none of the three."""
    one, many = (scores(detectors / "runs" / f"validate_detector_{n}") for n in (1, world))
    assert one["val/n"] == 3
    assert many == pytest.approx(one, rel=1e-6)
    assert "val/threshold" in one
    check_scores(detectors, "detector", world)
    assert any(float(row["predicted"]) for row in rows(detectors / "runs" / "test_detector_1" / "test_counts.csv"))
    trained = weights(detectors / "runs" / "fit_detector" / "checkpoints" / "last.ckpt")
    fitted = scores(detectors / "runs" / "fit_detector")
    assert float(trained["threshold"]) == pytest.approx(fitted["val/threshold"]) == pytest.approx(one["val/threshold"])
