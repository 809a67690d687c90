"""One job in the parent process: which tasks the ranks get, and what becomes of their results."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from ulysses_exp.config import Config, device_of, fitting, lineage, redaction, stages, text_architecture
from ulysses_exp.config.received import sources
from ulysses_exp.config.received.reading import Refused
from ulysses_exp.config.stages import Stage
from ulysses_exp.experiment import continuing
from ulysses_exp.experiment.continuing import Earlier
from ulysses_exp.experiment.following import following
from ulysses_exp.experiment.out_of_memory import advice
from ulysses_exp.experiment.sweep import fingerprint
from ulysses_exp.launch import RankFailure, Ranks, Task, strict_json
from ulysses_exp.launch.failure import Cause
from ulysses_exp.launch.output_trouble import of_the_place, said
from ulysses_exp.launch.supervision import stopped_at
from ulysses_exp.report import views
from ulysses_exp.report.terminal import Progress, summary
from ulysses_exp.tracking.run import Tracker

log = logging.getLogger("ulysses_exp")


class StageFailure(Exception):
    """A stage that ended without its result; `str()` is the reason."""


def run(
    config: Config,
    folder: Path,
    *,
    overrides: list[str],
    group: str | None,
    ranks: Ranks,
    console: Console,
    headline: str | None = None,
    earlier: Earlier | None = None,
) -> dict[str, Any]:
    """Runs the stages of `config` in order and writes results.json; returns what it wrote.

    A stage that fails is recorded with its reason and the stages that do not need it go on.

    Args:
        overrides: of the command line; of a job of a sweep, what it stands for.
        group: the sweep or experiment that the tracker shows it in.
        earlier: what earlier attempts of the job left in `folder` to go on from.

    Raises:
        KeyboardInterrupt: after results.json says `interrupted`.
        OSError: nothing can be written to `folder` from the start.
    """
    job = Job(config, folder, ranks, earlier)
    job.results["overrides"] = overrides
    job.write()
    if earlier is not None:
        continuing.tidy(folder, earlier)
    with _run_log(folder), Progress(console, headline) as progress:
        if earlier is not None:
            progress.note(f"continues at step {earlier.step} of {config.train.steps}")
        for line in fitting.remarks(config, overrides):
            log.info(line)
            progress.note(line)
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
                with following(folder / "metrics.jsonl", progress, tracker, known) as caught_up:
                    job.run(progress, caught_up)
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
        self.beside: dict[str, dict[str, Any]] = {}  # by stage, what its result says however it ends
        self.main: Task | None = None  # the task that brings the results of several stages

    def run(self, progress: Progress, caught_up: Callable[[], None]) -> None:
        """All stages in order. Raises KeyboardInterrupt after results.json says so.

        Args:
            caught_up: returns when the lines of metrics.jsonl are shown.
        """
        log.info("%s at %s, stages %s", self.config.model.name, self.config.layout, ", ".join(self.config.stages))
        try:
            for stage in self.config.stages:
                if stage in self.results["stages"]:  # brought by the task of an earlier stage
                    continue
                progress.start(stage, self.config.train.steps if stage == "train" else None)
                self.run_stage(stage, progress.note)
                caught_up()
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
            described = stages.stage(stage)
            if described.parent is None:
                self.take(stage, self.do(self.task(stage, (stage,), self.checkpoint_options()), stage))
            else:
                stages.resolve(described.parent)(self, note)
            self._check(described)
        except RankFailure as error:
            log.error("stage %s failed: %s\n%s", stage, error, error.trace)
            self._collect()
            ran_out = error.out_of_memory and error.cause == Cause.ERROR  # not killed, which may have another reason
            reason = f"{error}; {advice(self.config)}" if ran_out else str(error)
            self.results["stages"].setdefault(stage, {"status": "failed", "reason": reason})
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
        result.update(self.beside.get(stage, {}))
        result.setdefault("seconds", round(time.perf_counter() - began, 3))
        log.info("stage %s: %s", stage, result["status"])

    # -- what stages share ------------------------------------------------------------------------------------

    def task(self, name: str, work: tuple[str, ...], options: dict[str, Any]) -> Task:
        """A task at the job's layout. `work` names functions of stages (`config.stages.Work`)."""
        return Task(name, self.config, work, self.folder, options)

    def do(self, task: Task, work: str | None = None) -> dict[str, Any]:
        """Has the ranks run `task`; returns what `work` of it came to. Raises RankFailure."""
        log.info("task %s: %s at %s", task.name, ", ".join(task.work), task.layout)
        began = time.perf_counter()
        self.ranks.run(task)
        log.info("task %s: done in %.2f s", task.name, time.perf_counter() - began)
        self._describe(task)
        return _read(task.results / f"{work}.json") if work is not None else {}

    def do_main(self, work: tuple[str, ...], options: dict[str, Any]) -> None:
        """Has the ranks run the task of the job that trains, and records what its parts came to. Raises RankFailure."""
        self.main = self.task("main", work, options)
        self.do(self.main)
        self._collect()

    def needs(self, stage: str) -> None:
        """Raises StageFailure where `stage` is part of the job and did not end well."""
        entry = self.results["stages"].get(stage)
        if stage in self.config.stages and (entry is None or entry["status"] != "ok"):
            raise StageFailure(f"stage {stage} did not end well, so there is nothing to work on")

    def source_options(self) -> dict[str, Any]:
        """What tells ranks where to start from: an earlier attempt, or checkpoint.source. Raises StageFailure."""
        if self.earlier is not None:
            return {"checkpoint": str(self.earlier.checkpoint)}
        if self.config.checkpoint.source is None:
            return {}
        checkpoint = checkpoint_of(self.config.checkpoint.source)
        return {"checkpoint": str(checkpoint), "data_chosen": lineage.overridden(self.folder, "data")}

    def checkpoint_options(self) -> dict[str, Any]:
        """What tells ranks which weights to work on: those that the job has trained, or starts from."""
        trained = self.results["stages"].get("train")
        if trained and trained.get("checkpoint"):
            return {"checkpoint": str(self.folder / trained["checkpoint"])}
        return self.source_options()

    def take(self, stage: str, result: dict[str, Any]) -> None:
        """Records the result of `stage`, the first that there is.

        Its lines of metrics.jsonl are written here, where it counts: an evaluation that its ranks could not end is made
        again, and would be there twice if they logged it.
        """
        if stage in self.results["stages"]:
            return
        self.results["stages"][stage] = result
        for line in views.lines(stage, result):
            _append(self.folder / "metrics.jsonl", line)

    def _check(self, stage: Stage) -> None:
        """Raises RuntimeError where what `stage` left is not what it promises."""
        entry = self.results["stages"].get(stage.name)
        if entry is None or "status" not in entry:
            raise RuntimeError(f"stage {stage.name} has left no result with a status")
        if entry["status"] == "ok" and (missing := [key for key in stage.results if key not in entry]):
            raise RuntimeError(f"the result of stage {stage.name} lacks {', '.join(missing)}")

    def _collect(self) -> None:
        """Takes over what the main task has left so far, also when a later part of it failed."""
        if self.main is None:
            return
        self._describe(self.main)
        for work in self.main.work:
            if work in stages.names() and (result := _read_if_there(self.main.results / f"{work}.json")):
                if work == "train" and self.earlier is not None and self.earlier.train is None:
                    result = continuing.joined(result, self.folder, self.config, self.earlier)
                self.take(work, result)
        if losses := _read_if_there(self.main.results / "continuation.json").get("loss"):
            self.results["stages"]["train"]["continuation_loss"] = losses

    def _interrupted(self, signal: str) -> None:
        """Says so, and which checkpoint training was stopped at."""
        text = f"interrupted by {signal}" if signal else "interrupted"
        self.results.update(status="interrupted", error=text)
        log.warning(text)
        if self.main is not None and (stopped := stopped_at(self.main)) is not None:
            reason = f"{text} after step {stopped['step']}"
            self.results["stages"].setdefault("train", {"status": "interrupted", "reason": reason, **stopped})

    def _describe(self, task: Task) -> None:
        self.results.update(_read_if_there(task.results / "session.json"))

    # -- results.json -----------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Settles the status and writes results.json for the last time."""
        ended = self.results["stages"]
        if self.results["status"] != "interrupted":
            failed = [name for name in self.config.stages if ended.get(name, {}).get("status") != "ok"]
            self.results["status"] = "failed" if failed else "ok"
            self.results["error"] = (
                f"stage {failed[0]}: {ended.get(failed[0], {}).get('reason', 'did not run')}" if failed else None
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


def checkpoint_of(source: str) -> Path:
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
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _read_if_there(path: Path) -> dict[str, Any]:
    return _read(path) if path.exists() else {}
