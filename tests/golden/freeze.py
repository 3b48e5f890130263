"""Write today's numbers to ``frozen/*.json``: ``python tests/golden/freeze.py [--checkpoints] [SECTION ...]``.

Checkpoints in ``frozen`` stay what earlier code has written, since later code must load them; ``--checkpoints`` trains
and writes new ones. Needs no network and no data.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import conftest  # noqa: F401  (no network, one thread)
import frozen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(frozen.SECTIONS)}; default all")
    parser.add_argument("--checkpoints", action="store_true", help="train and write new checkpoints first")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(frozen.SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}")
    frozen.FROZEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if options.checkpoints:
            frozen.write_checkpoints(root / "training")
        for section in options.sections or frozen.SECTIONS:
            frozen.write(section, frozen.calculate(section, root / "numbers"))
            print(section)
    frozen.write("machine", frozen.machine())


if __name__ == "__main__":
    main()
