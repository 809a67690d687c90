"""manifest.json: what a checkpoint consists of, and how its files are found to be what was written.

Nothing in a checkpoint is code or pickle. Each byte is covered: this file by its own SHA-256, a shard's header by one
too, the data of a tensor by the digest that was computed from the live engine. Checksums tell damage, not malice: who
can write a checkpoint can write its checksums, so sizes, names and numbers are looked at before they are used.

Imports no torch: the parent reads a manifest before it starts a rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from ulysses_exp.config.received.reading import Refused, read_json, regular
from ulysses_exp.layout import Layout

NAME = "manifest.json"
PORTABLE = "portable"
_FORMAT, _VERSION = "ulysses-exp checkpoint", 2
_READABLE = (1, 2)  # 1 has no `function`
_SHARD_NAME = re.compile(r"[A-Za-z0-9_]+-\d{5}-of-\d{5}\.safetensors")
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MOST = 10**15  # steps or samples; anything above is no count

#: Bytes of an element by safetensors' name of its type.
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class CheckpointError(Exception):
    """One clear line: which file, what is wrong with it."""

    def __init__(self, where: Path | str, problem: str):
        super().__init__(f"{where}: {problem}")
        self.where, self.problem = str(where), problem


@dataclass
class Manifest:
    """What is known of a checkpoint without opening another file."""

    layout: str
    step: int
    optimizer: str  # class name
    weights: dict[str, str]  # parameter -> digest of its full fp32 weights
    states: dict[str, dict[str, str]]  # optimizer state -> parameter -> digest
    numbers: dict[str, dict[str, float]]  # parameter -> optimizer state that is one number
    module: dict[str, str]  # parameter -> digest of the weights in the type of the forward pass, as exported
    files: dict[str, dict[str, Any]]  # shard in portable/ -> bytes, sha256 of its header
    engine: dict[str, Any] = field(default_factory=dict)  # counters, learning rates, scheduler
    state: dict[str, Any] = field(default_factory=dict)  # the caller's
    function: dict[str, Any] = field(default_factory=dict)  # huggingface/config.json, logits_sha256 of function.FILE
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes `folder`/manifest.json. Raises CheckpointError where it would hold a number that is not finite."""
        content = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        content["sha256"] = _checksum(content)
        try:
            text = json.dumps(content, indent=1, allow_nan=False)
        except ValueError:
            problem = "would hold a number that is not finite, and could not be read again; look at optim"
            raise CheckpointError(folder / NAME, problem) from None
        (folder / NAME).write_text(text)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises CheckpointError where the file is missing, damaged, or not of this format."""
        path = folder / NAME
        if not path.exists() and not path.is_symlink():
            raise CheckpointError(path, "missing; this is no checkpoint, or an unfinished one")
        content = _json(path)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise CheckpointError(path, "is not the manifest of a checkpoint of ulysses-exp")
        if content.get("version") not in _READABLE:
            raise CheckpointError(path, f"has format version {content.get('version')!r}, this is version {_VERSION}")
        checksum = content.pop("sha256", None)
        if checksum != _checksum(content):
            raise CheckpointError(path, "damaged: its checksum does not match its content")
        del content["format"], content["version"]
        try:
            manifest = cls(**content)
            Layout.parse(manifest.layout)
            manifest._check()
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(path, f"has wrong entries ({str(error)[:200]})") from None
        for name in manifest.files:
            if not _SHARD_NAME.fullmatch(name):
                raise CheckpointError(path, f"names a file that no checkpoint holds: {name!r}")
        return manifest

    def _check(self) -> None:
        """Raises TypeError where an entry that `load` relies on is of another type than declared."""

        def table(name: str, value: object, entry: type | tuple[type, ...]) -> None:
            if not isinstance(value, dict) or not all(isinstance(v, entry) for v in value.values()):
                raise TypeError(name)

        if not _counts(self.step):
            raise TypeError("step is not a number of steps")
        table("weights", self.weights, str)
        table("module", self.module, str)
        for name, of, entry in (("states", self.states, str), ("numbers", self.numbers, (int, float))):
            table(name, of, dict)
            for value in of.values():
                table(name, value, entry)
        for numbers in self.numbers.values():
            if not all(math.isfinite(number) for number in numbers.values()):
                raise TypeError("numbers are not all finite")
        table("files", self.files, dict)
        for value in self.files.values():
            if not _counts(value.get("bytes")) or not isinstance(value.get("header_sha256"), str):
                raise TypeError("files")
        if not isinstance(self.engine, dict) or not isinstance(self.state, dict):
            raise TypeError("engine and state are not tables")
        for name in ("global_steps", "global_samples", "skipped_steps"):
            count = self.engine.get(name)  # DeepSpeed counts samples in floats under sequence parallelism
            if not _is_number(count) or not 0 <= count < _MOST:
                raise TypeError(f"engine.{name} is not a count")
        groups = self.engine.get("groups")
        if not isinstance(groups, list) or not all(isinstance(g, dict) and _is_number(g.get("lr")) for g in groups):
            raise TypeError("engine.groups hold no learning rates")
        if not isinstance(self.engine.get("scheduler"), dict | None):
            raise TypeError("engine.scheduler")
        generators = self.engine.get("generators")
        if not isinstance(generators, list):
            raise TypeError("engine.generators")
        for generator in generators:
            table("engine.generators", generator, str)


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Stored:
    """A tensor in a shard."""

    path: Path
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]
    position: int  # byte in the file
    nbytes: int


def stored_tensors(folder: Path, manifest: Manifest) -> dict[tuple[str, str], Stored]:
    """(kind, name) -> where the tensor lies. Checks sizes and headers of all shards; reads no data.

    Raises:
        CheckpointError: a file is missing, is not a regular one, or differs from what was written.
    """
    found: dict[tuple[str, str], Stored] = {}
    for file, about in manifest.files.items():
        path = folder / PORTABLE / file
        kind = file.split("-")[0]
        for name, stored in _read_header(path, about).items():
            found[kind, name] = stored
    expected = {("weights", name) for name in manifest.weights}
    expected |= {(kind, name) for kind, names in manifest.states.items() for name in names}
    if found.keys() != expected:
        kind, name = min(found.keys() ^ expected)
        raise CheckpointError(
            folder / NAME, f"{kind} of {name} {'has no digest' if (kind, name) in found else 'is in no file'}"
        )
    return found


def _read_header(path: Path, about: dict[str, Any]) -> dict[str, Stored]:
    try:
        size = _regular(path).stat().st_size
        if size != about["bytes"]:
            raise CheckpointError(path, f"damaged: {size} bytes instead of {about['bytes']}")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, _LARGEST_HEADER):
                raise CheckpointError(path, f"damaged: its header claims {length} bytes")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(path, f"unreadable ({error.strerror})") from None
    if hashlib.sha256(length.to_bytes(8, "little") + text).hexdigest() != about["header_sha256"]:
        raise CheckpointError(path, "damaged or foreign: its header is not the one that was written")
    try:
        return dict(_tensors(path, json.loads(text), 8 + length, size))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(path, f"has a header that no tensor file has ({type(error).__name__})") from None


def _tensors(path: Path, header: dict[str, Any], first: int, size: int) -> Iterator[tuple[str, Stored]]:
    """Raises one of several errors where an entry does not describe bytes of the file."""
    for name, entry in header.items():
        if name != "__metadata__":
            (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
            if not all(map(_counts, (begin, end, *shape))) or not begin <= end <= size - first:
                raise ValueError("offsets")
            if math.prod(shape) * _ITEM_BYTES[entry["dtype"]] != end - begin:
                raise ValueError("shape")
            yield name, Stored(path, entry["dtype"], shape, first + begin, end - begin)


def _json(path: Path) -> Any:
    try:
        _regular(path)
        return read_json(path, path.parent)
    except Refused as error:
        raise CheckpointError(path, str(error).removeprefix(f"{path}: ")) from None


def _regular(path: Path) -> Path:
    """`path`, a regular file of its checkpoint: neither it nor a folder on the way is a link."""
    folder = path.parent.parent if path.parent.name == PORTABLE else path.parent
    try:
        if regular(path, folder) != folder.resolve() / path.relative_to(folder):
            raise Refused(path, "is not a regular file")
    except Refused as error:
        problem = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(path, "missing" if problem == "is missing" else problem) from None
    return path


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
