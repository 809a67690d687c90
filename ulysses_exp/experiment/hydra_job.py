"""One job of Hydra's in the folder that it has locked: done already, continued, started, or skipped with the reason."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape

from ulysses_exp.config import Config, ConfigError, device_of
from ulysses_exp.config.redaction import redacted
from ulysses_exp.experiment import continuing, sweep
from ulysses_exp.experiment.continuing import Earlier
from ulysses_exp.launch import run_folder


def run(
    cfg: Any, config: Config, hydra_config: Any, jobs: sweep.Sweep, console: Console, headline: str | None
) -> float | None:
    """The job, in a folder that nobody else writes to now. Returns what a search is to optimize.

    Args:
        cfg: the composed configuration, `config` as it was checked.
        jobs: gets the outcome.
        headline: how far a sweep is.

    Raises:
        OSError: nothing can be written to the folder.
        KeyboardInterrupt: after results.json says so.
    """
    folder = Path(hydra_config.runtime.output_dir)
    changed = replace(config, sweep=replace(config.sweep, rerun="changed"))
    if sweep.finished(config if config.sweep.rerun == "all" else changed, folder):
        if config.launch.name == "attached":
            from ulysses_exp.launch import open_ranks

            open_ranks(config).close()  # the other ranks wait for tasks
        return done(config, folder, jobs, console)
    earlier, moved = continuing.take_over(config, folder, list(hydra_config.overrides.task))
    if moved is not None:
        text = f"{folder.name} held the outputs of another run or attempt; they are in previous/{moved.name} now"
        console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)
    _write_composed(cfg, folder, hydra_config)
    try:
        results = _launch(config, folder, hydra_config, headline, console, earlier)
    except KeyboardInterrupt:
        jobs.add("interrupted", folder.name, "it goes on when the command is given again")
        raise
    jobs.add(results["status"], folder.name, results["error"])
    return sweep.objective(config.optimize.metric, results)


def done(config: Config, folder: Path, jobs: sweep.Sweep, console: Console) -> float | None:
    """Says that an earlier call has done this job; returns what a search is to optimize."""
    jobs.add("ok", folder.name, None, ran=False)
    hint = "" if jobs.total > 1 else " already; sweep.rerun=all runs it anew"
    console.print(f"[green]done[/] {escape(folder.name)}{hint}", highlight=False, soft_wrap=True)
    return sweep.objective(config.optimize.metric, json.loads((folder / "results.json").read_text()))


def skip(cfg: Any, folder: Path, reason: str, overrides: list[str]) -> None:
    """Leaves, in the folder of a job whose settings cannot run, why. Nothing where the folder is somebody else's."""
    with contextlib.suppress(ConfigError, OSError):
        run_folder.lock(folder, "hydra.sweep.dir")
        try:
            run_folder.begin(folder, "skipped", [])
            text = json.dumps(sweep.skipped(cfg, reason) | {"overrides": overrides}, indent=1)
            (folder / "results.json").write_text(redacted(text))
        finally:
            run_folder.release(folder)


def _write_composed(cfg: Any, folder: Path, hydra_config: Any) -> None:
    """`.hydra/`, as Hydra writes it, with what the job inherits from checkpoint.source. Raises OSError."""
    place = folder / ".hydra"
    place.mkdir(exist_ok=True)
    OmegaConf.save(cfg, place / "config.yaml", resolve=True)  # whoever reads it resolves nothing
    OmegaConf.save(OmegaConf.create({"hydra": hydra_config}), place / "hydra.yaml")
    OmegaConf.save(hydra_config.overrides.task, place / "overrides.yaml")


def _launch(
    config: Config, folder: Path, hydra_config: Any, headline: str | None, console: Console, earlier: Earlier | None
) -> dict[str, Any]:
    from ulysses_exp.experiment import model_check
    from ulysses_exp.launch.local import warm_up

    model_check.close()
    if config.launch.name == "local":
        warm_up(device_of(config), config.launch.start)  # the ranks' imports run beside ours
    from ulysses_exp.experiment import job
    from ulysses_exp.launch import open_ranks

    group = config.sweep.name or hydra_config.runtime.choices.get("experiment")
    ranks = open_ranks(config)
    try:
        return job.run(
            config,
            folder,
            overrides=list(hydra_config.overrides.task),
            group=group,
            ranks=ranks,
            console=console,
            headline=headline,
            earlier=earlier,
        )
    finally:
        ranks.close()
