"""Many commands in one process, whose ranks stay warm: a command costs seconds less than `python run.py`.

Run as a program it reads a list of overrides a line from stdin, as JSON, and answers each with [exit code, output,
libraries of the ranks that are now imported here].
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from checkout import ROOT


class WarmCommand:
    """`python run.py <overrides>` again and again, in `folder`.

    Args:
        inside: a command that starts the one which is given to it, e.g. in namespaces of its own.
    """

    def __init__(self, folder: Path, inside: tuple[str, ...] = ()):
        surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "RANK", "WORLD_SIZE"))}
        self._process = subprocess.Popen(
            [*inside, sys.executable, __file__], cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=surroundings | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def __call__(self, *overrides: str) -> tuple[int, str]:
        """(exit code, what stdout and stderr showed)."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(overrides) + "\n")
        self._process.stdin.flush()
        code, output, loaded = json.loads(self._process.stdout.readline())
        assert not loaded, f"a local job's own process needs no {loaded}; its ranks do"
        return code, output

    def close(self) -> None:
        self._process.communicate(timeout=60)


def _serve() -> None:
    from ulysses_exp.cli import main

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        sys.argv[1:] = json.loads(line)
        said = io.StringIO()
        code: object = 0
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                main()
            except SystemExit as ended:
                code = ended.code
        loaded = [name for name in ("torch", "transformers", "deepspeed") if name in sys.modules]
        answers.write(json.dumps([code, said.getvalue(), loaded]) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
