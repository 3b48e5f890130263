"""Files in one piece, their hashes, and plain data."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from counting_zoo.errors import InputError, listed
from counting_zoo.io import file_sha256, plain, replacing, sha256, tensors_sha256, write_whole


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "new" / "a.txt", "old")
    for begun in (False, True):
        with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:  # noqa: PT012
            if begun:
                temporary.write_text("half")
            raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), replacing(path):  # nothing was written
        pass
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path, both = tmp_path / "a.onnx", threading.Barrier(2)
    seen: list[Path] = []

    def write(content: str) -> None:
        with replacing(path) as temporary:
            seen.append(temporary)
            temporary.write_text(content)
            both.wait(10)

    threads = [threading.Thread(target=write, args=(content * 1000,)) for content in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in ("a" * 1000, "b" * 1000)
    assert list(tmp_path.iterdir()) == [path]
    assert len(set(seen)) == 2
    assert {one.name for one in seen} == {path.name}


def test_the_longest_name_of_a_file(tmp_path: Path) -> None:
    assert write_whole(tmp_path / ("ü" * 127), b"a").read_bytes() == b"a"


def test_hashes(tmp_path: Path) -> None:
    content = "größer" * 100_000
    expected = hashlib.sha256(content.encode()).hexdigest()
    assert sha256(content) == sha256(content.encode()) == expected
    assert file_sha256(write_whole(tmp_path / "a", content)) == expected


def test_tensors_are_hashed_with_their_types_and_shapes() -> None:
    zeros = {torch.zeros(2, 2), torch.zeros(4), torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, 2).bfloat16()}
    assert len({tensors_sha256("a", [("w", value)]) for value in zeros}) == 4
    grid = torch.arange(6).view(2, 3)
    assert tensors_sha256("a", [("w", grid.T)]) == tensors_sha256("a", [("w", grid.T.contiguous())])
    by_hand = hashlib.sha256(b"aw torch.int64 (2, 3)" + grid.numpy().tobytes())
    assert tensors_sha256("a", [("w", grid)]) == by_hand.hexdigest()


def test_plain_data_is_json() -> None:
    found = plain({"a": [np.int64(3), np.float64(1 / 3), float("inf")], 2: (True, None, Path("b"))}, digits=3)
    assert found == {"a": [3, 0.333, None], "2": [True, None, "b"]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    with pytest.raises(InputError, match=r"recipe\.a"):
        plain({"a": [torch.float32]}, "recipe")
    assert plain([torch.float32], other=str) == ["torch.float32"]


def test_few_names_are_all_listed() -> None:
    assert listed("abc", 3) == "a, b, c"
    assert listed(iter("abcde"), 3) == "a, b, c and 2 more"
