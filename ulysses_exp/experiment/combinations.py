"""Combinations of a sweep that cannot run, found before Hydra composes a job: of a thousand in a few seconds."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ulysses_exp import config as schema
from ulysses_exp.config import Config, ConfigError

#: Hydra's own settings that change neither what a job is made of nor what its folder is called
_HARMLESS = ("hydra.sweep.dir", "hydra.sweeper.params", "hydra/launcher", "hydra.launcher.")

_MOST_VALUES = 8  # of a key, told beside a reason


@dataclass(frozen=True)
class Impossible:
    """A job that cannot run: its overrides, its place in the sweep, its configuration as far as it goes, and why."""

    overrides: list[str]
    number: int
    config: Config
    error: ConfigError


@dataclass(frozen=True)
class _Axis:
    key: str
    in_place: bool  # a value of the composed configuration; else a group's choice, or a new key, which Hydra composes


def impossible(
    overrides: Sequence[str],
    compose: Callable[[list[str]], DictConfig],
    check: Callable[[Config], None],
) -> list[Impossible] | None:
    """Those of a sweep's jobs that `check` refuses; None where they cannot be told without composing each.

    That is so with sweepers that search, settings that depend on each other, and jobs that inherit from a checkpoint.

    Args:
        compose: the configuration of a job from its overrides.
        check: raises ConfigError for a configuration that cannot run.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if not _tellable(parsed):
        return None
    axes = [_Axis(o.get_key_element(), _in_place(o.get_key_element())) for o in parsed if o.is_sweep_override()]
    parts = _Parts(compose, axes)
    found = []
    for number, job in enumerate(jobs_of(overrides)):
        try:
            config = parts.config(job)
            if config.checkpoint.source is not None:
                return None
        except ConfigError as error:
            found.append(Impossible(job, number, parts.latest, error))
            continue
        try:
            check(config)
        except ConfigError as error:
            found.append(Impossible(job, number, config, error))
    return found


def _tellable(parsed: Sequence[Any]) -> bool:
    keys = [o.key_or_group for o in parsed]
    for override in parsed:
        key = override.key_or_group
        if key.startswith(("hydra.", "hydra/")) and not key.startswith(_HARMLESS):
            return False
        if key == "checkpoint.source" or "${" in override.input_line:
            return False
        if override.is_sweep_override() and not override.is_discrete_sweep():
            return False
    nested = (a for a in keys for b in keys if a != b and a.startswith(f"{b}.") and "." in b)
    return next(nested, None) is None


def _in_place(key: str) -> bool:
    known = schema.known_keys()
    return "." in key and not key.startswith(("+", "~", "hydra")) and "@" not in key and key in known


class _Parts:
    """Typed sections of the configuration by the overrides that reach them: a job's configuration is put together.

    A group's file and a key change nothing outside their own section; only `experiment` does.
    """

    def __init__(self, compose: Callable[[list[str]], DictConfig], axes: Sequence[_Axis]):
        self._compose = compose
        self._in_place = {axis.key for axis in axes if axis.in_place}
        self._axes = {axis.key for axis in axes}
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._refused: dict[tuple[str, ...], ConfigError] = {}
        self._typed: dict[tuple[str, ...], Config] = {}
        self._sections: dict[tuple[tuple[str, ...], str], Any] = {}
        self.latest = Config()  # the last that could be composed

    def config(self, job: Sequence[str]) -> Config:
        """Of a job. Raises ConfigError where it cannot be composed."""
        shared = [o for o in job if _key(o) not in self._axes or _key(o).lstrip("+~") == "experiment"]
        by_section: dict[str, list[str]] = {}
        for override in job:
            if override not in shared:
                by_section.setdefault(re.split(r"[.@/=]", _key(override).lstrip("+~"))[0], []).append(override)
        base = self.latest = self._whole(tuple(shared))
        changed = {}
        for section, overrides in by_section.items():
            if hasattr(base, section):
                changed[section] = self._section(tuple(shared), section, tuple(overrides))
        return replace(base, **changed)

    def _section(self, shared: tuple[str, ...], section: str, overrides: tuple[str, ...]) -> Any:
        state = (shared + overrides, section)
        if state not in self._sections:
            values = [o for o in overrides if _key(o) in self._in_place]
            composed = tuple(o for o in overrides if o not in values)
            self._sections[state] = self._with_values(shared + composed, section, values)
        return self._sections[state]

    def _with_values(self, overrides: tuple[str, ...], section: str, values: list[str]) -> Any:
        """Puts `values` into the composed configuration, reads the section, and takes them out again."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        if not values:
            return getattr(self._whole(overrides), section)
        self._whole(overrides)  # has it composed and checked for unknown keys
        composed = self._composed[overrides]
        kept = {}
        try:
            for override in OverridesParser.create().parse_overrides(values):
                key = override.key_or_group
                kept[key] = copy.deepcopy(OmegaConf.select(composed, key))  # a list is changed where it is
                OmegaConf.update(composed, key, override.value(), merge=True)
            node = composed[section]
            return OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
        finally:
            for key, value in kept.items():
                OmegaConf.update(composed, key, value, merge=False)

    def _whole(self, overrides: tuple[str, ...]) -> Config:
        if overrides not in self._composed and overrides not in self._refused:
            try:
                self._composed[overrides] = cfg = self._compose(list(overrides))
                self._typed[overrides] = schema.typed(cfg)
            except ConfigError as error:
                self._refused[overrides] = error
        if overrides in self._refused:
            raise self._refused[overrides]
        return self._typed[overrides]


def _key(override: str) -> str:
    return override.partition("=")[0]


def jobs_of(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a grid, in Hydra's order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return [
        list(job)
        for batch in BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(list(overrides)), None)
        for job in batch
    ]


@contextlib.contextmanager
def only(jobs: list[list[str]]) -> Iterator[None]:
    """Hydra's grid is these jobs: those left out need not even be composed."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    def batches(overrides: Any, max_batch_size: int | None) -> list[list[list[str]]]:
        size = max_batch_size or max(len(jobs), 1)
        return [jobs[start : start + size] for start in range(0, len(jobs), size)]

    original = BasicSweeper.__dict__["split_arguments"]
    BasicSweeper.split_arguments = staticmethod(batches)  # type: ignore[method-assign]
    try:
        yield
    finally:
        BasicSweeper.split_arguments = original  # type: ignore[method-assign]


def reasons(jobs: Sequence[Impossible]) -> list[str]:
    """Each reason once, with how many jobs it keeps from running; reasons that differ in numbers alone are one."""
    lines = []
    by_reason: dict[tuple[str, str], list[Impossible]] = {}
    for job in jobs:
        key, problem, _ = job.error.args
        by_reason.setdefault((key, re.sub(r"-?\d[\d.e+]*", "#", problem)), []).append(job)
    for (key, _), alike in sorted(by_reason.items(), key=lambda entry: -len(entry[1])):
        line = f"skipped {len(alike)} {'job' if len(alike) == 1 else 'jobs'}: {alike[0].error}"
        values = list(dict.fromkeys(o for job in alike for o in job.overrides if _key(o).lstrip("+~") == key))
        others = [value.partition("=")[2] for value in values if value not in alike[0].overrides]
        if others:
            more = ", ..." if len(others) > _MOST_VALUES else ""
            line += f" (also {key}={', '.join(itertools.islice(others, _MOST_VALUES))}{more})"
        lines.append(line)
    return lines
