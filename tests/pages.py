"""Reports as tests read them: cells, headings and attributes of HTML, and tables of Markdown."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "circle", "line", "rect", "br"}


class Page(HTMLParser):
    """Rows of tables, headings in order, and attributes; fails on unbalanced tags and on handlers in attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.values: list[list[float | None]] = []
        self.verdict: dict[str, str] = {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        assert not [name for name in named if name.startswith("on")]
        self.tags.append(tag)
        self.links += [named[name] for name in ("src", "href") if name in named]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.values.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.values[-1].append(float(named["data-value"]) if "data-value" in named else None)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if "data-follows" in named and not self.verdict:
            self.verdict = {name.removeprefix("data-"): value for name, value in named.items()} | {"text": ""}

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data
        if self.open and self.open[-1] == "p" and self.verdict.get("text") == "":
            self.verdict["text"] = data


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Cells of every table, as GitHub splits them: at pipes that no backslash precedes."""
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif tables[-1]:
            tables.append([])
    return [rows for rows in tables if rows]
