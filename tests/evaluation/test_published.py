"""Published results: all with a source, for data modules and settings that exist, and in the installed package."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import tomllib
from importlib import resources
from pathlib import Path

import pytest

import counting_zoo
from counting_zoo.evaluation.benchmark_report import Published, deciding_settings, published

ROOT = Path(counting_zoo.__file__).parents[1]
FILE = resources.files("counting_zoo.evaluation").joinpath("published.json")
ENTRIES = [Published(**entry) for entry in json.loads(FILE.read_text(encoding="utf-8"))]
METRICS = {"mae", "rmse", "nae", "mrmse", "mrmse_nz", "m_rel_rmse", "m_rel_rmse_nz"}


def found(data: str, split: str, **settings: object) -> dict[str, dict[str, float]]:
    return {entry.model: dict(entry.metrics) for entry in published(data, split, settings)}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.model} on {e.data} {e.split}")
def test_every_result_is_complete(entry: Published) -> None:
    assert all(text.strip() for text in (entry.model, entry.source, entry.protocol))
    assert entry.split in ("val", "test")
    assert entry.metrics
    assert set(entry.metrics) <= METRICS
    assert all(math.isfinite(value) and value > 0 for value in entry.metrics.values())
    assert entry.metrics.get("mae", 0) <= entry.metrics.get("rmse", math.inf)
    assert entry.metrics.get("nae", 0) < 1
    assert not entry.url or entry.url.startswith("https://")
    assert set(entry.settings) == set(deciding_settings(entry.data)), "one setting decides for all or for none"
    module = getattr(counting_zoo, entry.data)
    assert set(entry.settings) <= set(inspect.signature(module.__init__).parameters), "settings of another data module"


def test_nothing_from_memory_and_nothing_twice() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert not [mark for mark in ("[M]", "[mem", "memory") if mark in text]
    keys = [(e.model, e.data, e.split, tuple(sorted(e.settings.items()))) for e in ENTRIES]
    assert len(set(keys)) == len(keys)


def test_figures_on_which_sources_disagree_stay_out() -> None:
    values = {(e.data, e.split, value) for e in ENTRIES for value in e.metrics.values()}
    for contested in (
        ("NWPUCrowd", "test", 58.2),
        ("NWPUCrowd", "test", 61.2),
        ("UCFQNRF", "test", 136.6),
        ("UCFQNRF", "test", 139.3),
        ("ShanghaiTech", "test", 83.2),
        ("ShanghaiTech", "test", 85.9),
        ("UCFQNRF", "test", 77.8),
        ("UCFQNRF", "test", 74.3),
        ("NWPUCrowd", "val", 61.9),
        ("FSC147", "val", 18.76),
        ("FSC147", "test", 10.12),
        ("FSC147", "test", 15.88),
    ):
        assert contested not in values


def test_results_belong_to_data_split_and_settings() -> None:
    assert found("FSC147", "test")["CLIP-Count, released checkpoint"] == {"mae": 17.45, "rmse": 104.88}
    assert found("FSC147", "val")["CLIP-Count, released checkpoint"] == {"mae": 18.93, "rmse": 66.10}
    part_a, part_b = found("ShanghaiTech", "test", part="A"), found("ShanghaiTech", "test", part="B", max_side=1024)
    assert part_a["DM-Count"] == {"mae": 59.7, "rmse": 95.7}
    assert part_b["DM-Count"] == {"mae": 7.4, "rmse": 11.8}
    assert found("ShanghaiTech", "test") == {}
    assert len(published("ShanghaiTech", "test")) == len(part_a) + len(part_b)
    assert list(found("VOCCounts", "test", year=2007, difficult="exclude")) == ["Lower-Count, released weights"]
    assert found("VOCCounts", "test", year=2007, difficult="include") == {}
    assert found("SyntheticScenes", "test") == {}


def test_the_best_comes_first() -> None:
    values = [entry.metrics["mae"] for entry in published("UCFQNRF", "test")]
    assert values == sorted(values)
    assert len(values) > 5


def test_the_installed_package_has_the_file_and_the_templates() -> None:
    """Hatch packs every file of the package that git does not ignore, unless told otherwise."""
    built = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert built["wheel"]["packages"] == ["counting_zoo"]
    assert not {"exclude", "include", "only-include"} & set(built["wheel"])
    assert "counting_zoo" in built["sdist"]["include"]
    for file in ("published.json", "templates/page.html.jinja"):
        ignored = subprocess.run(["git", "check-ignore", "-q", f"counting_zoo/evaluation/{file}"], cwd=ROOT)
        assert ignored.returncode != 0
