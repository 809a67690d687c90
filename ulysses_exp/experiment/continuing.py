"""The same job in its own folder goes on where an earlier attempt was ended, as if nothing had happened.

Training resumes at the newest checkpoint of the folder. What the attempt logged after that step is taken back, what it
logged before is kept: the numbers of all steps are in metrics.jsonl, and stage train's lists are made from it. What the
attempt left otherwise (its results.json, its ranks' logs) is moved to `previous/<n>`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ulysses_exp.config import Config
from ulysses_exp.config import measuring as throughput
from ulysses_exp.config.received.sources import newest_manifests
from ulysses_exp.experiment.sweep import fingerprint
from ulysses_exp.launch import run_folder

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Earlier:
    """What earlier attempts of a job have left to go on from."""

    checkpoint: Path
    step: int  # optimizer steps in the checkpoint
    first_step: int  # where the first attempt began
    lines: list[str]  # of metrics.jsonl, one a step up to the checkpoint's
    train: dict[str, Any] | None  # stage train's result, where it had ended
    session: dict[str, Any]  # what the ranks said of model and machine, then


def take_over(config: Config, folder: Path, overrides: list[str]) -> tuple[Earlier | None, Path | None]:
    """Makes the locked `folder` that of this job.

    Returns:
        What to go on from, if anything, and where to things that are in the way were moved, if there were any.

    Raises:
        OSError: something cannot be moved; nothing is lost.
    """
    again = config.sweep.rerun == "all"
    same, place = run_folder.begin(folder, fingerprint(config), overrides, fresh=again)
    if not same:
        return None, place
    if (found := earlier(config, folder)) is not None:
        return found, None
    return None, run_folder.set_aside(folder)


def earlier(config: Config, folder: Path) -> Earlier | None:
    """The newest checkpoint in `folder` of which every step before is known; None where there is none."""
    if "train" not in config.stages or config.longest.search:  # a search finds its length anew
        return None
    logged = _steps(folder / METRICS)
    first = _first_step(config, logged)
    for step, checkpoint in sorted(_checkpoints(folder), reverse=True):
        wanted = range(first + 1, step + 1)
        if step > config.train.steps or not wanted or not all(number in logged for number in wanted):
            continue
        lines = [logged[number] for number in wanted]
        train = _ended(folder) if step == config.train.steps else None
        if train is not None:
            train = _joined(train, [json.loads(line) for line in lines], config, checkpoint)
        session = _json(folder / "ranks" / "main" / "session.json") or {
            key: value for key, value in _json(folder / "results.json").items() if key in _OF_THE_SESSION
        }
        return Earlier(checkpoint, step, first, lines, train, session)
    return None


_OF_THE_SESSION = ("model", "device", "data", "threads_per_rank")


def tidy(folder: Path, found: Earlier) -> None:
    """Takes back what the earlier attempt did after its checkpoint. Can be repeated when it is interrupted.

    Called once results.json holds what is known of stage train.

    Raises:
        OSError: something cannot be written; nothing is lost.
    """
    place = run_folder.set_aside(folder, ["ranks"]) or run_folder.next_place(folder)
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(folder / METRICS, place / METRICS)
    kept = folder / f"{METRICS}.tmp"
    kept.write_text("".join(f"{line}\n" for line in found.lines))
    kept.replace(folder / METRICS)
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_symlink():
        for partial in checkpoints.glob(".step*.partial"):  # of a save that was cut off
            shutil.rmtree(partial)


def joined(result: dict[str, Any], folder: Path, config: Config, found: Earlier) -> dict[str, Any]:
    """`result`, stage train's of the attempt that has ended it, over the steps of all attempts."""
    logged = _steps(folder / METRICS)
    rows = [json.loads(logged[step]) for step in range(found.first_step + 1, config.train.steps + 1)]
    return _joined(result, rows, config, found.checkpoint)


def _joined(result: dict[str, Any], rows: list[dict[str, Any]], config: Config, checkpoint: Path) -> dict[str, Any]:
    seconds = [row["perf/step_time_s"] for row in rows]
    tokens = [round(row["perf/tokens_per_second"] * row["perf/step_time_s"]) for row in rows]
    last = rows[-1]
    whole = {
        **result,
        "steps": len(rows),
        "first_step": int(rows[0]["step"]) - 1,
        "continued_from": _step_of(checkpoint),
        "loss": [row["train/loss"] for row in rows],
        "grad_norm": [row["train/grad_norm"] for row in rows],
        "learning_rate": [row["train/learning_rate"] for row in rows],
        **throughput.speed(seconds, tokens, throughput.unmeasured(config.train)),
    }
    for name in ("mfu", "hfu"):  # of a step they are in inverse proportion to its time
        if last.get(f"perf/{name}") is not None:
            whole[name] = last[f"perf/{name}"] * seconds[-1] / whole["step_time_s"]["median"]
    if bad := [int(row["step"]) for row in rows if row["train/loss"] is None or row["train/grad_norm"] is None]:
        whole["nonfinite_steps"] = bad
        if config.train.on_nonfinite == "skip":
            whole["skipped_steps"] = len(bad)
        elif whole["status"] == "ok":
            reason = f"{len(bad)} of {len(rows)} steps are not finite, the first: step {bad[0]}"
            whole.update(status="failed", reason=reason)
    if not result["steps"]:  # all steps were made by earlier attempts
        whole.pop("already_at_step", None)
        whole["checkpoint"] = f"checkpoints/{checkpoint.name}"
        whole["communication"] = {
            "all_to_all_calls_per_step": last["comm/all_to_all_calls"],
            "all_to_all_bytes_per_step": last["comm/all_to_all_bytes"],
        }
        if peak := _peak_memory(checkpoint):
            whole["peak_memory_bytes"] = {"max": max(peak), "per_rank": peak}
    return whole


def _ended(folder: Path) -> dict[str, Any] | None:
    """Stage train's result where an earlier attempt has ended it."""
    train = _json(folder / "results.json").get("stages", {}).get("train") or {}
    if train.get("status") != "ok":
        train = _json(folder / "ranks" / "main" / "train.json")
    if train.get("status") != "ok":
        return None
    if losses := _json(folder / "ranks" / "main" / "continuation.json").get("loss"):
        train = {**train, "continuation_loss": losses}
    return train


def _steps(metrics: Path) -> dict[int, str]:
    """The lines of optimizer steps by step; what is cut off or no JSON is left out."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for line in metrics.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                if "train/loss" in entry:
                    found[int(entry["step"])] = line
    return found


def _first_step(config: Config, logged: dict[int, str]) -> int:
    """Where the first attempt began."""
    if config.checkpoint.source is None:
        return 0
    for manifest in newest_manifests(config.checkpoint.source):
        if isinstance(step := _json(manifest).get("step"), int):
            return step
    return min(logged, default=1) - 1


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of those that are complete: a save gets its name last."""
    return [
        (_step_of(path), path)
        for path in (folder / "checkpoints").glob("step*")
        if path.name.removeprefix("step").isdecimal() and (path / "manifest.json").is_file()
    ]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step"))


def _peak_memory(checkpoint: Path) -> list[int] | None:
    state = _json(checkpoint / "manifest.json").get("state")
    found = state.get("peak_memory_bytes") if isinstance(state, dict) else None
    return found if isinstance(found, list) and all(isinstance(n, int) for n in found) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}
