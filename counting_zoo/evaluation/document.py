"""Headings, sentences and tables that are written as Markdown and as HTML alike, whatever text the data bring along."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple
from urllib.parse import quote


class Link(NamedTuple):
    """A cell that points to where it comes from; plain text where ``url`` does not begin with ``https://``."""

    text: str
    url: str


Cell = str | Link


@dataclass(frozen=True)
class Heading:
    """A heading, ``level`` 0 for the highest of the document."""

    text: str
    level: int = 0


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table; cells after the first are aligned to the right where ``numbers`` says so.

    Args:
        header: of each column.
        rows: as many cells each.
        numbers: whether all columns but the first hold numbers.
        bold: which rows stand out; of these, Markdown shows the first cell in bold.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: bool = True
    bold: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Images:
    """Files of pictures, relative to the document, with what stands below each."""

    files: Sequence[tuple[str, str]]


Block = Heading | Text | Items | Table | Images


def to_markdown(blocks: Sequence[Block], level: int = 1) -> str:
    """GitHub's Markdown.

    Args:
        blocks: of the document.
        level: of the highest heading.

    Example:
        >>> print(to_markdown([Heading("a|b"), Table(["model", "MAE"], [["<x>|y", "1.5"]])]))
        # a\\|b
        <BLANKLINE>
        | model | MAE |
        |---|---:|
        | &lt;x&gt;\\|y | 1.5 |
        <BLANKLINE>
    """
    written = []
    for block in blocks:
        match block:
            case Heading(text, below):
                written.append(f"{'#' * (level + below)} {markdown_text(text)}")
            case Text(text):
                written.append(markdown_text(text))
            case Items(items):
                written.append("\n".join(f"- {markdown_text(item)}" for item in items))
            case Table(header, rows, numbers, bold):
                rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
                lines = [[markdown_text(title) for title in header], rule] + [
                    [_markdown_cell(cell, i in bold and not k) for k, cell in enumerate(row)]
                    for i, row in enumerate(rows)
                ]
                written.append("\n".join(_markdown_row(cells, rule) for cells in lines))
            case Images(files):
                shown = (f"![]({_markdown_url(file)})\\\n{markdown_text(caption)}" for file, caption in files)
                written.append("\n\n".join(shown))
    return "\n\n".join(written) + "\n"


def to_html(blocks: Sequence[Block], level: int = 1) -> str:
    """HTML for the body of a page.

    Args:
        blocks: of the document.
        level: of the highest heading.

    Example:
        >>> to_html([Text("<script>")])
        '<p class="note">&lt;script&gt;</p>'
    """
    written = []
    for block in blocks:
        match block:
            case Heading(text, below):
                written.append(f"<h{level + below}>{escape(text)}</h{level + below}>")
            case Text(text):
                written.append(f'<p class="note">{escape(text)}</p>')
            case Items(items):
                lines = "".join(f"<li>{escape(item)}</li>" for item in items)
                written.append(f'<ul class="note">{lines}</ul>')
            case Table(header, rows, numbers, bold):
                right = ' class="n"' if numbers else ""
                head = "".join(f"<th{right if k else ''}>{escape(title)}</th>" for k, title in enumerate(header))
                lines = "".join(
                    (_BOLD_ROW if i in bold else "<tr>")
                    + "".join(f"<td{right if k else ''}>{_html_cell(cell)}</td>" for k, cell in enumerate(row))
                    + "</tr>"
                    for i, row in enumerate(rows)
                )
                written.append(f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>')
            case Images(files):
                written += [
                    f'<figure><img alt="" src="{escape(file)}"><figcaption>{escape(caption)}</figcaption></figure>'
                    for file, caption in files
                ]
    return "\n".join(written)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no table cell ends in it, nothing becomes a link, HTML or emphasis.

    Example:
        >>> markdown_text("a|b <i> [x](y) snake_case")
        'a\\\\|b &lt;i&gt; [x]\\\\(y) snake_case'
    """
    text = " ".join(text.split("\n")).replace("\r", " ").replace("\\", "\\\\")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([|`*~])|(?<!\w)_|_(?!\w)", lambda found: f"\\{found[0]}", text)
    return text.replace("](", "]\\(")


def _markdown_row(cells: Sequence[str], rule: Sequence[str]) -> str:
    joined = "|".join(cells) if cells is rule else " " + " | ".join(cells) + " "
    return f"|{joined}|"


def _markdown_cell(cell: Cell, bold: bool) -> str:
    if isinstance(cell, str):
        return f"**{markdown_text(cell)}**" if bold and cell else markdown_text(cell)
    text = markdown_text(cell.text)
    return f"[{text}]({_markdown_url(cell.url)})" if cell.url.startswith("https://") else text


def _markdown_url(url: str) -> str:
    return quote(url, safe="/:?&=#%+,;@")


_BOLD_ROW = '<tr class="model">'


def _html_cell(cell: Cell) -> str:
    if isinstance(cell, str) or not cell.url.startswith("https://"):
        return escape(cell if isinstance(cell, str) else cell.text)
    return f'<a href="{escape(cell.url)}">{escape(cell.text)}</a>'


__all__ = [
    "Block", "Cell", "Heading", "Images", "Items", "Link", "Table", "Text", "markdown_text", "to_html", "to_markdown",
]  # fmt: skip
