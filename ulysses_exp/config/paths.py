"""Paths as a user types them, and where conf/ is."""

from __future__ import annotations

import glob
import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]

#: conf/ lies inside the installed package, beside it in a checkout
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


def matching(typed: str) -> list[str]:
    """What is there of `typed`: itself where it exists, also with brackets in its name, else what it matches."""
    path = os.path.expanduser(typed)
    return [path] if os.path.exists(path) else sorted(glob.glob(path))
