"""The files of a benchmark: complete, safe, and the same when written twice."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from pages import Page, markdown_tables

from counting_zoo.errors import InputError
from counting_zoo.evaluation.benchmark_report import (
    Run,
    read_results,
    results_section,
    summarise_runs,
    write_benchmark,
    write_costs,
)
from counting_zoo.evaluation.report import Drawing
from counting_zoo.metrics.counts import CountTable
from counting_zoo.metrics.statistics import Bootstrap, compare, summarise

NASTY = '<script>alert("x")</script>|&\'=1,.jpg'
NAMES = ["figs", f"date|{NASTY}"]
FACTS = {"class": "ShanghaiTech", "split": "test", "settings": {"part": "A"}, "pictures": 20, "sha256": "ab" * 32}


def table(noise: float, names: list[str], n: int = 20, points: bool = True, intervals: bool = True) -> CountTable:
    """Counts of the same pictures whatever the noise, whose totals do not depend on the names asked."""
    rng, fault = np.random.default_rng(0), np.random.default_rng(int(noise * 10))
    rows: list[list[str | float | None]] = []
    for i in range(n):
        pair = [float(rng.integers(0, 10 ** int(rng.integers(1, 4)))) for _ in range(2)]
        for name, target in zip(names, pair if len(names) == 2 else [sum(pair)], strict=True):
            said = target + fault.normal() * noise
            game = [abs(said - target) + level for level in range(1, 4)] if points else []
            rows.append(
                [f"{i}{NASTY}", name, target, said, *([said - 5, said + 5] if intervals else [None] * 2), *game]
            )
    return CountTable.of(rows)


def run(model: str, noise: float, names: list[str] = NAMES, **changes: object) -> Run:
    shade = np.full((40, 60, 3), min(int(noise), 99), np.uint8)
    shade[:, :, 0] = 200
    made = Run(
        model,
        f"SHA {NASTY}",
        table(noise, names),
        {"train_mean": 50.0, "median": dict.fromkeys(NAMES, 20.0)},
        {"class": "Model", "parameters": 10},
        FACTS,
        ["All pictures, once each.", f"{model} is loaded first."],
        [Drawing(shade, "best", NASTY), Drawing(shade, "worst", "b.jpg")],
        [(f"broken {NASTY}", "cut short")],
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def three() -> list[Run]:
    blind = run("blind", 9, [" + ".join(NAMES)])
    return [run("good", 2), run(f"poor {NASTY}", 30), blind]


def write(folder: Path, runs: list[Run]) -> dict[str, Path]:
    return write_benchmark(folder, summarise_runs(runs, title=f"All {NASTY}", bootstrap=Bootstrap(100)), runs)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_written_twice_it_is_the_same_to_the_byte(tmp_path: Path) -> None:
    write(tmp_path / "a", three())
    runs = three()
    order = np.random.default_rng(0).permutation(len(runs[0].table))
    own = runs[0].table
    runs[0] = replace(
        runs[0],
        table=own.select(np.array(order)),
    )
    write(tmp_path / "b", three())
    write(tmp_path / "c", runs)
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    assert sorted(first) == [
        "benchmark.csv",
        "benchmark.html",
        "benchmark.json",
        "benchmark.md",
        *(f"pictures/{i:02d}-{j:02d}.jpg" for i in range(3) for j in range(2)),
    ]
    assert first == contents(tmp_path / "c"), "the order of rows does not matter"


def test_the_json_holds_figures_and_comparisons(tmp_path: Path) -> None:
    runs = three()
    found = read_results(write(tmp_path, runs)["json"])
    assert found == read_results(tmp_path)
    (entry,) = found["data"]
    assert [model["model"] for model in entry["models"]] == [run.model for run in runs]
    for model, own in zip(entry["models"], runs, strict=True):
        expected = summarise(own.table, own.constants, Bootstrap(100, 0))
        assert model["figures"]["mae"] == pytest.approx(expected["mae"], rel=1e-9)
        assert model["figures"]["interval"]["rmse"] == pytest.approx(expected["interval"]["rmse"], rel=1e-9)
        assert model["figures"].keys() == expected.keys()
        assert model["protocol"] == [f"{own.model} is loaded first."]
    pair = entry["comparisons"][1]
    expected = compare(runs[0].table, runs[2].table, Bootstrap(100, 0))
    assert (pair["a"], pair["b"], pair["compared"]) == ("good", "blind", "totals")
    assert pair["mae"]["difference"] == pytest.approx(expected["mae"]["difference"], rel=1e-9)
    assert entry["protocol"] == ["All pictures, once each."]
    assert [model["all_names_together"] for model in entry["models"]] == [False, False, True]
    assert {result["data"] for result in entry["published"]} == {"ShanghaiTech"}
    assert all(result["settings"] == {"part": "A"} for result in entry["published"])


def test_the_page_is_whole_and_safe(tmp_path: Path) -> None:
    text = write(tmp_path, three())["html"].read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("script") == 1, "the page's own"
    assert '<script>alert("x")' not in text
    assert all(link.startswith(("data:image/jpeg;base64,", "https://")) for link in page.links)
    assert text.count('class="dots one"') == 3 + 3, "a scatter for each model, and its legend"
    images = [link for link in page.links if link.startswith("data:")]
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(images[0].split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (40, 60, 3)
    assert decoded[20, 30].tolist() == pytest.approx([2, 2, 200], abs=6), "colours are not swapped"
    stored = cv2.imread(str(tmp_path / "pictures" / "00-00.jpg"))
    assert (stored == decoded).all()
    own = summarise(three()[0].table, None, Bootstrap(100))
    low, high = own["interval"]["mae"]
    first = next(i for i, row in enumerate(page.rows) if row[0] == "good")
    assert page.rows[first][1] == f"{own['mae']:.2f} [{low:.2f}, {high:.2f}]"
    assert page.values[first][1] == pytest.approx(own["mae"], rel=1e-9)
    assert page.tags.index("p") < page.tags.index("img") < page.tags.index("table")


def test_every_table_of_the_markdown_keeps_its_columns(tmp_path: Path) -> None:
    text = write(tmp_path, three())["md"].read_text(encoding="utf-8")
    tables = markdown_tables(text)
    assert len(tables) >= 9
    for rows in tables:
        assert len({len(row) for row in rows}) == 1
    assert "<script" not in text
    assert "published, not measured here" in text
    assert "[README of P2PNet (arXiv 2107.12746)](https://github.com/TencentYoutuResearch/CrowdCounting-P2PNet)" in text
    errors = {row[0]: row[1:] for row in tables[0]}
    assert "always the training mean (on the rows of good, poor" in "".join(errors)
    assert errors["**good**"][0].startswith("1.")


def test_the_matrix_of_differences_is_antisymmetric(tmp_path: Path) -> None:
    text = write(tmp_path, three())["md"].read_text(encoding="utf-8")
    matrix = next(rows for rows in markdown_tables(text) if rows[0][0] == "MAE")[2:]

    def numbers(cell: str) -> list[float]:
        return [float(part) for part in re.findall(r"[-+]?\d+(?:\.\d+)?", cell)]

    for i in range(3):
        assert matrix[i][i + 1] == ""
        for j in range(i):
            value, low, high = numbers(matrix[i][j + 1])
            assert numbers(matrix[j][i + 1]) == [-value, -high, -low]
            assert (r"\*" in matrix[i][j + 1]) == (low > 0 or high < 0)
    assert r"\*" in matrix[0][2], "noise 2 against noise 30"


def test_the_csv_has_a_row_for_each_model_and_constant(tmp_path: Path) -> None:
    path = write(tmp_path, three())["csv"]
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["name"]) for row in rows[:3]] == [
        ("model", "good"),
        ("constant", "always the training mean"),
        ("constant", "always the median"),
    ]
    assert len(rows) == 9
    own = summarise(three()[0].table, three()[0].constants, Bootstrap(100))
    assert float(rows[0]["rmse"]) == pytest.approx(own["rmse"], rel=1e-6)
    assert float(rows[0]["rmse_high"]) == pytest.approx(own["interval"]["rmse"][1], rel=1e-6)
    assert float(rows[0]["total_mae"]) == pytest.approx(own["totals"]["mae"], rel=1e-6)
    assert float(rows[2]["mrmse"]) == pytest.approx(own["constants"]["median"]["classes"]["mrmse"], rel=1e-6)
    assert rows[1]["game1"] == rows[6]["total_mae"] == ""


def test_a_formula_in_a_name_is_no_formula(tmp_path: Path) -> None:
    path = write(tmp_path, [run("=1+1", 2)])["csv"]
    assert next(csv.DictReader(path.open(newline="", encoding="utf-8")))["name"] == "'=1+1"


@pytest.mark.parametrize("rows", [[], [("a", "x", 3, 4)], [("a", "x", None, 4)], [("a", "x", 3, math.nan)]])
@pytest.mark.filterwarnings("ignore:1 of 1 predictions")
def test_little_or_nothing_to_show(tmp_path: Path, rows: list) -> None:
    paths = write(tmp_path, [Run("m", "d", CountTable.of(rows)), Run("n", "d", CountTable.of(rows), {"mean": 2.0})])
    Page(paths["html"].read_text(encoding="utf-8"))
    for name in ("md", "html", "json"):
        written = paths[name].read_text(encoding="utf-8").partition("<script>")[0]  # the page's own knows isNaN
        assert "nan" not in written.lower().replace("nan or infinity", "")
    assert "No constant predictors" not in paths["md"].read_text(encoding="utf-8") or not rows or rows[0][2] is None


def test_no_runs_at_all(tmp_path: Path) -> None:
    assert read_results(write(tmp_path, [])["json"])["data"] == []


def test_several_data_sets_stand_apart(tmp_path: Path) -> None:
    other = replace(run("good", 2), data="B", data_facts={"class": "ShanghaiTech", "split": "test"})
    found = read_results(write(tmp_path, [*three(), other])["json"])
    assert [entry["name"] for entry in found["data"]] == [f"SHA {NASTY}", "B"]
    assert found["data"][1]["published"] == [], "without its settings it is not known which part"
    assert found["data"][1]["comparisons"] == []
    assert [image["file"] for image in found["data"][1]["models"][0]["pictures"]] == [
        "pictures/03-00.jpg",
        "pictures/03-01.jpg",
    ]


def test_other_annotation_is_said(tmp_path: Path) -> None:
    changed = replace(run("other", 3), data_facts=FACTS | {"sha256": "cd" * 32})
    text = write(tmp_path, [run("good", 2), changed])["md"].read_text(encoding="utf-8")
    assert "Not the same data: what is known of them differs for other" in text
    assert f"| sha256 | {'ab' * 32} | {'cd' * 32} |" in text


def test_long_facts_are_in_the_json_alone(tmp_path: Path) -> None:
    recipe = {f"setting_{i}": i for i in range(30)}
    paths = write(tmp_path, [run("good", 2, model_facts={"recipe": recipe, "short": {"a": 1}})])
    text = paths["md"].read_text(encoding="utf-8")
    assert "| recipe | see benchmark.json |" in text
    assert '| short | {"a": 1} |' in text
    assert read_results(tmp_path)["data"][0]["models"][0]["facts"]["recipe"] == recipe


def test_images_of_an_earlier_benchmark_go(tmp_path: Path) -> None:
    write(tmp_path, three())
    (tmp_path / "pictures" / "mine.jpg").write_bytes(b"x")
    write(tmp_path, [run("good", 2)])
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["00-00.jpg", "00-01.jpg", "mine.jpg"]


def test_a_section_of_a_results_page(tmp_path: Path) -> None:
    results = read_results(write(tmp_path, three())["json"])
    text = results_section(results)
    assert text.startswith("## All ")
    assert "\n### SHA " in text
    assert "\n#### Errors\n" in text
    assert "![](" not in text
    assert "![](results/x/pictures/00-01.jpg)" in results_section(results, folder="results/x")
    assert "![](./pictures/00-01.jpg)" in (tmp_path / "benchmark.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("text", "message"), [(None, "benchmark.json"), ("{", "benchmark.json"), ("[]", "bootstrap")])
def test_other_files_are_no_results(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "benchmark.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_results(tmp_path / "benchmark.json")


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'good'"):
        write(tmp_path, [run("good", 2), run("good", 3)])
    with pytest.raises(InputError, match=r"facts\.made"):
        write(tmp_path, [run("good", 2, model_facts={"made": object()})])
    assert not list(tmp_path.iterdir())


def test_costs_have_files_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, three())
    before = contents(tmp_path)
    costs = {
        "good": {"pictures_per_second": 12.3456, "device": "Xeon|x", "peak_memory_mib": None},
        "poor": {"pictures_per_second": 1234.5, "parameters": 1234567},
    }
    paths = write_costs(tmp_path, costs)
    assert json.loads(paths["json"].read_text())["good"]["pictures_per_second"] == 12.3456
    (rows,) = markdown_tables(paths["md"].read_text(encoding="utf-8"))
    assert rows[0] == ["", "images per second", "device", "peak memory mib", "parameters"]
    assert rows[2:] == [["good", "12.35", r"Xeon\|x", "–", "–"], ["poor", "1,234", "–", "–", "1,234,567"]]
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert b"12.3456" not in after["benchmark.html"]


def verdict(folder: Path, runs: list[Run]) -> dict[str, str]:
    return Page(write(folder, runs)["html"].read_text(encoding="utf-8")).verdict


def test_the_verdict_names_the_best_by_totals_where_a_model_counts_without_names(tmp_path: Path) -> None:
    found = verdict(tmp_path, three())
    assert (found["best"], found["better"], found["follows"]) == ("good", "yes", "untested")
    own = [summarise(one.table, None, Bootstrap(100)) for one in three()]
    less = own[2]["mae"] - own[0]["totals"]["mae"]
    assert f"{own[0]['totals']['mae']:.2f} [" in found["text"]
    assert f"{less:.2f} [" in found["text"]
    assert "blind" in found["text"], "poor is the last"


@pytest.mark.parametrize(
    ("noise", "constant", "better"), [(2, 50.0, "yes"), (2000, 50.0, "no")], ids=["better", "no better"]
)
def test_the_verdict_beside_constants(tmp_path: Path, noise: float, constant: float, better: str) -> None:
    found = verdict(tmp_path, [run("only", noise, constants={"mean": constant})])
    assert (found["best"], found["better"]) == ("only", better)
    assert "always the mean" in found["text"]


def test_the_verdict_where_little_is_known(tmp_path: Path) -> None:
    found = verdict(tmp_path / "a", [run("only", 2, constants={}, model_facts={"text_guided": False})])
    assert (found["best"], found["better"], found["follows"]) == ("only", "unknown", "blind")
    lost = Run("m", "d", CountTable.of([("a", "x", None, 4)]))
    assert verdict(tmp_path / "b", [lost])["best"] == ""
    close = [run("first", 9.1, constants={}), run("second", 9, constants={})]
    assert "may explain" in verdict(tmp_path / "c", close)["text"]


def test_each_data_set_has_its_verdict_and_its_sections_in_order(tmp_path: Path) -> None:
    other = replace(run("alone", 2), data="B")
    text = write(tmp_path, [*three(), other])["html"].read_text(encoding="utf-8")
    assert re.findall('data-best="([a-z]*)"', text) == ["good", "alone"]
    page = Page(text)
    second = page.headings[page.headings.index("B") :]
    assert second[:4] == ["B", "Images", "Plots", "Errors"]


def test_the_plot_puts_values_and_intervals_on_one_scale(tmp_path: Path) -> None:
    text = write(tmp_path, [run("only", 2, constants={"c": 0.0})])["html"].read_text(encoding="utf-8")
    own = summarise(run("only", 2).table, {"c": 0.0}, Bootstrap(100))
    low, high = own["interval"]["mae"]
    row = text[text.index('aria-label="only"') :]
    dot = float(re.findall(r'<circle cx="([\d.]+)%"', row)[0])
    start, end = map(float, re.findall(r'<line x1="([\d.]+)%" x2="([\d.]+)%" y1="50%"', row)[0])
    assert start / dot == pytest.approx(low / own["mae"], rel=0.05)
    assert end / dot == pytest.approx(high / own["mae"], rel=0.05)
    assert start < dot < end
