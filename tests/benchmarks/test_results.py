"""The commands and tables of RESULTS.md."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from places import BENCHMARKS
from tiny_zoo import TinyCounter, TinyImages

from counting_zoo import benchmark

sys.path.append(str(BENCHMARKS))

import results
import results_page


class Blind(TinyCounter):
    """Counts without names."""

    class_blind = True


def test_commands_name_the_data_and_keep_their_braces() -> None:
    words = {fit.name: shlex.split(fit.command("/data sets"), posix=True) for fit in results.fits()}
    assert len(words) == len(results.fits())
    assert "{resize: height, size: 192}" in words["bccd-limit4"]
    assert not any("{data}" in word for line in words.values() for word in line)
    configs = [line[i + 1] for line in words.values() for i, word in enumerate(line) if word == "--config"]
    assert all((results.HERE / path).is_file() for path in configs)


def test_totals_have_a_column_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: dict[str, Any] = {"ebc-0": Blind(), "ebc-1": Blind(scale=0.2), "clip_count-0": TinyCounter()}
    found = benchmark(models, {"d": TinyImages(prompts="all")}, tmp_path, accelerator="cpu", images=0, costs=False)
    monkeypatch.setattr(results_page, "STORED", tmp_path)
    (tmp_path / "low.json").write_bytes(found.results.read_bytes())
    table = [line[2:-2].split(" | ") for line in results_page.benchmark_table("low") if line.startswith("|")]
    head, rows = table[0], {line[0]: line for line in table[2:]}
    each, total = head.index("MAE"), head.index("MAE of the total")
    figures = {run["model"]: run["figures"] for run in json.loads(found.results.read_text())["data"][0]["models"]}
    for name in ("ebc-0", "ebc-1"):
        assert rows[name][each] == "–"
        assert rows[name][total].startswith(f"{figures[name]['mae']:.2f} [")
    assert rows["clip_count-0"][each].startswith(f"{figures['clip_count-0']['mae']:.2f} [")
    mean = (figures["ebc-0"]["mae"] + figures["ebc-1"]["mae"]) / 2
    assert rows["**EBC small, counts without names**, mean of 2"][total] == f"**{mean:.2f}**"
    assert rows["always the training mean of the total"][each] == "–"
    assert rows["always the training mean"][each] != "–"
