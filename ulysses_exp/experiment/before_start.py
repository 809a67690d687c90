"""What else can be known before a rank starts: the environment, the checkpoint to start from, the model, the data."""

from __future__ import annotations

import glob
import os
import re
import socket
from pathlib import Path

from ulysses_exp.config import Config, ConfigError, device_of
from ulysses_exp.config.bounds import LEAST_TOKENS
from ulysses_exp.config.received.sources import run_folders
from ulysses_exp.experiment import model_check
from ulysses_exp.launch.run_folder import OF_A_JOB


def check(config: Config) -> None:
    """Raises ConfigError for what would fail in the ranks, as far as it can be seen from here. Starts no rank."""
    check_environment(config)
    _check_dataset(config)
    model_check.check(config)


def check_environment(config: Config) -> None:
    """Raises ConfigError, naming the variable, where the environment does not go with the configuration."""
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if not re.fullmatch("[1-9][0-9]{0,3}", threads):
        raise ConfigError("OMP_NUM_THREADS", f"{threads[:40]!r} is no number of threads", "unset it, or set 1 or more")
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME")
    if interfaces is not None and config.launch.name == "local" and device_of(config) == "cpu":
        known = [name for _, name in socket.if_nameindex()]
        for name in interfaces.split(","):
            if name not in known:
                problem = f"{name[:40]!r} is no network interface of this machine"
                raise ConfigError("GLOO_SOCKET_IFNAME", problem, f"unset it, or set one of {', '.join(known[:8])}")


def _check_dataset(config: Config) -> None:
    """A folder or file that is there has something in it. A name on a hub is for the ranks to find."""
    data = config.data
    if data.tokenizer is not None:
        _check_exists("data.tokenizer", data.tokenizer)
    if data.name != "hub" or data.dataset is None:
        return
    _check_exists("data.dataset", data.dataset)
    place = Path(data.dataset).expanduser()
    if not place.exists():
        return
    files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files)
    if size < LEAST_TOKENS:  # a token has a byte at least
        raise ConfigError("data.dataset", f"{data.dataset} holds {size} bytes", f"set at least {LEAST_TOKENS} tokens")


def _check_exists(key: str, name: str) -> None:
    """A name that can only be a path is there; a name on a hub has one slash at most."""
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        if not Path(name).expanduser().exists():
            raise ConfigError(key, f"{name} does not exist", "set a local folder or a hub name")
    elif not Path(name).exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ConfigError(key, f"{name!r} is neither a folder here nor a hub name", "set one of these")


def refuse_own(config: Config, folder: Path) -> None:
    """Raises ConfigError where the job reads from `folder`, into which it would write."""
    own = folder.resolve()
    if (named := config.checkpoint.source) is not None:
        for source in [*map(Path, glob.glob(os.path.expanduser(named))), *run_folders(named)]:
            found = source.resolve()
            if found == own or own in found.parents:
                raise ConfigError(
                    "checkpoint.source",
                    f"{source} is {'' if found == own else 'in '}this job's own folder",
                    "leave hydra.run.dir out to start a new run from it, or leave checkpoint.source out:"
                    " the same job in its own folder continues",
                )
    written = {own / name for name in OF_A_JOB}
    for key, value in (
        ("model.name_or_path", config.model.name_or_path),
        ("data.dataset", config.data.dataset),
        ("data.tokenizer", config.data.tokenizer),
    ):
        read = Path(value).expanduser().resolve() if value else None
        if read is not None and written & {read, *read.parents}:
            raise ConfigError(key, f"{value} is in this job's own folder", "set another hydra.run.dir")
