"""Tensors out of every kind of weight file, and no code out of any."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from counting_zoo.errors import WeightsError
from counting_zoo.nn.weights import read_state_dict


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.downsample = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.sizes = [2, 3]

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.bn(x)) * self.sizes[0]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Inner()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).t())  # not contiguous
        self.register_buffer("resolution", torch.tensor(224))

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x) * self.scale + self.empty.sum() + self.turned.sum() + self.resolution


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in expected.items()
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compile", [torch.jit.script, lambda m: torch.jit.trace(m, torch.rand(1, 3, 4, 4))])
@pytest.mark.parametrize("half", [False, True])
def test_torchscript_archive(
    tmp_path: Path, compile: Callable[[nn.Module], torch.jit.ScriptModule], half: bool
) -> None:
    module = compile(Outer().eval())
    module = module.half() if half else module
    torch.jit.save(module, tmp_path / "RN50.pt")
    found = read_state_dict(tmp_path / "RN50.pt")
    assert same(found, dict(module.state_dict()))
    assert found["visual.downsample.0.weight"].dtype == (torch.float16 if half else torch.float32)


def test_state_dicts(tmp_path: Path) -> None:
    state = {"visual.conv1.weight": torch.randn(2, 3), "logit_scale": torch.tensor(1.0)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save(state, tmp_path / "c.bin", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "d.pt")
    save_file(state, tmp_path / "misnamed.pt")
    for path in tmp_path.iterdir():
        assert same(read_state_dict(path), state), path.name


class Planted:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_nothing_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"visual": Planted(marker)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:  # passes for TorchScript
        archive.writestr("b/constants.pkl", pickle.dumps(()))
        archive.writestr("b/data.pkl", pickle.dumps(Planted(marker)))
    for name, message in (("a.pt", "a.pt"), ("b.pt", r"(posix|nt)\.system")):
        with pytest.raises(WeightsError, match=message):
            read_state_dict(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"not weights at all", b"PK\x03\x04 and then nothing", b"\xff\xff\xff\xff\x00\x00\x00\x00{}"],
)
def test_no_weights(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights\.pt"):
        read_state_dict(path)


def test_truncated_archives(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(100)}, tmp_path / "a.pt")
    save_file({"a": torch.randn(100)}, tmp_path / "b.safetensors")
    for path in list(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(WeightsError, match=path.name):
            read_state_dict(path)


def test_no_state_dict(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "a.pt")
    torch.save([torch.zeros(1)], tmp_path / "b.pt")
    for name, found in (("a.pt", "epoch"), ("b.pt", "list")):
        with pytest.raises(WeightsError, match=found):
            read_state_dict(tmp_path / name)
