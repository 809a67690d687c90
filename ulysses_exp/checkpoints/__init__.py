"""Checkpoints that any layout writes and any other one resumes from, bit for bit."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulysses_exp.checkpoints.errors import CheckpointError
    from ulysses_exp.checkpoints.fingerprints import Fingerprint, fingerprint, weights_identical
    from ulysses_exp.checkpoints.gathering import full_weights
    from ulysses_exp.checkpoints.huggingface import export_huggingface
    from ulysses_exp.checkpoints.loaded import Loaded
    from ulysses_exp.checkpoints.loading import load, source_layout
    from ulysses_exp.checkpoints.saving import Saved, save

#: Where each name is defined. Imported at first use: huggingface_check runs where deepspeed cannot be imported.
_HOME = {
    "CheckpointError": "errors",
    "Fingerprint": "fingerprints", "fingerprint": "fingerprints", "weights_identical": "fingerprints",
    "full_weights": "gathering",
    "export_huggingface": "huggingface",
    "Loaded": "loaded",
    "load": "loading", "source_layout": "loading",
    "Saved": "saving", "save": "saving",
}  # fmt: skip

__all__ = [
    "CheckpointError", "Fingerprint", "Loaded", "Saved",
    "export_huggingface", "fingerprint", "full_weights", "load", "save", "source_layout", "weights_identical",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
