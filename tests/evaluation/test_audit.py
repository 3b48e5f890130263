"""The audit of models whose answers are known, of real ones, and of data it cannot be made with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
import tiny
import torch
from models.region_clip.test_counter import counter as region_counter
from pages import Page
from tiny_clip import counter as clip_counter
from torch import Tensor

from counting_zoo import save
from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.records import Record, Split
from counting_zoo.errors import InputError
from counting_zoo.evaluation.audit import Asker, Audit, Cost, audit
from counting_zoo.evaluation.audit_report import audit_figures, write_audit
from counting_zoo.geometry import Preprocess
from counting_zoo.metrics.counts import CountTable
from counting_zoo.module import CountingModule
from counting_zoo.types import Batch, CountOutput, Query

NAMES = ["dates", "figs", "kiwis", "plums"]
#: How many objects of each name a image shows, its own name first.
SHOWN: dict[str, dict[str, int]] = {
    "a.png": {"figs": 32, "dates": 64},
    "b.png": {"dates": 32},
    "c.png": {"plums": 96},
    "d.png": {"figs": 64, "plums": 32},
    "e.png": {"kiwis": 32},
    "empty.png": {"figs": 0},
}
OWN = {image_id: next(iter(shown)) for image_id, shown in SHOWN.items() if any(shown.values())}


class Gardens(CountingDataModule):
    """Pictures with as many objects of a name in each cell of an 8 x 4 grid.

    Args:
        shown: what each picture shows.
        broken: pictures that cannot be read.
        points: whether the annotation says where the objects are.
        kwargs: of the base class.
    """

    def __init__(self, shown: Any = None, *, broken: Sequence[str] = (), points: bool = True, **kwargs: Any) -> None:
        super().__init__(num_workers=0, **kwargs)
        self.shown, self.broken, self.with_points = SHOWN if shown is None else shown, broken, points

    def read_split(self, split: Split) -> list[Record]:
        x, y = np.meshgrid(np.arange(8) * 10 + 5, np.arange(4) * 12 + 6)
        cells = np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)
        found = []
        for image_id, shown in self.shown.items():
            labels = np.repeat(np.arange(len(shown)), list(shown.values()))
            known: dict[str, Any] = {"counts": np.array(list(shown.values()), np.float32)}
            if self.with_points:
                known = {"points": np.resize(cells, (len(labels), 2)), "labels": labels}
            found.append(Record(image_id, classes=list(shown), size=(48, 80), **known))
        return found

    def read_bytes(self, record: Record) -> bytes:
        if record.image_id in self.broken:
            return b"not a picture"
        return cv2.imencode(".png", np.full((48, 80, 3), 90, np.uint8))[1].tobytes()


class Repainted(Gardens):
    """The same annotation, other pictures."""

    def read_bytes(self, record: Record) -> bytes:
        return cv2.imencode(".png", np.full((48, 80, 3), 30, np.uint8))[1].tobytes()


class Oracle(CountingModule):
    """Knows what every picture shows.

    Args:
        listens: whether it counts what is asked, or everything.
        competing: whether names take counts from each other when they are asked together.
    """

    #: After so many passes it is interrupted.
    fails = math.inf
    #: What torch refuses.
    too_small = ""

    text_guided: ClassVar[bool] = True

    def __init__(self, *, listens: bool = True, competing: bool = False) -> None:
        super().__init__()
        self.listens, self.competing = listens, competing
        self.passes: list[tuple[str, int]] = []

    def forward(self, image: Tensor, queries: Sequence[Query]) -> CountOutput:
        raise NotImplementedError

    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def said(self, image_id: str, prompt: str) -> float:
        shown = SHOWN.get(image_id, {})
        if not self.listens:
            return float(sum(shown.values()))
        words = prompt.lower()
        return float(sum(n for name, n in shown.items() if name in words or name.removesuffix("s") == words))

    def count_images(self, images: Any, queries: Any, *args: Any, image_ids: Any = None, **kwargs: Any) -> Any:
        (image_id,), names = image_ids, queries[0].names
        if image_id == self.too_small:
            raise RuntimeError("Kernel size can't be greater than actual input size")
        if len(self.passes) >= self.fails:
            raise KeyboardInterrupt
        self.passes.append((image_id, len(names)))
        upper, _, lower = image_id.partition(" above ")
        halves = [[self.said(upper, n), self.said(lower, n)] if lower else [self.said(upper, n) / 2] * 2 for n in names]
        density = torch.tensor(halves)[None, :, :, None]  # (1, K, 2, 1)
        return [CountOutput(density / len(names) if self.competing else density)]


@pytest.fixture(scope="module")
def listened() -> Audit:
    return audit(Oracle().eval(), Gardens(), mosaics=0)


def test_a_model_that_follows_the_text(listened: Audit) -> None:
    found = audit_figures(listened)
    assert found["verdict"]["follows"] == "yes"
    assert (found["verdict"]["ratio"], found["verdict"]["mae"]) == (0, 0)
    assert found["verdict"]["loss"] is None  # infinite
    assert found["verdict"]["shuffled_mae"] == pytest.approx((32 + 32 + 96 + (64 + 32 + 64) / 3 + 32) / 5)
    assert found["verdict"]["constant_mae"] == pytest.approx((0 + 0 + 64 + 32 + 0) / 5)
    assert found["verdict"]["sentence"].startswith("The count follows the text:")
    negative = found["negative"]
    assert [negative[key] for key in ("avg_np", "nmn", "pccn", "mae", "rmse")] == [1, 0, 100, 0, 0]
    assert negative["absent_above_half"] == 0
    # PrACo takes the other class of the images a and d for an absent one.
    assert negative["official"]["nmn"] == pytest.approx((64 / 3 / 32 + 32 / 3 / 64) / 5)
    assert found["multi_class"]["mae_micro"] == found["multi_class"]["mnp_micro"] == 0
    for place in ("global", "2x2", "4x4", "8x8"):
        assert [found["mosaic"][place][key] for key in ("cnt_p", "cnt_r", "cnt_f1")] == pytest.approx([1, 1, 1])
        assert found["mosaic"][place]["n"] == 15
    assert found["pairs"] == pytest.approx(
        {"n": 2, "error_a": 0, "error_both": 0, "a_from_both": 48, "change": 48, "over": 0, "nearer_both": 0}
    )
    free = found["label_free"]
    assert (free["empty_ratio"], free["nonsense_ratio"], free["paraphrase_ratio"]) == (0, 0, 1)
    assert all(one == {"n": 5, "mean": 0, "p95": 0} for one in free["spread"].values())
    assert free["blank"] == {kind: {"mean": 0, "max": 0} for kind in ("black", "grey", "white", "noise")}
    assert (found["n_pictures"], found["n_without_target"]) == (5, 1)
    assert found["kinds"]["right"]["median"] == 1
    assert found["kinds"]["absent"]["mean"] == 0


def test_a_model_that_ignores_the_text() -> None:
    made = audit(Oracle(listens=False).eval(), Gardens(), mosaics=0)
    found = audit_figures(made)
    assert (found["verdict"]["follows"], found["verdict"]["ratio"], found["verdict"]["loss"]) == ("no", 1, 1)
    total = {image_id: sum(shown.values()) for image_id, shown in SHOWN.items()}
    ratios = [total[i] / SHOWN[i][own] for i, own in OWN.items()]
    assert found["negative"]["nmn"] == found["negative"]["avg_np"] == pytest.approx(np.mean(ratios))
    assert (found["negative"]["pccn"], found["negative"]["absent_above_half"]) == (0, 1)
    assert found["label_free"]["empty_ratio"] == found["label_free"]["nonsense_ratio"] == 1
    precision: dict[str, list[float]] = {}
    for mosaic in made.mosaics:
        own = OWN[mosaic.image_id]
        assert SHOWN[mosaic.below].get(own, 0) == 0
        assert SHOWN[mosaic.below][mosaic.name] > 0
        assert mosaic.truth == SHOWN[mosaic.image_id][own]
        precision.setdefault(mosaic.image_id, []).append(mosaic.truth / (total[mosaic.image_id] + total[mosaic.below]))
    expected = np.mean([np.mean(values) for values in precision.values()])
    for place in ("global", "2x2", "4x4", "8x8"):  # what is too many is even, so that every grid sees the same
        assert found["mosaic"][place]["cnt_p"] == pytest.approx(expected)
        assert found["mosaic"][place]["cnt_r"] == pytest.approx(1)
    assert found["pairs"] == pytest.approx(
        {"n": 2, "error_a": 48, "error_both": 96, "a_from_both": 0, "change": 96, "over": 100, "nearer_both": 100}
    )


def test_each_image_is_asked_once() -> None:
    model = Oracle().eval()
    audit(model, Gardens(), tests=["negative", "labelfree"], examples=0)
    passes = [(image_id, n) for image_id, n in model.passes if image_id in OWN and n > len(NAMES)]
    assert [image_id for image_id, _ in passes] == list(OWN)
    assert len(Asker(model).counts(torch.zeros(3, 4, 4), ["figs", "dates"], "a.png", (4, 4))) == 2
    in_parts = audit(Oracle().eval(), Gardens(), prompts_at_once=3)
    assert in_parts.images == audit(Oracle().eval(), Gardens()).images


def test_names_that_compete_are_asked_alone(listened: Audit) -> None:
    found = audit(Oracle(competing=True).eval(), Gardens(), mosaics=0)
    assert not found.protocol["prompts_together"]
    assert [one.counts for one in found.images] == [one.counts for one in listened.images]
    assert [one.both for one in found.images if one.both is not None] == [48, 48]  # asked together, each is halved
    assert listened.protocol["prompts_together"]
    assert listened.cost is not None
    assert (listened.cost.images, listened.cost.prompts, listened.cost.difference) == (2, 4, 0)
    assert Cost(1, 4, 8.0, 2.0, 0.0).ratio == 4


def files(folder: Path) -> dict[str, bytes]:
    """What must be the same twice."""
    return {path.name: path.read_bytes() for path in folder.glob("audit*.*") if path.name != "audit_cost.json"}


def test_a_image_that_torch_refuses_is_listed() -> None:
    model = Oracle().eval()
    model.too_small = "c.png"
    found = audit(model, Gardens(), mosaics=1)
    assert "c.png" not in {one.image_id for one in found.images}
    assert ("c.png", "RuntimeError: Kernel size can't be greater than actual input size") in found.failed


def test_an_interrupted_audit_goes_on_and_ends_with_the_same_files(tmp_path: Path, listened: Audit) -> None:
    write_audit(listened, tmp_path / "whole")
    parts = tmp_path / "parts"
    model = Oracle().eval()
    model.fails = 26
    with pytest.raises(KeyboardInterrupt):
        audit(model, Gardens(), mosaics=0, parts=parts)
    (kept,) = parts.glob("*.jsonl")
    before = [json.loads(line)[0] for line in kept.read_text(encoding="utf-8").splitlines() if line]
    assert 0 < len(before) < len(SHOWN)
    with kept.open("a", encoding="utf-8") as file:
        file.write('["e.png", {"picture": ')  # what an interruption may leave
    model = Oracle().eval()
    write_audit(audit(model, Gardens(), mosaics=0, parts=parts), tmp_path / "resumed")
    assert not [one for one in model.passes if one[0].split(" above ")[0] in before and one[1] > len(NAMES)]
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")
    assert set(files(tmp_path / "whole")) == {
        "audit.json",
        "audit.md",
        "audit.html",
        "audit_counts.csv",
        "audit_mosaics.csv",
    }
    assert len(list(parts.glob("*.jsonl"))) == 1
    audit(Oracle(listens=False).eval(), Gardens(), mosaics=1, parts=parts)
    assert len(list(parts.glob("*.jsonl"))) == 2  # another question
    audit(Oracle(listens=False).eval(), Repainted(), mosaics=1, parts=parts)
    assert len(list(parts.glob("*.jsonl"))) == 3  # other images


def test_the_files(tmp_path: Path, listened: Audit) -> None:
    figures = write_audit(listened, tmp_path)
    assert json.loads((tmp_path / "audit.json").read_text(encoding="utf-8")) == figures
    table = CountTable.read(tmp_path / "audit_counts.csv")
    said = dict(zip(zip(table.image, table.name, strict=True), table.predicted, strict=True))
    assert (said["a.png", "figs"], said["a.png", "dates"], said["a.png", "FIGS"]) == (32, 64, 32)
    true = dict(zip(zip(table.image, table.name, strict=True), table.target, strict=True))
    assert (true["a.png", "many figs"], true["a.png", "kiwis"], true["a.png", "."]) == (32, 0, 0)
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    text = (tmp_path / "audit.md").read_text(encoding="utf-8")
    for written in (page, text):
        assert figures["verdict"]["sentence"].split(":")[0] in written
        assert "one_by_one" not in written
    read = Page(page)
    assert (read.verdict["best"], read.verdict["better"], read.verdict["follows"]) == ("Oracle", "yes", "yes")
    assert read.headings[1:4] == ["Images", "Kinds of prompts", "Right and wrong prompts"]
    assert read.tags.count("img") == 6
    assert all(link.startswith("data:") for link in read.links)
    rows = {row[0]: row[1:] for row in read.rows}
    assert rows["halves"][:3] == ["1.00", "1.00", "1.00"]
    assert rows["|f(A) - f(A+B)|"] == ["48.00"]
    assert text.splitlines()[2].startswith("**Oracle ")
    assert json.loads((tmp_path / "audit_cost.json").read_text())["prompts"] == 4


def test_an_unreadable_image_does_not_end_it(tmp_path: Path) -> None:
    found = audit(Oracle().eval(), Gardens(broken=["b.png", "a.png"]), mosaics=0)
    assert [one.image_id for one in found.images] == ["c.png", "d.png", "e.png", "empty.png"]
    whole = [image_id for image_id, _ in found.failed if " above " not in image_id]
    below = [image_id for image_id, _ in found.failed if " above " in image_id]
    assert whole == ["a.png", "b.png"]
    assert below
    assert all(image_id.endswith((" above a.png", " above b.png")) for image_id in below)
    figures = write_audit(found, tmp_path)
    assert figures["verdict"]["follows"] == "yes"
    assert figures["mosaic"]["global"]["cnt_f1"] == pytest.approx(1)
    assert "a.png above b.png" not in str(figures["failed"])
    assert f"Not counted: {len(found.failed)}" in (tmp_path / "audit.md").read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.png"):
        audit(Oracle().eval(), Gardens(broken=list(SHOWN)))


def test_one_class_only(tmp_path: Path) -> None:
    found = audit(Oracle().eval(), Gardens({"b.png": {"dates": 32}}))
    figures = write_audit(found, tmp_path)
    assert set(figures["left_out"]) == {"negative", "mosaic", "pairs"}
    assert "'dates'" in figures["left_out"]["negative"]
    assert figures["verdict"]["follows"] == "unknown"
    assert figures["label_free"]["nonsense_ratio"] == 0
    with pytest.raises(InputError, match="negative"):
        audit(Oracle().eval(), Gardens({"b.png": {"dates": 32}}), tests=["negative"])


def test_counts_without_points() -> None:
    found = audit(Oracle().eval(), Gardens(points=False))
    assert set(found.left_out) == {"mosaic"}
    assert audit_figures(found)["negative"]["mae"] == 0


def test_some_images_and_some_classes() -> None:
    found = audit(Oracle().eval(), Gardens(), limit=3, mosaics=2, tests=["mosaic"])
    assert [one.image_id for one in found.images] == ["a.png", "c.png", "e.png"]
    assert [m.image_id for m in found.mosaics] == ["a.png"] * 2 + ["c.png"] * 2 + ["e.png"] * 2
    assert set(found.images[0].counts) == set(NAMES)


class Dazzled(Oracle):
    """Counts infinitely much where there is nothing."""

    def said(self, image_id: str, prompt: str) -> float:
        return math.inf if image_id == "white" else super().said(image_id, prompt)


def test_a_blank_image_does_not_end_it(listened: Audit) -> None:
    found = audit(Dazzled().eval(), Gardens(), mosaics=0)
    assert [image_id for image_id, _ in found.failed] == ["white picture"]
    assert set(found.blanks) == {"black", "grey", "noise"}
    assert found.images == listened.images


class Blind(Oracle):
    """Does not read."""

    text_guided: ClassVar[bool] = False


class Listed(Oracle):
    """Knows four names."""

    @property
    def vocabulary(self) -> list[str]:
        return NAMES


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Blind, {}, "Blind"),
        (Listed, {}, "Listed"),
        (Oracle, {"tests": ["negativ"]}, "negativ"),
        (Oracle, {"limit": 0}, "limit"),
        (Oracle, {"mosaics": -1}, "mosaics"),
        (Oracle, {"split": "predict"}, "split"),
    ],
)
def test_what_is_refused(model: type[Oracle], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        audit(model().eval(), Gardens(), **options)


@pytest.mark.filterwarnings("ignore:prompt of")
@pytest.mark.parametrize("make", [clip_counter, region_counter], ids=["CLIPCount", "RegionCLIPCounter"])
def test_the_command_on_real_models(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save(make(preprocess=Preprocess("short", 32)), tmp_path / "model.ckpt")
    options = tiny.write_data("scenes_easy", tmp_path / "scenes")
    words = ["audit", "--ckpt_path", checkpoint, *tiny.data("scenes_easy", options), "--limit", 2, "--mosaics", 1]
    for folder in ("first", "second"):
        assert tiny.run(*words, "--out", tmp_path / folder) == 0
    said = capsys.readouterr().out
    assert "follow" in said
    assert "in one pass took" in said
    assert files(tmp_path / "first") == files(tmp_path / "second")
    figures = json.loads((tmp_path / "first" / "audit.json").read_text(encoding="utf-8"))
    assert figures["protocol"]["prompts_together"]
    assert figures["protocol"]["model"] == make().__class__.__name__
    assert figures["mosaic"]["global"]["n"] == 2
    assert figures["negative"]["n"] == 2
    assert not figures["failed"]
