from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from counting_zoo.errors import ImageError, InputError
from counting_zoo.images import as_image
from counting_zoo.prediction import RED, Prediction, ascii_text, draw_prediction, plot_prediction


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def prediction(**changes: object) -> Prediction:
    density = torch.zeros(2, 4, 8)
    density[0, 1, 6], density[1, 3, 0] = 2.0, 1.0
    made = Prediction(
        counts=density.sum((1, 2)),
        names=["yellow rings", "Äpfel 苹果"],
        density=density,
        points=[torch.tensor([[650.0, 150.0]]), torch.zeros(0, 2)],
        image_id="a b/ç.jpg",
        image=np.zeros((200, 400, 3), np.uint8),
        size=(400, 800),
    )
    return replace(made, **changes)


def test_every_source_gives_the_same_image(rgb: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a b ü.png"
    path.write_bytes(cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes())
    chw = torch.from_numpy(rgb).permute(2, 0, 1)
    sources = [
        path,
        str(path),
        rgb,
        rgb.astype(np.float64) / 255,
        rgb.astype(np.uint16) * 257,
        chw,
        chw / 255,
        np.dstack([rgb, rgb[:, :, :1]]),
        rgb[:, ::-1][:, ::-1],
    ]
    for source in sources:
        image, name = as_image(source)
        assert image.dtype == torch.uint8
        assert image.permute(1, 2, 0).is_contiguous()
        assert torch.equal(image, chw)
        assert name == (str(path) if isinstance(source, str | Path) else "image")


def test_grey_becomes_rgb() -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    expected = torch.from_numpy(grey).expand(3, 2, 3)
    for source in (grey, grey[:, :, None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert torch.equal(as_image(source)[0], expected)
    assert as_image(np.array([[True, False]]))[0][0].tolist() == [[255, 0]]


def test_the_callers_array_is_not_shared(rgb: np.ndarray) -> None:
    image, _ = as_image(rgb)
    before = image.clone()
    rgb[:] = 0
    assert torch.equal(image, before)


def test_pil_images_are_turned_upright(rgb: np.ndarray, tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    exif = image_module.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    path = tmp_path / "turned.png"
    image_module.fromarray(rgb).save(path, exif=exif)
    with image_module.open(path) as image:
        photo, name = as_image(image)
    assert torch.equal(photo, torch.from_numpy(np.rot90(rgb, -1).copy()).permute(2, 0, 1))
    assert torch.equal(photo, as_image(path)[0])
    assert name == str(path)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_pil_modes(mode: str) -> None:
    image_module = pytest.importorskip("PIL.Image")
    image = image_module.new("L", (5, 4), 255)
    image = image_module.fromarray(np.full((4, 5), 65535, np.uint16)) if mode == "I;16" else image.convert(mode)
    photo, _ = as_image(image)
    assert photo.shape == (3, 4, 5)
    assert int(photo.min()) >= 254


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 20, 30), np.uint8), r"\(3, 20, 30\)"),
        (torch.zeros(20, 30, 3), r"\(20, 30, 3\)"),
        (torch.zeros(2, 3, 4, 4), r"\(2, 3, 4, 4\)"),
        (np.full((4, 4), 255.0), "255"),
        (torch.full((3, 4, 4), -0.1), r"-0\.1"),
        (np.full((4, 4), np.nan), "nan"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (7, "builtins.int"),
    ],
)
def test_what_is_no_image_says_so(source: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_image(source)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.jpg"):
        as_image(tmp_path / "gone.jpg")
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ImageError, match=r"text\.jpg"):
        as_image(tmp_path / "text.jpg")


def test_a_drawing_shows_points_and_density_in_their_places() -> None:
    drawn = draw_prediction(prediction(), "yellow rings")
    assert drawn.shape == (28 + 400, 800, 3)
    assert drawn.dtype == np.uint8
    image = drawn[28:].astype(int)
    red = (image[:, :, 0] > 200) & (image[:, :, 1] < 100) & (image[:, :, 2] < 100)
    y, x = np.argwhere(red & (np.abs(np.indices(red.shape) - [[[150]], [[650]]]).max(0) < 12)).mean(0)
    assert (x + 0.5, y + 0.5) == pytest.approx((650, 150), abs=1)
    assert not image[:90].any(), "no density above the cell, and a black picture"
    assert image[110:190, 610:690].any(2).all(), "the cell of density 2 is coloured throughout"
    assert not image[210:].any()


def test_boxes_are_scaled_to_the_drawing() -> None:
    box = torch.tensor([[80.0, 240.0, 160.0, 320.0]])
    drawn = draw_prediction(prediction(boxes=[box, box], points=[], density=torch.zeros(2, 4, 8)), "yellow rings")
    lines = (drawn[28:] == RED).all(2)
    ys, xs = np.nonzero(lines)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (80, 159, 240, 319), "the outermost pixels of the box"
    assert lines.sum() == 4 * 79
    ys, xs = np.nonzero(drawn[28:].any(2))
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (79, 160, 239, 320), "and a rim of one pixel"


def test_boxes_stand_in_for_points_and_colour() -> None:
    box = torch.tensor([[600.0, 100.0, 700.0, 200.0]])
    drawn = draw_prediction(prediction(boxes=[box, torch.zeros(0, 4)]), "yellow rings")[28:]
    assert not drawn[102:198, 602:698].any(), "what is in the box can be seen"
    assert not draw_prediction(prediction(boxes=[box, torch.zeros(0, 4)]), "Äpfel 苹果")[28:].any()


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_boxes_at_the_border_and_without_area_are_seen(scale: float) -> None:
    size = (round(400 * scale), round(800 * scale))
    whole = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    lines = (draw_prediction(prediction(size=size, boxes=[whole, whole]), "yellow rings")[28:] == RED).all(2)
    assert all(side.all() for side in (lines[0], lines[-1], lines[:, 0], lines[:, -1]))
    point = torch.tensor([[size[1] / 2, size[0] / 2, size[1] / 2, size[0] / 2]])
    lines = (draw_prediction(prediction(size=size, boxes=[point, point]), "yellow rings")[28:] == RED).all(2)
    assert lines.sum() == 1


def test_no_rim_hides_the_line_of_a_neighbour() -> None:
    side_by_side = torch.tensor([[100.0, 100.0, 200.0, 200.0], [200.0, 100.0, 300.0, 200.0]])
    lines = (draw_prediction(prediction(boxes=[side_by_side, side_by_side]), "yellow rings")[28:] == RED).all(2)
    assert lines[100:200, [100, 199, 200, 299]].all()


@pytest.mark.parametrize("size", [(1, 1), (5, 3000), (192, 192)])
@pytest.mark.parametrize("with_image", [True, False])
def test_any_size_can_be_drawn(size: tuple[int, int], with_image: bool) -> None:
    image = np.zeros((*size, 3), np.uint8) if with_image else None
    drawn = draw_prediction(prediction(size=size, image=image, points=[], density=-torch.ones(2, 2, 2)), "yellow rings")
    assert 384 <= drawn.shape[1] <= 1600
    if not with_image:
        assert (drawn[28:] == 128).all(), "blank grey; negative density shows nothing"


def test_names_beyond_ascii_and_long_names_are_drawn() -> None:
    assert ascii_text("naïve\n☃") == "naive??"
    assert draw_prediction(prediction(), "Äpfel 苹果").shape == (428, 800, 3)
    long = prediction(names=["x" * 500, "b"])
    assert draw_prediction(long, "x" * 500).shape == (428, 800, 3)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(InputError, match="pears"):
        draw_prediction(prediction(), "pears")


def test_overlay_draws_the_first_name() -> None:
    assert np.array_equal(prediction().overlay(), draw_prediction(prediction(), "yellow rings"))


def test_plot_has_a_panel_for_each_name() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes = prediction().plot()
    assert [ax.get_title() for ax in axes] == ["yellow rings: 2.0", "Äpfel 苹果: 1.0"]
    assert axes[0].lines[0].get_xydata().tolist() == [[650.0, 150.0]]
    assert axes[0].get_xlim() == (0, 800)
    with pytest.raises(InputError, match="1 axes"):
        plot_prediction(prediction(), axes[0])
    plt.close("all")


@pytest.mark.parametrize("with_image", [True, False])
def test_plot_draws_boxes_in_place_of_points(with_image: bool) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    boxes = [torch.tensor([[600.0, 100.0, 700.0, 200.0], [0.0, 0.0, 50.0, 80.0]]), torch.zeros(0, 4)]
    changes: dict[str, object] = {} if with_image else {"image": None}
    axes = prediction(boxes=boxes, **changes).plot()
    drawn = [[path.get_extents().extents.tolist() for path in ax.collections[0].get_paths()] for ax in axes]
    assert drawn == [value.tolist() for value in boxes]
    assert [(len(ax.lines), len(ax.images)) for ax in axes] == [(0, int(with_image))] * 2
    assert axes[0].get_xlim() == (0, 800)
    plt.close("all")


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"counting-zoo\[viz\]"):
        prediction().plot()
