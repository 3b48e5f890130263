"""Markdown and HTML of any text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counting_zoo.evaluation.report import (
    Heading,
    Images,
    Items,
    Link,
    Table,
    Text,
    markdown_text,
    to_html,
    to_markdown,
)

NASTY = st.text(alphabet="ab|\\`*_[]()<>&!#\n\r '\"~é", max_size=12)


def cells(line: str) -> list[str]:
    """The cells of a row as GitHub splits it: at pipes that no backslash precedes."""
    return re.split(r"(?<!\\)\|", line)[1:-1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(NASTY, min_size=3, max_size=3), min_size=1, max_size=4), NASTY)
def test_every_row_keeps_its_cells(rows: list[list[str]], title: str) -> None:
    written = to_markdown([Heading(title), Table(["a", title, "c"], rows, bold=frozenset({0}))])
    lines = written.strip().splitlines()
    assert len(lines) == 4 + len(rows)
    for line in lines[2:]:
        assert len(cells(line)) == 3
        assert "<" not in line.replace("&lt;", "")
        assert "](" not in line


class Reader(HTMLParser):
    """Text of table cells; fails on a tag that the document did not write or that is left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("table", "tr", "td", "th", "p", "h1", "ul", "li", "a", "div")
        assert {name for name, _ in attrs} <= {"class", "href"}
        self.open.append(tag)
        if tag in ("td", "th"):
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.found[-1] += data


@settings(max_examples=30, deadline=None)
@given(st.lists(NASTY, min_size=4, max_size=4))
def test_html_says_what_was_given(words: list[str]) -> None:
    text = to_html([Heading(words[0]), Items(words), Text(words[1]), Table(words[:2], [words[2:]])])
    assert Reader(text).found == words


def test_links_go_to_https_only() -> None:
    rows = [[Link("a", "https://x.org/a (b)"), Link("b|", "javascript:alert(1)"), Link("c", "")]]
    markdown, html = to_markdown([Table(["", "", ""], rows)]), to_html([Table(["", "", ""], rows)])
    assert "[a](https://x.org/a%20%28b%29)" in markdown
    assert "javascript" not in markdown + html
    assert '<a href="https://x.org/a (b)">a</a>' in html
    assert html.count("<a ") == 1


def test_levels_numbers_and_images() -> None:
    assert to_markdown([Heading("x", 1)], 2) == "### x\n"
    assert to_html([Heading("x", 1)], 2) == "<h3>x</h3>"
    assert "|---|---|" in to_markdown([Table(["a", "b"], [], numbers=False)])
    assert "![](a%20b.jpg)\\\nnot \\*bold\\*" in to_markdown([Images([("a b.jpg", "not *bold*")])])
    assert '<img alt="" src="a&quot;.jpg">' in to_html([Images([('a".jpg', "<b>")])])


@pytest.mark.parametrize(
    ("text", "shown"), [("snake_case", "snake_case"), ("_a_", r"\_a\_"), ("a\\|b", r"a\\\|b"), ("x\ny", "x y")]
)
def test_escapes(text: str, shown: str) -> None:
    assert markdown_text(text) == shown
