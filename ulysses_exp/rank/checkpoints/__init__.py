"""Checkpoints that any layout writes and any other one resumes from, bit for bit.

A checkpoint is a folder `step<N>`:

    manifest.json  layout, step, digests of all tensors as the engine held them, scheduler, random numbers
    portable/      full fp32 weights and each optimizer state by parameter name, as safetensors
    huggingface/   the weights in the type they are trained in, for `from_pretrained`

Routes. `portable` opens every layout's checkpoint in every layout (benchmarks/results/reload_matrix.md: bit-exact in
all 576 cells; DeepSpeed's `load_checkpoint`: in 106), at the same layout included, in about the time that DeepSpeed
takes for its own (benchmarks/results/checkpoint_io.md). So nothing is lost by what is left out: DeepSpeed's own files
beside it, which would double the bytes and are pickled, and its universal checkpoints, which need a conversion and,
under sequence parallelism, two patches of DeepSpeed, and still lead neither from nor to ZeRO 0. `direct` is left for
checkpoints that DeepSpeed wrote elsewhere, on trust (deepspeed_files.py).

torch.distributed.checkpoint was not taken: DeepSpeed's flat partitions are no DTensors, so it would have to be told of
each fragment as homes.py does, and it keeps its metadata in a pickle.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulysses_exp.config.received.manifest import CheckpointError
    from ulysses_exp.rank.checkpoints.fingerprints import Fingerprint, fingerprint, weights_identical
    from ulysses_exp.rank.checkpoints.gathering import full_weights
    from ulysses_exp.rank.checkpoints.huggingface import export_huggingface
    from ulysses_exp.rank.checkpoints.loaded import Loaded
    from ulysses_exp.rank.checkpoints.loading import load, source_layout
    from ulysses_exp.rank.checkpoints.saving import Saved, Saving, begin, save

#: Where each name is defined. Imported at first use: huggingface_check runs where deepspeed cannot be imported.
_HOME = {
    "CheckpointError": "errors",
    "Fingerprint": "fingerprints", "fingerprint": "fingerprints", "weights_identical": "fingerprints",
    "full_weights": "gathering",
    "export_huggingface": "huggingface",
    "Loaded": "loaded",
    "load": "loading", "source_layout": "loading",
    "Saved": "saving", "Saving": "saving", "begin": "saving", "save": "saving",
}  # fmt: skip

__all__ = [
    "CheckpointError", "Fingerprint", "Loaded", "Saved", "Saving", "begin",
    "export_huggingface", "fingerprint", "full_weights", "load", "save", "source_layout", "weights_identical",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
