from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from counting_zoo.config_safety import ALLOW_VARIABLE, take_allowed_packages
from counting_zoo.errors import InputError

EVIL = "from pathlib import Path\nPath('executed').touch()\nclass X:\n    pass\n"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "evilmod.py").write_text(EVIL)
    return subprocess.run(
        [sys.executable, "-m", "counting_zoo.cli", *words], cwd=folder, capture_output=True, text=True, timeout=100
    )


# Each takes seconds, so that one process tries all ways to name a class: every one must be refused before it runs.
ATTACKS = r"""
import contextlib, io, os, sys
from pathlib import Path
from counting_zoo.cli import main
sys.path.insert(0, ".")
ways = [
    ["fit", "--model", "evilmod.X"],
    ["fit", "--model=evilmod.X"],
    ["fit", "--model", "{class_path: evilmod.X}"],
    ["fit", "--model.class_path", "evilmod.X"],
    ["fit", "--model.help", "evilmod.X"],
    ["fit", "--model", "CLIPCount", "--model.optimizer", "evilmod.X"],
    ["fit", "--model", "CLIPCount", "--model.optimizer", "os.system"],
    ["fit", "--model", "CLIPCount", "--model.scheduler", "posix.system"],
    ["fit", "--model", "CLIPCount", "--model.optimizer", "torch.optim.lr_scheduler.partial"],
    ["fit", "--model", "CLIPCount", "--model.optimizer", "counting_zoo.cli.os.system"],
    ["fit", "--data", "evilmod.X"],
    ["fit", "--trainer.callbacks+=evilmod.X"],
    ["fit", "--trainer.logger", "evilmod.X"],
    ["fit", "--config", "evil.yaml"],
    ["fit", "--model", "evil_model.yaml"],
    ["test", "--config", "evil.yaml"],
    ["pack", "--data", "evilmod.X", "--out", "x.h5"],
    ["fit", "--config", "tag.yaml"],
]
Path("evil.yaml").write_text("model: {class_path: evilmod.X}\n")
Path("evil_model.yaml").write_text("class_path: evilmod.X\n")
Path("tag.yaml").write_text("model: !!python/object/apply:os.system ['touch executed']\n")
for words in ways:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(words)
    assert code == 2, (words, code)
    assert "evilmod" not in sys.modules, words
    assert not os.path.exists("executed"), words
    reason = "could not determine a constructor" if "tag.yaml" in words else "--allow_packages"
    assert reason in said.getvalue(), (words, said.getvalue())
print("all refused")
main(["fit", "--allow_packages", "evilmod", "--model", "evilmod.X"])
assert os.path.exists("executed"), "the attack is none"
print("allowed")
"""


def test_nothing_outside_the_list_is_imported(tmp_path: Path) -> None:
    (tmp_path / "evilmod.py").write_text(EVIL)
    done = subprocess.run([sys.executable, "-c", ATTACKS], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stdout.split("\n")[:2] == ["all refused", "allowed"], done.stdout + done.stderr


def test_the_flag_is_taken_out_of_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_VARIABLE, "one, two")
    words, packages = take_allowed_packages(["--a", "1", "--allow_packages=three", "--allow_packages", "four,five"])
    assert words == ["--a", "1"]
    assert packages == ["one", "two", "three", "four", "five"]


@pytest.mark.parametrize("words", [["--allow_packages"], ["--allow_packages", "--model"], ["--allow_packages="]])
def test_the_flag_needs_a_value(words: list[str]) -> None:
    with pytest.raises(InputError, match="allow_packages"):
        take_allowed_packages(words)


def test_jsonargparse_itself_and_nonsense_cannot_be_allowed(tmp_path: Path) -> None:
    for package in ("jsonargparse", "a/b"):
        done = run(tmp_path, "fit", "--allow_packages", package)
        assert done.returncode == 2
        assert done.stderr.startswith("error: --allow_packages"), done.stderr
