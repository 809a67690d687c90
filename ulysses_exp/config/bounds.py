"""What a value of each key may be: bounds of every number, and what no text may hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.schema import Config

#: Characters that end a line, move a cursor, or cannot be written to a file
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_PLAIN_NAME = re.compile(r"(?!\.+$)[\w.-]+")

LONGEST_TEXT = 1024  # characters

#: Keys whose value becomes part of a path or of a name elsewhere, and how long it may be
_NAMES = {
    "model.name": 100,
    "data.name": 100,
    "memory.name": 100,
    "optim.name": 100,
    "launch.name": 100,
    "sweep.name": 100,
    "tracker.project": 128,  # W&B's own limit
    "tracker.entity": 128,
}


@dataclass(frozen=True)
class Bounds:
    """From `least` to `most`, both included; `open` names an end that is not: `least`, `most` or `both`."""

    least: float
    most: float
    open: str = ""

    def holds(self, value: float) -> bool:
        """False for nan, too."""
        above = value > self.least if self.open in ("least", "both") else value >= self.least
        below = value < self.most if self.open in ("most", "both") else value <= self.most
        return above and below


_SHARE = Bounds(0, 1, "most")
_STEPS = Bounds(0, 10**9)
_AT_LEAST_ONE_STEP = Bounds(1, 10**9)

#: Of every number key. A test holds that none is missing.
BOUNDS = {
    "sp.size": Bounds(1, 2**16),
    "dp.size": Bounds(1, 2**20),
    "zero.stage": Bounds(0, 3),
    "zero.param_persistence_threshold": Bounds(0, 10**15),
    "eval.sequences": Bounds(1, 10**6),
    "data.ignore_labels": _SHARE,
    "data.mean_document": Bounds(2, 2**30),
    "memory.tiled_mlp": Bounds(-1, 2**20),
    "memory.tiled_loss": Bounds(-1, 2**20),
    "train.seq_len": Bounds(2, 2**30),
    "train.steps": _AT_LEAST_ONE_STEP,
    "train.global_batch_size": Bounds(1, 2**24),
    "train.micro_batch_size": Bounds(1, 2**24),
    "train.unmeasured_steps": _STEPS,
    "train.log_every": _AT_LEAST_ONE_STEP,
    "longest.memory_gib": Bounds(0, 2**20, "least"),
    "longest.steps": Bounds(1, 10**6),
    "longest.within": Bounds(0, 1, "both"),
    "optim.lr": Bounds(0, 10**9),
    "optim.weight_decay": Bounds(0, 10**6),
    "optim.beta1": _SHARE,
    "optim.beta2": _SHARE,
    "optim.eps": Bounds(0, 1, "least"),  # at 0 a gradient of zero is divided by zero
    "optim.momentum": _SHARE,
    "optim.grad_clip": Bounds(0, 10**9),
    "optim.warmup_steps": _STEPS,
    "checkpoint.every": _STEPS,
    "checkpoint.keep": Bounds(1, 10**6),
    "checkpoint.on_signal_s": Bounds(0, 10**6),
    "reload.steps": Bounds(0, 10**6),
    "parity.steps": Bounds(1, 10**6),
    "parity.tolerance": Bounds(0, 1),
    "launch.timeout_s": Bounds(1, 30 * 24 * 3600),
    "launch.gpus_per_node": Bounds(1, 1024),
    "launch.cpus_per_task": Bounds(1, 4096),
    "launch.mem_gb": Bounds(1, 2**20),
    "launch.time_min": Bounds(1, 366 * 24 * 60),
    "seed": Bounds(0, 2**63 - 1),
}

MOST_RANKS = 2**20  # more than anything here counts in a list

LEAST_TOKENS = 20  # of a text: a tenth of it is held out, and a token is predicted from one before


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value, type) of every value of a typed configuration; lists and dicts count as one value."""
    kinds = get_type_hints(type(node))
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value, kinds[f.name]


def check(config: Config) -> None:
    """Raises ConfigError for the first value of the typed `config` that its key does not take."""
    for key, value, kind in leaves(config):
        _check_kind(key, value, kind)
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, (int, float)):
            check_number(key, value)
        elif isinstance(value, str):
            check_text(key, value)
        elif isinstance(value, list):
            for entry in value:
                if not isinstance(entry, str):
                    raise ConfigError(key, f"{str(entry)[:60]!r} is no text", "set a list of texts")
                check_text(key, entry, 64)  # W&B's limit for a tag
    if config.sp.size * config.dp.size > MOST_RANKS:
        problem = f"sp {config.sp.size} x dp {config.dp.size} are too many ranks"
        raise ConfigError("dp.size", problem, f"set at most {MOST_RANKS} in all")


def _check_kind(key: str, value: Any, kind: Any) -> None:
    """Raises ConfigError where an interpolation brought a value of another type, which OmegaConf does not look at."""
    allowed = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    plain = tuple(get_origin(k) or k for k in allowed)
    fits = isinstance(value, plain) or (isinstance(value, int) and float in plain)
    if not fits or (isinstance(value, bool) and bool not in plain):
        raise ConfigError(key, f"{str(value)[:60]!r} is of another type", "write a value of its own")


def check_number(key: str, value: float) -> None:
    """Raises ConfigError. A number without bounds of its own has to be finite."""
    if math.isnan(value):
        raise ConfigError(key, "nan is not a number", f"set {_allowed(key)}")
    bounds = BOUNDS.get(key)
    if bounds is None:
        if math.isinf(value):
            raise ConfigError(key, f"{value} is not finite", "set a finite number")
    elif not bounds.holds(value):
        what = "too small" if value <= bounds.least else "too large"
        raise ConfigError(key, f"{_short(value)} is {what}", f"set {_allowed(key)}")


def check_text(key: str, value: str, most: int = LONGEST_TEXT) -> None:
    """Raises ConfigError for control characters, for a text that is too long, and for a name that is not plain."""
    most = _NAMES.get(key, most)
    if len(value) > most:
        raise ConfigError(key, f"{len(value)} characters are too long", f"set at most {most}")
    if _CONTROL.search(value):
        raise ConfigError(key, f"{value[:60]!a} has a control character", "leave it out")
    if key in _NAMES and not _PLAIN_NAME.fullmatch(value):
        problem = f"{value!r} is not a plain name"
        raise ConfigError(key, problem, "use letters, digits, dots, dashes and underscores")


def _allowed(key: str) -> str:
    bounds = BOUNDS.get(key)
    if bounds is None:
        return "a finite number"
    least, most = bounds.least, bounds.most
    if bounds.open in ("least", "both"):
        return f"more than {least}, and {'less than' if bounds.open == 'both' else 'at most'} {most}"
    return f"at least {least}, and {'less than' if bounds.open == 'most' else 'at most'} {most}"


def _short(value: float) -> str:
    """As it was typed, but for a whole number of which nobody reads the digits."""
    return str(value) if abs(value) < 10**40 or math.isinf(value) else f"a number beyond {'-' if value < 0 else ''}1e40"
