"""W&B: an offline run that is really made; in online mode the login and the server, too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ulysses_exp.config import Config
from ulysses_exp.doctor.finding import Asked, Finding, ok, warning, wrong
from ulysses_exp.tracking.run import Tracker
from ulysses_exp.tracking.server import PROBE_S, api_key, unreachable


def check(asked: Asked) -> Iterator[Finding]:
    """Never prints a key."""
    mode = asked.config.tracker.mode
    if mode == "disabled":
        yield ok("W&B", "off (tracker.mode=disabled)")
        return
    import wandb

    server = wandb.setup(wandb.Settings(silent=True)).settings.base_url
    has_key = api_key(server) is not None
    yield _offline(asked.config)
    if mode == "online":
        problem = unreachable(server, PROBE_S)
        if problem is None:
            yield ok("online", f"{server} answers and knows the key")
        else:
            yield wrong("online", problem, "wandb login; or tracker.mode=offline, and upload later: "
                        "python -m ulysses_exp.tracking sync FOLDER")  # fmt: skip
    else:
        yield ok("login", "a key is there" if has_key else "no key; only tracker.mode=online needs one: wandb login")


def _offline(config: Config) -> Finding:
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ulysses-exp-doctor-") as place:
        offline = replace(config, tracker=replace(config.tracker, mode="offline"))
        tracker = Tracker(offline, Path(place), resolved={}, name="doctor", group=None, tags=[], on_warning=said.append)
        with tracker:
            tracker.log({"train/loss": 0.0}, 1)
            tracker.finish({}, failed=False)
        if not said and list(Path(place).glob("wandb/offline-run-*/*.wandb")):
            return ok("offline", "a run was written")
    return warning("offline", said[0] if said else "no run was written", "tracker.mode=disabled")
