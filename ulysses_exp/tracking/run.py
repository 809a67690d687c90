"""One Weights & Biases run a job, owned by the job's parent process.

Ranks know nothing of W&B: rank 0 writes metrics.jsonl, the parent reads its lines and logs them here. So a rank that is
killed loses nothing, and no job has one run a rank (wandb issue 8428).

A job never waits for W&B and never fails of it: the client lives in a thread that is fed by a queue, an unreachable
server is noticed by a probe and turns the run into an offline one, and the end of a job waits a bounded time.

What was kept offline is uploaded later by `sync.py`.
"""

from __future__ import annotations

import math
import os
import queue
import re
import shlex
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from ulysses_exp.config import Config
from ulysses_exp.config.redaction import without_secrets
from ulysses_exp.tracking.client import client_places
from ulysses_exp.tracking.server import PROBE_S, foreign_settings, one_line, server, unreachable

INIT_S = 10  # for the server to open the run
LATENCY_S = 1  # at the end of a job: a server slower than this gets no request that has to be waited for
FINISH_S = 8  # for the upload of what is left at the end of a job
GRACE_S = 25  # at the end of a job: longest wait for all of the above together

#: Metrics whose best value is what one compares runs by; every other metric's summary is its last value.
SUMMARIES = {
    "train/loss": "min,last",
    "train/grad_norm": "max,last",
    "perf/*": "min,max,last",
    "memory/*": "max",
    "eval/*": "last",
    "reload/*": "max,last",
}

RELOAD_COLUMNS = (
    "source", "target", "route", "status", "weights_bit_exact", "optimizer_bit_exact",
    "continuation_max_abs_loss_diff", "seconds", "reason",
)  # fmt: skip

CLAIM_COLUMNS = ("claim", "sentence", "side", "layout", "verdict", "figure", "why", "finding")


class Tracker:
    """The W&B run of one job: `log` its metrics, then `finish` it; an exception in its context finishes it as failed.

    No method raises, blocks on the network or prints: what goes wrong is said once through `on_warning`, from the
    tracker's own thread or from `finish`.

    Args:
        config: the job's configuration; `config.tracker.mode` is offline, online or disabled.
        folder: the run folder. All that the client writes lies in its `wandb/`, caches and staged tables included.
        resolved: the same configuration as plain dicts, logged as the run's config without anything secret.
        name: what the run is called, `<model>-<layout>`.
        group: the sweep or experiment it belongs to.
        tags: the stages; `config.tracker.tags` are added.
        on_warning: called with one line of text, at most once.
    """

    how_to_open: str  #: one line for the terminal: the URL of an online run, else the command that shows a local one

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        resolved: dict[str, Any],
        name: str,
        group: str | None,
        tags: list[str],
        on_warning: Callable[[str], None],
    ):
        self._mode = config.tracker.mode
        self._folder = Path(folder).resolve()
        self._on_warning = on_warning
        self._warned = False
        self._finished = False
        self._run: Any = None
        self.how_to_open = f"wandb leet {_shown(self._folder / 'wandb')}" if self._mode != "disabled" else ""
        self._settings = {
            "project": config.tracker.project,
            "entity": config.tracker.entity,
            "id": _run_id(name),
            "name": name,
            "group": group,
            "tags": sorted({tag[:64] for tag in (*tags, *config.tracker.tags) if tag}),
            "config": without_secrets(resolved) | (_flat(config) if resolved else {}),
        }
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        if self._mode != "disabled":
            self._thread.start()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.finish({}, failed=True)

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Logs `metrics` (names as in metrics.jsonl) at optimizer step `step`. Returns at once."""
        if self._mode != "disabled" and not self._finished:
            numbers = {key: value for key, value in metrics.items() if value is None or _is_number(value)}
            self._queue.put(lambda: self._log(numbers, step))

    def log_media(self, pictures: Mapping[str, Path], columns: list[str], rows: list[list[Any]]) -> None:
        """Logs PNG files as `report/<name>`, and a table of the runs that they show as `runs`."""
        if self._mode != "disabled" and not self._finished:
            self._queue.put(lambda: self._log_media(pictures, columns, rows))

    def finish(self, results: dict[str, Any], failed: bool) -> None:
        """Writes the figures of results.json as the run's summary and its reload cells as a table, then closes it.

        Waits until the data is on disk, and in online mode up to `FINISH_S` for the upload.
        """
        if self._finished or self._mode == "disabled":
            return
        self._finished = True
        self._queue.put(lambda: self._finish(results, failed))
        self._queue.put(None)
        self._thread.join(GRACE_S)
        if self._thread.is_alive():
            self._warn(f"W&B did not finish in {GRACE_S} s; metrics.jsonl and results.json hold everything")

    # What follows runs in the tracker's thread.

    def _work(self) -> None:
        self._base_url = server()
        support = client_places(self._folder)
        previous = {key: os.environ.get(key) for key in support}
        os.environ.update(support)
        try:
            self._run = self._open()
            while (job := self._queue.get()) is not None:
                job()
        except Exception as error:  # tracking must never end a job, whatever the client does
            self._warn(f"W&B stopped tracking ({one_line(error)}); metrics.jsonl and results.json hold everything")
        finally:
            try:
                import wandb

                wandb.teardown()  # ends the client's service process; the next job of a sweep starts its own
            except Exception as error:
                self._warn(f"W&B did not shut down ({one_line(error)})")
            for key, value in previous.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value

    def _open(self) -> Any:
        import wandb

        # silent before anything is said
        wandb.setup(wandb.Settings(silent=True, base_url=self._base_url))
        if self._mode == "online":
            problem = foreign_settings(self._base_url) or unreachable(self._base_url, PROBE_S)
            if problem is None:
                before = set((self._folder / "wandb").glob("run-*"))  # of an earlier attempt of the job
                try:
                    run = self._init("online")
                    self.how_to_open = run.url or self.how_to_open
                    return run
                except Exception as error:
                    problem = one_line(error)
                    # The client's service holds on to the id of a run that it could not open.
                    self._settings["id"] = _run_id(self._settings["name"])
                    for started in set((self._folder / "wandb").glob("run-*")) - before:  # nothing was logged to it
                        shutil.rmtree(started, ignore_errors=True)
            self._mode = "offline"
            self._warn(
                f"W&B is not reachable ({problem}); the run is kept offline,"
                f" upload it later: python -m ulysses_exp.tracking sync {_shown(self._folder)}"
            )
        return self._init("offline")

    def _init(self, mode: Literal["offline", "online"]) -> Any:
        import wandb

        run = wandb.init(
            **self._settings,
            mode=mode,  # always passed: unset, it may ask a question on the terminal
            dir=str(self._folder),
            reinit="create_new",
            settings=wandb.Settings(
                x_transaction_log_flush_interval=1,  # default 15 s: a killed job would leave nothing readable
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                save_code=False,
                host="",  # not the machine's name, not the path of the command
                program="ulysses-exp",
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
                init_timeout=INIT_S,
                finish_timeout=FINISH_S,
                finish_timeout_raises=True,
            ),
        )
        run.define_metric("step", hidden=True)
        for metric, summary in SUMMARIES.items():
            # A glob takes no min or max over what it matches before it is seen, so each gets the same step axis.
            run.define_metric(metric, step_metric="step", summary=summary)
        return run

    def _log(self, metrics: Mapping[str, float | None], step: int) -> None:
        self._run.log({**metrics, "step": step}, step=max(step, self._run.step))

    def _log_media(self, pictures: Mapping[str, Path], columns: list[str], rows: list[list[Any]]) -> None:
        import wandb

        images = {f"report/{name}": wandb.Image(str(path)) for name, path in pictures.items()}
        self._run.log(images | {"runs": wandb.Table(columns=[*columns], data=rows, allow_mixed_types=True)})

    def _finish(self, results: dict[str, Any], failed: bool) -> None:
        for key, value in figures(results):
            self._run.summary[key] = value
        tables = dict(_tables(results))
        # A table goes up as an artifact, for which the client asks the server and waits: 20 s and an error if it died.
        lost = self._mode == "online" and unreachable(self._base_url, LATENCY_S) is not None
        if tables and not lost:
            self._run.log(tables)
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError:
            lost = True
        if tables and lost:  # a second, offline part of the same run; `wandb sync` sends both
            with self._init("offline") as part:
                part.log(dict(_tables(results)), step=self._run.step)
        if lost:
            self._warn(
                "W&B stopped answering; the run is complete on disk,"
                f" upload it later: python -m ulysses_exp.tracking sync {_shown(self._folder)}"
            )
        elif self._mode == "online":  # the marker that `wandb sync` itself leaves
            for log in Path(self._run.settings.sync_dir).glob("*.wandb"):
                log.with_name(log.name + ".synced").touch()

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._on_warning(text)


def _tables(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Those that have rows, by name: the cells of reload and of claims, each a wandb.Table."""
    import wandb

    stages = results.get("stages", {})
    reload = [[cell.get(column) for column in RELOAD_COLUMNS] for cell in stages.get("reload", {}).get("cells", [])]
    for name, columns, rows in (
        ("reload", RELOAD_COLUMNS, reload),
        ("claims", CLAIM_COLUMNS, list(_claim_cells(stages.get("claims", {})))),
    ):
        if rows:
            yield name, wandb.Table(columns=list(columns), data=rows, allow_mixed_types=True)


def _claim_cells(stage: Mapping[str, Any]) -> Iterator[list[Any]]:
    for claim, entry in stage.items():
        for side in ("upstream", "here") if isinstance(entry, Mapping) else ():
            for layout, cell in entry.get(side, {}).get("cells", {}).items():
                known = {"claim": claim, "sentence": entry.get("claim"), "side": side, "layout": layout, **cell}
                yield [known.get(column) for column in CLAIM_COLUMNS]


def _flat(config: Config) -> dict[str, Any]:
    """What one groups runs by, without the dots that W&B's groupings write as `sp.value.size`."""
    return {
        "layout": config.layout.name,
        "world_size": config.layout.world,
        "sp_size": config.sp.size,
        "dp_size": config.dp.size,
        "zero_stage": config.zero.stage,
        "model_name": config.model.name,
        "seq_len": config.train.seq_len,
    }


def _run_id(name: str) -> str:
    """A new id that can be read, because `wandb leet` lists runs by it."""
    plain = re.sub(r"[^\w.-]+", "-", name)[:100]
    return f"{plain}-{uuid.uuid4().hex[:6]}"


def _shown(path: Path) -> str:
    """`path` as one would type it from here."""
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path))


def figures(results: Mapping[str, Any], prefix: str = "results") -> Iterator[tuple[str, float | bool | str]]:
    """The single numbers, flags and states of results.json by flat name, e.g. `results/train/step_time_s/median`."""
    for key, value in results.items():
        name = prefix if key == "stages" else f"{prefix}/{key}"
        if isinstance(value, Mapping):
            if key != "cells":  # of claims: they have a table
                yield from figures(value, name)
        elif isinstance(value, (bool, str)) or _is_number(value):
            yield name, value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
