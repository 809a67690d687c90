"""Run folders as the report reads them: finished or not, whole or damaged."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ulysses_exp.launch.run_folder import settled
from ulysses_exp.layout import Layout
from ulysses_exp.report import shape
from ulysses_exp.report.files import MIB, Unreadable, read, read_json, read_yaml
from ulysses_exp.report.plain import ends, line
from ulysses_exp.report.results import results as results_of

#: Folders of a run that hold no further run
_INSIDE_A_RUN = {".hydra", "checkpoints", "ranks", "wandb", "profile", "compiled", "previous"}

#: Settings that may differ between two runs whose losses must be the same
_NOT_PART_OF_THE_LOSS = (
    "sp", "dp", "zero", "memory", "stages", "eval", "reload", "parity", "plan", "claims", "checkpoint", "tracker",
    "launch", "sweep", "device", "hydra", "experiment", "optimize",
)  # fmt: skip

#: Settings that the layout, the model or the length stand for already, or that say where and how a job ran
_NOT_A_TRAIT = (
    "sp.size", "dp", "zero.stage", "model", "train.seq_len", "stages", "eval", "reload", "parity", "plan", "claims",
    "checkpoint", "tracker", "launch", "sweep", "device", "hydra", "experiment", "optimize",
)  # fmt: skip

#: What is read of a file at most, in bytes
_RESULTS, _METRICS, _CONFIG = 32 * MIB, 64 * MIB, 1 * MIB

_SETTING, _SHOWN = 2000, 40  # characters that are read of a setting, that are shown
_NOTES = 3  # of what is wrong with a file that many are shown


@dataclass(frozen=True)
class Run:
    """A job's folder: results.json, metrics.jsonl and the composed configuration, as far as they are there and sound.

    Values have the types of `shape`; what was of another type is not in them, but in `damaged`.
    """

    folder: Path
    results: dict[str, Any]
    logged: dict[int, float]  # training loss by optimizer step, of metrics.jsonl; NaN where it is not finite
    config: dict[str, Any]
    command: str | None = None  # what starts the same job again
    damaged: tuple[str, ...] = ()  # what is wrong with the files, one short sentence each
    not_finite: tuple[str, ...] = ()  # figures of results.json that are NaN or infinite, by dotted path

    @property
    def status(self) -> str:
        """ok, failed, interrupted, skipped, running, unfinished where there is no results.json, or damaged."""
        return "damaged" if self.damaged else str(self.results.get("status", "unfinished"))

    @cached_property
    def layout(self) -> Layout | None:
        """From the results, else from the configuration."""
        known = self.results.get("layout")
        if not known:
            known = {
                name: self.setting(f"{name}.{'stage' if name == 'zero' else 'size'}") for name in ("sp", "dp", "zero")
            }
        try:
            return Layout(int(known["sp"]), int(known["dp"]), int(known["zero"]))
        except (TypeError, ValueError, KeyError, OverflowError):
            return None

    @cached_property
    def model(self) -> str:
        """A name of the configuration or of a hub; of a local folder its last part."""
        name = str(self.results.get("model", {}).get("name") or self.setting("model.name") or "?")
        return Path(name).name if name.startswith(("/", "./", "../", "~")) else name

    @cached_property
    def name(self) -> str:
        """The folder's name, as it can be shown."""
        return line(self.folder.name, shape.NAME).lstrip("_") or "?"  # matplotlib hides what begins with _

    @property
    def place(self) -> str:
        """What the folder's name says beyond model and layout, e.g. when the job began."""
        suffix = f"-{self.model}-{self.layout.name}" if self.layout else ""
        return line(self.name.removesuffix(suffix), 32)

    @cached_property
    def seq_len(self) -> int | None:
        """Tokens of a sequence over all of its ranks: as configured, or the longest that a search has found."""
        asked = self.setting("train.seq_len")
        sound = isinstance(asked, int) and not isinstance(asked, bool) and 0 < asked < 2**53
        return self.figure("train.max_seq_len") or (asked if sound else None)

    @cached_property
    def losses(self) -> dict[int, float]:
        """Training loss by optimizer step, NaN where it is not finite; in an unfinished run as far as it came."""
        first = self.figure("train.first_step") or 0
        return self.logged | {first + i: loss for i, loss in enumerate(self.figure("train.loss") or [], 1)}

    @cached_property
    def diverged(self) -> list[int]:
        """The steps at which the training loss is not finite."""
        return [step for step, loss in self.losses.items() if math.isnan(loss)]

    @cached_property
    def last_loss(self) -> float | None:
        """Training loss of the last step; None without one, and where it is not finite."""
        last = next(reversed(self.losses.values()), None)
        return None if last is None or math.isnan(last) else last

    def setting(self, key: str) -> Any:
        """A value of the configuration by its dotted key, None where it has none."""
        node: Any = self.config
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    def figure(self, path: str) -> Any:
        """A value of results.json below `stages` by its dotted path, None where the stage did not run or has none."""
        node: Any = self.results["stages"]
        for name in path.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    @cached_property
    def traits(self) -> dict[str, str]:
        """What can tell a run from another, each as it is written beside a line of a picture."""
        layout = self.layout
        return {
            "model": self.model,
            "sp": f"sp {layout.sp}" if layout else "?",
            "dp": f"dp {layout.dp}" if layout else "?",
            "zero": f"ZeRO {layout.zero}" if layout else "?",
            "seq_len": f"{self.seq_len:,} tokens" if self.seq_len else "?",
            **{key: f"{short_key(key)} {value}" for key, value in _leaves(self.config)},
        }

    @cached_property
    def experiment(self) -> str:
        """Equal for runs that must have the same loss curve: settings without the layout and what follows."""
        kept = {key: value for key, value in self.config.items() if key not in _NOT_PART_OF_THE_LOSS}
        kept["first"] = min(self.losses, default=None)
        kept["seq_len"] = self.seq_len
        if not self.config and self.damaged:  # settings that nobody knows are not those of another run
            kept["folder"] = str(self.folder)
        return json.dumps(kept, sort_keys=True, default=str)


def find(paths: Iterable[Path]) -> list[Run]:
    """All runs at or below `paths`, ordered by model, sequence length and layout, then as they were started.

    A job that has not finished, or was killed, is read as far as it came: complete lines of metrics.jsonl. What is
    damaged in a run is left out of it and noted.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(path)
        for place, inside, files in os.walk(path):
            if "results.json" in files or "metrics.jsonl" in files:
                folders[Path(place).resolve()] = None
            inside[:] = sorted(set(inside) - _INSIDE_A_RUN)
    runs = [_read(folder) for folder in folders]
    return sorted(
        runs,
        key=lambda r: (
            r.model, r.seq_len or 0, r.layout or Layout(), r.results.get("started") or math.inf, str(r.folder)
        ),
    )  # fmt: skip


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The settings that can be traits, by dotted key."""
    for name, value in node.items():
        key = prefix + str(name)
        if key in _NOT_A_TRAIT:
            continue
        if isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, setting_text(value)


def setting_text(value: Any) -> str:
    """A setting as it is shown; of a drawn number, e.g. a search's learning rate, four digits."""
    text = str(value)
    return f"{value:.4g}" if isinstance(value, float) and len(text) > 9 else ends(text, _SHOWN)


@lru_cache(maxsize=4096)
def short_key(key: str) -> str:
    """`memory.name` is called memory, `train.steps` steps."""
    return key.removesuffix(".name").rsplit(".", 1)[-1]


def _read(folder: Path) -> Run:
    found = shape.Findings()
    damaged: list[str] = []
    results: dict[str, Any] = {"stages": {}}
    try:
        content = read_json(folder / "results.json", _RESULTS)
        if content is not None or (folder / "results.json").exists():
            results = settled(results_of(content, found), folder)
    except Unreadable as error:
        damaged.append(f"results.json {error}")
    damaged += [f"results.json: {text.strip()}" for text in found.damaged[:_NOTES]]
    if len(found.damaged) > _NOTES:
        damaged.append(f"results.json: {len(found.damaged) - _NOTES} more values of a wrong type")
    config: Any = {}
    try:
        config = read_yaml(folder / ".hydra" / "config.yaml", _CONFIG)
        if config is not None and not isinstance(config, dict):
            damaged.append(".hydra/config.yaml holds no settings")
    except Unreadable as error:
        damaged.append(f".hydra/config.yaml {error}")
    config = _shown(config) if isinstance(config, dict) else {}
    logged = _logged(folder / "metrics.jsonl", damaged)
    return Run(folder, results, logged, config, _command(folder), tuple(damaged), tuple(found.not_finite))


def _logged(path: Path, damaged: list[str]) -> dict[int, float]:
    """Training loss by step. A last line without an end was being written; any other that is no JSON is damaged."""
    try:
        content = read(path, _METRICS)
    except Unreadable as error:
        damaged.append(f"metrics.jsonl {error}")
        return {}
    losses: dict[int, float] = {}
    bad: list[int] = []
    for number, text in enumerate((content or b"").split(b"\n")[:-1], 1):
        try:
            metrics = json.loads(text)
            if "train/loss" in metrics:
                step = int(metrics["step"])
                if not 0 <= step < 2**53:
                    raise ValueError(step)
                losses[step] = shape.loss_of(metrics["train/loss"])
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            bad.append(number)
    if bad:
        damaged.append(f"metrics.jsonl: line {bad[0]} is damaged" + f" (and {len(bad) - 1} more)" * (len(bad) > 1))
    return losses


def _shown(value: Any) -> Any:
    """Settings as plain texts, numbers and dictionaries of them."""
    if isinstance(value, dict):
        return {line(key, _SHOWN): _shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return line(f"[{', '.join(str(_shown(item)) for item in value)}]", _SETTING)
    return line(value, _SETTING) if isinstance(value, str) else value


def _command(folder: Path) -> str | None:
    """The command that starts the same job again, from the overrides that Hydra has noted."""
    try:
        overrides = read_yaml(folder / ".hydra" / "overrides.yaml", _CONFIG)
    except Unreadable:
        return None
    if not isinstance(overrides, list) or not overrides or not all(isinstance(text, str) for text in overrides):
        return None
    return f"python run.py {shlex.join(line(text, 2000) for text in overrides)}"
