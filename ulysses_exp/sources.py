"""What `checkpoint.source` means: which run folders it names, and the configuration that their checkpoints go with."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ulysses_exp.config import Config, ConfigError

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
            found += sorted(p.parent for p in path.glob("**/.hydra") if (p.parent / "checkpoints" / "latest").exists())
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
    """`cfg` with the sections of the source's configuration, then with the user's own `overrides` of them again.

    Raises:
        ConfigError: another optimizer is asked for than the one whose states the checkpoint holds.
    """
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
    if "optim" in chosen and "optim" in trained and trained.optim.name != cfg.optim.name:
        raise ConfigError(
            "optim",
            f"the checkpoint holds the states of {trained.optim.name}, not of {cfg.optim.name}",
            "leave optim out, and set optim.lr and the like",
        )
    plain |= {s: _plain(trained[s]) for s in INHERITED if s in trained and s not in chosen}
    inherited = OmegaConf.merge(OmegaConf.structured(Config), plain)
    for override in asked:
        if override.key_or_group.split(".")[0] in INHERITED and "." in override.key_or_group:
            OmegaConf.update(inherited, override.key_or_group, override.value())
    return inherited  # type: ignore[return-value]


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
