"""Folders of models and data sets, looked at before a library opens them.

transformers executes no code of a model's folder unless `model.trust_remote_code` says so, and reads no pickle here.
But it and datasets follow names in the folder's files, and links, wherever they lead. Those that lead out are refused.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.received.reading import Refused, inside, parse_yaml, read_json, read_text, regular
from ulysses_exp.config.schema import Config

#: Arguments of `from_pretrained` that are no part of a model: where to look, what to trust.
_OF_THE_LOADER = {
    "adapter_kwargs", "cache_dir", "code_revision", "force_download", "gguf_file", "local_files_only", "name_or_path",
    "proxies", "repo_type", "return_unused_kwargs", "revision", "subfolder", "token",
    "trust_remote_code", "use_auth_token",
}  # fmt: skip

_PLAIN_NAME = re.compile(r"[\w][\w.-]*")
_WEIGHTS = re.compile(r"[\w][\w.-]*\.safetensors(\.index\.json)?")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_ELSEWHERE = re.compile(r"^[/~]|(^|/)\.\.(/|$)|://")
_MOST_FILES = 100_000
_LARGEST_CARD = 1_000_000  # bytes of a data set's README.md


def check(config: Config) -> None:
    """Raises ConfigError where a local folder that `config` names would have something read from elsewhere."""
    model, data = config.model, config.data
    for argument in model.architecture:
        if argument in _OF_THE_LOADER or str(argument).startswith("_"):
            raise ConfigError(f"model.architecture.{argument}", "is no part of an architecture", "leave it out")
    folders: tuple[tuple[str, str | None, Callable[[Path], None]], ...] = (
        ("model.name_or_path", model.name_or_path, lambda f: check_model(f, weights=model.pretrained)),
        ("data.tokenizer", data.tokenizer, lambda f: check_model(f, weights=False)),
        ("data.dataset", data.dataset if data.name == "hub" else None, check_dataset),
    )
    for key, name, what in folders:
        if name is not None and (folder := Path(name).expanduser()).is_dir():
            try:
                what(folder)
            except Refused as error:
                raise ConfigError(
                    key, str(error), "set another folder, or mend it if you know where it is from"
                ) from None


def check_model(folder: Path, *, weights: bool) -> None:
    """Raises Refused where a model's or tokenizer's folder holds what is no data of its own.

    Args:
        weights: they will be opened too, which may not be pickled.
    """
    files = {path.name for path in _files(folder, folder / "additional_chat_templates")}
    if "adapter_config.json" in files:
        raise Refused(folder / "adapter_config.json", "an adapter, which names another model; merge it into that first")
    if "config.json" in files:
        _check_model_config(folder / "config.json", folder)
    for name in files:
        if name.endswith(".safetensors.index.json"):
            index = read_json(folder / name, folder, finite=False)
            named = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(named, dict):
                raise Refused(folder / name, "has no weight_map")
            for file in named.values():
                if not isinstance(file, str) or not _WEIGHTS.fullmatch(file):
                    raise Refused(folder / name, f"names weights that are not beside it: {str(file)[:100]!r}")
    if weights and not any(name.endswith(".safetensors") for name in files):
        for name in sorted(files):
            if name.endswith(_PICKLED):
                raise Refused(folder / name, "pickled weights, which can execute code; save them as safetensors")


def _check_model_config(path: Path, folder: Path) -> None:
    config = read_json(path, folder, finite=False)
    if not isinstance(config, dict):
        raise Refused(path, "is no model's configuration")
    for name, value in _settings(config):
        if "attn_implementation" in name and "/" in str(value):
            raise Refused(path, f"{name} names code on a hub: {str(value)[:100]!r}")
        if name == "transformers_weights" and not (isinstance(value, str) and _WEIGHTS.fullmatch(value)):
            raise Refused(path, f"{name} names no safetensors file beside it: {str(value)[:100]!r}")


def check_dataset(folder: Path) -> None:
    """Raises Refused where a data set's folder names data that is not its own."""
    for path in _tree(folder):
        if path.name == "state.json":
            state = read_json(path, folder)
            _beside(
                path, [f.get("filename") for f in state.get("_data_files", ())] if isinstance(state, dict) else [None]
            )
        elif path.name == "dataset_dict.json":
            splits = read_json(path, folder)
            _beside(path, splits.get("splits") if isinstance(splits, dict) else [None])
    for name in ("README.md", ".huggingface.yaml"):
        card = folder / name
        if card.exists():
            text = read_text(card, folder, _LARGEST_CARD)
            if name == "README.md":
                text = text.split("\n---", 1)[0].removeprefix("---") if text.startswith("---") else ""
            if "data_files" in text or "data_dir" in text:
                try:
                    about = parse_yaml(text)
                except (yaml.YAMLError, ValueError, RecursionError):
                    raise Refused(card, "has metadata that cannot be read") from None
                for _, value in _settings(about.get("configs") if isinstance(about, dict) else None):
                    if isinstance(value, str) and _ELSEWHERE.search(value):
                        raise Refused(card, f"names data that is elsewhere: {value[:100]!r}")


def _beside(path: Path, names: Any) -> None:
    for name in names if isinstance(names, list) else [None]:
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise Refused(path, f"names data that is not beside it: {str(name)[:100]!r}")


def _settings(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of every setting at any depth; of a list each item."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _settings(value, str(key))
    elif isinstance(node, list):
        for item in node:
            yield from _settings(item, name)
    else:
        yield name, node


def _files(*folders: Path) -> Iterator[Path]:
    """What lies directly in `folders` and is not hidden. Raises Refused for pipes, devices, and links that lead out."""
    home = folders[0]
    for folder in folders:
        if not folder.is_dir():
            continue
        inside(folder, home)
        for path in folder.iterdir():
            if not path.name.startswith(".") and not path.is_dir():
                regular(path, home)
                yield path
            elif path.is_symlink():
                inside(path, home)


def _tree(folder: Path) -> Iterator[Path]:
    """All files below `folder`, in the same way."""
    for number, (place, inner, files) in enumerate(os.walk(folder)):
        if number > _MOST_FILES:
            raise Refused(folder, f"has more than {_MOST_FILES:,} folders")
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in (*inner, *files):
            path = Path(place, name)
            if path.is_symlink():
                inside(path, folder)
            if name in files:
                regular(path, folder)
                yield path
