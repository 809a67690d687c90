"""What `checkpoint.source` means: which run folders it names, and the configuration that their checkpoints go with."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ulysses_exp.config import Config

#: What a checkpoint was trained as. A job that starts from it runs with the same, except for what its user overrides.
INHERITED = ("model", "sp", "dp", "zero", "data", "memory", "train", "optim", "seed")


def run_folders(source: str) -> list[Path]:
    """The run folders that `source` names: a run folder, a checkpoint in one, a sweep folder, or a glob of these."""
    found: list[Path] = []
    for match in sorted(glob.glob(os.path.expanduser(source))):
        path = Path(match)
        if (path / ".hydra").is_dir() or (path / "manifest.json").exists():
            found.append(path)
        else:
            runs = (p.parent for p in path.glob("**/.hydra") if (p.parent / "checkpoints" / "latest").exists())
            found += sorted(run for run in runs if "previous" not in run.relative_to(path).parts)  # moved aside
    return found


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
