"""Paths as a user types them: a name, or a pattern that names several."""

from __future__ import annotations

import glob
import os


def matching(typed: str) -> list[str]:
    """What is there of `typed`: itself where it exists, also with brackets in its name, else what it matches."""
    path = os.path.expanduser(typed)
    return [path] if os.path.exists(path) else sorted(glob.glob(path))
