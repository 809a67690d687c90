"""One job in the parent process: which tasks the ranks get, and what becomes of their results."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from ulysses_exp import continuing, lineage, redaction, sources, strict_json
from ulysses_exp.checkpoints.errors import CheckpointError
from ulysses_exp.checkpoints.manifest import Manifest
from ulysses_exp.config import Config, ConfigError, device_of, text_architecture
from ulysses_exp.continuing import Earlier
from ulysses_exp.launch import RankFailure, Ranks, Task
from ulysses_exp.launch.supervision import stopped_at
from ulysses_exp.layout import REFERENCE, Layout
from ulysses_exp.output_trouble import of_the_place, said
from ulysses_exp.received import Refused
from ulysses_exp.report.terminal import Progress, summary
from ulysses_exp.sweep import fingerprint
from ulysses_exp.tracking import Tracker

log = logging.getLogger("ulysses_exp")

#: A continuation agrees with the uninterrupted run when its losses differ by at most this much, relative.
CONTINUATION_TOLERANCE = {"fp32": 1e-6, "bf16": 1e-2}


class StageFailure(Exception):
    """A stage that ended without its result; `str()` is the reason."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to evaluate or reload: its folder, its layout, and the losses of the run that went on from it."""

    checkpoint: Path
    layout: Layout
    continuation: list[float] | None


def run(
    config: Config,
    folder: Path,
    *,
    group: str | None,
    ranks: Ranks,
    console: Console,
    headline: str | None = None,
    earlier: Earlier | None = None,
) -> dict[str, Any]:
    """Runs the stages of `config` in order and writes results.json; returns what it wrote.

    A stage that fails is recorded with its reason and the stages that do not need it go on.

    Args:
        earlier: what earlier attempts of the job left in `folder` to go on from.

    Raises:
        KeyboardInterrupt: after results.json says `interrupted`.
        OSError: nothing can be written to `folder` from the start.
    """
    job = Job(config, folder, ranks, earlier)
    job.write()
    if earlier is not None:
        continuing.tidy(folder, earlier)
    with _run_log(folder), Progress(console, headline) as progress:
        if earlier is not None:
            progress.note(f"continues at step {earlier.step} of {config.train.steps}")
        tracker = Tracker(
            config,
            folder,
            resolved=asdict(config),
            name=f"{config.model.name}-{config.layout.name}",
            group=group,
            tags=config.stages,
            on_warning=progress.note,
        )
        with tracker:
            try:
                known = len(earlier.lines) if earlier is not None else 0
                with following(folder / "metrics.jsonl", progress, tracker, known):
                    job.run(progress)
            finally:
                tracker.finish(job.results, failed=job.results["status"] != "ok")
    summary(job.results, folder, console, tracker.how_to_open)
    return job.results


class Job:
    """The results of a job as they come in, and the tasks that bring them."""

    def __init__(self, config: Config, folder: Path, ranks: Ranks, earlier: Earlier | None = None):
        self.config, self.folder, self.ranks, self.earlier = config, folder, ranks, earlier
        self.results: dict[str, Any] = {
            "schema_version": 1,
            "status": "running",
            "error": None,
            "layout": config.layout.as_dict(),
            "model": _model_before_start(config),
            "versions": {
                name: version(name)
                for name in ("torch", "deepspeed", "transformers", "ulysses-exp")
                if _installed(name)
            },
            "device": device_of(config),
            "fingerprint": fingerprint(config),
            "started": time.time(),
            "stages": {},
        }
        if earlier is not None:
            self.results.update(earlier.session)
            if earlier.train is not None:
                self.results["stages"]["train"] = earlier.train
        self._main: Task | None = None
        self._longest: dict[str, Any] = {}  # what the search for the longest sequence adds to the train stage

    def run(self, progress: Progress) -> None:
        """All stages in order. Raises KeyboardInterrupt after results.json says so."""
        log.info("%s at %s, stages %s", self.config.model.name, self.config.layout, ", ".join(self.config.stages))
        try:
            for stage in self.config.stages:
                if stage in self.results["stages"]:  # brought by the task of an earlier stage
                    continue
                progress.start(stage, self.config.train.steps if stage == "train" else None)
                self.run_stage(stage, progress.note)
                self._write_if_possible()
        except KeyboardInterrupt as stop:
            self._collect()
            self._interrupted(str(stop))
            raise
        finally:
            self.finish()

    # -- stages -----------------------------------------------------------------------------------------------

    def run_stage(self, stage: str, note: Callable[[str], None]) -> None:
        """Runs `stage` and records its result, or the reason why there is none."""
        began = time.perf_counter()
        try:
            getattr(self, f"_{stage}")(note)
        except RankFailure as error:
            log.error("stage %s failed: %s\n%s", stage, error, error.trace)
            self._collect()
            self.results["stages"].setdefault(stage, {"status": "failed", "reason": str(error)})
        except StageFailure as error:
            log.error("stage %s failed: %s", stage, error)
            self.results["stages"][stage] = {"status": "failed", "reason": str(error)}
        except Exception as error:
            log.exception("stage %s failed", stage)
            reason = f"{type(error).__name__}: {error} (a defect of ulysses-exp; the trace is in run.log)"
            if isinstance(error, OSError) and of_the_place(error):
                reason = said(error)
            self.results["stages"][stage] = {"status": "failed", "reason": reason}
        result = self.results["stages"][stage]
        if stage == "train":
            result.update(self._longest)
        result.setdefault("seconds", round(time.perf_counter() - began, 3))
        log.info("stage %s: %s", stage, result["status"])

    def _train(self, note: Callable[[str], None]) -> None:
        """Training, and what the same engine can do afterwards: evaluation, and the steps that reloads compare with."""
        if self.config.longest.search:
            self._find_longest(note)
        work = ["train"]
        if "eval" in self.config.stages and self.config.eval.mode != "none":
            work.append("eval")
        if "reload" in self.config.stages and self.config.reload.steps:
            work.append("continuation")
        options = self._source_options() | (self._eval_options(note) if "eval" in work else {})
        self._main = Task("main", self.config, tuple(work), self.folder, options)
        self._do(self._main)
        self._collect()

    def _find_longest(self, note: Callable[[str], None]) -> None:
        """Makes the longest sequence that trains the length of this job."""
        from ulysses_exp.stages import longest

        tokens = longest.find(self.config, self.folder, self._do, self._longest, note)
        if tokens == 0:
            raise StageFailure(f"no sequence trains: {self._longest['tries'][-1]['reason']}")
        self.config = longest.at_length(self.config, tokens)

    def _eval(self, note: Callable[[str], None]) -> None:
        if self.config.eval.mode == "none":
            self.results["stages"]["eval"] = {"status": "ok", "mode": "none"}
            return
        self._needs("train")
        trained = self.results["stages"].get("train")  # then its own task has ended before it came to this
        of_source = {"checkpoint": str(self.folder / trained["checkpoint"])} if trained else self._source_options()
        task = Task("eval", self.config, ("eval",), self.folder, of_source | self._eval_options(note))
        self._main = self._main or task
        self._do(task)
        self._take("eval", _read(task.results / "eval.json"))

    def _reload(self, note: Callable[[str], None]) -> None:
        self._needs("train")
        source = self._source(note)
        cells = []
        targets = [Layout.parse(name) for name in self.config.reload.layouts or ()]
        with self._transformers_alone(source) as alone:
            for number, target in enumerate(targets, 1):
                note(f"reload {source.layout} -> {target} ({number}/{len(targets)})")
                cells.append({"source": source.layout.name, "target": target.name, **self._reload_cell(source, target)})
            note(f"reload {source.layout} -> one process, transformers alone")
            cells.append({"source": source.layout.name, "target": REFERENCE.name, **self._huggingface_cell(alone)})
        failed = [cell for cell in cells if cell["status"] != "ok"]
        stage = {"status": "failed" if failed else "ok", "checkpoint": str(source.checkpoint), "cells": cells}
        if failed:
            stage["reason"] = f"{len(failed)} of {len(cells)} cells: {failed[0]['target']}: {failed[0]['reason']}"
        self.results["stages"]["reload"] = stage
        _append(self.folder / "metrics.jsonl", {
            "step": int(source.checkpoint.name.removeprefix("step")),
            "reload/seconds": sum(cell["seconds"] for cell in cells),
        })  # fmt: skip

    def _reload_cell(self, source: Source, target: Layout) -> dict[str, Any]:
        options = {
            "checkpoint": str(source.checkpoint),
            "trust_pickle": self.config.checkpoint.trust_pickle,
            "model_seed": self.config.seed + 1,  # other weights: a load that loads nothing cannot pass
        }
        task = Task(f"reload-{target.name}", self.config.at(target), ("reload",), self.folder, options)
        began = time.perf_counter()
        try:
            self._do(task)
        except RankFailure as error:
            log.error("reload %s failed: %s\n%s", target, error, error.trace)
            return {"route": "portable", "status": "failed", "reason": str(error), "weights_bit_exact": None,
                    "optimizer_bit_exact": None, "seconds": time.perf_counter() - began}  # fmt: skip
        cell = _read(task.results / "reload.json")
        return judged(cell, source.continuation, CONTINUATION_TOLERANCE[self.config.train.precision])

    @contextlib.contextmanager
    def _transformers_alone(self, source: Source) -> Iterator[subprocess.Popen[str]]:
        """A fresh process in which deepspeed cannot be imported. It imports what it needs, for seconds, and waits."""
        out = self.folder / "ranks" / "huggingface.json"
        out.parent.mkdir(exist_ok=True)
        command = [
            sys.executable, "-P", "-m", "ulysses_exp.checkpoints.huggingface_check", str(source.checkpoint),
            "--out", str(out), "--wait",
        ]  # fmt: skip
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def _huggingface_cell(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """`from_pretrained` in the process that waits for it."""
        began = time.perf_counter()
        out = self.folder / "ranks" / "huggingface.json"
        _, errors = process.communicate("go\n")
        seconds = time.perf_counter() - began
        if process.returncode:
            log.error("reload by from_pretrained failed:\n%s", errors)
            reason = (errors.strip().splitlines() or ["no message"])[-1]
            return {"route": "huggingface", "status": "failed", "reason": reason, "weights_bit_exact": None,
                    "optimizer_bit_exact": None, "seconds": seconds}  # fmt: skip
        result = _read(out)
        problems = []
        if not result["weights_bit_exact"]:
            problems.append("the weights that from_pretrained loads are not those that were trained")
        if changes := result.get("config_changed"):
            problems.append(f"huggingface/config.json is not as it was saved ({'; '.join(changes)})")
        if (logits := result.get("logits")) not in ("ok", "not recorded"):
            although = ", although the weights are equal" if result["weights_bit_exact"] else ""
            problems.append(f"{logits}{although}")
        cell = {
            "route": "huggingface",
            "status": "failed" if problems else "ok",
            "optimizer_bit_exact": None,
            "seconds": seconds,
            **result,
        }
        if problems:
            cell["reason"] = "; ".join(problems)
        return cell

    def _parity(self, note: Callable[[str], None]) -> None:
        from ulysses_exp.stages import parity

        tasks = []
        for name, config in (("parity-reference", self.config.reference()), ("parity-layout", self.config)):
            note(f"{name.replace('-', ' ')}: {config.layout}")
            tasks.append(Task(name, config, ("trajectory",), self.folder))
            self._do(tasks[-1])
        reference, ours = (task.results for task in tasks)
        self.results["stages"]["parity"] = parity.compare(
            self.config, reference, ours, (_read(reference / "trajectory.json"), _read(ours / "trajectory.json"))
        )
        for weights in (*reference.glob("weights*"), *ours.glob("weights*")):
            weights.unlink()

    def _plan(self, note: Callable[[str], None]) -> None:
        from ulysses_exp.plan.forks import TraceError
        from ulysses_exp.stages.plan import plan

        try:
            result = plan(self.config)
        except (TraceError, ConfigError) as error:
            raise StageFailure(str(error)) from error
        self.results["stages"]["plan"] = result
        self.results["model"]["parameters"] = self.results["model"]["parameters"] or result["parameters"]

    # -- what stages share ------------------------------------------------------------------------------------

    def _do(self, task: Task) -> None:
        """Has the ranks run `task`. Raises RankFailure."""
        log.info("task %s: %s at %s", task.name, ", ".join(task.work), task.layout)
        began = time.perf_counter()
        self.ranks.run(task)
        log.info("task %s: done in %.2f s", task.name, time.perf_counter() - began)
        self._describe(task)

    def _needs(self, stage: str) -> None:
        entry = self.results["stages"].get(stage)
        if stage in self.config.stages and (entry is None or entry["status"] != "ok"):
            raise StageFailure(f"stage {stage} did not end well, so there is nothing to work on")

    def _eval_options(self, note: Callable[[str], None]) -> dict[str, Any]:
        """What `eval.mode=auto` is decided by; the ranks know how much memory is free."""
        if self.config.eval.mode != "auto" or self.config.layout.sp == 1:
            return {}
        from ulysses_exp.plan.planner import bypassed_evaluation_bytes

        note("eval.mode=auto: planning the evaluation of a whole sequence on one rank")
        return {"bypassed_evaluation_bytes": bypassed_evaluation_bytes(self.config)}

    def _source_options(self) -> dict[str, Any]:
        if self.earlier is not None:
            return {"checkpoint": str(self.earlier.checkpoint)}
        if self.config.checkpoint.source is None:
            return {}
        checkpoint = _checkpoint_of(self.config.checkpoint.source)
        return {"checkpoint": str(checkpoint), "data_chosen": lineage.overridden(self.folder, "data")}

    def _source(self, note: Callable[[str], None]) -> Source:
        train = self.results["stages"].get("train") or {}
        losses, same = None, True
        if train.get("checkpoint"):
            folder, checkpoint = self.folder, self.folder / train["checkpoint"]
            saved, losses = self.config.layout, train.get("continuation_loss")
        else:
            folder = sources.run_folders(self.config.checkpoint.source or "")[0]
            checkpoint = _checkpoint_of(str(folder))
            try:
                manifest = Manifest.read(checkpoint)
            except CheckpointError as error:
                raise StageFailure(str(error)) from error
            saved = Layout.parse(manifest.layout)
            # losses of another configuration, e.g. of sequences of another length, are no losses to compare with
            same = lineage.changed(manifest.state, self.config) == {}
            try:
                losses = sources.continuation_losses(folder, self.config.reload.steps)
            except Refused as error:
                note(f"{error}; its losses are computed again")
        if (losses is None or len(losses) < self.config.reload.steps or not same) and self.config.reload.steps:
            layout = sources.comparison_layout(self.config, saved)
            note(f"continuing {folder.name} at {layout} for comparison")
            task = Task("continuation", self.config.at(layout), ("continuation",), self.folder,
                        {"checkpoint": str(checkpoint), "data_chosen": True})  # fmt: skip
            self._do(task)
            losses = _read(task.results / "continuation.json")["loss"]
            if train.get("checkpoint"):
                train["continuation_loss"] = losses
        return Source(checkpoint, saved, losses)

    def _collect(self) -> None:
        """Takes over what the main task has left so far, also when a later part of it failed."""
        if self._main is None:
            return
        self._describe(self._main)
        for work in ("train", "eval"):
            if result := _read_if_there(self._main.results / f"{work}.json"):
                if work == "train" and self.earlier is not None and self.earlier.train is None:
                    result = continuing.joined(result, self.folder, self.config, self.earlier)
                self._take(work, result)
        if losses := _read_if_there(self._main.results / "continuation.json").get("loss"):
            self.results["stages"]["train"]["continuation_loss"] = losses

    def _take(self, stage: str, result: dict[str, Any]) -> None:
        """Records the result of `stage`, the first that there is.

        What an evaluation came to is logged here, where it counts: an evaluation that its ranks could not end is made
        again, and would be in metrics.jsonl twice if they logged it.
        """
        if stage in self.results["stages"]:
            return
        self.results["stages"][stage] = result
        for name in ("bypass", "sp") if stage == "eval" else ():
            if name in result:
                line = {"step": result["step"], f"eval/{name}/loss": result[name]["loss"]}
                _append(self.folder / "metrics.jsonl", line)

    def _interrupted(self, signal: str) -> None:
        """Says so, and which checkpoint training was stopped at."""
        text = f"interrupted by {signal}" if signal else "interrupted"
        self.results.update(status="interrupted", error=text)
        log.warning(text)
        if self._main is not None and (stopped := stopped_at(self._main)) is not None:
            reason = f"{text} after step {stopped['step']}"
            self.results["stages"].setdefault("train", {"status": "interrupted", "reason": reason, **stopped})

    def _describe(self, task: Task) -> None:
        self.results.update(_read_if_there(task.results / "session.json"))

    # -- results.json -----------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Settles the status and writes results.json for the last time."""
        stages = self.results["stages"]
        if self.results["status"] != "interrupted":
            failed = [name for name in self.config.stages if stages.get(name, {}).get("status") != "ok"]
            self.results["status"] = "failed" if failed else "ok"
            self.results["error"] = (
                f"stage {failed[0]}: {stages.get(failed[0], {}).get('reason', 'did not run')}" if failed else None
            )
        self.results["seconds"] = round(time.time() - self.results["started"], 3)
        if (problem := self._write_if_possible()) is not None:
            before = self.results["error"]
            self.results.update(status="failed", error=f"{before}; {problem}" if before else problem)

    def write(self) -> None:
        """results.json, whole or not at all. Raises OSError."""
        self.results = redaction.redacted_results(self.results)
        temporary = self.folder / "results.json.tmp"
        try:
            temporary.write_text(strict_json.dumps(self.results, indent=1))
            temporary.replace(self.folder / "results.json")
        except OSError as error:
            error.filename = str(self.folder / "results.json")
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def _write_if_possible(self) -> str | None:
        """Writes results.json; returns why it cannot be written."""
        try:
            self.write()
        except OSError as error:
            log.error("results.json cannot be written: %s", error)
            return said(error)
        return None


def judged(cell: dict[str, Any], uninterrupted: list[float] | None, tolerance: float) -> dict[str, Any]:
    """`cell` with its status: bit-exact weights and states, and losses that go on as if nothing had happened."""
    losses = cell.pop("loss")
    cell["continuation_max_abs_loss_diff"] = None
    problems = []
    if cell["weights_bit_exact"] is not True:
        problems.append("weights are not bit-exact")
    if cell["optimizer_bit_exact"] is False:
        problems.append("optimizer states are not bit-exact")
    expected = uninterrupted or []
    if losses and not expected:
        problems.append("the uninterrupted run has left no losses to compare with")
    elif losses and not all(map(_is_finite, [*losses, *expected])):
        problems.append("the next losses are not finite")
    elif losses:
        differences = [abs(a - b) for a, b in zip(losses, expected, strict=False)]
        cell["continuation_max_abs_loss_diff"] = max(differences)
        if max(d / max(abs(b), 1e-30) for d, b in zip(differences, expected, strict=False)) > tolerance:
            problems.append(f"the next losses differ by {max(differences):.2e} from the uninterrupted run's")
    cell["status"] = "failed" if problems else "ok"
    if problems:
        cell["reason"] = "; ".join(problems)
    return cell


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


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


@contextlib.contextmanager
def _run_log(folder: Path) -> Iterator[None]:
    """run.log: what happened, with the full traces that the terminal is spared."""
    logging.raiseExceptions = False  # a full disk would print a trace onto the terminal for every line of a log
    handler = logging.FileHandler(folder / "run.log")
    handler.setFormatter(redaction.Redacting("%(asctime)s %(levelname)s %(message)s"))
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


def _installed(name: str) -> bool:
    try:
        version(name)
    except ImportError:  # PackageNotFoundError: run from a checkout without installing
        return False
    return True


def _model_before_start(config: Config) -> dict[str, Any]:
    """What the configuration says of the model; the ranks replace it by what they built."""
    known = text_architecture(config)
    heads = known.get("num_attention_heads", 0)
    return {
        "name": config.model.name if config.model.name_or_path is None else config.model.name_or_path,
        "parameters": 0,
        "layers": known.get("num_hidden_layers", 0),
        "hidden": known.get("hidden_size", 0),
        "heads": heads,
        "kv_heads": known.get("num_key_value_heads") or heads,
        "attention": config.sp.attention,
    }


def _checkpoint_of(source: str) -> Path:
    """The newest checkpoint of what `checkpoint.source` names. Raises StageFailure."""
    folders = sources.run_folders(source)
    try:
        return sources.newest_checkpoint(folders[0] if folders else Path(source).expanduser())
    except Refused as error:
        raise StageFailure(str(error)) from error


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(strict_json.dumps(entry) + "\n")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _read_if_there(path: Path) -> dict[str, Any]:
    return _read(path) if path.exists() else {}
