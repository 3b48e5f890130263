"""Graphs that run without the package."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from asking import ask
from tiny_clip import counter
from torch import Tensor

from counting_zoo import CLIPEBC, EBC, CountingModule, LowerCount, RegionCLIPCounter
from counting_zoo.cli import main
from counting_zoo.errors import InputError
from counting_zoo.exporting import RECIPE, export
from counting_zoo.loading import save
from counting_zoo.models.lower_count.network import LowerCountConfig
from counting_zoo.models.region_clip.network import RegionCLIPConfig
from counting_zoo.nn.text import word_tokenizer

EBC_SMALL = {"encoder": "small", "width": 4, "representatives": "middle"}
NAMES = ["red figs", "dates"]
SMALL = {"interaction": "film", "stem": "conv", "prompt_width": 0, "n_context": 0, "text_pool": "words"}


def model(kind: str) -> CountingModule:
    torch.manual_seed(0)
    made: CountingModule
    if kind == "EBC":
        made = EBC(**EBC_SMALL, default_classes=["people"])
    elif kind == "CLIPEBC":
        made = CLIPEBC(tiny.clip_config(), visual_prompts=2, representatives="middle", decoder=[8])
    elif kind == "LowerCount":
        made = LowerCount(
            encoder="small", width=4, reduction=8, network=LowerCountConfig(branch_norm="none"), classes=NAMES
        )
    else:
        made = counter(**(SMALL if kind == "small" else {}))
    return made.eval()


def run_pt2(path: Path, image: Tensor) -> tuple[Tensor, dict]:
    extra = {RECIPE: ""}
    graph = torch.export.load(path, extra_files=extra).module()
    return graph(image), json.loads(extra[RECIPE])


def run_onnx(path: Path, image: Tensor) -> tuple[Tensor, dict]:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    session = onnxruntime.InferenceSession(path)
    (density,) = session.run(None, {"image": image.numpy()})
    return torch.from_numpy(density), json.loads(session.get_modelmeta().custom_metadata_map[RECIPE])


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("published", "CLIPEBC", "LowerCount")]


@pytest.mark.parametrize("kind", ["small", "EBC", *SLOW])
def test_a_graph_gives_the_models_density(kind: str, tmp_path: Path) -> None:
    made = model(kind)
    path = export(made, tmp_path / "counter.pt2", NAMES)
    for height, width in ((64, 64), (96, 32)):
        image = torch.rand(1, 3, height, width)
        with torch.no_grad():
            expected = made(image, ask([["red figs + dates"] if made.class_blind else NAMES])).density
        found, recipe = run_pt2(path, image)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert recipe["names"] == (["red figs + dates"] if made.class_blind else NAMES)
    assert recipe["window"] == made.window


@pytest.mark.parametrize("kind", ["small", "EBC"])
def test_onnx(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    made = model(kind)
    path = export(made, tmp_path / "counter.onnx", NAMES)
    image = torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        expected = made(image, ask([["red figs + dates"] if made.class_blind else NAMES])).density
    found, recipe = run_onnx(path, image)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert recipe["model"] == type(made).__name__


def test_without_onnx_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(InputError, match=r"counting-zoo\[export\]"):
        export(model("EBC"), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    boxes = RegionCLIPCounter(tiny.clip_config(), network=RegionCLIPConfig(templates=["{}"], width=8)).eval()
    boxes.set_tokenizer(word_tokenizer(NAMES, 320))
    with pytest.raises(InputError, match="RegionCLIPCounter"):
        export(boxes, tmp_path / "a.pt2", ["figs"])
    with pytest.raises(InputError, match="classes"):
        export(model("small"), tmp_path / "a.pt2")
    with pytest.raises(InputError, match=r"a\.pth"):
        export(model("EBC"), tmp_path / "a.pth")


def test_one_name_is_not_its_letters(tmp_path: Path) -> None:
    path = export(model("small"), tmp_path / "counter.pt2", "dates")
    assert run_pt2(path, torch.rand(1, 3, 64, 64))[1]["names"] == ["dates"]
    with pytest.raises(InputError, match="dates"):
        export(model("small"), tmp_path / "a.pt2", ["dates", "dates"])


def test_the_recipe_says_what_becomes_of_a_sum(tmp_path: Path) -> None:
    made = LowerCount(
        encoder="small",
        width=4,
        reduction=8,
        network=LowerCountConfig(branch_norm="none"),
        classes=NAMES,
        round_counts=True,
    )
    export(made.train(), tmp_path / "counter.pt2")
    assert made.training  # as it was
    recipe = run_pt2(tmp_path / "counter.pt2", torch.rand(1, 3, 64, 64))[1]
    assert (recipe["round_counts"], recipe["clamp_counts"], recipe["pad"]) == (True, False, "minimal")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_on_another_device_gives_a_graph_of_the_cpu(tmp_path: Path) -> None:
    made = model("EBC").cuda()
    path = export(made, tmp_path / "counter.pt2")
    assert made.device.type == "cuda"
    assert run_pt2(path, torch.rand(1, 3, 64, 64))[0].device.type == "cpu"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(model("EBC"), tmp_path / "best.ckpt")
    assert main(["export", str(tmp_path / "best.ckpt"), str(tmp_path / "counter.pt2")]) == 0
    assert "wrote" in capsys.readouterr().out
    assert run_pt2(tmp_path / "counter.pt2", torch.rand(1, 3, 64, 64))[1]["names"] == ["people"]


def test_the_command_takes_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_counter.py").write_text("from counting_zoo import EBC\nclass Mine(EBC): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    save(importlib.import_module("my_counter").Mine(**EBC_SMALL, default_classes=["people"]), tmp_path / "mine.ckpt")
    words = ["export", str(tmp_path / "mine.ckpt"), str(tmp_path / "counter.pt2")]
    monkeypatch.delitem(sys.modules, "my_counter")
    assert main(words) == 2
    assert "--allow_packages my_counter" in capsys.readouterr().err
    assert main([*words, "--allow_packages", "my_counter"]) == 0
    assert run_pt2(tmp_path / "counter.pt2", torch.rand(1, 3, 64, 64))[1]["model"] == "Mine"
