"""What an interrupted command leaves its user with: the line that goes on from here."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def continue_command(typed: list[str], folder: Path, multirun: bool) -> str | None:
    """`continue with: ...` for a job, or a sweep, that was stopped; None where nothing was saved.

    Args:
        typed: the command's arguments as the user gave them.
        folder: of the job, or of the sweep. The same job in its own folder continues from its newest checkpoint, and
            a sweep skips what is done.
    """
    if not multirun and not (folder / "checkpoints" / "latest").exists():
        return None
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    named = multirun and any(word.startswith("sweep.name=") for word in typed)
    place = [] if named or any(word.startswith(f"{key}=") for word in typed) else [f"{key}={_shown(folder)}"]
    program = "python run.py" if sys.argv[0].endswith(".py") else Path(sys.argv[0]).name
    return f"continue with: {program} {shlex.join([*typed, *place])}"


def _shown(folder: Path) -> str:
    here = Path.cwd()
    path = str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
    return f"'{path}'" if any(letter in path for letter in "=,{}[]() ") else path  # for Hydra's grammar
