"""Faults planted in people's data, files and configurations, end to end; ids are those of the reliability battery.

What is held elsewhere: F2, F18 test_checksums, test_pack; F10, F12, F14 test_data_checks; F16, F19-F21 test_folder,
test_shanghaitech; F17 test_data_base; D1-D3 test_ddp; R5 test_module; R6 test_resume; R9 test_loading; S4
test_config_safety; S5 test_images; I1, I2 test_invariants.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import logging
import os
import pickle
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import fakes
import numpy as np
import pytest
import tiny
import torch
from asking import ask
from test_images import with_exif
from tiny import model, run, trainer

from counting_zoo import CLIPCount, ImageFolder, Prediction, RegionCLIPCounter, load, load_official, save
from counting_zoo.errors import CheckpointError, InputError
from counting_zoo.images import read_image

FITTING = [*trainer(callbacks=[]), *model("clip_count_small")]
QUIET = trainer(callbacks=[])
POINTS = {f"{i}.png": [(5 + i, 6)] * (i + 1) for i in range(8)}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COUNTING_ZOO_DEBUG", raising=False)  # as a user sees it: one line and a code


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight CLIP-Count as a checkpoint."""
    torch.manual_seed(0)
    counter = CLIPCount(**CLIPCount.nested(tiny.SHRUNK["clip_count"]))
    counter.make_tokenizer(["apples", "pears"])
    return save(counter, tmp_path_factory.mktemp("model") / "model.ckpt")


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight RegionCLIPCounter that finds much in every picture, as a checkpoint."""
    torch.manual_seed(0)
    found: dict[str, Any] = {"proposals": "grid", "scale": 4.0, "bias": 0.0}
    counter = RegionCLIPCounter(**RegionCLIPCounter.nested(tiny.SHRUNK["region_clip_counter_small"] | found))
    counter.make_tokenizer(["apples", "pears"])
    return save(counter, tmp_path_factory.mktemp("detector") / "model.ckpt")


@pytest.fixture(params=["checkpoint", "detector"])
def either(request: pytest.FixtureRequest) -> Path:
    """One that makes a density, and one that makes boxes."""
    return request.getfixturevalue(request.param)


def folder_words(root: Path | str = "data") -> list[str]:
    sizes = '--data.sizes={"train": 4, "val": 2, "test": 2}'
    crop = '--data.augmentation={"class_path": "PlainAugmentation", "init_args": {"crop": 32}}'
    return ["--data=ImageFolder", f"--data.root={root}", "--data.num_workers=0", "--data.batch_size=2", sizes, crop]


def predict_words(checkpoint: Path, root: Path | str = "data", names: str = "[apples]") -> list[str]:
    return [*QUIET, *folder_words(root), f"--data.classes={names}", "--ckpt_path", str(checkpoint)]


def rows(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# -- images (F1, F3-F7, I6) --------------------------------------------------------------------------------------

PICTURE = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
JPEG = cv2.imencode(".jpg", PICTURE)[1].tobytes()
BROKEN = {
    "F1 truncated": JPEG[: len(JPEG) // 2],
    "F1 nearly whole": JPEG[:-40],
    "F3 text": b"not a picture",
    "F4 empty": b"",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_image_stops_training_and_testing(
    fault: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F1, F3, F4: exit code 2 and a line that names the file."""
    for split in ("train", "test"):
        root = Path(split)
        fakes.folder(root, POINTS)
        chosen = ImageFolder(root, sizes={"train": 4, "val": 2, "test": 2}).records(split)[1].image_id  # type: ignore[arg-type]
        (root / chosen).write_bytes(BROKEN[fault])
        commands = {"train": ["fit", *FITTING], "test": ["test", *QUIET, "--ckpt_path", str(checkpoint)]}
        assert run(*commands[split], *folder_words(split)) == 2
        assert Path(chosen).name in capsys.readouterr().err


def test_one_broken_image_among_many(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """I6, F1, F3, F4: all others, one logged error for each, and a failing exit code if that is asked for."""
    fakes.folder(Path("data"), {f"{i:03d}.png": [(5, 5)] for i in range(40)})
    for i, content in enumerate(BROKEN.values()):
        Path("data/images", f"bad{i}.jpg").write_bytes(content)
    with caplog.at_level(logging.ERROR):
        assert run("predict", *predict_words(checkpoint), "--predictions.images=false") == 0
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == len(BROKEN)
    assert all(any(f"bad{i}.jpg" in message for message in errors) for i in range(len(BROKEN)))
    assert len(rows("predictions/counts.csv")) == 40
    assert {Path(row["image"]).name for row in rows("predictions/errors.csv")} == {f"bad{i}.jpg" for i in range(4)}
    words = [*predict_words(checkpoint), "--predictions.dir=again", "--predictions.fail_on_error=true"]
    assert run("predict", *words) == 2
    assert len(rows("again/counts.csv")) == 40
    assert "4 of 44" in capsys.readouterr().err


def test_every_orientation_counts_alike(checkpoint: Path) -> None:
    """F5: the same picture stored in eight orientations has the same count and peaks, from the file and in a batch."""
    upright = cv2.GaussianBlur(PICTURE, (0, 0), 3)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }
    Path("data").mkdir()
    for orientation, stored in turned.items():
        quality = [cv2.IMWRITE_JPEG_QUALITY, 100, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111]
        encoded = cv2.imencode(".jpg", np.ascontiguousarray(stored), quality)[1].tobytes()
        Path("data", f"{orientation}.jpg").write_bytes(with_exif(encoded, orientation))
    counter = load(checkpoint)
    found = counter.count([f"data/{i}.jpg" for i in range(1, 9)], "apples")
    assert isinstance(found, list)
    assert [p.size for p in found] == [(40, 56)] * 8
    for prediction in found[1:]:
        torch.testing.assert_close(prediction.counts, found[0].counts, rtol=1e-3, atol=1e-4)
        assert prediction.density.shape == found[0].density.shape
    assert run("predict", *predict_words(checkpoint)) == 0
    for row, prediction in zip(rows("predictions/counts.csv"), found, strict=True):
        assert float(row["predicted"]) == pytest.approx(float(prediction.counts[0]), rel=1e-5)
        assert (row["height"], row["width"]) == ("40", "56")


def test_odd_images(either: Path) -> None:
    """F6, F7: grey, alpha, palette-free 16 bits; 1 x 1, very long, smaller than the window."""
    Path("data").mkdir()
    grey = cv2.cvtColor(PICTURE, cv2.COLOR_BGR2GRAY)
    images = {
        "grey": grey,
        "as colour": cv2.merge([grey] * 3),
        "alpha": np.dstack([PICTURE, grey]),
        "colour": PICTURE,
        "deep": PICTURE.astype(np.uint16) * 257,
        "one": PICTURE[:1, :1],
        "long": PICTURE[:2].repeat(9, 1),
        "small": PICTURE[:9, :7],
    }
    for name, image in images.items():
        assert cv2.imwrite(f"data/{name}.png", image)
    assert run("predict", *predict_words(either)) == 0
    counts = {row["image"].removesuffix(".png"): float(row["predicted"]) for row in rows("predictions/counts.csv")}
    assert counts.keys() == images.keys()
    assert np.isfinite(list(counts.values())).all()
    assert counts["grey"] == pytest.approx(counts["as colour"], rel=1e-6)
    assert counts["alpha"] == pytest.approx(counts["colour"], rel=1e-6)
    assert counts["deep"] == pytest.approx(counts["colour"], rel=1e-6)


@pytest.mark.parametrize("content", ["black", "white", "noise"])
def test_blank_images(content: str, either: Path) -> None:
    """I3: nothing but one value, or noise: a finite count, which sums from its density."""
    values = {
        "black": np.zeros((50, 70, 3)),
        "white": np.full((50, 70, 3), 255),
        "noise": np.resize(PICTURE, (50, 70, 3)),
    }
    found = load(either).count(values[content].astype(np.uint8), "apples")
    assert isinstance(found, Prediction)
    assert bool(torch.isfinite(found.counts).all())
    assert float(found.density.sum()) == pytest.approx(float(found.counts[0]), rel=1e-5)


# -- annotation (F8, F9, F11-F15) ----------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", ["one", "all"])
@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("clip_count", {"contrast", "density"}),
        ("clip_count_small", {"contrast", "density"}),
        ("region_clip_counter", {"heat", "size", "text"}),
        ("region_clip_counter_small", {"heat", "size", "text"}),
    ],
)
def test_images_without_objects(name: str, terms: set[str], empty: str) -> None:
    """F8, F9: fit and test in every stage with finite losses and metrics; NAE leaves such pictures out."""
    table = {f"{i}.png": [("", "")] if empty == "all" or i % 2 else [(5, 5)] for i in range(8)}
    fakes.folder(Path("data"), table)  # type: ignore[arg-type]
    assert run("fit", *trainer(max_epochs=2), *model(name), *folder_words()) == 0
    found = {key: float(value) for row in rows("runs/a/metrics.csv") for key, value in row.items() if value}
    needed = {"train/loss", *(f"train/{term}" for term in terms), "val/mae", "val/rmse", "val/bias"}
    assert needed <= found.keys()
    assert all(np.isfinite(found[key]) for key in needed)
    if empty == "all":
        assert not np.isfinite(found.get("val/nae", np.nan))  # undefined, and not a number that looks good
    assert run("test", *QUIET, *folder_words(), "--ckpt_path", "runs/a/checkpoints/last.ckpt") == 0
    assert Path("runs/a/report.html").is_file()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("nan", 5), "nan"),
        (("inf", 5), "inf"),
        (("-4", 5), "-4"),
        (("left", 5), "left"),
        ((5, 400), "400"),
    ],
)
def test_bad_coordinates(row: tuple[Any, Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """F12, F13: named with file and value before training starts; nothing is trained."""
    fakes.folder(Path("data"), {name: [*places, row] for name, places in POINTS.items()})
    assert run("fit", *FITTING, *folder_words()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert ".png" in error or "points.csv" in error


def test_clamped_points_are_reported(recwarn: pytest.WarningsRecorder) -> None:
    """F11, F12: points beyond the border are moved, counted and reported; points in one place stay as many."""
    fakes.folder(Path("data"), {f"{i}.png": [(70, 20), (5, 5), (5, 5), (64, 48)] for i in range(8)})
    folder = ImageFolder("data", sizes={"train": 4, "val": 2, "test": 2}, outside="clamp", num_workers=0)
    folder.setup("fit")
    assert any("4 coordinates" in str(w.message) for w in recwarn)
    batch = next(iter(folder.val_dataloader()))
    assert batch["counts"].tolist() == [[4.0]]
    assert float(batch["points"][0].max()) == 64


def test_counts_that_disagree_with_points(capsys: pytest.CaptureFixture[str]) -> None:
    """F15"""
    fakes.folder(Path("data"), POINTS)  # type: ignore[arg-type]
    fakes.folder(
        Path("data"),
        {name: [("figs", len(p) + 1)] for name, p in POINTS.items()},
        header="image,label,count",
        name="counts.csv",
    )
    assert run("fit", *FITTING, *folder_words()) == 2
    error = capsys.readouterr().err
    assert ".png" in error
    assert "points" in error


@pytest.mark.parametrize("damage", ["truncated", "rotten"])
def test_damaged_packs(damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """F18: through the command line."""
    scenes = [
        "--data=SyntheticScenes",
        "--data.root=scenes",
        "--data.num_workers=0",
        '--data.sizes={"train": 4, "val": 2, "test": 2}',
    ]
    assert run("pack", *scenes, "--out=scenes.h5") == 0
    content = bytearray(Path("scenes.h5").read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    else:
        middle = content.find(b"\xff\xd8\xff") + 900  # inside the first JPEG
        content[middle : middle + 4] = bytes(255 - value for value in content[middle : middle + 4])
    Path("scenes.h5").write_bytes(content)
    assert run("fit", *FITTING, "--data=PackedCounts", "--data.root=scenes.h5", "--data.num_workers=0") == 2
    assert "scenes.h5" in capsys.readouterr().err


# -- code in files, names that attack (S1, S2, S7, S8) -------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_pickled_code_runs_nowhere(kind: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """S1: every way in which a file of weights gets into the zoo."""
    content = {**torch.load(checkpoint, weights_only=True), "extra": Evil()}
    if kind == "torch":
        torch.save(content, "evil.ckpt")
    else:
        Path("evil.ckpt").write_bytes(pickle.dumps({"state_dict": {}, "extra": Evil()}))
    fakes.folder(Path("data"), POINTS)  # type: ignore[arg-type]
    for command in ("fit", "validate", "test", "predict"):
        start = FITTING if command == "fit" else QUIET
        assert run(command, *start, *folder_words(), "--ckpt_path", "evil.ckpt") == 2
        assert "evil.ckpt" in capsys.readouterr().err
    assert run("convert", "clip_count", "evil.ckpt", "out.ckpt") == 2
    assert run("convert", "clip_count", checkpoint, "out.ckpt", "--clip", "evil.ckpt") == 2
    for read in (load, lambda path: load_official("clip_count", path)):
        with pytest.raises(CheckpointError):
            read("evil.ckpt")
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "link.png"])
def test_names_that_lead_out(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """S2: refused, not read."""
    (tmp_path / "secret.png").write_bytes(JPEG)
    fakes.folder(Path("data"), POINTS)  # type: ignore[arg-type]
    Path("data/images/link.png").symlink_to(tmp_path / "secret.png")
    with open("data/points.csv", "a") as file:
        file.write(f"{name},1,1\n")
    assert run("fit", *FITTING, *folder_words()) == 2
    error = capsys.readouterr().err
    assert Path(name).name in error


def test_names_that_attack_readers(either: Path) -> None:
    """S7, S8: a picture's and an object's name stay text in the report and in tables."""
    evil = {"=1+cmd.png": [(5, 5, "<script>alert(1)</script>")], "<b>&.png": [(6, 6, "@SUM(A1)")]}
    fakes.folder(Path("data"), evil, header="image,x,y,label")  # type: ignore[arg-type]
    words = ["--data=ImageFolder", "--data.root=data", "--data.num_workers=0", "--ckpt_path", str(either)]
    assert run("test", *QUIET, *words) == 0
    report = Path("runs/a/report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in report
    assert "&lt;script&gt;alert(1)" in report
    assert "<b>&.png" not in report
    assert run("predict", *QUIET, *words, '--data.classes=["=cmd()", "+1", "-2", "@x"]') == 0
    boxes = ["predictions/boxes.csv"] if Path("predictions/boxes.csv").is_file() else []
    for table in ("predictions/counts.csv", "predictions/points.csv", "runs/a/test_counts.csv", *boxes):
        for row in csv.reader(Path(table).read_text(encoding="utf-8").splitlines()):
            assert not any((cell[:1] in "=@+" and cell) or cell.startswith("-2") for cell in row[:2]), row
    assert all(path.name[0] not in "=<" for path in Path("predictions/pictures").iterdir())


# -- prompts (I4) --------------------------------------------------------------------------------------------------


def test_prompts(checkpoint: Path) -> None:
    """I4: empty, far too long, emoji, other scripts, case and number."""
    counter = load(checkpoint)
    nothing: list[Any] = ["", "   ", []]
    for empty in nothing:
        with pytest.raises(InputError, match=r"name|prompt"):
            counter.count(PICTURE, empty)
    with pytest.warns(UserWarning, match="22"):
        found = counter.count(PICTURE, "apples " * 500)
    assert isinstance(found, Prediction)
    assert bool(torch.isfinite(found.counts).all())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = ["🍎", "苹果", "яблоки", "تفاح", "apple", "Apples", "apples"]
        together = counter.count(PICTURE, names)
    assert isinstance(together, Prediction)
    assert bool(torch.isfinite(together.counts).all())
    assert together["Apples"] == together["apples"]  # CLIP reads lower case
    assert len({round(together[name], 9) for name in names}) == len(names) - 1  # and all else is told apart


# -- numbers (R5, R8, R9, I5) --------------------------------------------------------------------------------------


def test_a_diverging_run_stops_with_the_last_weights_good(capsys: pytest.CaptureFixture[str]) -> None:
    """R5: a learning rate beyond reason; the error names pictures and the checkpoint before it loads."""
    fakes.folder(Path("data"), POINTS)  # type: ignore[arg-type]
    wild = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e30"]
    assert run("fit", *trainer(max_epochs=1), *model("clip_count_small"), *folder_words()) == 0
    words = [*trainer(max_epochs=5), *model("clip_count_small"), *wild, "--model.scheduler=null", *folder_words()]
    best = Path("runs/a/checkpoints/best.ckpt")
    best.rename("good.ckpt")
    assert run("fit", *words) == 2
    error = capsys.readouterr().err
    assert "not finite" in error
    assert ".png" in error
    assert all(bool(torch.isfinite(p).all()) for p in load("good.ckpt").parameters())


@pytest.mark.parametrize("name", ["clip_count", "clip_count_small"])
def test_mixed_precision_counts_alike(name: str) -> None:
    """R8: after training on a toy, bf16-mixed differs from float32 by at most 1 % of the counts."""
    fakes.folder(Path("data"), POINTS)  # type: ignore[arg-type]
    assert run("fit", *trainer(max_epochs=2), *model(name), *folder_words()) == 0
    counts = []
    for precision in ("32-true", "bf16-mixed"):
        words = [*trainer(callbacks=[], precision=precision), *folder_words(), "--data.classes=[objects]"]
        assert run("predict", *words, "--ckpt_path=runs/a/checkpoints/last.ckpt") == 0
        counts.append([float(row["predicted"]) for row in rows("predictions/counts.csv")])
    exact, mixed = np.array(counts)
    assert not np.array_equal(exact, mixed)
    assert np.abs(exact - mixed).mean() <= 0.01 * np.abs(exact).mean() + 1e-3


def test_batches_change_nothing(checkpoint: Path) -> None:
    """R9: one by one, all together, and by the command line in batches of 3; a loaded model gives the same bits."""
    fakes.folder(Path("data"), POINTS)  # type: ignore[arg-type]
    paths = sorted(Path("data/images").iterdir())
    counter, again = load(checkpoint), load(checkpoint, window_batch_size=3)
    single = [counter.count(path, "apples") for path in paths]
    assert all(isinstance(p, Prediction) for p in single)
    counts = torch.stack([p.counts[0] for p in single if isinstance(p, Prediction)])
    images = [torch.from_numpy(read_image(path)).permute(2, 0, 1) for path in paths]
    together = again.count_images([counter.preprocess(p) for p in images], ask([["apples"]] * len(paths)))
    assert isinstance(together, list)
    torch.testing.assert_close(torch.cat([o.counts[:, 0] for o in together]), counts, rtol=1e-5, atol=1e-6)
    assert run("predict", *predict_words(checkpoint), "--data.eval_batch_size=3") == 0
    written = torch.tensor([float(row["predicted"]) for row in rows("predictions/counts.csv")])
    torch.testing.assert_close(written, counts, rtol=1e-5, atol=1e-6)
    saved = load(save(counter, "copy.ckpt")).count(paths[0], "apples")
    assert isinstance(saved, Prediction)
    assert torch.equal(saved.density, single[0].density)  # type: ignore[union-attr]


class Exported(torch.nn.Module):
    """Density of pictures for one fixed prompt: names are no tensors, so the text is encoded beforehand."""

    def __init__(self, counter: CLIPCount, name: str) -> None:
        super().__init__()
        self.network = counter.network
        with torch.no_grad():
            pooled, tokens = counter.network.text.encode([name])
        self.pooled, self.tokens = torch.nn.Buffer(pooled.clone()), torch.nn.Buffer(tokens.clone())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        n = image.shape[0]
        text = self.pooled.expand(n, -1), self.tokens.expand(n, -1, -1)
        with mock.patch.object(self.network.text, "encode", return_value=text):
            return self.network(image, [["fixed"]]).density


@pytest.mark.parametrize("options", [{}, {"interaction": "film", "stem": "conv", "prompt_width": 0}])
def test_export(options: dict[str, Any]) -> None:
    """I5: the density network leaves Python with the same numbers for any batch and size (ONNX where installed)."""
    counter = CLIPCount(**CLIPCount.nested(tiny.SHRUNK["clip_count"] | options))
    counter.make_tokenizer(["apples"])
    counter.eval()
    network = Exported(counter, "apples").eval()
    side = {name: 32 * torch.export.Dim(name, min=2, max=32) for name in ("rows", "columns")}
    free = {"image": {0: torch.export.Dim("batch", min=1, max=64), 2: side["rows"], 3: side["columns"]}}
    images = [torch.rand(*shape) for shape in ((2, 3, 64, 96), (1, 3, 96, 64), (5, 3, 128, 160))]
    with torch.no_grad():
        exported = torch.export.export(network, (images[0],), dynamic_shapes=free, strict=False)
        for image in images:
            expected = counter(image, ask([["apples"]] * len(image))).density
            torch.testing.assert_close(exported.module()(image), expected, rtol=1e-4, atol=1e-6)
        if not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript")):
            return
        torch.onnx.export(exported, (), "model.onnx", dynamo=True)
        session = importlib.import_module("onnxruntime").InferenceSession("model.onnx")
        for image in images:
            (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), exported.module()(image), rtol=1e-4, atol=1e-6)
