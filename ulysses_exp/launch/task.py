"""What the parent asks of a group of ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ulysses_exp.config import Config
from ulysses_exp.config.sections import configuration
from ulysses_exp.layout import Layout


@dataclass(frozen=True)
class Task:
    """`work` names what stages can do (`config.stages.Work`), done in this order in one session at `config.layout`.

    Rank 0 leaves the result of each at `results / <work>.json`.
    """

    name: str
    config: Config
    work: tuple[str, ...]
    folder: Path  # the run folder
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return self.config.layout

    @property
    def results(self) -> Path:
        """Where the ranks of this task leave results, logs and errors."""
        return self.folder / "ranks" / self.name

    def to_json(self) -> str:
        """All of it, for ranks that another launcher has started. Raises TypeError for options that JSON has not."""
        return json.dumps(asdict(self) | {"folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str | bytes) -> Task:
        """What `to_json` wrote: data of the declared types, nothing else. Raises ValueError where it is no task."""
        try:
            task: Task = _typed(cls, json.loads(text), "task")
        except RecursionError:
            raise ValueError("task: too deep") from None
        return task


def _typed(kind: Any, value: Any, key: str) -> Any:
    """`value`, as JSON has it, as a `kind`. Raises ValueError, which names the key."""
    if kind is Config:  # with the sections of stages that other packages bring
        kind = configuration()
    if is_dataclass(kind) and isinstance(kind, type):
        hints, names = get_type_hints(kind), {f.name for f in fields(kind)}
        if not isinstance(value, Mapping) or value.keys() != names:
            raise ValueError(f"{key}: not the settings of {kind.__name__}")
        return kind(**{name: _typed(hints[name], value[name], f"{key}.{name}") for name in names})
    if isinstance(kind, UnionType):
        for choice in get_args(kind):
            if choice is NoneType and value is None:
                return None
        (kind,) = (choice for choice in get_args(kind) if choice is not NoneType)
        return _typed(kind, value, key)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_typed(inner[0], item, key) for item in value)
    if origin is dict and isinstance(value, dict):
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return value  # as in the parent, where an override may be a whole number
    if type(value) is kind:
        return value
    raise ValueError(f"{key}: {type(value).__name__} is not its type")
