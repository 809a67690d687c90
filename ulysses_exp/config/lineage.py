"""What a checkpoint was trained with, and what a job that goes on from it does otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.schema import Config

#: Of the sections that decide the numbers, what decides none.
_NO_NUMBERS = ("model.trust_remote_code", "train.unmeasured_steps", "train.log_every", "train.profile")

#: Of the settings, those that a corpus follows from: synthetic tokens from seed and length, others from the tokenizer.
_DECIDE_THE_DATA = ("data.", "seed", "train.seq_len", "model.")


def trained_with(config: Config) -> dict[str, Any]:
    """The settings that decide the losses of a run, whatever its layout, by dotted key; JSON."""
    found: dict[str, Any] = {"seed": config.seed}
    for section in ("model", "data", "train", "optim"):
        found |= {f"{section}.{name}": value for name, value in asdict(getattr(config, section)).items()}
    return {key: value for key, value in found.items() if key not in _NO_NUMBERS}


def changed(state: Mapping[str, Any], config: Config) -> dict[str, list[Any]] | None:
    """Key -> [value in the checkpoint, value now] where they differ; None where the checkpoint does not say.

    Args:
        state: of the checkpoint's manifest.
    """
    then = state.get("trained_with")
    if not isinstance(then, dict):
        return None
    now = trained_with(config)
    return {key: [then[key], now[key]] for key in now if key in then and then[key] != now[key]}


def check_data(state: Mapping[str, Any], config: Config, sha256: str, chosen: bool) -> None:
    """Raises ConfigError where training would go on with other data and nobody has asked for it.

    Args:
        sha256: of the corpus that this job reads.
        chosen: the user has given a key of `data` on the command line.
    """
    then = state.get("data_sha256")
    asked = chosen or any(key.startswith(_DECIDE_THE_DATA) for key in changed(state, config) or ())
    if not isinstance(then, str) or then == sha256 or asked:
        return
    raise ConfigError(
        "checkpoint.source",
        f"it was trained on other data: sha256 {then}, that of data={config.data.name} is {sha256} now",
        f"bring the data back, or give data={config.data.name} on the command line to train on with what there is",
    )


def overridden(folder: Path, section: str) -> bool:
    """Whether the command line of the job in `folder` sets `section` or a key of it."""
    path = folder / ".hydra" / "overrides.yaml"
    if not path.exists():
        return False
    keys = [str(line).partition("=")[0].lstrip("+~") for line in OmegaConf.to_container(OmegaConf.load(path)) or ()]
    return any(key.split(".")[0].split("@")[0] == section for key in keys)
