"""The files of a run as the report reads and writes them: nothing that hangs, nothing without an end, nothing half."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

MIB = 2**20
_LEVELS, _NODES = 12, 5000  # no configuration of ours is as deep, or has as many values
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?\d{1,20}")
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class Unreadable(Exception):
    """A file is there and cannot be used; `str()` says why in a few words."""


def read(path: Path, largest: int) -> bytes | None:
    """The content of a regular file, None where there is nothing of this name.

    Args:
        path: may be a symlink; opening never waits, whatever it leads to.
        largest: bytes; a larger file is not read.

    Raises:
        Unreadable: it is no file, too large, or cannot be opened.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if path.is_symlink():
            raise Unreadable("leads nowhere") from None
        return None
    except OSError as error:
        raise Unreadable(f"cannot be opened ({error.strerror})") from None
    try:
        kind = os.fstat(handle)
        if not stat.S_ISREG(kind.st_mode):
            raise Unreadable("is a folder" if stat.S_ISDIR(kind.st_mode) else "is no file")
        if kind.st_size > largest:
            raise Unreadable(f"is larger than {largest // MIB} MiB")
        with open(handle, "rb", closefd=False) as file:
            return file.read(largest)
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from None
    finally:
        os.close(handle)


def read_json(path: Path, largest: int) -> Any:
    """The value in a JSON file, None where there is no file. Raises Unreadable."""
    content = read(path, largest)
    if content is None:
        return None
    try:
        return json.loads(content)
    except UnicodeDecodeError:
        raise Unreadable("is not UTF-8") from None
    except RecursionError:
        raise Unreadable("is nested too deeply") from None
    except ValueError:
        raise Unreadable("is empty" if not content.strip() else "is no JSON, or only a part of it") from None


def read_yaml(path: Path, largest: int) -> Any:
    """The value in a YAML file as OmegaConf writes it, interpolations as they stand; None where there is no file.

    Built from libyaml's events, which takes neither a stack nor aliases: nothing in a file makes it large or deep.

    Raises:
        Unreadable: no YAML, too deep, too many values, aliases or tags.
    """
    content = read(path, largest)
    if content is None:
        return None
    try:
        return _built(content.decode())
    except UnicodeDecodeError:
        raise Unreadable("is not UTF-8") from None
    except yaml.YAMLError:
        raise Unreadable("is no YAML, or only a part of it") from None


def _built(text: str) -> Any:
    root: list[Any] = []
    open_nodes: list[tuple[Any, list[Any]]] = [(root, [])]  # a container, and for a dictionary the key that waits
    count = 0
    for event in yaml.parse(text, Loader=_LOADER):
        kind = type(event)
        if kind is yaml.ScalarEvent:
            value = _scalar(event.value) if event.implicit[0] else event.value
        elif kind is yaml.MappingStartEvent:
            value = {}
        elif kind is yaml.SequenceStartEvent:
            value = []
        elif kind is yaml.AliasEvent:
            raise Unreadable("has aliases, which no configuration has")
        else:
            if kind in (yaml.MappingEndEvent, yaml.SequenceEndEvent):
                open_nodes.pop()
            continue
        count += 1
        if count > _NODES or len(open_nodes) > _LEVELS:
            raise Unreadable("has more values, or deeper ones, than any configuration")
        container, key = open_nodes[-1]
        if isinstance(container, list):
            container.append(value)
        elif key:
            container[key.pop()] = value
        elif isinstance(value, (dict, list)):
            raise Unreadable("has a key that is no text")
        else:
            key.append("null" if value is None else str(value))
        if isinstance(value, (dict, list)):
            open_nodes.append((value, []))
    return root[0] if root else None


def _scalar(text: str) -> Any:
    if text in _PLAIN:
        return _PLAIN[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def write(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all; what stood there is replaced, never opened. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
