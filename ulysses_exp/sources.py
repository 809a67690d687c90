"""What `checkpoint.source` means: which run folders it names, and the configuration that their checkpoints go with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ulysses_exp.config import Config
from ulysses_exp.paths import matching

#: What a checkpoint was trained as. A job that starts from it runs with the same, except for what its user overrides.
INHERITED = ("model", "sp", "dp", "zero", "data", "memory", "train", "optim", "seed")

_DEPTH, _MOST_FOLDERS = 6, 50_000  # how far below a folder runs are looked for: outputs/sweeps/<name>/<job> is 3


def run_folders(source: str) -> list[Path]:
    """The run folders that `source` names: a run folder, a checkpoint in one, a sweep folder, or a glob of these."""
    found: list[Path] = []
    for match in matching(source):
        path = Path(match)
        if (path / ".hydra").is_dir() or (path / "manifest.json").exists():
            found.append(path)
        else:
            found += _trained_below(path)
    return found


def _trained_below(folder: Path) -> list[Path]:
    """Run folders with a checkpoint below `folder`, which may be anything: it is not followed to its ends."""
    found = []
    for seen, (place, inside, _) in enumerate(os.walk(folder)):
        if ".hydra" in inside:
            if os.path.exists(os.path.join(place, "checkpoints", "latest")):
                found.append(Path(place))
            inside.clear()
        elif seen > _MOST_FOLDERS or place.count(os.sep) - str(folder).count(os.sep) >= _DEPTH:
            inside.clear()
    return sorted(found)


def newest_manifests(source: str) -> list[Path]:
    """The manifests of the newest checkpoints that `source` names."""
    manifests = []
    for folder in run_folders(source):
        latest = folder / "checkpoints" / "latest"
        newest = latest.parent / latest.read_text().strip() if latest.exists() else folder
        if (newest / "manifest.json").exists():
            manifests.append(newest / "manifest.json")
    return manifests


def inherit(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """`cfg` with the sections of the source's configuration, then with the user's own `overrides` of them again."""
    source = cfg.checkpoint.source
    if source is None or not (folders := run_folders(source)):
        return cfg
    run = folders[0].parent.parent if (folders[0] / "manifest.json").exists() else folders[0]
    saved = run / ".hydra" / "config.yaml"
    if not saved.exists():
        return cfg
    from hydra.core.override_parser.overrides_parser import OverridesParser

    asked = OverridesParser.create().parse_overrides(overrides)
    chosen = {override.key_or_group for override in asked}
    trained = OmegaConf.load(saved)
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict) and isinstance(trained, DictConfig)
    plain |= {s: _plain(trained[s]) for s in INHERITED if s in trained and s not in chosen}
    inherited = OmegaConf.merge(OmegaConf.structured(Config), plain)
    for override in asked:
        if override.key_or_group.split(".")[0] in INHERITED and "." in override.key_or_group:
            OmegaConf.update(inherited, override.key_or_group, override.value())
    return inherited  # type: ignore[return-value]


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
