"""metrics.jsonl as it grows, shown on the terminal and handed to the tracker."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ulysses_exp.report.terminal import Progress
from ulysses_exp.tracking.run import Tracker

_PATIENCE_S = 1  # for what has been written to be shown


@contextlib.contextmanager
def following(path: Path, progress: Progress, tracker: Tracker, known: int = 0) -> Iterator[Callable[[], None]]:
    """While open, hands every line that is added to metrics.jsonl to the terminal and to the tracker.

    Args:
        known: first lines that earlier attempts of the job have shown; the tracker, which has a new run, gets them.

    Yields:
        What returns when all that has been written so far is shown: a stage's figures come before the next stage.
    """
    done, shown = threading.Event(), 0  # bytes

    def follow() -> None:
        nonlocal shown
        while not path.exists():
            if done.wait(0.05):
                return
        with path.open("rb") as file:
            rest, old = b"", known
            while True:
                last = done.is_set()  # read once more after the ranks have ended
                more = file.read()
                *lines, rest = (rest + more).split(b"\n")
                for line in lines:
                    metrics = json.loads(line)
                    step = metrics.pop("step")
                    tracker.log(metrics, step)
                    if old:
                        old -= 1
                    else:
                        progress.step({"step": step, **metrics})
                shown += len(more)
                if last:
                    return
                done.wait(0.05)

    def caught_up() -> None:
        end = time.monotonic() + _PATIENCE_S
        while path.exists() and shown < path.stat().st_size and thread.is_alive() and time.monotonic() < end:
            time.sleep(0.01)

    thread = threading.Thread(target=follow, name="metrics", daemon=True)
    thread.start()
    try:
        yield caught_up
    finally:
        done.set()
        thread.join()
