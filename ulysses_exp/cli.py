"""The command: compose, validate, launch, summarise. Exit codes 0 ok, 1 failed, 2 wrong configuration, 130 interrupted."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

#: conf/ lies inside the installed package, beside it in a checkout
_HERE = Path(__file__).resolve().parent
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


def main() -> None:
    """Entry point of run.py and of the installed command `ulysses-exp`."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as exceptions; we say them in a line
    os.environ["OC_DISABLE_DOT_ACCESS_WARNING"] = "1"
    from hydra._internal.utils import get_args_parser

    arguments = get_args_parser().parse_args()
    if os.environ.get("RANK", "0") != "0" and "launch=attached" in arguments.overrides:
        from ulysses_exp.launch.attached import serve

        sys.exit(serve())
    asks = arguments.help or arguments.hydra_help or arguments.cfg or arguments.info or arguments.shell_completion
    outcomes: list[str] = []
    try:
        _register_resolvers()
        if not asks and not arguments.multirun:
            _validate(arguments.overrides)
        _hydra(outcomes)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = _user_message(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        sys.exit(2)
    if any(outcome != "ok" for outcome in outcomes):
        sys.exit(130 if "interrupted" in outcomes else 1)


def _register_resolvers() -> None:
    """Names of sweep and job folders."""
    from datetime import datetime

    from omegaconf import OmegaConf

    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    OmegaConf.register_new_resolver("sweep_folder", lambda name: name or now, replace=True)

    def job_folder(overrides: str, number: int) -> str:
        return re.sub(r"[^\w.=,+-]+", "_", overrides or "")[:150].strip("_,") or str(number)

    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


def _validate(overrides: list[str]) -> None:
    """Composes and checks the job before Hydra makes its folder."""
    from hydra import compose, initialize_config_dir

    import ulysses_exp.config as schema

    with initialize_config_dir(str(CONF), version_base="1.3"):
        schema.resolve(compose("config", overrides))


def _hydra(outcomes: list[str]) -> None:
    import hydra

    import ulysses_exp.config  # noqa: F401  registers the schema

    def job(cfg: Any) -> None:
        outcomes.append(run_job(cfg))

    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()


def run_job(cfg: Any) -> str:
    """One job of Hydra's: returns the status that its results.json says."""
    from hydra.core.hydra_config import HydraConfig
    from rich.console import Console

    from ulysses_exp import config as schema
    from ulysses_exp.launch.local import warm_up

    config = schema.resolve(cfg)
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if config.launch.name == "local" and set(config.stages) != {"plan"}:
        warm_up(schema.device_of(config))  # the ranks' imports run beside ours
    from ulysses_exp import job
    from ulysses_exp.launch import open_ranks

    group = config.sweep.name or hydra_config.runtime.choices.get("experiment")
    ranks = open_ranks(config)
    try:
        return job.run(config, folder, group=group, ranks=ranks, console=Console())["status"]
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
    if match := re.search(r"Could not override '?([\w./@]+)'?\.\s*No match in the defaults list", text):
        return f"{match[1]}: unknown key; {nearest(match[1], sorted(known_keys()))}"
    key = getattr(cause, "full_key", None)
    first = str(cause).splitlines()[0]
    if key:
        return f"{key}: {first}; see python run.py --help"
    return " ".join(text.split("\n")[:2])
