"""SyntheticScenes: files that are written once, whole, the same everywhere, and in FSC-147's layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import names_of

from counting_zoo.data.folder import ImageFolder
from counting_zoo.data.fsc147 import FSC147
from counting_zoo.data.synthetic import (
    ANNOTATION,
    FINGERPRINT,
    IMAGES,
    SIZES,
    TEST_IMAGES,
    SceneSet,
    SyntheticScenes,
    captions,
    ensure_scenes,
)
from counting_zoo.errors import InputError

FEW = {"train": 6, "val": 3, "test": 4}


def make(root: Path | None, **options: Any) -> SyntheticScenes:
    return SyntheticScenes(root, **{"sizes": FEW, "num_workers": 0, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> SyntheticScenes:
    data = make(tmp_path_factory.mktemp("scenes") / "easy")
    data.prepare_data()
    return data


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> SyntheticScenes:
    return make(tmp_path_factory.mktemp("scenes") / "low", preset="low")


def test_same_seed_same_bytes_with_any_number_of_processes(easy: SyntheticScenes, tmp_path: Path) -> None:
    make(tmp_path / "two", processes=2).prepare_data()
    make(tmp_path / "other", scene_seed=1).prepare_data()
    first, second, other = contents(easy.root), contents(tmp_path / "two"), contents(tmp_path / "other")
    assert first == second
    assert set(first) == set(other)
    assert not any(first[name] == other[name] for name in first if name.endswith(".jpg"))


def test_sizes_change_nothing_else(easy: SyntheticScenes, tmp_path: Path) -> None:
    """A picture depends on seed, split and index, so that a larger set holds the smaller one."""
    larger = make(tmp_path, sizes={**FEW, "train": 8})
    larger.prepare_data()
    name = f"{IMAGES}/train_00005.jpg"
    assert (larger.root / name).read_bytes() == (easy.root / name).read_bytes()


def test_records(easy: SyntheticScenes) -> None:
    for split in ("train", "val", "test"):
        records = easy.records(split)
        assert len(records) == FEW[split]
        assert {name for r in records for name in r.classes} <= set(easy.class_names(split))
        for record in records:
            assert record.counts.tolist() == np.bincount(record.labels, minlength=len(record.classes)).tolist()
            assert len(record.boxes) == len(record.points)
            x, y = record.points.T
            x1, y1, x2, y2 = record.boxes.T
            assert ((x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)).all()
            assert record.captions[0].startswith(f"{record.counts[0]:.0f} ")
            assert record.size == (192, 192)
    assert easy.provides == {"points", "labels", "boxes", "box_labels", "exemplars", "captions", "counts"}


def test_batches(easy: SyntheticScenes) -> None:
    batch = next(iter(make(easy.root, batch_size=3, prompts=3).train_dataloader()))
    assert batch["image"].shape == (3, 3, 192, 192)
    assert batch["counts"].shape == (3, 3)
    for names, present in zip(names_of(batch), batch["present"], strict=True):
        assert names[0] == present[0]
        assert not set(names) <= set(present)  # at least one of them is absent
    for counts, labels in zip(batch["counts"], batch["labels"], strict=True):
        assert counts.tolist() == np.bincount(labels, minlength=3).tolist()


def test_classes_are_listed_also_when_no_image_shows_them(easy: SyntheticScenes) -> None:
    assert [len(easy.class_names(split)) for split in ("train", "val", "test", "predict")] == [48, 12, 12, 12]
    assert not set(easy.class_names("train")) & set(easy.class_names("test"))


def test_predict_gives_names_but_no_annotation(easy: SyntheticScenes) -> None:
    predict, test = easy.records("predict"), easy.records("test")
    assert [r.image_id for r in predict] == [r.image_id for r in test]
    assert all(r.points is None and r.counts is None and r.boxes is None for r in predict)
    assert predict[0].classes == test[0].classes
    asked = make(easy.root, classes=["red discs", "dogs"])
    assert names_of(next(iter(asked.predict_dataloader()))) == [["red discs", "dogs"]]
    files = sorted(path.name for path in (easy.root / TEST_IMAGES).iterdir())
    assert files == sorted(r.image_id for r in test)


def test_a_folder_of_scenes_is_predicted_in_order(tmp_path: Path) -> None:
    scenes = make(tmp_path / "scenes", sizes={"train": 10, "val": 4, "test": 6})
    names = [record.image_id for split in ("test", "train", "val") for record in scenes.records(split)]  # type: ignore[arg-type]
    for folder, expected in ((IMAGES, names), (TEST_IMAGES, names[:6])):
        data = ImageFolder(tmp_path / "scenes" / folder, classes=["red discs"], eval_batch_size=3, num_workers=0)
        data.setup("predict")
        batches = list(data.predict_dataloader())
        assert [name for batch in batches for name in batch["image_id"]] == expected
        assert all(names_of(batch) == [["red discs"]] * len(batch["image_id"]) for batch in batches)


def test_low_answers_for_the_whole_list(low: SyntheticScenes) -> None:
    batch = next(iter(make(low.root, preset="low", eval_batch_size=4).test_dataloader()))
    assert all(names == low.class_names("train") for names in names_of(batch))
    assert batch["counts"].shape == (4, 12)
    assert (batch["counts"] == 0).sum() > 12
    assert batch["counts"].max() <= 8
    for record in low.records("test"):
        stated = {word for caption in record.captions[2:] for word in caption.replace(" and ", ", ").split(", ")}
        assert stated == {name for name, n in zip(record.classes, record.counts, strict=True) if n}
    assert "exemplars" not in low.provides


def test_split_by_image_shares_classes() -> None:
    data = make(None, split_by="image")
    assert data.class_names("train") == data.class_names("test")
    assert len(data.class_names("train")) == 72
    assert make(None, preset="low").scenes.split_by == "image"


def test_read_as_fsc147(easy: SyntheticScenes) -> None:
    fsc = FSC147(easy.root, num_workers=0, outside="error")
    for split in ("train", "val", "test"):
        for theirs, ours in zip(fsc.records(split), easy.records(split), strict=True):
            assert theirs.path == ours.path
            assert theirs.classes == ours.classes[:1]
            np.testing.assert_allclose(theirs.points, ours.points[ours.labels == 0], atol=1e-3)
            np.testing.assert_allclose(theirs.exemplars, ours.exemplars, atol=1e-3)
    official = json.loads((easy.root / "FSC-147-D.json").read_text())
    assert official["test_00000.jpg"]["text_description"] == f"the {easy.records('test')[0].classes[0]}"


def test_written_once(easy: SyntheticScenes) -> None:
    before = (easy.root / ANNOTATION).stat().st_mtime_ns
    make(easy.root).records("val")
    assert (easy.root / ANNOTATION).stat().st_mtime_ns == before


def test_two_processes_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from counting_zoo.data.synthetic import *;"
        "ensure_scenes(SceneSet(sizes={'train': 20, 'val': 1, 'test': 1}), Path(sys.argv[1]))"
    )
    folder = tmp_path / "scenes"
    running = [subprocess.Popen([sys.executable, "-c", code, str(folder)]) for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]  # no temporary folder is left
    assert len(list((folder / IMAGES).iterdir())) == 22
    ensure_scenes(SceneSet(sizes={"train": 20, "val": 1, "test": 1}), folder)


def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import counting_zoo.data.synthetic as files

    def stop(job: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_draw", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "scenes").prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_folder_of_other_scenes_is_refused(easy: SyntheticScenes) -> None:
    with pytest.raises(InputError, match="seed"):
        make(easy.root, scene_seed=3).records("train")


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(InputError, match=FINGERPRINT):
        make(tmp_path).records("train")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_empty_folder_is_used(tmp_path: Path) -> None:
    assert len(make(tmp_path).records("val")) == FEW["val"]


def test_unwritable_place_names_the_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="COUNTING_ZOO_CACHE"):
        make(tmp_path / "file" / "scenes").prepare_data()


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTING_ZOO_CACHE", str(tmp_path))
    roots = [make(None).root, make(None, scene_seed=1).root, make(None, preset="full").root]
    assert len(set(roots)) == 3
    assert all(root.parent == tmp_path / "scenes" for root in roots)
    assert SyntheticScenes().scenes.sizes == SIZES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "hard"}, "data.preset"),
        ({"split_by": "colour"}, "data.split_by"),
        ({"preset": "low", "split_by": "class"}, "'low'"),
        ({"sizes": {"train": 0}}, "data.sizes"),
        ({"sizes": {"training": 5}}, "data.sizes"),
        ({"scene_seed": -1}, "data.scene_seed"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(None, **options)


def test_captions_leave_out_what_is_not_there() -> None:
    classes = make(None).scenes.class_splits()["train"][:3]
    sentences = captions(classes, [21, 0, 1])
    assert sentences[0] == f"21 {classes[0].name} and 1 {classes[2].singular}"
    assert sentences[1] == f"many {classes[0].name} and one {classes[2].singular}"
    assert not any(classes[1].name in sentence for sentence in sentences)
    assert not any(character.isdigit() for sentence in sentences[1:] for character in sentence)
