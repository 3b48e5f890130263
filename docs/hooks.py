"""Hooks of the site: pages that show a file of the repository, and links to files outside docs/."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r"^<!-- include (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)\s#]+)")

log = logging.getLogger("mkdocs.hooks")
pages: dict[str, str] = {}  # by files of the repository, the page that shows it


def on_files(files: Any, config: Any) -> None:
    """Note which file each page shows."""
    for file in files.documentation_pages():
        pages[f"docs/{file.src_uri}"] = file.src_uri
        pages.update(dict.fromkeys(INCLUDE.findall(file.content_string), file.src_uri))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put included files in their place; links lead to where their targets are on the site, or to the repository."""

    def linked(text: str, source: str) -> str:
        def target(match: re.Match[str]) -> str:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
            if not (ROOT / path).exists():
                log.warning("%s links to %s, which is not there", source, match[2])
            shown = pages.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
            if shown is None:
                return f"{match[1]}{config.repo_url}/blob/main/{path}"
            return match[1] + posixpath.relpath(shown, posixpath.dirname(page.file.src_uri) or ".")

        return LINK.sub(target, text)

    parts = INCLUDE.split(linked(markdown, f"docs/{page.file.src_uri}"))  # text, name, text, name, ..., text
    return "".join(
        linked((ROOT / part).read_text(encoding="utf-8"), part) if i % 2 else part for i, part in enumerate(parts)
    )
