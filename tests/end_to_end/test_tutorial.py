"""docs/tutorial.md: its commands run as written and print what it shows, but for the figures."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

TUTORIAL = ROOT / "docs" / "tutorial.md"
ELISION = "..."
_NUMBER = r"(?<![A-Za-z\d])-?\d[\d,.:]*(e[+-]?\d+)?( ?(ms|s|min|B|KiB|MiB|GiB|TiB|k|M|%)(?![A-Za-z]))?"


def sessions(text: str) -> list[tuple[str, list[str]]]:
    """(command, lines that it prints) of each `console` block."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for session in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = session.replace("\\\n", "").partition("\n")
            found.append((command, [line for line in output.splitlines() if line.strip()]))
    return found


def masked(line: str) -> str:
    """The line with every figure, and the space and rules that grow with them, made the same."""
    return " ".join(re.sub(r"[─\s]+", " ", re.sub(_NUMBER, "#", line)).split())


def run(command: str, folder: Path) -> list[str]:
    """Runs a command of the tutorial, whose `python` is this one and whose run.py is the checkout's."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    words = [str(ROOT / word) if word == "run.py" else word for word in words]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(words, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.long
def test_what_the_tutorial_shows_is_what_its_commands_print(tmp_path):
    shown = sessions(TUTORIAL.read_text())
    assert len(shown) >= 4
    for command, expected in shown:
        printed = iter([masked(line) for line in run(command, tmp_path)])
        for line in expected:
            if line != ELISION:
                assert masked(line) in printed, f"{command}: does not print, in this place: {line}"
