"""The command: compose, validate, launch, summarise.

Exit codes: 0 ok, 1 failed, 2 wrong configuration, 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulysses_exp.launch.stopping import requests

if TYPE_CHECKING:
    from ulysses_exp.config import Config
    from ulysses_exp.sweep import Sweep

#: conf/ lies inside the installed package, beside it in a checkout
_HERE = Path(__file__).resolve().parent
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


def main() -> None:
    """Entry point of run.py and of the installed command `ulysses-exp`."""
    try:
        with requests.heeded():
            _command()
    except KeyboardInterrupt as stop:  # before there was anything to summarise
        print(f"interrupted by {stop}" if str(stop) else "interrupted", file=sys.stderr)
        sys.exit(130)


def _command() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as exceptions; we say them in a line
    from hydra._internal.utils import get_args_parser

    began, typed = time.time(), sys.argv[1:]
    arguments = get_args_parser().parse_args()
    if "launch=attached" in arguments.overrides:
        _leave_to_rank_0(arguments.overrides)
    asks = arguments.help or arguments.hydra_help or arguments.cfg or arguments.info or arguments.shell_completion
    from ulysses_exp.interruption import continue_command
    from ulysses_exp.sweep import Sweep

    sweep = Sweep()
    axes: set[str] = set()
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
        _hydra(sweep)
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
        message = _user_message(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        sys.exit(2)
    if arguments.multirun:
        if not sweep.outcomes:  # another launcher than Hydra's own had them run elsewhere
            sweep.read(_sweep_folder(arguments.overrides), began)
        print(sweep.summary())
    sys.exit(sweep.exit_code())


def _leave_to_rank_0(overrides: list[str]) -> None:
    """Ends here, when there is nothing more to do, in every process of `launch=attached` but that of rank 0."""
    from ulysses_exp.config import ConfigError
    from ulysses_exp.launch.seat import seat

    try:
        rank = seat().rank
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if rank:
        from ulysses_exp.launch.attached import serve

        sys.exit(serve(overrides))


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

    return [o for o in OverridesParser.create().parse_overrides(overrides) if o.is_sweep_override()]


def _compose(overrides: list[str], check: bool) -> dict[str, str]:
    """Composes a job, and checks it before Hydra makes its folder; returns the axes of a study that is a sweep."""
    from hydra import compose, initialize_config_dir
    from hydra.types import RunMode
    from omegaconf import open_dict

    from ulysses_exp import config, sources

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides, return_hydra_config=True)
    of_hydra = cfg.hydra
    with open_dict(cfg):
        del cfg["hydra"]
    if check:
        checked = config.resolve(sources.inherit(cfg, overrides))
        _name_run(f"{checked.model.name}-{checked.layout.name}")
    return dict(of_hydra.sweeper.params or {}) if of_hydra.mode == RunMode.MULTIRUN else {}


def _jobs(overrides: list[str]) -> int:
    """How many jobs a sweep has: those of the grid, or as many as a sweeper that searches will ask for."""
    from ulysses_exp.sweep import jobs_of

    if any(override.startswith("hydra/sweeper=") for override in overrides):
        return int(_hydra_settings(overrides).sweeper.n_trials)
    return jobs_of(overrides)


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

    from ulysses_exp import config as schema
    from ulysses_exp import sources
    from ulysses_exp import sweep as sweeps

    hydra_config = HydraConfig.get()
    folder = sweep.folder = Path(hydra_config.runtime.output_dir)
    console = Console()
    multirun = sweep.total > 1 or (hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN")
    name = folder.name
    try:
        cfg = sources.inherit(cfg, list(hydra_config.overrides.task))
        config = schema.resolve(cfg)
    except schema.ConfigError as error:
        if not multirun:
            raise
        sweeps.clear(folder)
        (folder / "results.json").write_text(json.dumps(sweeps.skipped(cfg, str(error)), indent=1))
        sweep.add("skipped", name, str(error), ran=False)
        console.print(f"[yellow]skipped[/] {name}: {error}", highlight=False, soft_wrap=True)
        return None
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")  # with what it inherits from checkpoint.source
    if multirun and sweeps.finished(config, folder):
        sweep.add("ok", name, None, ran=False)
        console.print(f"[green]done[/] {name}", highlight=False, soft_wrap=True)
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
    from ulysses_exp.config import device_of
    from ulysses_exp.launch.local import warm_up

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


def _user_message(error: Exception) -> str | None:
    """One or two lines for a mistake of the user's: the key, what is wrong, what to set. None for a mistake of ours."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from ulysses_exp.config import ConfigError, known_keys, nearest

    if isinstance(error, ConfigError):
        return str(error)
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text):
        key = match[1] or getattr(cause, "full_key", None) or match[2]
        return f"{key}: unknown key; {nearest(key, sorted(known_keys()))}"
    if match := re.search(r"In '[^']*': Could not find '([^']+)/([^']+)'", text):
        choices = sorted(p.stem for p in (CONF / match[1]).glob("*.yaml"))
        return f"{match[1]}: {match[2]!r} is not a choice; {nearest(match[2], choices)}"
    key = getattr(cause, "full_key", None)
    first = str(cause).splitlines()[0]
    if key:
        return f"{key}: {first}; see python run.py --help"
    return " ".join(text.split("\n")[:2])
