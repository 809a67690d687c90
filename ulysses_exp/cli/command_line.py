"""The words of the command line: Hydra's flags and overrides, in any order."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ulysses_exp.config import ConfigError, known_keys, nearest


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Hydra's arguments, its `overrides` wherever they stood. Raises ConfigError for a flag that it does not have."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    arguments, strange = parser.parse_known_intermixed_args(list(words))
    for word in strange:
        key = word.lstrip("-").partition("=")[0]
        raise ConfigError(word[:60], "is no flag, and overrides have no dashes", nearest(key, sorted(known_keys())))
    arguments.overrides = list(arguments.overrides or [])
    return arguments


def in_order(words: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    """The same words with the flags first, as Hydra wants them."""
    left = list(arguments.overrides)
    flags = []
    for word in words:
        if word in left:
            left.remove(word)
        else:
            flags.append(word)
    return [*flags, *arguments.overrides]


def _refuse(message: str) -> NoReturn:
    raise ConfigError("command line", message.splitlines()[0], "python run.py --help says what there is")
