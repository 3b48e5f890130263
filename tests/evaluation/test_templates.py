"""Templates of reports: any text stays text, numbers have one format, and the verdict is right."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Page, markdown_tables

from counting_zoo.evaluation.report import axis, cell, judge, markdown_text, number, place, render, table

NASTY = st.text(alphabet="ab|\\`*_[]()<>&!#\n\r '\"~é$:/", max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(NASTY, min_size=3, max_size=3), min_size=1, max_size=4), NASTY)
def test_every_row_of_markdown_keeps_its_cells(rows: list[list[str]], title: str) -> None:
    written = render("costs", "md", costs=table(["a", title, "c"], rows, bold=1))
    (found,) = markdown_tables(written)
    assert len(found) == 2 + len(rows)
    assert {len(cells) for cells in found} == {3}
    lines = [line for line in written.splitlines() if line.startswith("|")]
    assert "<" not in "".join(lines).replace("&lt;", "")
    assert "](" not in "".join(lines)
    assert not re.search(r"(?<!\\)://", "".join(lines))  # an escaped colon makes no link


@settings(max_examples=40, deadline=None)
@given(st.lists(NASTY, min_size=4, max_size=4))
def test_html_shows_the_text_it_was_given(words: list[str]) -> None:
    page = Page(render("costs", "html", costs=table(words[:2], [words[2:]])))
    assert set(page.tags) <= {"h1", "div", "table", "thead", "tbody", "tr", "th", "td", "button", "p"}
    assert [text for row in page.rows for text in row] == words


def test_links_go_to_https_only() -> None:
    urls = {"a": "https://x.org/a (b)", "b|": "javascript:alert(1)", "c": ""}
    one = table(["", "", ""], [[{"text": text, "url": url} for text, url in urls.items()]])
    markdown, html = render("costs", "md", costs=one), render("costs", "html", costs=one)
    assert "[a](https://x.org/a%20%28b%29)" in markdown
    assert "javascript" not in markdown + html
    assert Page(html).links == ["https://x.org/a (b)"]


def test_numbers_are_aligned_and_sort_by_their_value() -> None:
    one = table(["name", "MAE", "n"], [["b", cell(12345.678, interval=[1.0, 20000.0]), 7], ["a", None, 1000]])
    page = Page(render("costs", "html", costs=one))
    assert page.rows[1:] == [["b", "12,346 [1.00, 20,000]", "7"], ["a", "–", "1,000"]]
    assert page.values[1:] == [[None, 12345.678, 7], [None, None, 1000]]
    assert "|---|---:|---:|" in render("costs", "md", costs=one)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("snake_case", "snake_case"),
        ("_a_", r"\_a\_"),
        ("a\\|b", r"a\\\|b"),
        ("x\ny", "x y"),
        ("https://x.org www.x.org", r"https\://x.org www\.x.org"),
        ("$x$", r"\$x\$"),
    ],
)
def test_escapes_of_markdown(text: str, shown: str) -> None:
    assert markdown_text(text) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(-0.001, "0.00"), (999.994, "999.99"), (1000.4, "1,000"), (math.nan, "nan"), (12345, "12,345")]
)
def test_one_format_of_numbers(value: float, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize("values", [[0.0], [3.0, 11.0], [-2.0, 0.5], [1e-6], [123456.0, 5.0], [0.3], [99.0, 100.0]])
def test_an_axis_holds_its_values_between_round_ticks(values: list[float]) -> None:
    found = axis("x", values)
    ticks = found["ticks"]
    assert (found["low"], found["high"]) == (ticks[0], ticks[-1])
    assert found["low"] <= min(0, *values)
    assert max(values) <= found["high"]
    assert 2 <= len(ticks) <= 9
    assert 0 in ticks
    assert all(len(f"{tick:.6g}") <= 7 for tick in ticks)
    assert place(ticks[0], found) == "0.00%"
    assert place(ticks[-1], found, upwards=True) == "0.00%"


@pytest.mark.parametrize(
    ("given", "better", "baseline"),
    [
        ({"error": 4.0, "baselines": {"mean": 9.0, "median": 8.0}}, "yes", "median"),
        ({"error": 4.0, "baselines": {"mean": 9.0}, "interval": [3.0, 10.0]}, "hardly", "mean"),
        ({"error": 9.0, "baselines": {"mean": 9.0}}, "no", "mean"),
        ({"error": 9.0, "baselines": {"mean": math.nan}}, "unknown", None),
        ({"error": math.nan, "baselines": {"mean": 2.0}}, "unknown", None),
        ({"error": None}, "unknown", None),
    ],
)
def test_the_verdict_beside_constants(given: dict[str, Any], better: str, baseline: str | None) -> None:
    found = judge("A", **given)
    assert (found["better"], (found["baseline"] or {}).get("name")) == (better, baseline)
    assert (found["name"] is None) == (given["error"] is None or math.isnan(given["error"]))


def test_jinja2_is_imported_by_reports_alone() -> None:
    """Lightning imports it too, so that it is forgotten before the package is imported."""
    code = (
        "import sys, lightning, transformers\n"
        "for name in [name for name in sys.modules if name.split('.')[0] == 'jinja2']: del sys.modules[name]\n"
        "import counting_zoo.callbacks, counting_zoo.evaluation.benchmark, counting_zoo.evaluation.audit_report\n"
        "print('LOADED', 'jinja2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED False"
