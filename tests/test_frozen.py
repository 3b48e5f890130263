"""Numbers are those of ``golden/frozen``, to the bit on the kind of machine that wrote them.

On others, or with other versions of torch and numpy, floats may differ by 1e-6 of their size;
``COUNTING_ZOO_FROZEN=exact`` compares bits everywhere. ``python tests/golden/freeze.py`` writes the files anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import frozen
import pytest

EXACT = os.environ.get("COUNTING_ZOO_FROZEN") == "exact" or frozen.stored("machine") == frozen.machine()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small copies of data and unpacked checkpoints, written once."""
    return tmp_path_factory.mktemp("frozen")


def differences(found: Any, expected: Any, exact: bool, place: str = "") -> Iterator[str]:
    """Where results differ from what is stored; what is new in them is no difference."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key, value in expected.items():
            if key in found:
                yield from differences(found[key], value, exact, f"{place}/{key}")
            else:
                yield f"{place}/{key} is missing"
    elif isinstance(expected, list) and isinstance(found, list):
        if len(found) != len(expected):
            yield f"{place} has {len(found)} entries; expected {len(expected)}"
        for i, (one, other) in enumerate(zip(found, expected, strict=False)):
            yield from differences(one, other, exact, f"{place}/{i}")
    elif isinstance(expected, float) and isinstance(found, float | int) and not exact:
        if found != pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True):
            yield f"{place} is {found!r}; expected about {expected!r}"
    elif isinstance(expected, str) and expected.startswith("crc:") and not exact:
        return
    elif type(found) is not type(expected) or (found != expected and not (found != found and expected != expected)):
        yield f"{place} is {found!r}; expected {expected!r}"


@pytest.mark.parametrize("section", frozen.SECTIONS)
def test_numbers_are_what_they_were(section: str, root: Path) -> None:
    found = list(differences(frozen.calculate(section, root), frozen.stored(section), EXACT))
    assert not found, f"{len(found)} differences, such as\n" + "\n".join(found[:20])


def test_a_changed_number_is_found() -> None:
    expected = {"a": [1.0, "crc:0"], "b": {"c": 2}}
    assert not list(differences({"a": [1.0, "crc:0"], "b": {"c": 2}, "new": 0}, expected, True))
    assert not list(differences({"a": [1.0 + 1e-8, "crc:1"], "b": {"c": 2}}, expected, False))
    assert len(list(differences({"a": [1.0 + 1e-8, "crc:1"], "b": {"c": 2}}, expected, True))) == 2
    assert len(list(differences({"a": [1.1], "b": {}}, expected, False))) == 3
