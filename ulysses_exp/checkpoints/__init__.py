"""Checkpoints that any layout writes and any other one resumes from, bit for bit."""

from ulysses_exp.checkpoints.errors import CheckpointError
from ulysses_exp.checkpoints.fingerprints import Fingerprint, fingerprint, weights_identical
from ulysses_exp.checkpoints.gathering import full_weights
from ulysses_exp.checkpoints.huggingface import export_huggingface
from ulysses_exp.checkpoints.loading import Loaded, load, source_layout
from ulysses_exp.checkpoints.saving import Saved, save

__all__ = [
    "CheckpointError", "Fingerprint", "Loaded", "Saved",
    "export_huggingface", "fingerprint", "full_weights", "load", "save", "source_layout", "weights_identical",
]  # fmt: skip
