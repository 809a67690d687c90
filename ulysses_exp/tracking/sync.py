"""W&B runs that were kept offline: uploaded later, or looked at on the terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ulysses_exp.tracking.client import client_places
from ulysses_exp.tracking.server import PROBE_S, foreign_settings, server, unreachable


def unsent(paths: Iterable[Path]) -> list[Path]:
    """W&B run directories anywhere below `paths` that have not been uploaded, oldest first."""
    found = {
        log.parent
        for path in paths
        for log in Path(path).glob("**/wandb/*run-*/*.wandb")
        if not log.with_name(log.name + ".synced").exists() and not log.parent.is_symlink()
    }
    return sorted(found, key=lambda run: run.name)


def sync(paths: Iterable[Path]) -> int:
    """Uploads all offline and half-uploaded runs below `paths` with wandb's own client; returns its exit code."""
    import wandb

    paths = list(paths)
    runs = unsent(paths)
    if not runs:
        print("nothing to upload: every run below", *paths, "has been sent, or was not tracked")
        return 0
    base_url = server()
    wandb.setup(wandb.Settings(silent=True, base_url=base_url))
    problem = foreign_settings(base_url) or unreachable(base_url, PROBE_S)
    if problem is not None:
        print(f"W&B is not reachable ({problem}); {len(runs)} run(s) wait on disk", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as place:
        # the client would put its logs into ./wandb, and reads the server's address from the user's settings only
        environment = {**os.environ, **client_places(Path(place)), "WANDB_DIR": place, "WANDB_BASE_URL": base_url}
        return subprocess.run(
            [sys.executable, "-P", "-m", "wandb", "sync", "--include-online", *map(str, runs)], env=environment
        ).returncode


def browse(paths: Iterable[Path]) -> int:
    """Opens all runs below `paths` side by side in `wandb leet`, the terminal dashboard of the client."""
    paths = list(paths)
    with tempfile.TemporaryDirectory(prefix="ulysses-exp-") as place:
        gathered = Path(place, "wandb")
        for path in paths:
            for log in Path(path).resolve().glob("**/wandb/*run-*/*.wandb"):
                if log.parent.is_symlink():
                    continue
                # The list shows 30 characters of a directory's name, from which it takes the file's.
                stamp, name = log.parent.name.removeprefix("offline-").removeprefix("run-").split("-", 1)
                name = name[match.start() :] if (match := re.search(r"sp\d+-dp\d+-z\d", name)) else name
                (folder := gathered / f"run-{stamp}-{name}").mkdir(parents=True, exist_ok=True)
                if not (link := folder / f"run-{name}.wandb").is_symlink():
                    link.symlink_to(log)
        if not gathered.exists():
            print("no W&B run below", *map(str, paths), file=sys.stderr)
            return 1
        return subprocess.run(
            [sys.executable, "-P", "-m", "wandb", "leet", str(gathered)], env={**os.environ, "WANDB_DIR": place}
        ).returncode
