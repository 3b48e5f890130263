"""Instance masks as people ask for them: of one picture in Python, of many on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tiny import data, model, run, trainer, write_counts_folder

from counting_zoo import CLIPCount, LowerCount
from counting_zoo.errors import InputError
from counting_zoo.models.lower_count.instances import Retrieval
from counting_zoo.models.lower_count.proposals import Proposals, decode_proposal, encode_mask
from counting_zoo.models.lower_count.writer import InstanceWriter

NAMES = ["figs", "plums"]


@pytest.fixture
def counter() -> LowerCount:
    """A network without training that sees two red objects: its class maps are the redness of a cell."""
    torch.manual_seed(0)
    found = LowerCount("small", width=8, reduction=8, classes=NAMES, preprocess={"resize": "warp", "size": 64}).eval()  # type: ignore[arg-type]
    net = found.network
    net.encoder = Redness()
    net.neck = torch.nn.Conv2d(1, 2, 1)
    net.class_branch = torch.nn.Conv2d(1, 2, 1)  # type: ignore[assignment]
    net.density_branch = torch.nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        net.neck.weight.fill_(1.0), net.neck.bias.zero_()  # type: ignore[union-attr]
        net.class_branch.weight.copy_(torch.tensor([8.0, 8.0]).view(2, 1, 1, 1))  # type: ignore[union-attr]
        net.class_branch.bias.copy_(torch.tensor([-1.0, -99.0]))  # type: ignore[union-attr]
        net.density_branch.weight.fill_(64.0), net.density_branch.bias.zero_()  # type: ignore[operator, union-attr]
    return found


class Redness(torch.nn.Module):
    """How much redder than green a cell of 8 pixels is, by one convolution."""

    dim, stride, multiple = 1, 8, 8

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.nn.Conv2d(3, 1, 8, stride=8, bias=False)
        self.mean.weight.data.zero_()
        self.mean.weight.data[:, 0] = 1 / 64
        self.mean.weight.data[:, 1] = -1 / 64

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.mean(x) - 0.5)


def image(height: int = 96, width: int = 128) -> tuple[np.ndarray, torch.Tensor]:
    """Two red squares of a cell each on grey, and their masks."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    for mask, (y, x) in zip(masks, ((2, 1), (4, 6)), strict=True):
        rows = slice(y * height // 8, (y + 1) * height // 8)
        columns = slice(x * width // 8, (x + 1) * width // 8)
        pixels[rows, columns] = (250, 10, 10)
        mask[rows, columns] = True
    return pixels, masks


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_masks_lie_on_the_objects_in_pixels_of_the_stored_image(counter: LowerCount) -> None:
    pixels, truth = image()
    counts = counter.count(pixels).counts  # type: ignore[union-attr]
    assert float(counts[0]) > 1.5
    assert float(counts[1]) == 0  # its class score is below zero
    counter.network.density_branch.weight.data *= 2 / float(counts[0])  # type: ignore[union-attr, operator]
    found = counter.instances(pixels)
    assert found.masks.shape == (2, 96, 128)
    assert found.labels.tolist() == [0, 0]
    assert max(iou(found.masks[0], mask) for mask in truth) > 0.8
    assert {int(torch.stack([torch.tensor(iou(m, t)) for t in truth]).argmax()) for m in found.masks} == {0, 1}
    assert float(found.responses.sum()) == pytest.approx(2, rel=1e-3)
    assert counter.network.training is False
    one = counter.instances(pixels, "figs", retrieval=Retrieval(max_proposals=None, peak_threshold=0.0), by_count=False)
    assert len(one) == 2
    assert len(counter.instances(pixels, "plums")) == 0
    with pytest.raises(InputError, match="'dates'"):
        counter.instances(pixels, ["dates"])


def test_proposals_from_a_file(counter: LowerCount, tmp_path: Path) -> None:
    pixels, truth = image()
    cv2.imwrite(str(tmp_path / "a.png"), pixels[..., ::-1])
    rows = [{"image_id": "a.png", "segmentation": encode_mask(mask)} for mask in truth]
    (tmp_path / "proposals.json").write_text(json.dumps(rows))
    for given in (tmp_path / "proposals.json", Proposals(tmp_path / "proposals.json"), truth):
        found = counter.instances(
            tmp_path / "a.png", proposals=given, retrieval=Retrieval(peak_threshold=0.0), by_count=False
        )
        assert {m.nonzero()[0, 0].item() for m in found.masks} == {24, 48}
    with pytest.raises(InputError, match=r"a\.png"):
        counter.instances(cv2.resize(pixels, (64, 64)), proposals=tmp_path / "proposals.json")


def test_proposals_of_another_size(counter: LowerCount) -> None:
    pixels, truth = image()
    with pytest.raises(InputError, match=r"\(2, 48, 128\)"):
        counter.instances(pixels, proposals=truth[:, :48])


@pytest.mark.parametrize("side", [1, 7, 8, 64])
def test_any_size(counter: LowerCount, side: int) -> None:
    counter.preprocess = type(counter.preprocess)()
    pixels, _ = image(side, 2 * side)
    found = counter.instances(pixels)
    assert found.masks.shape[1:] == (side, 2 * side)


def test_run_lengths_are_read_back() -> None:
    masks = torch.rand(5, 7, 9) > torch.tensor([0.5, 0.5, 0.9, -1.0, 2.0])[:, None, None]
    for mask in masks:
        encoded = encode_mask(mask)
        assert encoded["size"] == [7, 9]
        assert decode_proposal(json.loads(json.dumps(encoded)), (7, 9)).tolist() == mask.tolist()


def test_predict_writes_instances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTING_ZOO_DEBUG", "1")
    words = data("folder", write_counts_folder(tmp_path / "counted"))
    assert run("fit", *trainer(), *model("lower_count_small"), *words) == 0
    best = tmp_path / "runs" / "a" / "checkpoints" / "best.ckpt"
    writer = "--trainer.callbacks+=counting_zoo.models.lower_count.writer.InstanceWriter"
    quiet = trainer(callbacks=[])
    assert (
        run(
            "predict",
            *quiet,
            *words,
            "--ckpt_path",
            best,
            "--predictions.dir=out",
            writer,
            "--trainer.callbacks.dir=out",
            "--trainer.callbacks.by_count=false",
        )
        == 0
    )
    rows = json.loads((tmp_path / "out" / "instances.json").read_text())
    assert all({"image_id", "category", "score", "segmentation"} == set(row) for row in rows)
    drawings = sorted(path.name for path in (tmp_path / "out" / "instances").iterdir())
    assert len(drawings) == 8
    assert all(cv2.imread(str(tmp_path / "out" / "instances" / name)) is not None for name in drawings)


def test_other_models_have_no_peaks_to_write() -> None:
    with pytest.raises(InputError, match="CLIPCount"):
        InstanceWriter().on_predict_start(None, CLIPCount.__new__(CLIPCount))  # type: ignore[arg-type]
