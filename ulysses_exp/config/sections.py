"""The schema with the sections that installed stages bring."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore

from ulysses_exp.config.schema import Config
from ulysses_exp.config.stages import installed


@cache
def configuration() -> type[Config]:
    """`Config`, or a class of it that has the sections of other packages' stages as well."""
    own = {stage.name: stage.settings for stage in installed() if stage.settings is not None}
    if not own:
        return Config
    sections: list[Any] = [(name, kind, field(default_factory=kind)) for name, kind in own.items()]
    return make_dataclass("Extended", sections, bases=(Config,), namespace={"__module__": __name__})


def __getattr__(name: str) -> Any:
    if name == "Extended":  # where pickle looks for the class of a configuration
        return configuration()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Tells Hydra the schema, as `schema` in the defaults list of conf/config.yaml."""
    ConfigStore.instance().store(name="schema", node=configuration())
