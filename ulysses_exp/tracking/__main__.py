"""`python -m ulysses_exp.tracking sync SWEEP` uploads what was kept offline.

`... browse SWEEP` opens all runs of it side by side in wandb's own terminal dashboard, without account or network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ulysses_exp.tracking.sync import browse, sync


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ulysses_exp.tracking", description="Runs that were kept offline.")
    parser.add_argument("command", choices=("sync", "browse"), help="upload them, or look at them on the terminal")
    parser.add_argument("paths", nargs="+", type=Path, metavar="FOLDER", help="run or sweep folders")
    arguments = parser.parse_args()
    return {"sync": sync, "browse": browse}[arguments.command](arguments.paths)


if __name__ == "__main__":
    sys.exit(main())
