"""What Hydra makes of conf/ and of a command line's overrides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from ulysses_exp.config.paths import CONF
from ulysses_exp.config.schema import Config
from ulysses_exp.config.sections import register


def composed(overrides: Sequence[str]) -> tuple[DictConfig, Any]:
    """The configuration of a job, and Hydra's own part of it. Raises Hydra's and OmegaConf's errors."""
    from hydra import compose, initialize_config_dir

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", list(overrides), return_hydra_config=True)
    of_hydra = cfg.hydra
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, of_hydra


def unchecked(overrides: Sequence[str]) -> Config:
    """The configuration of a job as an object, with no rule checked."""
    return OmegaConf.to_object(composed(overrides)[0])  # type: ignore[return-value]
