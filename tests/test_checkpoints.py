"""Checkpoints are lost to nothing: kills, full disks, weights that are not finite."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from counting_zoo import io
from counting_zoo.checkpoints import CheckpointFiles, write_checkpoint
from counting_zoo.errors import CheckpointError, OutputError
from counting_zoo.nn.weights import read_checkpoint

LARGE = {"state_dict": {"weight": torch.zeros(4_000_000)}}


def remains(folder: Path) -> list[Path]:
    return list(folder.glob(f".*{io.PARTIAL}"))


def write_for_ever(path: Path, checkpoint: dict[str, Any]) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    while True:
        write_checkpoint(checkpoint, path)


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_during_a_save_leaves_the_file_before(tmp_path: Path, kills: int) -> None:
    """Half of the kills are aimed: they come while the temporary file is there."""
    path = tmp_path / "last.ckpt"
    write_checkpoint({"state_dict": {"weight": torch.full((4_000_000,), -1.0)}}, path)
    caught = 0
    for kill in range(kills):
        checkpoint = {"state_dict": {"weight": torch.full((4_000_000,), float(kill))}}
        process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path, checkpoint))
        process.start()
        start = time.monotonic()
        while kill % 2 == 0 and not remains(tmp_path) and time.monotonic() - start < 20:
            pass
        time.sleep(0.003 * kill)
        process.kill()
        process.join()
        caught += bool(remains(tmp_path))
        weight = read_checkpoint(path)["state_dict"]["weight"]
        assert weight.min() == weight.max()
        assert float(weight[0]) in range(-1, kill + 1)
    assert caught, "no kill came during a save"
    old = time.time() - 60
    for folder in remains(tmp_path):
        os.utime(folder, (old, old))
    io._remove_remains.cache_clear()
    write_checkpoint(LARGE, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with io.replacing(tmp_path / "a.txt") as temporary:
        old = time.time() - 60
        os.utime(temporary.parent, (old, old))
        io._remove_remains.cache_clear()
        io.write_whole(tmp_path / "b.txt", "b")
        temporary.write_text("a")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "b.txt"]


@pytest.fixture
def room() -> Any:
    """Limits the size of files, as a full disk or a quota does."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_file_before(tmp_path: Path, room: None) -> None:
    path = write_checkpoint({"state_dict": {}}, tmp_path / "last.ckpt")
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"last\.ckpt.*MB free"):
        write_checkpoint(LARGE, path)
    with pytest.raises(OutputError, match=r"table\.csv.*MB free"):
        io.write_whole(tmp_path / "table.csv", "x" * 2_000_000)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        write_checkpoint({"state_dict": {}}, tmp_path / "file" / "last.ckpt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_replace_nothing(tmp_path: Path, value: float) -> None:
    path, files = tmp_path / "best.ckpt", CheckpointFiles()
    files.save_checkpoint({"state_dict": {"weight": torch.zeros(2)}}, path)
    with pytest.raises(FloatingPointError, match=r"weight.*best\.ckpt"):
        files.save_checkpoint({"state_dict": {"weight": torch.tensor([0.0, value])}}, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["weight"], torch.zeros(2))


@pytest.mark.parametrize("place", [b"weights of it", b"hyper-parameters of it"])
def test_a_flipped_bit_is_found(tmp_path: Path, place: bytes) -> None:
    """In a weight, which no reader notices, or in a setting."""
    weight = torch.frombuffer(bytearray(b"weights of it..."), dtype=torch.float32)
    content = {"state_dict": {"weight": weight}, "hyper_parameters": {"name": "hyper-parameters of it"}}
    path = write_checkpoint(content, tmp_path / "best.ckpt")
    stored = bytearray(path.read_bytes())
    stored[stored.index(place) + 2] ^= 1
    path.write_bytes(stored)
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(path)
    read = read_checkpoint(path, verify=False)
    assert (
        not torch.equal(read["state_dict"]["weight"], weight) or read["hyper_parameters"] != content["hyper_parameters"]
    )
