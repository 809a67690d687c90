"""Secrets of the environment stay there: in no configuration, no log, no result.

A secret is the value of an environment variable whose name says so, such as HF_TOKEN or MY_PASSWORD.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ulysses_exp.config.errors import ConfigError

_SHORTEST = 6  # characters; a shorter value would be found by chance

_OF_THE_ENVIRONMENT = re.compile(r"secret|passw|credential|api_?key|((^|_)key|token)s?($|_)", re.IGNORECASE)
_OF_THE_CONFIGURATION = re.compile(r"token$|secret|password|api_?key|credential", re.IGNORECASE)
_ASKS = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}\s]+)")

MASK = "***"


def environment_secrets() -> dict[str, str]:
    """Value -> name of the variable that holds it. Values that name files are no secrets, what is in them may be."""
    return {
        value: name
        for name, value in os.environ.items()
        if _OF_THE_ENVIRONMENT.search(name) and len(value) >= _SHORTEST and not os.path.exists(value)
    }


def redacted(text: str) -> str:
    """`text` with a mask in the place of each secret, as it is or as JSON writes it."""
    return _masked(text, environment_secrets())


def redacted_results(node: Any) -> Any:
    """The same for every text in a tree of results."""
    known = environment_secrets()

    def walk(node: Any) -> Any:
        if isinstance(node, str):
            return _masked(node, known)
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        return [walk(item) for item in node] if isinstance(node, list) else node

    return walk(node) if known else node


def _masked(text: str, known: Iterable[str]) -> str:
    for value in sorted(known, key=len, reverse=True):
        for form in {value, json.dumps(value)[1:-1], repr(value)[1:-1]}:
            text = text.replace(form, MASK)
    return text


class Redacting(logging.Formatter):
    """Log lines, traces included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def without_secrets(node: Any) -> Any:
    """A configuration as plain tables, what is secret by the name of its key masked."""
    if isinstance(node, Mapping):
        hidden = {k for k, v in node.items() if _OF_THE_CONFIGURATION.search(str(k)) and v}
        return {k: MASK if k in hidden else without_secrets(v) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [without_secrets(item) for item in node]
    return node


def check_overrides(overrides: Iterable[str]) -> None:
    """Raises ConfigError where an override holds a secret, or asks for one: Hydra writes overrides into the folder."""
    known = environment_secrets()
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        for name in _ASKS.findall(override):
            if _OF_THE_ENVIRONMENT.search(name):
                raise _refusal(redacted(key), name)
        for value, name in known.items():
            if value in override:
                raise _refusal(redacted(key), name)


def check_configuration(plain: Mapping[str, Any]) -> None:
    """Raises ConfigError where a value holds a secret: the configuration is written into the folder, and to W&B."""
    known = environment_secrets()
    if not known:
        return
    for key, text in _texts(plain):
        for value, name in known.items():
            if value in text:
                raise _refusal(key, name)


def _refusal(key: str, name: str) -> ConfigError:
    problem = f"holds the environment variable {name}, and would be written into the run folder"
    return ConfigError(key, problem, "leave it out: the libraries that need it read the environment")


def _texts(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _texts(value, f"{prefix}.{key}".lstrip("."))
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from _texts(item, prefix)
    elif isinstance(node, str):
        yield prefix, node
