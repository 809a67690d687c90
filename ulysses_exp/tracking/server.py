"""Which W&B server a run goes to, its user's, never one that the current folder names, and whether it answers.

The client also reads `./wandb/settings`. In a folder from somebody else that file would have the user's key sent to
whatever address it gives.
"""

from __future__ import annotations

import base64
import configparser
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

PROBE_S = 3  # a server that does not answer a small request in this time is not waited for

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


def api_key(base_url: str) -> str | None:
    """The key for the W&B server at `base_url`, of the environment or else of `wandb login`."""
    from wandb.sdk.lib.wbauth import wbnetrc

    return os.environ.get("WANDB_API_KEY") or wbnetrc.read_netrc_auth(host=base_url) or None


def unreachable(base_url: str, timeout: float) -> str | None:
    """Why the W&B server at `base_url` cannot be used; None if it answers within `timeout` s and knows the key."""
    key = api_key(base_url)
    if not key and not os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "no API key: run `wandb login` or set WANDB_API_KEY"
    request = urllib.request.Request(
        base_url.rstrip("/") + "/graphql",
        data=json.dumps({"query": "query Viewer { viewer { id } }"}).encode(),
        headers={"Content-Type": "application/json", "User-Agent": "ulysses-exp"},
    )
    if key:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"api:{key}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            answer.read(1)
    except urllib.error.HTTPError as error:
        return f"{base_url} answers {error.code} {error.reason}"
    except (OSError, ValueError) as error:
        return f"{base_url}: {one_line(error)}"
    return None


def one_line(error: BaseException) -> str:
    """What `error` says, short enough for a warning."""
    return (" ".join(str(error).split()) or type(error).__name__)[:120]
