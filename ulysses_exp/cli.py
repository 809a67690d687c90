"""The command: compose, validate, launch, summarise.

Exit codes: 0 ok, 1 failed, 2 wrong configuration, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from ulysses_exp.config import Config
    from ulysses_exp.sweep import Sweep

#: conf/ lies inside the installed package, beside it in a checkout
_HERE = Path(__file__).resolve().parent
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


def main() -> None:
    """Entry point of run.py and of the installed command `ulysses-exp`."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as exceptions; we say them in a line
    from ulysses_exp import command_line

    began = time.time()
    try:
        arguments = command_line.parse(sys.argv[1:])
    except Exception as error:
        _refuse(error, [])
    sys.argv[1:] = command_line.in_order(sys.argv[1:], arguments)
    typed = list(arguments.overrides)
    if os.environ.get("RANK", "0") != "0" and "launch=attached" in arguments.overrides:
        from ulysses_exp.launch.attached import serve

        sys.exit(serve())
    asks = arguments.help or arguments.hydra_help or arguments.cfg or arguments.info or arguments.shell_completion
    from ulysses_exp import combinations
    from ulysses_exp.sweep import Sweep

    sweep = Sweep()
    axes: set[str] = set()
    possible: list[list[str]] | None = None  # the jobs of a sweep that can run, where that is known
    try:
        _register_resolvers(axes)
        if not asks:
            jobs = sweep_overrides(arguments.overrides, arguments.multirun)
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
    except KeyboardInterrupt:
        if arguments.multirun:
            print(sweep.summary())
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        _refuse(error, typed)
    if arguments.multirun:
        if possible != [] and set(sweep.outcomes) <= {"skipped"}:  # another launcher had them run elsewhere
            sweep.read(_sweep_folder(arguments.overrides), began)
        print(sweep.summary())
    sys.exit(sweep.exit_code())


def _refuse(error: Exception, overrides: list[str]) -> NoReturn:
    """Ends with a line or two for a mistake of the user's; raises `error` again where it is one of ours."""
    from ulysses_exp.user_errors import user_message

    message = user_message(error, CONF, overrides)
    if message is None:
        raise error
    print(message, file=sys.stderr)
    sys.exit(2)


def _leave_out_the_impossible(jobs: list[str], axes: Collection[str], sweep: Sweep) -> list[list[str]] | None:
    """Records the jobs of a sweep that cannot run, and says why; returns those that can, None where that is not known.

    Raises:
        ConfigError: a value is of no type that its key takes.
    """
    from ulysses_exp import before_start, combinations, config
    from ulysses_exp.sweep import job_name, leave_skipped

    def check(of_job: Config) -> None:
        config.check(of_job)
        before_start.check(of_job)

    lost = combinations.impossible(jobs, lambda overrides: _composed(overrides)[0], check)
    if lost is None:
        return None
    every = combinations.jobs_of(jobs)
    folder = _sweep_folder(jobs) if lost else Path()
    for job in lost:
        name = job_name(job.overrides, job.number, axes)
        if len(lost) < len(every):  # a sweep of which nothing can run leaves nothing
            leave_skipped(folder / name, job.config, str(job.error))
        sweep.add("skipped", name, str(job.error), ran=False)
    for reason in combinations.reasons(lost):
        print(reason, flush=True)
    numbers = {job.number for job in lost}
    return [job for number, job in enumerate(every) if number not in numbers]


def _register_resolvers(axes: Collection[str]) -> None:
    """Names of sweep and job folders, for conf/config.yaml. `axes`: the keys that the sweep varies, once known."""
    from datetime import datetime

    from omegaconf import OmegaConf

    from ulysses_exp.sweep import job_name

    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    OmegaConf.register_new_resolver("sweep_folder", lambda name: name or now, replace=True)

    def job_folder(overrides: list[str], number: int) -> str:
        return job_name(overrides, number, axes)

    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
    OmegaConf.register_new_resolver("run_name", lambda composed: composed, replace=True)


def _name_run(name: str) -> None:
    """Names the folder of the one job after what it has inherited from checkpoint.source, too."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("run_name", lambda composed: name, replace=True)


def sweep_overrides(overrides: list[str], multirun: bool) -> list[str] | None:
    """What Hydra is to make the jobs of a sweep from; None for a single job, which has been checked then.

    A sweep is what the user asked for with -m, a study, or a job over several run folders. A study brings its own axes;
    Hydra would multiply those that the user also gives, so they are left out.

    Raises:
        ConfigError: the one job cannot run, or several values were given for one.
    """
    from ulysses_exp.config import ConfigError

    sources = _several_sources(overrides)
    overrides = sources or overrides
    several = _swept(overrides)
    varied = [override.input_line for override in several]
    plain = [override for override in overrides if override not in varied]
    axes = _compose(plain, check=not (multirun or several))
    if not (multirun or sources or axes):
        if several:
            key = several[0].key_or_group
            raise ConfigError(key, "has several values", "add -m to run a job for each")
        return None
    given = {override.partition("=")[0].lstrip("+~") for override in overrides}
    kept = [f"{key}={values}" for key, values in axes.items() if key not in given]
    return [*kept, *overrides, *(["hydra.sweeper.params=null"] if axes else [])]


def _swept(overrides: list[str]) -> list[Any]:
    """Those of `overrides`, parsed, that give more than one value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from ulysses_exp.user_errors import check_overrides

    parsed = OverridesParser.create().parse_overrides(overrides)
    check_overrides(parsed, CONF)
    return [override for override in parsed if override.is_sweep_override()]


def _compose(overrides: list[str], check: bool) -> dict[str, str]:
    """Composes a job, and checks it before Hydra makes its folder; returns the axes of a study that is a sweep."""
    from hydra.types import RunMode

    from ulysses_exp import before_start, config, sources

    cfg, of_hydra = _composed(overrides)
    if check:
        checked = config.resolve(sources.inherit(cfg, overrides))
        before_start.check(checked)
        _name_run(f"{checked.model.name}-{checked.layout.name}")
    return dict(of_hydra.sweeper.params or {}) if of_hydra.mode == RunMode.MULTIRUN else {}


def _composed(overrides: list[str]) -> tuple[Any, Any]:
    """The configuration of a job, and Hydra's own part of it."""
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict

    from ulysses_exp import config  # noqa: F401  registers the schema

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides, return_hydra_config=True)
    of_hydra = cfg.hydra
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, of_hydra


def _jobs(overrides: list[str]) -> int:
    """How many jobs a sweep has: those of the grid, or as many as a sweeper that searches will ask for."""
    from ulysses_exp.combinations import jobs_of

    if any(override.startswith("hydra/sweeper=") for override in overrides):
        return int(_hydra_settings(overrides).sweeper.n_trials)
    return len(jobs_of(overrides))


def _sweep_folder(overrides: list[str]) -> Path:
    return Path(_hydra_settings(overrides).sweep.dir)


def _hydra_settings(overrides: list[str]) -> Any:
    """Hydra's own part of the configuration of a sweep."""
    from hydra import compose, initialize_config_dir

    asked = [o for o in overrides if o.startswith(("hydra/", "hydra.", "sweep.name=", "experiment="))]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", asked, return_hydra_config=True).hydra


def _several_sources(overrides: list[str]) -> list[str] | None:
    """The overrides of a sweep over run folders, where `checkpoint.source` names more than one."""
    from ulysses_exp.sources import run_folders

    for i, override in enumerate(overrides):
        key, _, value = override.partition("=")
        if key == "checkpoint.source":
            folders = run_folders(value.strip("'\""))
            if len(folders) > 1:
                choice = ",".join(f"'{folder}'" for folder in folders)
                return [*overrides[:i], f"checkpoint.source={choice}", *overrides[i + 1 :]]
    return None


def _hydra(sweep: Sweep) -> None:
    import hydra

    import ulysses_exp.config  # noqa: F401  registers the schema
    from ulysses_exp.launch.environment import make_importable

    make_importable()  # for jobs that hydra/launcher=... starts elsewhere

    def job(cfg: Any) -> float | None:
        return _run_job(cfg, sweep)

    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()


def _run_job(cfg: Any, sweep: Sweep) -> float | None:
    """One job of Hydra's, in its folder. Returns what a search is to optimize."""
    import json

    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from rich.console import Console
    from rich.markup import escape

    from ulysses_exp import before_start, sources
    from ulysses_exp import config as schema
    from ulysses_exp import sweep as sweeps

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    console = Console()
    multirun = sweep.total > 1 or (hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN")
    name = folder.name
    try:
        cfg = sources.inherit(cfg, list(hydra_config.overrides.task))
        config = schema.resolve(cfg)
        before_start.check(config)
    except schema.ConfigError as error:
        if not multirun:
            raise
        sweeps.leave_skipped(folder, cfg, str(error))
        sweep.add("skipped", name, str(error), ran=False)
        console.print(f"[yellow]skipped[/] {escape(name)}: {escape(str(error))}", highlight=False, soft_wrap=True)
        return None
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")  # with what it inherits from checkpoint.source
    if multirun and sweeps.finished(config, folder):
        sweep.add("ok", name, None, ran=False)
        console.print(f"[green]done[/] {escape(name)}", highlight=False, soft_wrap=True)
        return sweeps.objective(config.optimize.metric, json.loads((folder / "results.json").read_text()))
    sweeps.clear(folder)
    try:
        results = _launch(config, folder, hydra_config, sweep.headline() if multirun else None, console)
    except KeyboardInterrupt:
        sweep.add("interrupted", name, "it runs again when the sweep does")
        raise
    sweep.add(results["status"], name, results["error"])
    return sweeps.objective(config.optimize.metric, results)


def _launch(config: Config, folder: Path, hydra_config: Any, headline: str | None, console: Any) -> dict[str, Any]:
    from ulysses_exp import model_check
    from ulysses_exp.config import device_of
    from ulysses_exp.launch.local import warm_up

    model_check.close()
    if config.launch.name == "local":
        warm_up(device_of(config))  # the ranks' imports run beside ours
    from ulysses_exp import job
    from ulysses_exp.launch import open_ranks

    group = config.sweep.name or hydra_config.runtime.choices.get("experiment")
    ranks = open_ranks(config)
    try:
        return job.run(config, folder, group=group, ranks=ranks, console=console, headline=headline)
    finally:
        ranks.close()
