"""metrics.jsonl as it grows, shown on the terminal and handed to the tracker."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

from ulysses_exp.report.terminal import Progress
from ulysses_exp.tracking.run import Tracker


@contextlib.contextmanager
def following(path: Path, progress: Progress, tracker: Tracker, known: int = 0) -> Iterator[None]:
    """While open, hands every line that rank 0 adds to metrics.jsonl to the terminal and to the tracker.

    Args:
        known: first lines that earlier attempts of the job have shown; the tracker, which has a new run, gets them.
    """
    done = threading.Event()

    def follow() -> None:
        while not path.exists():
            if done.wait(0.05):
                return
        with path.open() as file:
            rest, old = "", known
            while True:
                last = done.is_set()  # read once more after the ranks have ended
                rest += file.read()
                *lines, rest = rest.split("\n")
                for line in lines:
                    metrics = json.loads(line)
                    step = metrics.pop("step")
                    tracker.log(metrics, step)
                    if old:
                        old -= 1
                    else:
                        progress.step({"step": step, **metrics})
                if last:
                    return
                done.wait(0.1)

    thread = threading.Thread(target=follow, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
