"""The benchmark of encoders: which runs it takes for the same, and that a failed one stops it."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from places import BENCHMARKS

BENCHMARK = BENCHMARKS / "transfer.py"


@pytest.fixture
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_transfer", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(out: Path, *more: str) -> argparse.Namespace:
    return argparse.Namespace(preset="easy", epochs=1, out=out, more=list(more))


def test_a_run_is_the_same_with_the_same_encoder_and_options(benchmark: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "clip.safetensors"
    file.write_bytes(b"a")
    first = benchmark.fingerprint(str(file), [])
    assert benchmark.fingerprint(str(file), []) == first
    assert benchmark.fingerprint(str(file), ["--model.lr", "1"]) != first
    file.write_bytes(b"b")
    assert len({first, *(benchmark.fingerprint(source, []) for source in (str(file), "small", None))}) == 4


def test_a_finished_run_is_read_and_a_failed_one_stops(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[str]] = []

    def failing(words: list[str]) -> int:
        begun.append(words)
        return 2

    monkeypatch.setattr(benchmark, "main", failing)
    monkeypatch.setattr(benchmark.SyntheticScenes, "prepare_data", lambda _: None)
    with pytest.raises(SystemExit) as stopped:
        benchmark.run("random", None, 0, options(tmp_path))
    assert stopped.value.code == 2
    assert [words[0] for words in begun] == ["fit"]
    folder = tmp_path / f"easy-random-0-1-{benchmark.fingerprint(None, [])}"
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps({"test/mae": 1.0}))
    assert benchmark.run("random", None, 0, options(tmp_path)) == {"test/mae": 1.0}
    with pytest.raises(SystemExit):
        benchmark.run("random", None, 0, options(tmp_path, "--trainer.max_steps=1"))
    assert len(begun) == 2
