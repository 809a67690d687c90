"""The keys of the schema: which there are, which of them open a door, and a composed configuration as an object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from ulysses_exp.config.errors import ConfigError, nearest
from ulysses_exp.config.schema import Config
from ulysses_exp.config.sections import configuration


def _fields(node: type) -> dict[str, Any]:
    hints = get_type_hints(node)
    return {f.name: hints[f.name] for f in fields(node)}


def known_keys(node: type | None = None, prefix: str = "") -> Iterator[str]:
    """Every key of the schema in dotted form, groups included."""
    for name, kind in _fields(node or configuration()).items():
        yield prefix + name
        if isinstance(kind, type) and is_dataclass(kind):
            yield from known_keys(kind, f"{prefix}{name}.")


def doors(node: type | None = None, prefix: str = "") -> dict[str, Callable[[Any], bool]]:
    """Every key that can let code in or data out, with what tells whether a value does."""
    found: dict[str, Callable[[Any], bool]] = {}
    node = node or configuration()
    for f in fields(node):
        kind = get_type_hints(node)[f.name]
        if isinstance(kind, type) and is_dataclass(kind):
            found |= doors(kind, f"{prefix}{f.name}.")
        elif "opens" in f.metadata:
            found[prefix + f.name] = f.metadata["opens"]
    return found


def _unknown(cfg: DictConfig) -> None:
    """Raises ConfigError for keys added with `+` that no code reads."""

    def walk(node: Mapping[str, Any], kind: type, prefix: str) -> None:
        expected = _fields(kind)
        for name, value in node.items():
            if name not in expected:
                raise ConfigError(prefix + name, "unknown key", nearest(prefix + name, sorted(known_keys())))
            if is_dataclass(expected[name]) and isinstance(value, Mapping):
                walk(value, expected[name], f"{prefix}{name}.")

    walk(OmegaConf.to_container(cfg, resolve=False), configuration(), "")  # type: ignore[arg-type]


def typed(cfg: DictConfig) -> Config:
    """The configuration as an object. Raises ConfigError for unknown keys and for keys without a value."""
    _unknown(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(missing[0], "has no value", f"set {missing[0]}=...")
    return OmegaConf.to_object(cfg)  # type: ignore[return-value]
