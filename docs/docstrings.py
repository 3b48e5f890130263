"""Docstrings as the site's reader takes them; an extension of griffe, which reads the package without importing it."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Changes to every docstring: examples as code, and Sphinx's roles as links where the site has their target."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = ROLE.sub(_link, text)


def _link(match: re.Match[str]) -> str:
    name = match[1].rpartition(".")[2]
    return f'<autoref identifier="{match[1]}" optional>`{name}`</autoref>'
