"""Which W&B server a run goes to: its user's, never one that the current folder names.

The client also reads `./wandb/settings`. In a folder from somebody else that file would have the user's key sent to
whatever address it gives.
"""

from __future__ import annotations

import configparser
import os
from pathlib import Path

_HARMLESS = {"project", "entity", "mode", "disabled"}


def server() -> str:
    """WANDB_BASE_URL, else what `wandb login --host` has left in the user's own settings, else the public one."""
    own = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings"
    return os.environ.get("WANDB_BASE_URL") or _settings(own).get("base_url") or "https://api.wandb.ai"


def foreign_settings(base_url: str) -> str | None:
    """Why the settings in the current folder are not to be followed to `base_url`; None where they change nothing."""
    for place in (Path("wandb/settings"), Path(".wandb/settings")):
        for name, value in _settings(place).items():
            if name not in _HARMLESS and not (name == "base_url" and value.rstrip("/") == base_url.rstrip("/")):
                return (
                    f"{place} in this folder sets {name}, which only you may: set it for yourself, or remove it there"
                )
    return None


def _settings(path: Path) -> dict[str, str]:
    parsed = configparser.ConfigParser(interpolation=None)
    try:
        if path.is_file():
            parsed.read(path)
    except (configparser.Error, OSError, ValueError):
        return {}
    return {name: value for section in parsed.sections() for name, value in parsed.items(section)}
