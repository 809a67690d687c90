"""The command: compose, validate, launch, summarise.

Exit codes: 0 ok, 1 failed, 2 wrong configuration, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ulysses_exp.config.paths import CONF
from ulysses_exp.launch.stopping import requests

if TYPE_CHECKING:
    from ulysses_exp.config import Config
    from ulysses_exp.experiment.sweep import Sweep


def main() -> None:
    """Entry point of run.py and of the installed command `ulysses-exp`."""
    from ulysses_exp.launch.output_trouble import forgiving_streams

    try:
        with forgiving_streams(), requests.heeded():
            _command()
    except KeyboardInterrupt as stop:  # before there was anything to summarise
        print(f"interrupted by {stop}" if str(stop) else "interrupted", file=sys.stderr)
        sys.exit(130)


def _command() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as exceptions; we say them in a line
    from ulysses_exp.cli import command_line

    began = time.time()
    try:
        arguments = command_line.parse(sys.argv[1:])
    except Exception as error:
        _refuse(error, [])
    sys.argv[1:] = command_line.in_order(sys.argv[1:], arguments)
    typed, given = sys.argv[1:], list(arguments.overrides)
    if "launch=attached" in arguments.overrides:
        leave_to_rank_0(arguments.overrides)
    asks = arguments.help or arguments.hydra_help or arguments.cfg or arguments.info or arguments.shell_completion
    from ulysses_exp.cli.interruption import continue_command
    from ulysses_exp.config.redaction import check_overrides
    from ulysses_exp.experiment import combinations
    from ulysses_exp.experiment.sweep import Sweep
    from ulysses_exp.launch import output_trouble, run_folder

    sweep = Sweep()
    axes: set[str] = set()
    possible: list[list[str]] | None = None  # the jobs of a sweep that can run, where that is known
    try:
        _register_resolvers(axes)
        if not asks:
            check_overrides(arguments.overrides)
            jobs = sweep_overrides(arguments.overrides, arguments.multirun, _claim)
            if jobs is not None:
                flags = [word for word in sys.argv[1:] if word not in arguments.overrides]
                sys.argv[1:] = [*flags, *([] if arguments.multirun else ["-m"]), *jobs]
                arguments.multirun, arguments.overrides = True, jobs
                sweep.total = _jobs(jobs)
                axes.update(override.key_or_group for override in _swept(jobs))
                possible = _leave_out_the_impossible(jobs, axes, sweep)
        if possible is None:
            _hydra(sweep)
        elif possible:
            with combinations.only(possible):
                _hydra(sweep)
        else:
            run_folder.abandon()  # of a sweep of which nothing can run
    except KeyboardInterrupt as stop:
        if arguments.multirun:
            print(sweep.summary())
        print(f"interrupted by {stop}" if str(stop) else "interrupted", file=sys.stderr)
        if sweep.folder is not None:
            folder = sweep.folder.parent if arguments.multirun else sweep.folder
            if line := continue_command(typed, folder, arguments.multirun):
                print(line, file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        run_folder.abandon()
        if isinstance(error, OSError) and output_trouble.of_the_place(error):
            print(output_trouble.said(error), file=sys.stderr)
            sys.exit(1)
        _refuse(error, given)
    if arguments.multirun:
        if possible != [] and set(sweep.outcomes) <= {"skipped"}:  # another launcher had them run elsewhere
            sweep.read(_sweep_folder(arguments.overrides), began)
        print(sweep.summary())
    sys.exit(sweep.exit_code())


def leave_to_rank_0(overrides: list[str]) -> None:
    """Ends here, when there is nothing more to do, in every process of `launch=attached` but that of rank 0."""
    from ulysses_exp.config import ConfigError
    from ulysses_exp.launch.seat import seat

    try:
        rank = seat().rank
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if rank:
        from ulysses_exp.config.composing import unchecked
        from ulysses_exp.launch.attached import serve

        sys.exit(serve(overrides, lambda: unchecked(overrides)))


def _refuse(error: Exception, overrides: list[str]) -> NoReturn:
    """Ends with a line or two for a mistake of the user's; raises `error` again where it is one of ours."""
    from ulysses_exp.cli.user_errors import user_message
    from ulysses_exp.config.redaction import redacted

    message = user_message(error, CONF, overrides)
    if message is None:
        raise error
    print(redacted(message), file=sys.stderr)
    sys.exit(2)


def _leave_out_the_impossible(jobs: list[str], axes: Collection[str], sweep: Sweep) -> list[list[str]] | None:
    """Records the jobs of a sweep that cannot run, and says why; returns those that can, None where that is not known.

    Raises:
        ConfigError: a value is of no type that its key takes.
    """
    from ulysses_exp import config
    from ulysses_exp.experiment import before_start, combinations, hydra_job
    from ulysses_exp.experiment.job_name import job_name

    def check(of_job: Config) -> None:
        config.check(of_job)
        before_start.check(of_job)

    from ulysses_exp.config.composing import composed

    lost = combinations.impossible(jobs, lambda overrides: composed(overrides)[0], check)
    if lost is None:
        return None
    every = combinations.jobs_of(jobs)
    folder = _sweep_folder(jobs) if lost else Path()
    for job in lost:
        name = job_name(job.overrides, job.number, axes)
        if len(lost) < len(every):  # a sweep of which nothing can run leaves nothing
            hydra_job.skip(job.config, folder / name, str(job.error), job.overrides)
        sweep.add("skipped", name, str(job.error), ran=False)
    for reason in combinations.reasons(lost):
        print(reason, flush=True)
    numbers = {job.number for job in lost}
    return [job for number, job in enumerate(every) if number not in numbers]


def _register_resolvers(axes: Collection[str]) -> None:
    """Names of sweep and job folders, for conf/config.yaml. `axes`: the keys that the sweep varies, once known."""
    from datetime import datetime

    from omegaconf import OmegaConf

    from ulysses_exp.experiment.job_name import job_name

    started = datetime.now()  # Hydra's own ${now:} is another time each time it is asked
    now = started.strftime("%Y-%m-%d_%H-%M-%S")
    OmegaConf.register_new_resolver("sweep_folder", lambda name: name or now, replace=True)
    OmegaConf.register_new_resolver("started", started.strftime, replace=True)

    def job_folder(overrides: list[str], number: int) -> str:
        return job_name(overrides, number, axes)

    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
    OmegaConf.register_new_resolver("stages_help", stages_help, replace=True)
    OmegaConf.register_new_resolver("run_name", lambda composed: composed, replace=True)


def stages_help() -> str:
    """A line a stage, for --help."""
    from ulysses_exp.config.stages import installed

    width = max(len(stage.name) for stage in installed())
    return "\n".join(f"  {stage.name:<{width}}  {stage.about}" for stage in installed())


def _name_run(name: str) -> None:
    """Names the folder of the one job after what it has inherited from checkpoint.source, too."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("run_name", lambda composed: name, replace=True)


def _claim(config: Config | None, folder: Path, key: str) -> None:
    """Takes the folder of the one job, or, without a `config`, of a sweep, before Hydra writes there."""
    from ulysses_exp.experiment import before_start
    from ulysses_exp.experiment.job_name import check_names
    from ulysses_exp.launch import run_folder

    if config is None:
        check_names(folder, key)
        run_folder.lock(folder, key, run_folder.OF_A_SWEEP)
    else:
        before_start.refuse_own(config, folder)
        run_folder.lock(folder, key)


def sweep_overrides(
    overrides: list[str], multirun: bool, claim: Callable[[Config | None, Path, str], None] | None = None
) -> list[str] | None:
    """What Hydra is to make the jobs of a sweep from; None for a single job, which has been checked then.

    A sweep is what the user asked for with -m, a study, or a job over several run folders. A study brings its own axes;
    Hydra would multiply those that the user also gives, so they are left out.

    Args:
        claim: called with the configuration of the one job (None: a sweep), its folder, and the key that names it.

    Raises:
        ConfigError: the one job cannot run, or several values were given for one.
    """
    from ulysses_exp.config import ConfigError

    sources = _several_sources(overrides)
    overrides = sources or overrides
    several = _swept(overrides)
    varied = [override.input_line for override in several]
    plain = [override for override in overrides if override not in varied]
    axes, config, settings = _compose(plain, check=not (multirun or several))
    if not (multirun or sources or axes):
        if several:
            key = several[0].key_or_group
            raise ConfigError(key, "has several values", "add -m to run a job for each")
        if claim is not None:
            claim(config, Path(settings.run.dir), "hydra.run.dir")
        return None
    if claim is not None:
        claim(None, Path(settings.sweep.dir), "sweep.name" if _names_its_sweep(plain) else "hydra.sweep.dir")
    given = {override.partition("=")[0].lstrip("+~") for override in overrides}
    kept = [f"{key}={values}" for key, values in axes.items() if key not in given]
    return [*kept, *overrides, *(["hydra.sweeper.params=null"] if axes else [])]


def _swept(overrides: list[str]) -> list[Any]:
    """Those of `overrides`, parsed, that give more than one value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from ulysses_exp.cli.user_errors import check_overrides

    parsed = OverridesParser.create().parse_overrides(overrides)
    check_overrides(parsed, CONF)
    return [override for override in parsed if override.is_sweep_override()]


def _names_its_sweep(overrides: list[str]) -> bool:
    return any(override.startswith("sweep.name=") for override in overrides) and not any(
        override.startswith("hydra.sweep.dir=") for override in overrides
    )


def _compose(overrides: list[str], check: bool) -> tuple[dict[str, str], Config | None, Any]:
    """Composes a job, and checks it before Hydra makes its folder.

    Returns:
        The axes of a study that is a sweep, the configuration where it was checked, and Hydra's own settings.
    """
    from hydra.types import RunMode

    from ulysses_exp import config
    from ulysses_exp.config.composing import composed
    from ulysses_exp.config.received import sources
    from ulysses_exp.experiment import before_start

    cfg, of_hydra = composed(overrides)
    checked = None
    if check:
        checked = config.resolve(sources.inherit(cfg, overrides), overrides)
        before_start.check(checked)
        _name_run(f"{checked.model.name}-{checked.layout.name}")
    axes = dict(of_hydra.sweeper.params or {}) if of_hydra.mode == RunMode.MULTIRUN else {}
    return axes, checked, of_hydra


def _jobs(overrides: list[str]) -> int:
    """How many jobs a sweep has: those of the grid, or as many as a sweeper that searches will ask for."""
    from ulysses_exp.experiment.combinations import jobs_of

    if any(override.startswith("hydra/sweeper=") for override in overrides):
        return int(_hydra_settings(overrides).sweeper.n_trials)
    return len(jobs_of(overrides))


def _sweep_folder(overrides: list[str]) -> Path:
    return Path(_hydra_settings(overrides).sweep.dir)


def _hydra_settings(overrides: list[str]) -> Any:
    """Hydra's own part of the configuration of a sweep."""
    from ulysses_exp.config.composing import composed

    asked = [o for o in overrides if o.startswith(("hydra/", "hydra.", "sweep.name=", "experiment="))]
    return composed(asked)[1]


def _several_sources(overrides: list[str]) -> list[str] | None:
    """The overrides of a sweep over run folders, where `checkpoint.source` names more than one."""
    from ulysses_exp.cli.user_errors import hydra_text
    from ulysses_exp.config.received.sources import run_folders

    for i, override in enumerate(overrides):
        key, _, value = override.partition("=")
        if key == "checkpoint.source":
            folders = run_folders(value.strip("'\""))
            if len(folders) > 1:
                choice = ",".join(hydra_text(str(folder)) for folder in folders)
                return [*overrides[:i], f"checkpoint.source={choice}", *overrides[i + 1 :]]
    return None


def _hydra(sweep: Sweep) -> None:
    import hydra

    from ulysses_exp.config.sections import register
    from ulysses_exp.launch.environment import make_importable

    register()
    make_importable()  # for jobs that hydra/launcher=... starts elsewhere

    def job(cfg: Any) -> float | None:
        return _run_job(cfg, sweep)

    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()


def _run_job(cfg: Any, sweep: Sweep) -> float | None:
    """One job of Hydra's, in its folder. Returns what a search is to optimize."""
    from hydra.core.hydra_config import HydraConfig
    from rich.console import Console
    from rich.markup import escape

    from ulysses_exp import config as schema
    from ulysses_exp.config.received import sources
    from ulysses_exp.experiment import before_start, hydra_job
    from ulysses_exp.experiment import sweep as sweeps
    from ulysses_exp.launch import output_trouble, run_folder

    hydra_config = HydraConfig.get()
    folder = sweep.folder = Path(hydra_config.runtime.output_dir)
    console = Console()
    multirun = sweep.total > 1 or (hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN")
    name = folder.name
    try:
        cfg = sources.inherit(cfg, list(hydra_config.overrides.task))
        config = schema.resolve(cfg, hydra_config.overrides.task)
        before_start.check(config)
    except schema.ConfigError as error:
        if not multirun:
            raise
        hydra_job.skip(cfg, folder, str(error), list(hydra_config.overrides.task))
        sweep.add("skipped", name, str(error), ran=False)
        console.print(f"[yellow]skipped[/] {escape(name)}: {escape(str(error))}", highlight=False, soft_wrap=True)
        return None
    if multirun and sweeps.finished(config, folder):
        return hydra_job.done(config, folder, sweep, console)
    try:
        before_start.refuse_own(config, folder)
        run_folder.lock(folder, "sweep.name" if config.sweep.name else "hydra.sweep.dir")
    except schema.ConfigError as error:
        if not multirun:
            raise
        sweep.add("failed", name, str(error), ran=False)
        console.print(f"[red]failed[/] {escape(name)}: {escape(str(error))}", highlight=False, soft_wrap=True)
        return None
    try:
        headline = sweep.headline() if multirun else None
        return hydra_job.run(cfg, config, hydra_config, sweep, console, headline)
    except OSError as error:
        if not output_trouble.of_the_place(error):
            raise
        sweep.add("failed", name, output_trouble.said(error, folder))
        said = escape(f"{name}: {output_trouble.said(error, folder)}")
        console.print(f"[red]failed[/] {said}", highlight=False, soft_wrap=True)
        return None
    finally:
        run_folder.release(folder)
