"""Run folders as the report reads them, finished or not."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ulysses_exp.layout import Layout
from ulysses_exp.run_folder import settled

#: Folders of a run that hold no further run
_INSIDE_A_RUN = {".hydra", "checkpoints", "ranks", "wandb", "profile", "compiled", "previous"}

#: Settings that may differ between two runs whose losses must be the same
_NOT_PART_OF_THE_LOSS = (
    "sp", "dp", "zero", "memory", "stages", "eval", "reload", "parity", "plan", "checkpoint", "tracker", "launch",
    "sweep", "device", "hydra", "experiment", "optimize",
)  # fmt: skip


#: Settings that the layout, the model or the length stand for already, or that say where and how a job ran
_NOT_A_TRAIT = (
    "sp.size", "dp", "zero.stage", "model", "train.seq_len", "stages", "eval", "reload", "parity", "plan", "checkpoint",
    "tracker", "launch", "sweep", "device", "hydra", "experiment", "optimize",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A job's folder: results.json, metrics.jsonl and the composed configuration, as far as they are there."""

    folder: Path
    results: dict[str, Any]
    metrics: list[dict[str, float]]
    config: dict[str, Any]

    @property
    def status(self) -> str:
        """ok, failed, running, interrupted, skipped, or unfinished where there is no results.json."""
        return str(self.results.get("status", "unfinished"))

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
        except (TypeError, ValueError, KeyError):
            return None

    @property
    def model(self) -> str:
        """A name of the configuration or of a hub; of a local folder its last part."""
        name = str(self.results.get("model", {}).get("name") or self.setting("model.name") or "?")
        return Path(name).name if name.startswith(("/", "./", "../", "~")) else name

    @property
    def place(self) -> str:
        """What the folder's name says beyond model and layout, e.g. when the job began."""
        suffix = f"-{self.model}-{self.layout.name}" if self.layout else ""
        name = self.folder.name.removesuffix(suffix)
        return name if len(name) <= 32 else f"{name[:31]}…"

    @property
    def seq_len(self) -> int | None:
        """Tokens of a sequence over all of its ranks: as configured, or the longest that a search has found."""
        return self.figure("train.max_seq_len") or self.setting("train.seq_len")

    @cached_property
    def losses(self) -> dict[int, float]:
        """Training loss by optimizer step, nan where it was not finite; in an unfinished run as far as it came."""
        logged = {
            int(line["step"]): line["train/loss"] for line in self.metrics if "train/loss" in line and "step" in line
        }
        train = self.results.get("stages", {}).get("train", {})
        first = int(train.get("first_step") or 0)
        found = logged | {first + i: loss for i, loss in enumerate(train.get("loss") or [], 1)}
        return {step: math.nan if loss is None else loss for step, loss in found.items()}

    def setting(self, key: str) -> Any:
        """A value of the configuration by its dotted key, None where it has none."""
        node: Any = self.config
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    def figure(self, path: str) -> Any:
        """A value of results.json below `stages` by its dotted path, None where the stage did not run or has none."""
        node: Any = self.results.get("stages", {})
        for name in path.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    @cached_property
    def experiment(self) -> str:
        """Equal for runs that must have the same loss curve: settings without the layout and what follows."""
        kept = {key: value for key, value in self.config.items() if key not in _NOT_PART_OF_THE_LOSS}
        kept["first"] = min(self.losses, default=None)
        kept["seq_len"] = self.seq_len
        return json.dumps(kept, sort_keys=True, default=str)


def find(paths: Iterable[Path]) -> list[Run]:
    """All runs at or below `paths`, ordered by model, sequence length and layout, then as they were started.

    A job that has not finished, or was killed, is read as far as it came: complete lines of metrics.jsonl.

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


def traits(run: Run) -> dict[str, str]:
    """What can tell a run from another, each as it is written beside a line of a picture."""
    layout = run.layout
    return {
        "model": run.model,
        "sp": f"sp {layout.sp}" if layout else "?",
        "dp": f"dp {layout.dp}" if layout else "?",
        "zero": f"ZeRO {layout.zero}" if layout else "?",
        "seq_len": f"{run.seq_len:,} tokens" if run.seq_len else "?",
        **{key: f"{_short(key)} {value}" for key, value in _leaves(run.config)},
    }


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The settings that can be traits, by dotted key."""
    for name, value in node.items():
        key = prefix + str(name)
        if key in _NOT_A_TRAIT:
            continue
        if isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, str(value)


def _short(key: str) -> str:
    """`memory.name` is called memory, `train.steps` steps."""
    return key.removesuffix(".name").rsplit(".", 1)[-1]


def differing(runs: list[Run]) -> list[str]:
    """The traits in which `runs` are not all the same."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in traits(run).items():
            values.setdefault(name, set()).add(value)
    several = [name for name, found in values.items() if len(found - {"?"}) > 1]
    return [name for name in several if not _told_by_name(name, runs)]


def _told_by_name(trait: str, runs: list[Run]) -> bool:
    """Whether the choice of the trait's group says it all: another choice changes many of the group's settings."""
    group = f"{trait.split('.')[0]}.name"
    if trait == group or "." not in trait:
        return False
    values: dict[str | None, set[str | None]] = {}
    for run in runs:
        of_run = traits(run)
        values.setdefault(of_run.get(group), set()).add(of_run.get(trait))
    return len(values) > 1 and all(len(found) == 1 for found in values.values())


def labels(runs: list[Run]) -> list[str]:
    """A short name for each run: its layout and whatever else tells it from the others."""
    names = [name for name in differing(runs) if name not in ("sp", "dp", "zero")]
    short = [
        ", ".join(
            [
                run.layout.name if run.layout else run.folder.name,
                *(traits(run)[name] for name in names if name in traits(run)),
            ]
        )
        for run in runs
    ]
    return [f"{text} ({run.place})" if short.count(text) > 1 else text for text, run in zip(short, runs, strict=True)]


def _read(folder: Path) -> Run:
    results = settled(_json(folder / "results.json"), folder)
    metrics = []
    if (folder / "metrics.jsonl").exists():
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            try:
                metrics.append(json.loads(line))
            except ValueError:  # the line that was being written
                continue
    composed = folder / ".hydra" / "config.yaml"
    config: Any = OmegaConf.to_container(OmegaConf.load(composed), resolve=False) if composed.exists() else {}
    return Run(folder, results, metrics, {str(key): value for key, value in config.items()})


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
