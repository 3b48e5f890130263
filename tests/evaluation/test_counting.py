"""Counting a split without a trainer: the numbers of ``test``, resumable, dealt out, past broken pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import lightning as L
import numpy as np
import pytest
import torch
from tiny_zoo import TinyCounter, TinyImages

from counting_zoo.data.records import Record, Split
from counting_zoo.errors import NamesError
from counting_zoo.evaluation.counting import count_split, read_parts


class SomeBroken(TinyImages):
    """The second test picture cannot be read."""

    def read_bytes(self, record: Record) -> bytes:
        return b"not a picture" if record.image_id.startswith("test/01") else super().read_bytes(record)


class Known(TinyCounter):
    """A fixed list of names."""

    @property
    def vocabulary(self) -> list[str]:
        return ["dots"]


class Blind(TinyCounter):
    """Counts without names."""

    class_blind = True


@pytest.fixture
def model() -> TinyCounter:
    torch.manual_seed(0)
    return TinyCounter(scale=0.2).eval()


@pytest.mark.parametrize("prompts", ["target", "all"])
def test_the_numbers_are_those_of_test(model, prompts, tmp_path) -> None:
    data = TinyImages(prompts=prompts)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    (scores,) = trainer.test(model, data, verbose=False)
    table = count_split(model.eval(), TinyImages(prompts=prompts)).table
    error = table.predicted - table.target
    assert np.abs(error).mean() == pytest.approx(scores["test/mae"], rel=1e-6)
    assert np.sqrt(np.square(error).mean()) == pytest.approx(scores["test/rmse"], rel=1e-6)
    for level in (1, 2, 3):
        assert table.game[:, level - 1].mean() == pytest.approx(scores[f"test/game{level}"], rel=1e-6)
    assert len(table) == 5 * (2 if prompts == "all" else 1)


def test_an_interrupted_run_goes_on_where_it_stopped(model, tmp_path, monkeypatch) -> None:
    whole = count_split(model, TinyImages(n=6)).table
    original, seen = TinyCounter.forward, []

    def forward(limit):
        def count(self, image, classes):
            if len(seen) == limit:
                raise InterruptedError
            seen.append(1)
            return original(self, image, classes)

        return count

    monkeypatch.setattr(TinyCounter, "forward", forward(limit=3))
    with pytest.raises(InterruptedError):
        count_split(model, TinyImages(n=6), parts=tmp_path)
    (part,) = tmp_path.glob("*.jsonl")
    with part.open("a", encoding="utf-8") as file:
        file.write('["test/05 ü.png", {"rows": [["test')  # the line that the interruption cut
    monkeypatch.setattr(TinyCounter, "forward", forward(limit=6))
    resumed = count_split(model, TinyImages(n=6), parts=tmp_path).table
    assert len(seen) == 6  # none of the first three again
    assert resumed.image == whole.image
    np.testing.assert_array_equal(resumed.predicted, whole.predicted)
    np.testing.assert_array_equal(resumed.game, whole.game)


def test_processes_share_the_images(model, tmp_path) -> None:
    whole = count_split(model, TinyImages(n=5)).table
    mine = [
        len(count_split(model, TinyImages(n=5), parts=tmp_path / "p", rank=r, world_size=3).table) for r in range(3)
    ]
    assert mine == [2, 4, 5]  # each sees what was finished before it
    together = read_parts(tmp_path / "p", TinyImages(n=5), "test").table
    assert together.image == whole.image
    np.testing.assert_array_equal(together.predicted, whole.predicted)


def test_a_image_that_cannot_be_read_is_named_and_tried_again(model, tmp_path) -> None:
    found = count_split(model, SomeBroken(), parts=tmp_path)
    assert [image_id for image_id, _ in found.failed] == ["test/01 ü.png"]
    assert "ImageError" in found.failed[0][1]
    assert len(found.table) == 4
    mended = count_split(model, TinyImages(), parts=tmp_path)
    assert mended.failed == []
    assert len(mended.table) == 5


def test_a_count_that_is_no_number_is_no_count(tmp_path) -> None:
    found = count_split(TinyCounter(scale=float("nan")).eval(), TinyImages(), parts=tmp_path)
    assert len(found.table) == 0
    assert len(found.failed) == 5
    assert "nan" in found.failed[0][1]


def test_a_fixed_list_of_names(model) -> None:
    table = count_split(Known().eval(), TinyImages(prompts="all")).table
    assert set(table.name) == {"dots"}
    with pytest.raises(NamesError, match="figs"):
        count_split(Known().eval(), TinyImages(classes=["figs"], prompts="all"))


def test_without_names_the_sum_is_scored() -> None:
    table = count_split(Blind().eval(), TinyImages(prompts="all")).table
    assert table.name[0] == "=stars + dots"
    assert table.target.tolist() == [1, 2, 3, 4, 5]
    assert np.isfinite(table.game).all()


def test_parts_of_unicode_names_come_back(model, tmp_path: Path) -> None:
    count_split(model, TinyImages(), parts=tmp_path)
    assert read_parts(tmp_path, TinyImages(), "test").table.image[0] == "test/00 ü.png"


class Repainted(TinyImages):
    """The same annotation, another picture."""

    def read_bytes(self, record: Record) -> bytes:
        return cv2.imencode(".png", np.full((32, 40, 3), 200, np.uint8))[1].tobytes()


class Darkened(TinyImages):
    """The same files, changed after they are checked."""

    def read_verified(self, record: Record) -> bytes:
        return cv2.imencode(".png", np.full((32, 40, 3), 20, np.uint8))[1].tobytes()


def test_a_image_whose_file_has_changed_is_counted_again(model, tmp_path) -> None:
    first = count_split(model, TinyImages(), parts=tmp_path).table
    second = count_split(model, Repainted(), parts=tmp_path).table
    np.testing.assert_array_equal(second.predicted, count_split(model, Repainted()).table.predicted)
    assert not np.isin(second.predicted, first.predicted).any()
    assert read_parts(tmp_path, TinyImages(), "test").table.predicted.tolist() == first.predicted.tolist()
    third = count_split(model, Darkened(), parts=tmp_path).table
    np.testing.assert_array_equal(third.predicted, count_split(model, Darkened()).table.predicted)
    assert not np.isin(third.predicted, np.concatenate([first.predicted, second.predicted])).any()


class Odd(TinyImages):
    """The second picture is smaller than a cell, the third one names nothing, and ids hold a separator of lines."""

    def read_split(self, split: Split) -> list[Record]:
        found = [replace(r, image_id=r.image_id.replace(" ", "\u2028")) for r in super().read_split(split)]
        nothing = {"points": np.zeros((0, 2), np.float32), "labels": np.zeros(0, np.int64)}
        found[1] = replace(found[1], size=(4, 4), **nothing)
        found[2] = replace(found[2], classes=[], **nothing)
        return found

    def read_bytes(self, record: Record) -> bytes:
        shape = (4, 4, 3) if record.size == (4, 4) else (32, 40, 3)
        return cv2.imencode(".png", np.zeros(shape, np.uint8))[1].tobytes()


def test_no_image_is_lost(model, tmp_path) -> None:
    found = count_split(model, Odd(), parts=tmp_path)
    assert [image_id[:7] for image_id in found.table.image] == ["test/00", "test/03", "test/04"]
    (small, why_small), (nameless, why_nameless) = found.failed
    assert (small[:7], nameless[:7]) == ("test/01", "test/02")
    assert "RuntimeError" in why_small
    assert "data.merge_classes" in why_nameless
