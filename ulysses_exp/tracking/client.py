"""Where the W&B client keeps its own files."""

from __future__ import annotations

from pathlib import Path


def client_places(folder: Path) -> dict[str, str]:
    """Environment that keeps the client's own files, which it would put under ~ and ., inside the run folder.

    Tables wait in the data directory for the upload, so it has to stay with an offline run.
    """
    place = folder / "wandb" / "client"
    return {
        "WANDB_CACHE_DIR": str(place / "cache"),
        "WANDB_CONFIG_DIR": str(place / "config"),
        "WANDB_DATA_DIR": str(place / "data"),
        "WANDB_ARTIFACT_DIR": str(place / "artifacts"),
        "WANDB_ERROR_REPORTING": "false",  # the client would report its own errors to its makers
    }
