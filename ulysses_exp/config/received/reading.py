"""Files that somebody else may have made: read as data, bounded, and only inside the folder that was handed over.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

LARGEST_CONFIGURATION = 64_000  # bytes; a composed configuration has 2,000
LARGEST_JSON = 256_000_000  # bytes; a manifest has 300 a tensor
_DEEPEST = 32  # levels
_LONGEST = 4096  # characters of a text
_LARGEST = 2**63  # of a whole number
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Refused(Exception):
    """One line: which file, what is wrong with it."""

    def __init__(self, where: Path | str, problem: str):
        super().__init__(f"{_CONTROL.sub('?', str(where))}: {_CONTROL.sub('?', problem)}")


def inside(path: Path, folder: Path) -> Path:
    """`path` without links. Raises Refused where that is outside of `folder`.

    Files of a snapshot in Hugging Face's cache are links to `blobs` of the same repository, which count as inside.
    """
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a name that is too long or has a NUL
        raise Refused(path, f"cannot be followed ({_first_line(error)})") from None
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if real.is_relative_to(home) or (blobs is not None and real.parent == blobs):
        return real
    raise Refused(path, f"leads out of {folder}")


def regular(path: Path, folder: Path) -> Path:
    """`path` without links. Raises Refused where it is missing, is not a regular file, or lies outside of `folder`."""
    real = inside(path, folder)
    try:
        kind = real.lstat().st_mode
    except OSError as error:
        raise Refused(path, "is missing" if isinstance(error, FileNotFoundError) else _unreadable(error)) from None
    if not stat.S_ISREG(kind):
        raise Refused(path, "is not a regular file")
    return real


def read_text(path: Path, folder: Path, limit: int) -> str:
    """The text of a regular file inside `folder`, of at most `limit` bytes. Never waits. Raises Refused."""
    real = regular(path, folder)
    try:
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise Refused(path, _unreadable(error)) from None
    if len(data) > limit:
        raise Refused(path, f"has more than {limit:,} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Refused(path, "is not UTF-8 text") from None


def read_json(path: Path, folder: Path, *, finite: bool = True, limit: int = LARGEST_JSON) -> Any:
    """The content of a JSON file inside `folder`.

    Args:
        finite: refuse NaN and infinite numbers.

    Raises:
        Refused: it cannot be read, is no JSON, or names a key twice.
    """

    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    def finite_number(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else no_constant(text)

    strict: dict[str, Any] = {"parse_constant": no_constant, "parse_float": finite_number} if finite else {}
    try:
        return json.loads(read_text(path, folder, limit), object_pairs_hook=_no_key_twice, **strict)
    except (ValueError, RecursionError) as error:
        raise Refused(path, f"unreadable ({_first_line(error)})") from None


def read_yaml(path: Path, folder: Path) -> dict[str, Any]:
    """The tables, lists, texts and numbers of a YAML file inside `folder`: no tags, no aliases, no interpolations.

    Raises:
        Refused: it cannot be read or holds something else.
    """
    text = read_text(path, folder, LARGEST_CONFIGURATION)
    try:
        content = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or _first_line(error)
        mark = getattr(error, "problem_mark", None)
        raise Refused(path, f"unreadable ({problem}{f', line {mark.line + 1}' if mark else ''})") from None
    if not isinstance(content, dict):
        raise Refused(path, "is not a table of settings")
    try:
        check_plain(content)
    except ValueError as error:
        raise Refused(path, str(error)) from None
    return content


def parse_yaml(text: str) -> Any:
    """Tables, lists and what YAML has of texts and numbers. Raises yaml.YAMLError, ValueError, RecursionError."""
    return yaml.load(text, Loader=_Plain)


def check_plain(value: Any, key: str = "") -> None:
    """Raises ValueError, which names the key, for what a configuration of a finished run does not hold."""
    name = _CONTROL.sub("?", key)[:100]
    if isinstance(value, dict):
        for inner, of_it in value.items():
            if not isinstance(inner, (str, int)):
                raise ValueError(f"{name}: {type(inner).__name__} as the name of a setting")
            check_plain(str(inner), f"{key}.{inner}".lstrip("."))
            check_plain(of_it, f"{key}.{inner}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            check_plain(item, key)
    elif isinstance(value, str):
        if "${" in value:
            raise ValueError(f"{name}: holds an interpolation; write the value that it stands for")
        if len(value) > _LONGEST or _CONTROL.search(value):
            raise ValueError(f"{name}: is no plain text")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: {value} is not a number to work with")
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"{name}: is too large a number")
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise ValueError(f"{name}: {type(value).__name__} is no setting")


class _Plain(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """YAML without what can grow beyond the file that it comes from."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="holds an alias", problem_mark=event.start_mark)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"more than {_DEEPEST} levels", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if (twice := _twice(str(name.value) for name, _ in node.value)) is not None:
            raise yaml.MarkedYAMLError(problem=f"names {twice!r} twice", problem_mark=node.start_mark)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError(f"names {_twice(name for name, _ in pairs)!r} twice")
    return content


def _twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name[:100]
        seen.add(name)
    return None


def _unreadable(error: OSError) -> str:
    return f"unreadable ({error.strerror or error})"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
