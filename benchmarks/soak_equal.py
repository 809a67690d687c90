"""Two sweeps of the same jobs: where do their results differ?"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Keys of results.json, metrics.jsonl and manifests that tell time, memory, or what follows from them; the overrides
#: name the sweep
NOT_COMPARED = {"started", "seconds", "first_step_finished", "tokens_per_second", "step_time_s", "mfu", "hfu",
                "peak_memory_bytes", "continued_from", "attempts", "overrides"}  # fmt: skip
_MEASURED = ("perf/", "memory/")


def differences(calm: Path, rough: Path) -> list[str]:
    """A line for each job, file or figure of `rough` that is not what it is in `calm`."""
    found = []
    jobs = {folder.name for sweep in (calm, rough) for folder in sweep.iterdir() if (folder / ".hydra").is_dir()}
    for job in sorted(jobs):
        found += [f"{job}: {text}" for text in _of_a_job(calm / job, rough / job)]
    return found


def _of_a_job(calm: Path, rough: Path) -> Iterator[str]:
    try:
        ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (calm, rough))
        yield from _of_a_tree(ours, theirs, "results.json")
        yield from _of_a_tree(_metrics(calm), _metrics(rough), "metrics.jsonl")
    except (OSError, ValueError) as error:
        yield str(error)
    yield from _of_checkpoints(calm / "checkpoints", rough / "checkpoints")


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(_MEASURED)} for line in lines]


def _of_a_tree(calm: Any, rough: Any, path: str) -> Iterator[str]:
    if isinstance(calm, dict) and isinstance(rough, dict):
        for key in sorted((calm.keys() | rough.keys()) - NOT_COMPARED):
            yield from _of_a_tree(calm.get(key), rough.get(key), f"{path}.{key}")
    elif isinstance(calm, list) and isinstance(rough, list) and len(calm) == len(rough):
        for number, (a, b) in enumerate(zip(calm, rough, strict=True)):
            yield from _of_a_tree(a, b, f"{path}.{number}")
    elif calm != rough or type(calm) is not type(rough):
        yield f"{path} is {_short(rough)}, undisturbed {_short(calm)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _of_checkpoints(calm: Path, rough: Path) -> Iterator[str]:
    """The same files with the same bytes; of manifests, which hold the digests, the same figures.

    A command that was asked to end has saved once more: a whole checkpoint of a step at which the undisturbed job saved
    none is no difference.
    """
    more = {folder.name for folder in rough.glob("step*") if (folder / "manifest.json").is_file()}
    more -= {folder.name for folder in calm.glob("step*")}
    files = {path.relative_to(top) for top in (calm, rough) for path in top.rglob("*") if path.is_file()}
    for file in sorted(file for file in files if file.parts[0] not in more):
        if not (rough / file).is_file():
            yield f"checkpoints/{file} is missing"
        elif not (calm / file).is_file():
            yield f"checkpoints/{file} is left"
        elif file.name == "manifest.json":  # it has a digest of itself
            ours, theirs = (json.loads((top / file).read_text()) | {"sha256": None} for top in (calm, rough))
            yield from _of_a_tree(ours, theirs, f"checkpoints/{file}")
        elif not filecmp.cmp(calm / file, rough / file, shallow=False):
            yield f"checkpoints/{file} has other bytes"
