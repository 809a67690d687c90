"""The stages that a job can have: this project's own, and those that installed packages bring.

A stage is a folder of `ulysses_exp/stages` and one line here. Its halves are named, `package.module:function`, and
imported where they are needed, so that neither wing imports the other, and nothing here imports a stage's libraries.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, distributions
from typing import Any

from ulysses_exp.config.errors import ConfigError, nearest

#: In the order of `--help` and of a summary. Each is `ulysses_exp.stages.<name>:STAGE`.
OWN = ("train", "eval", "reload", "parity", "plan", "claims")

#: Where packages register stages of their own, `name = "module:stage"` in their pyproject.toml
GROUP = "ulysses_exp.stages"


@dataclass(frozen=True)
class Work:
    """A part of a stage that ranks do.

    `function` names it, `module:function`. It gets the `rank.session.Session` and returns what JSON can hold, the same
    on every rank; it is collective.
    """

    function: str
    doing: str  # for the user, e.g. "evaluating"
    needed: bool = False  # where its result's status is not ok, the rest of the task is left out
    session: bool = True  # False: it gets the task and its rank instead, in a process group, and builds what it needs


@dataclass(frozen=True)
class Stage:
    """What a job can be asked to do, by its `name` in `stages`."""

    name: str
    about: str  # a line of --help
    work: Mapping[str, Work] = field(default_factory=dict)  # by the name that tasks call it by, unique among stages
    #: (job, note) -> None: which tasks the ranks get, and what becomes of their results (`experiment.job.Job`).
    #: None: one task at the job's layout, the work called as the stage is, on what the job has trained or starts from
    parent: str | None = None
    #: (job, note) -> what the ranks that have just trained are to do for it, as names of work and options of the task;
    #: None: nothing
    after_training: str | None = None
    rules: str | None = None  # (config) -> None, of every job, with this stage or without; raises ConfigError
    view: str | None = None  # a module with some of the names in `report/views.py`
    settings: type | None = None  # a dataclass: its section of the configuration, called as the stage is
    results: tuple[str, ...] = ()  # keys that its entry in results.json has where it is ok
    ranks: bool = True  # it starts ranks; else it computes nothing with the model and the data
    trains: bool = False  # its ranks make optimizer steps
    from_checkpoint: bool = False  # it works on checkpoint.source where there is one


#: What ranks can be asked for outside of any stage
_ASIDE = {"collectives": Work("ulysses_exp.rank.metrics.collectives:collectives", "measuring collectives")}


@cache
def names() -> tuple[str, ...]:
    """All stages, this project's first."""
    return (*OWN, *(name for name in sorted(_brought()) if name not in OWN))


@cache
def stage(name: str) -> Stage:
    """The stage called `name`. Raises ConfigError where there is none, or it cannot be imported."""
    if name in OWN:
        own: Stage = resolve(f"ulysses_exp.stages.{name}:STAGE")
        return own
    brought = _brought().get(name)
    if brought is None:
        raise ConfigError("stages", f"{name[:60]!r} is not a choice", nearest(name, list(names())))
    package = brought.dist.name if brought.dist is not None else brought.value
    try:
        found = brought.load()
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        problem = f"{name} of {package} cannot be imported ({said})"
        raise ConfigError("stages", problem, "mend or uninstall that package") from error
    if not isinstance(found, Stage) or found.name != name:
        raise ConfigError("stages", f"{brought.value} of {package} is no Stage called {name}", "mend that package")
    return found


@cache
def installed() -> tuple[Stage, ...]:
    """All stages that can be imported. One that cannot is an error only where a job asks for it, and tried once."""
    found = []
    for name in names():
        try:
            found.append(stage(name))
        except ConfigError:
            if name in OWN:
                raise
    return tuple(found)


def work(name: str) -> Work:
    """What tasks call `name`. Raises KeyError."""
    for of_stage in installed():
        if name in of_stage.work:
            return of_stage.work[name]
    return _ASIDE[name]


def resolve(place: str) -> Any:
    """What `module:attribute`, or a module alone, names; imported now."""
    module, _, attribute = place.partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def of(config: Any) -> list[Stage]:
    """The stages of a job. Raises ConfigError."""
    return [stage(name) for name in config.stages]


def starts_ranks(config: Any) -> bool:
    """Whether a stage of the job runs the model here; a plan alone does not."""
    return any(s.ranks for s in of(config))


def check(config: Any) -> None:
    """Raises ConfigError for the first rule of a stage that `config` breaks."""
    for installed_stage in installed():
        if installed_stage.rules is not None:
            rule: Callable[[Any], None] = resolve(installed_stage.rules)
            rule(config)


@cache
def _brought() -> dict[str, EntryPoint]:
    """What installed packages register. The current folder, which may be somebody else's, installs nothing."""
    here = {"", os.getcwd()}
    found: dict[str, EntryPoint] = {}
    for distribution in distributions(path=[place for place in sys.path if place not in here]):
        for entry in distribution.entry_points.select(group=GROUP):
            found.setdefault(entry.name, entry)
    return found
