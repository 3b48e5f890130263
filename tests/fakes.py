"""Small copies of public data sets in their real layouts, with pictures of dots made here."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.io import savemat


def shared_data(*parts: str) -> Path:
    """A place in the data beside the project; skips the test where it is absent."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    place = Path(os.environ.get("COUNTING_ZOO_DATA", beside)).joinpath(*parts)
    if not place.exists():
        pytest.skip(f"no data at {place}; set COUNTING_ZOO_DATA")
    return place


def draw_points(n: int, height: int, width: int, seed: int) -> np.ndarray:
    """``(n, 2)`` float32 x, y inside the picture."""
    return np.random.default_rng(seed).uniform(2, [width - 2, height - 2], (n, 2)).astype(np.float32)


def write_image(path: Path, points: np.ndarray, height: int = 48, width: int = 64, seed: int = 0) -> None:
    """A noisy picture with a bright disc at every point."""
    image = np.random.default_rng(seed).integers(0, 60, (height, width, 3), dtype=np.uint8)
    for x, y in points:
        cv2.circle(image, (int(x), int(y)), 2, (255, 255, 255), -1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())


def fsc147(root: Path, *, official_spelling: bool = True, ratio: float | None = None) -> dict[str, np.ndarray]:
    """FSC-147 with 4 training, 2 validation and 3 test pictures; returns the points by picture."""
    names = {"train": ["1", "2", "3", "4"], "val": ["5", "6"], "test": ["7", "8", "9"]}
    classes = {"train": "apples", "val": "sea shells", "test": "hot air balloons"}
    splits: dict[str, list[str]] = {split: [f"{n}.jpg" for n in found] for split, found in names.items()}
    splits["val_coco"], splits["test_coco"] = splits["val"][:1], splits["test"][:1]
    annotation, texts, sentences, truth = {}, [], {}, {}
    for split in names:
        for name in splits[split]:
            number = int(name[:-4])
            points = draw_points(number, 48, 64, number)
            write_image(root / "images_384_VarV2" / name, points, seed=number)
            box = [[1, 2], [1, 12], [11, 12], [11, 2]]
            entry: dict[str, Any] = {"points": points.tolist(), "box_examples_coordinates": [box]}
            if ratio is not None:
                entry |= {"H": round(48 / ratio), "W": round(64 / ratio), "ratio_h": ratio, "ratio_w": ratio}
            annotation[name], truth[name] = entry, points
            texts.append(f"{name}\t{classes[split]}\n")
            sentences[name] = {"data_split": split, "text_description": f"the {classes[split]}"}
    stem = "FSC147" if official_spelling else "FSC_147"
    (root / f"annotation_{stem}_384.json").write_text(json.dumps(annotation))
    (root / f"ImageClasses_{stem}.txt").write_text("".join(texts))
    (root / "Train_Test_Val_FSC_147.json").write_text(json.dumps(splits))
    (root / "FSC-147-D.json").write_text(json.dumps(sentences))
    return truth


def carpk(root: Path) -> dict[str, np.ndarray]:
    """The CARPK development kit with 10 training and 2 test pictures; returns the boxes by picture."""
    data, truth = root / "CARPK_devkit" / "data", {}
    for folder in ("ImageSets", "Annotations"):
        (data / folder).mkdir(parents=True)
    names = [f"2016{i:04d}_GF1" for i in range(12)]
    for i, name in enumerate(names):
        corners = draw_points(i + 1, 38, 54, i).astype(int)
        boxes = np.concatenate([corners, corners + np.array([8, 6])], 1)
        write_image(data / "Images" / f"{name}.png", corners + 3, seed=i)
        (data / "Annotations" / f"{name}.txt").write_text("".join(f"{a} {b} {c} {d} 1\n" for a, b, c, d in boxes))
        truth[f"{name}.png"] = boxes.astype(np.float32)
    (data / "ImageSets" / "train.txt").write_text("\n".join(names[:10]) + "\n")
    (data / "ImageSets" / "test.txt").write_text("\n".join(names[10:]) + "\n")
    return truth


def write_shanghai_mat(path: Path, points: np.ndarray, number: int | None = None, cell: bool = True) -> None:
    """The ground truth of one picture, with its structure inside a cell (as released) or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    inner = {"location": points.astype(np.float64), "number": float(len(points) if number is None else number)}
    if cell:
        outer = np.empty((1, 1), object)
        outer[0, 0] = inner
        savemat(path, {"image_info": outer})
    else:
        savemat(path, {"image_info": inner})


def shanghaitech(root: Path, part: str = "part_A_final", truth_folder: str = "ground_truth") -> dict[str, np.ndarray]:
    """A part of ShanghaiTech with 10 training and 3 test pictures; returns the points by picture."""
    truth = {}
    for folder, numbers in (("train_data", range(1, 11)), ("test_data", range(1, 4))):
        for n in numbers:
            points = draw_points(n, 48, 64, n)
            write_image(root / part / folder / "images" / f"IMG_{n}.jpg", points, seed=n + len(folder))
            write_shanghai_mat(root / part / folder / truth_folder / f"GT_IMG_{n}.mat", points, cell=n % 2 == 0)
            truth[f"{folder}/images/IMG_{n}.jpg"] = points
    return truth


def dot_pairs(root: Path, n: int = 10) -> dict[str, int]:
    """Pictures with dot pictures beside them, named as VGG cells are; returns the number of objects."""
    counts = {}
    for i in range(1, n + 1):
        places = np.random.default_rng(i).choice(48 * 64, size=i, replace=False)
        dots = np.zeros((48, 64, 3), np.uint8)
        dots[places // 64, places % 64, 2] = 255
        points = np.stack([places % 64, places // 64], 1)
        write_image(root / f"{i:03d}cell.png", points, seed=i)
        (root / f"{i:03d}dots.png").write_bytes(cv2.imencode(".png", dots)[1].tobytes())
        counts[f"{i:03d}cell.png"] = i
    return counts


def folder(
    root: Path, rows: dict[str, list[tuple[Any, ...]]], header: str = "image,x,y", name: str = "points.csv"
) -> None:
    """``images/`` with a picture for every key, and an annotation table with a line for every row."""
    for i, image in enumerate(rows):
        write_image(root / "images" / image, np.zeros((0, 2)), seed=i)
    with (root / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows((image, *row) for image, found in rows.items() for row in found)


def ucf_qnrf(root: Path) -> dict[str, np.ndarray]:
    """UCF-QNRF with 10 training and 3 test pictures; returns the points by picture."""
    truth = {}
    for folder, n_pictures in (("Train", 10), ("Test", 3)):
        for n in range(1, n_pictures + 1):
            points = draw_points(n, 48, 64, n)
            write_image(root / "UCF-QNRF_ECCV18" / folder / f"img_{n:04d}.jpg", points, seed=n + len(folder))
            savemat(root / "UCF-QNRF_ECCV18" / folder / f"img_{n:04d}_ann.mat", {"annPoints": points.astype(float)})
            truth[f"{folder}/img_{n:04d}.jpg"] = points
    return truth


def nwpu_crowd(root: Path, one_folder: bool = False) -> dict[str, np.ndarray]:
    """NWPU-Crowd with 8 training, 2 validation and 3 test pictures, which have no annotation; returns the points."""
    truth = {}
    ids = {"train": [f"{i:04d}" for i in range(996, 1004)], "val": ["3110", "3111"], "test": ["3610", "0021", "5109"]}
    (root / "mats").mkdir(parents=True)
    for split, names in ids.items():
        (root / f"{split}.txt").write_text("".join(f"{name} 0 1\n" for name in names))
        for i, name in enumerate(names):
            points = draw_points(i, 48, 64, int(name))  # the first of each has nobody in it
            folder = "images" if one_folder else f"images_part{min(5, (int(name) - 1) // 1000 + 1)}"
            write_image(root / folder / f"{name}.jpg", points, seed=int(name))
            if split != "test":
                savemat(root / "mats" / f"{name}.mat", {"annPoints": points.astype(float)})
                truth[f"{name}.jpg"] = points
    return truth


def jhu_crowd(root: Path) -> dict[str, np.ndarray]:
    """JHU-Crowd++ with 8 training, 2 validation and 3 test pictures; returns the points by picture."""
    truth = {}
    for folder, n_pictures in (("train", 8), ("val", 2), ("test", 3)):
        (root / folder / "gt").mkdir(parents=True)
        lines = []
        for n in range(n_pictures):
            points = draw_points(n, 48, 64, n + 7).astype(int)
            write_image(root / folder / "images" / f"{n:04d}.jpg", points, seed=n + len(folder))
            (root / folder / "gt" / f"{n:04d}.txt").write_text("".join(f"{x} {y} 5 6 1 0\n" for x, y in points))
            lines.append(f"{n:04d},{n},street,{n % 3},0\n")
            truth[f"{folder}/images/{n:04d}.jpg"] = points.astype(np.float32)
        (root / folder / "image_labels.txt").write_text("".join(lines))
    return truth


def write_voc_xml(path: Path, objects: list[tuple[Any, ...]], height: int = 48, width: int = 64) -> None:
    """An annotation as VOC has it; objects are (name, xmin, ymin, xmax, ymax[, difficult])."""
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    lines = [f"<annotation><filename>{path.stem}.jpg</filename>{size}<segmented>0</segmented>"]
    for name, *corners in objects:
        box = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=False))
        # a part of the object, as people have it, which is no object of its own
        part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        mark = f"<difficult>{corners[4]}</difficult>" if len(corners) > 4 else ""
        lines.append(f"<object><name>{name}</name><pose>Left</pose>{mark}<bndbox>{box}</bndbox>{part}</object>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "</annotation>"]), encoding="utf-8")


def voc(
    root: Path, folder: str = "VOCdevkit/VOC2007", classes: tuple[str, ...] = ("cat", "dog", "person")
) -> dict[str, list[tuple[Any, ...]]]:
    """VOC with 10 training, 2 validation and 3 test pictures; returns the objects by picture, every third difficult."""
    splits = {"train": range(1, 11), "val": range(11, 13), "test": range(13, 16)}
    splits["trainval"] = range(1, 13)
    truth: dict[str, list[tuple[Any, ...]]] = {}
    for split, numbers in splits.items():
        place = root / folder / "ImageSets" / "Main" / f"{split}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("".join(f"{n:06d}\n" for n in numbers))
    for n in range(1, 16):
        corners = draw_points(n % 5, 38, 54, n).astype(int)
        objects = [(classes[i % len(classes)], x, y, x + 8, y + 6, int(i % 3 == 2)) for i, (x, y) in enumerate(corners)]
        write_image(root / folder / "JPEGImages" / f"{n:06d}.jpg", corners + 4, seed=n)
        write_voc_xml(root / folder / "Annotations" / f"{n:06d}.xml", objects)
        truth[f"{n:06d}.jpg"] = objects
    return truth


#: Some of COCO's categories with their ids, which have gaps.
COCO_IDS = {"person": 1, "cat": 17, "dog": 18, "toothbrush": 90}


def coco(root: Path, year: int = 2014, folder_of_images: str = "") -> dict[str, list[dict[str, Any]]]:
    """COCO with 8 training and 9 validation images; returns the annotations by image, in the order of the file.

    The images stand in the file from the last to the first, the first of each split without annotation; the fourth
    annotation of each file is a crowd.
    """
    truth: dict[str, list[dict[str, Any]]] = {}
    for split, first, n_pictures in (("train", 9, 8), ("val", 42, 9)):
        images, annotations = [], []
        for n in range(first, first + n_pictures):
            stem = f"COCO_{split}2014_{n:012d}" if year == 2014 else f"{n:012d}"
            name = f"{split}{year}/{stem}.jpg"
            corners = draw_points(min(n - first, 4), 38, 54, n)
            write_image(root / folder_of_images / name, corners + 3, seed=n)
            images.append({"id": n, "file_name": f"{stem}.jpg", "height": 48, "width": 64})
            truth[name] = [
                {
                    "id": 1000 * n + i,
                    "image_id": n,
                    "category_id": list(COCO_IDS.values())[(n + i) % 4],
                    "bbox": [round(float(x), 2), round(float(y), 2), 8.5, 6.25],
                    "iscrowd": 0,
                    "area": 53.1,
                    "segmentation": [[float(x), float(y), float(x) + 8, float(y), float(x), float(y) + 6]],
                }
                for i, (x, y) in enumerate(corners)
            ]
        # mixed as in the release, where neighbours in the list are of different folder_of_images
        rows = [one for i in range(4) for name in truth for one in truth[name][i : i + 1] if f"{split}{year}" in name]
        order = np.random.default_rng(year).permutation(len(rows))
        annotations = [rows[i] for i in order]
        annotations[3] |= {"iscrowd": 1, "segmentation": {"counts": [1, 2], "size": [48, 64]}}
        categories = [{"id": number, "name": name, "supercategory": "all"} for name, number in COCO_IDS.items()]
        place = root / "annotations" / f"instances_{split}{year}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        content = {"images": images[::-1], "annotations": annotations, "categories": categories[::-1]}
        place.write_text(json.dumps(content))
    return truth


def coco_captions(root: Path) -> dict[str, list[str]]:
    """COCO 2017's captions of 6 training and 2 validation pictures; returns them by picture."""
    truth: dict[str, list[str]] = {}
    for split, first, n_pictures in (("train", 9, 6), ("val", 42, 2)):
        numbers = range(first, first + n_pictures)
        for n in numbers:
            name = f"{split}2017/{n:012d}.jpg"
            write_image(root / name, draw_points(3, 48, 64, n), seed=n)
            truth[name] = [f'{i + 1} dots, "café" {n}' for i in range(1 + n % 3)]
        rows = [(n, text) for n in numbers for text in truth[f"{split}2017/{n:012d}.jpg"]]
        rows.sort(key=lambda row: row[1])
        annotations = [{"id": i, "image_id": n, "caption": text + "\n"} for i, (n, text) in enumerate(rows)]
        images = [{"id": n, "file_name": f"{n:012d}.jpg", "height": 48, "width": 64} for n in reversed(numbers)]
        place = root / "annotations" / f"captions_{split}2017.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return truth
