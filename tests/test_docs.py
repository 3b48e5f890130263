"""The documentation builds, its links lead somewhere, and its commands parse."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from tiny import run

import counting_zoo
from counting_zoo.quickstart import config_or_path

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("counting_zoo/**/README.md")])
CODE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_ALONE = re.compile(
    r"\$\w|\.\.\.|--ckpt_path|--allow_packages|\.help\b|--help"
)  # not a whole command, or needs a file


def commands() -> list[str]:
    """Collect every ``counting-zoo`` command of the pages, each once and in one line."""
    found: dict[str, None] = {}
    for page in PAGES:
        for block in CODE.findall(page.read_text(encoding="utf-8")):
            lines = block.replace("\\\n", " ").splitlines()
            found.update(dict.fromkeys(" ".join(line.split()) for line in lines if line.startswith("counting-zoo ")))
    return list(found)


COMMANDS = commands()
FITS = [command for command in COMMANDS if command.startswith("counting-zoo fit ") and not NOT_ALONE.search(command)]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; the extra 'docs' has it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    pages = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")]
    fetched = [
        url for page in pages for url in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)', page)
    ]
    assert not fetched, "the site needs nothing from elsewhere"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page: Path) -> None:
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\((?!\w+:|#)([^)\s#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_reference_has_every_public_name() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)}
    assert set(counting_zoo.__all__) - {"__version__"} - shown == set()


def test_configurations_in_commands_are_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {name for command in COMMANDS for name in re.findall(r"--config[ =](\S+)", command)}
    own = {"word_count.yaml", "benchmark.yaml", "settings.json", "..."}
    assert len(names) > 20
    assert {name for name in names - own if not Path(config_or_path(name)).is_file()} == set()


@pytest.mark.parametrize("command", FITS)
def test_documented_training_parses(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)[1:]
    assert run(*words, "--print_config") == 0
    assert "class_path: counting_zoo." in capsys.readouterr().out
